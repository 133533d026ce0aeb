"""Requests and when they arrive: made once from a seed, the same for every system.

Prompts are token ids, so that all systems are asked the very same; lengths come from ShareGPT (or are fixed), capped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anchortp.bench.prompts import random_prompts, vocabulary_size
from anchortp.bench.sharegpt import conversations
from anchortp.errors import ConfigError

Trace = Literal["sharegpt", "synthetic"]
Arrivals = Literal["fixed", "poisson", "bursty"]

BURST_SHAPE = 0.25  # of the gamma distribution of gaps: its standard deviation is twice its mean
MIN_TOKENS = 4  # a prompt or an answer that is shorter is not taken
CHARS_PER_TOKEN = 8  # more than any tokenizer needs on average: what lies behind is not looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """`rate`: requests per second. `max_input`, `max_output`: tokens of a turn; what is longer is cut.

    `multi_turn`: whole conversations; a turn's prompt is all that was said before (the answers as the trace has them,
    so that every system is asked the same), up to `max_context` tokens, and follows the answer by `think_s`.
    """

    trace: Trace = "sharegpt"
    requests: int = 1000
    arrivals: Arrivals = "fixed"
    rate: float = 2.5
    max_input: int = 128
    max_output: int = 96
    multi_turn: bool = False
    max_context: int = 1024
    think_s: float = 2.0
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Turns of one client, one after the other; the first is sent `arrival_s` after the load begins."""

    arrival_s: float
    turns: tuple[Turn, ...]


def make(options: WorkloadOptions, model: Path) -> tuple[Session, ...]:
    """Sessions by arrival, `options.requests` turns in all. Raises ConfigError."""
    if options.rate <= 0:
        raise ConfigError(f"--rate {options.rate}: give requests per second, more than 0.")
    rng = random.Random(options.seed)
    talks = list(_synthetic(options, model) if options.trace == "synthetic" else _sharegpt(options, model, rng))
    if (found := sum(map(len, talks))) < options.requests:
        raise ConfigError(f"the trace has {found} requests of this kind; ask for no more with --requests.")
    gaps = arrival_gaps(options.arrivals, options.rate * len(talks) / options.requests, len(talks), rng)
    sessions, at_s = [], 0.0
    for turns, gap_s in zip(talks, gaps, strict=True):
        sessions.append(Session(arrival_s=at_s, turns=turns))
        at_s += gap_s
    return tuple(sessions)


def arrival_gaps(kind: Arrivals, rate: float, count: int, rng: random.Random) -> list[float]:
    """Seconds after each arrival to the next; their mean is 1 / rate."""
    if kind == "fixed":
        return [1 / rate] * count
    shape = 1.0 if kind == "poisson" else BURST_SHAPE
    return [rng.gammavariate(shape, 1 / (rate * shape)) for _ in range(count)]


def _synthetic(options: WorkloadOptions, model: Path) -> Iterator[tuple[Turn, ...]]:
    vocabulary = vocabulary_size(model)
    for prompt in random_prompts(options.requests, options.max_input, vocabulary, f"{options.seed}"):
        yield (Turn(prompt=tuple(prompt), max_tokens=options.max_output),)


def _sharegpt(options: WorkloadOptions, model: Path, rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def encode(text: str, most: int) -> list[int]:
        return tokenizer.encode(text[: CHARS_PER_TOKEN * most], add_special_tokens=False).ids[:most]

    left = options.requests
    talks = list(conversations())
    rng.shuffle(talks)
    for talk in talks:
        said = [encode(t, options.max_output if i % 2 else options.max_input) for i, t in enumerate(talk[: 2 * left])]
        turns = tuple(_turns(said, options))[:left]
        if turns:
            left -= len(turns)
            yield turns
        if left == 0:
            return


def _turns(said: Sequence[list[int]], options: WorkloadOptions) -> Iterator[Turn]:
    """A turn per question that has an answer, until the conversation is too long for the context."""
    history: list[int] = []
    for question, answer in zip(said[::2], said[1::2], strict=False):
        prompt = [*history, *question]
        too_short = min(len(question), len(answer)) < MIN_TOKENS
        if too_short or len(prompt) > max(options.max_context, options.max_input):
            return
        yield Turn(prompt=tuple(prompt), max_tokens=len(answer))
        if not options.multi_turn:
            return
        history = [*prompt, *answer]
