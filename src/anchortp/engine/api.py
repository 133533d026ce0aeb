"""The engine's front door: what the server may ask of it, as values.

Runs in the server process. No torch: the server and the tests of the server import this alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token of a request is chosen, and when the request ends.

    `top_k=0` and `min_p=0.0` switch those filters off; `temperature=0.0` is greedy. `logprobs=None` asks for
    none, `0` for the chosen token's alone, `n` for the `n` likeliest beside it. `seed=None` lets the engine
    draw one when the request is admitted. Stop strings are text and therefore the server's business.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """One sampled token; log-probabilities are natural logs of the unmodified model's distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """What one engine step produced for one request. After a `finish_reason` nothing follows.

    An output with `finish_reason="error"` carries `error` and no token.
    """

    request_id: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChange:
    """Devices that shall join the group or leave it, and the relative speeds from then on (1.0 where not named; None
    keeps those that are set). `memory_bytes`: the budget of anchors that have to be started, None for that of the
    others."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    speeds: tuple[tuple[str, float], ...] | None = None
    memory_bytes: int | None = None


Sink = Callable[[TokenOutput], None]


class Engine(Protocol):
    """Every method may be called from any thread and returns without waiting for a step."""

    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Queues a request; `sink` is called from the engine's thread, once per step that made a token.

        Raises EngineFull (too many waiting) or EngineStopped (stopping, or no layout fits any more).
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks. Unknown or finished ids are ignored; the sink stays silent."""
        ...

    def change_devices(self, change: DeviceChange) -> int:
        """Begins to change the group while it serves. Returns the id under which status()["changes"] tells how it
        goes: the last entry of that id has an `outcome` in the end, "serving" if the change was made.

        Raises ConfigError for names that are no devices or a change of nothing, EngineStopped.
        """
        ...

    def status(self) -> dict[str, Any]:
        """A JSON-able snapshot. Keys: see `docs/states.md`; always `state` and `epoch`.

        `state` is one of "starting", "serving", "recovering", "refusing", "stopped".
        """
        ...
