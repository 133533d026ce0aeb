"""`anchortp bench serving`: how fast systems are while nothing fails.

Each system is started alone, warmed up, and given the same requests `runs` times: many at a time (throughput), one
alone (latency), and prompts alone with a single token of answer (prefill). Prompts are random token ids of an exact
length, new in every run, so that no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchortp.bench import stats
from anchortp.bench.client import Attempt, Target, send
from anchortp.bench.prompts import random_prompts, vocabulary_size
from anchortp.bench.supervisor import Supervisor
from anchortp.bench.systems import System
from anchortp.errors import EngineStopped

IDLE_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Lengths in tokens. `prefill`: the length of the prompts of the prefill part."""

    requests: int = 64
    input: int = 128
    output: int = 128
    concurrency: int = 16
    alone: int = 4
    prefill: int = 512
    runs: int = 3
    seed: int = 0


def run(
    systems: list[System], model: Path, devices: tuple[str, ...], options: Options, tell: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One (name, measures) per system, as soon as it is measured. Raises EngineStopped."""
    for system in systems:
        yield system.name, asyncio.run(_measure_started(system, model, devices, options, tell))


async def _measure_started(
    system: System, model: Path, devices: tuple[str, ...], options: Options, tell: Callable[[str], None]
) -> dict[str, Any]:
    tell(f"{system.name}: starting")
    began_s = time.monotonic()
    async with Supervisor(system, model, devices) as supervisor:
        started_s = time.monotonic() - began_s
        measured = await measure(
            supervisor.target, vocabulary_size(model), options, lambda text: tell(f"{system.name}: {text}")
        )
    return {"settings": system.settings, "start_s": started_s, **measured}


async def measure(target: Target, vocabulary: int, options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    """What an already running server does. Raises EngineStopped if a request fails."""
    warm_up = random_prompts(options.concurrency, options.input, vocabulary, f"{options.seed} warm-up")
    tell("warming up")
    await _burst(target, warm_up, 16, options.concurrency)
    batched, alone, prefill = [], [], []
    for index in range(options.runs):
        tell(f"run {index + 1} of {options.runs}")
        seed = f"{options.seed} run {index}"
        prompts = random_prompts(options.requests, options.input, vocabulary, seed)
        batched.append(await _burst(target, prompts, options.output, options.concurrency))
        prompts = random_prompts(options.alone, options.input, vocabulary, f"{seed} alone")
        alone.append(await _burst(target, prompts, options.output, 1))
        prompts = random_prompts(options.concurrency, options.prefill, vocabulary, f"{seed} prefill")
        prefill.append(await _burst(target, prompts, 1, 1))
    return {
        "options": asdict(options),
        "batched": _summary(batched),
        "alone": _summary(alone),
        "prefill": _summary(prefill),
    }


async def _burst(target: Target, prompts: list[list[int]], num_tokens: int, concurrency: int) -> dict[str, Any]:
    """All prompts, `concurrency` at a time; rates are over the time that all took together."""
    slots = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int]) -> Attempt:
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        async with slots:
            attempt = Attempt(sent_s=time.monotonic())
            await send(target, body | {"return_token_ids": True}, attempt, idle_timeout_s=IDLE_TIMEOUT_S)
            return attempt

    began_s = time.monotonic()
    attempts = await asyncio.gather(*map(one, prompts))
    took_s = time.monotonic() - began_s
    for attempt in attempts:
        if not attempt.finished:
            raise EngineStopped(f"a request failed while nothing was to fail: {attempt.error}")
    first_s = [a.times_s[0] - a.sent_s for a in attempts]
    per_token_s = [(a.times_s[-1] - a.times_s[0]) / (a.num_tokens - 1) for a in attempts if a.num_tokens > 1]
    return {
        "output_tokens_per_s": sum(a.num_said for a in attempts) / took_s,
        "prompt_tokens_per_s": sum(map(len, prompts)) / took_s,
        "first_token_s": stats.distribution(first_s),
        "per_token_s": stats.distribution(per_token_s),
        "gap_s": stats.distribution([gap for a in attempts for gap in stats.gaps(a.times_s)]),
        "num_cached_tokens": sum(a.num_cached_tokens for a in attempts),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs, and the runs."""
    return {
        "output_tokens_per_s": statistics.median(run["output_tokens_per_s"] for run in runs),
        "prompt_tokens_per_s": statistics.median(run["prompt_tokens_per_s"] for run in runs),
        "first_token_s": statistics.median(run["first_token_s"]["median"] for run in runs),
        "runs": runs,
    }
