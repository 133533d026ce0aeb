"""One request on its way through the engine. Runs in the engine process; no torch, no clock.

The idea to keep: a sequence's KV cache is a pure function of `token_ids`, and every token that a client has
seen is in `token_ids`. So replay after a lost KV plane, after a preemption or after a batch that was cut off
is nothing but a smaller `num_computed_tokens`: the same tokens are computed again, and the next sampled token
is a new one. None is sent twice, none is skipped, and no part of the engine has a recovery mode.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from hashlib import blake2b

from anchortp.engine.api import EngineRequest

_SEED_MASK = (1 << 64) - 1


class SequenceState(enum.Enum):
    """`WAITING` holds no block; `RUNNING` holds blocks for every token it has; `FINISHED` is terminal."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request and how far it has come. Mutated by the scheduler alone.

    `token_ids`            the prompt and every token emitted so far
    `num_computed_tokens`  how many of them, from the start, have their KV in the cache
    `block_ids`            block table: position p is in slot p % block_size of block_ids[p // block_size]
    `block_hashes`         chained hashes of the full blocks of `token_ids`; they outlive the blocks
    `arrival`              order of arrival, a counter; the tie-breaker of every decision
    `num_once_computed`    how many of them had been computed when the sequence was last set back, or 0
    `lost_kv`              whether a lost KV plane set it back last, rather than a preemption
    `num_cached_tokens`    prompt tokens found in the prefix cache at the first admission; None before it
    """

    request: EngineRequest
    arrival: int
    num_prompt_tokens: int
    seed: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    num_once_computed: int = 0
    lost_kv: bool = False
    num_cached_tokens: int | None = None
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    state: SequenceState = SequenceState.WAITING

    @classmethod
    def from_request(cls, request: EngineRequest, *, arrival: int) -> Sequence:
        return cls(
            request=request,
            arrival=arrival,
            num_prompt_tokens=len(request.prompt_token_ids),
            seed=seed_of(request),
            token_ids=list(request.prompt_token_ids),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill and replay."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_tokens_to_replay(self) -> int:
        """Those of the pending tokens that had been computed before a KV plane was lost."""
        return max(0, self.num_once_computed - self.num_computed_tokens) if self.lost_kv else 0

    def set_back(self, num_computed_tokens: int, *, lost_kv: bool) -> None:
        """Tokens from `num_computed_tokens` on are to be computed again."""
        assert num_computed_tokens <= self.num_computed_tokens, (num_computed_tokens, self.num_computed_tokens)
        if num_computed_tokens < self.num_computed_tokens:
            self.num_once_computed = max(self.num_once_computed, self.num_computed_tokens)
            self.num_computed_tokens = num_computed_tokens
            self.lost_kv = lost_kv


def seed_of(request: EngineRequest) -> int:
    """The request's seed as an unsigned 64-bit integer.

    Without one it is drawn from the request id, not from a random generator: whoever resumes the request, in
    whatever process, draws the same. Request ids must therefore differ between requests that should differ.
    """
    if request.params.seed is not None:
        return request.params.seed & _SEED_MASK
    return int.from_bytes(blake2b(request.request_id.encode(), digest_size=8).digest(), "little")
