"""What to compute next: continuous batching with chunked prefill, in one rule.

Every step, every scheduled sequence advances by some of its pending tokens,
`token_ids[num_computed_tokens:]`, within the step's token budget; it samples when it reaches their end.
Decode (1 pending), prefill, replay after a preemption and replay after a lost KV plane are the same thing.

Who gets the budget
1. Running sequences, fewest pending tokens first (ties: earliest arrival). Decodes are thus never delayed by
   a prefill, and after a fault the shortest replay answers first.
2. With what is left, waiting sequences in order of arrival, none overtaking another, each as soon as blocks
   for all its tokens are free and every running sequence keeps one free block to grow into.

Why nobody starves: newcomers get only what the running ones leave, so whoever is running is overtaken by no
more than those that were running beside it, and `max_batch_tokens >= max_num_seqs` leaves a token for it even
when all others decode. Waiting is in order of arrival always, also for the preempted. Where blocks run out
the latest arrival is preempted, so the earliest always goes on, finishes and frees its blocks.

Runs in the engine process, on the engine's thread. No torch, no clock, no IO.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Mapping

import msgspec

from anchortp.engine.api import EngineRequest, FinishReason, SampledToken, TokenOutput
from anchortp.engine.blocks import BlockPool, extend_block_hashes
from anchortp.engine.sequence import Sequence, SequenceState
from anchortp.errors import ConfigError, EngineFull, RequestError

MIN_REPLAY_TOKENS = 64  # smaller steps cost hardly less time


class ScheduledSeq(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one step computes for one sequence; goes to every worker.

    `token_ids` are the tokens at positions `[start, position)`; their KV is written to the slots that
    `block_ids`, the sequence's whole table, gives these positions. With `sample`, the token at `position` is
    drawn from the logits of the last of them, by the fields below it (see `SamplingParams`).
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    position: int
    block_ids: tuple[int, ...]
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    logprobs: int | None


class Batch(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step's work. No two entries write to the same block, and none reads what another one writes."""

    step: int  # number of the `schedule()` call, from 1
    seqs: tuple[ScheduledSeq, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(seq.token_ids) for seq in self.seqs)

    @property
    def num_samples(self) -> int:
        return sum(seq.sample for seq in self.seqs)


class Scheduler:
    """The loop is `schedule`, run, `postprocess`.

    A batch that a fault cuts off is simply never postprocessed: `schedule` changes who holds which blocks and
    nothing else, so the next call plans the same work again. At most one batch is out at a time.

    Raises ConfigError if `max_batch_tokens < max_num_seqs`, under which a prefill could starve.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        max_waiting: int,
    ):
        if not 1 <= max_num_seqs <= max_batch_tokens:
            raise ConfigError(
                f"max_num_seqs={max_num_seqs} must be at least 1 and at most max_batch_tokens="
                f"{max_batch_tokens}, so that each sequence can advance in every step. Lower the first or "
                f"raise the second."
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.max_waiting = max_waiting
        self.num_preempted = 0
        self._num_arrived = 0
        self._step = 0
        self._running: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by arrival
        self._failures: list[TokenOutput] = []
        self._in_flight: tuple[Batch, list[Sequence]] | None = None
        self._budget = max_batch_tokens  # of the next step; smaller for a moment after `on_kv_lost`

    # --- requests come and go ---

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises RequestError (can never be served), EngineFull (too many wait)."""
        self._check(request)
        if len(self._waiting) >= self.max_waiting:
            raise EngineFull(f"{len(self._waiting)} requests are waiting, the limit; try again later")
        self._waiting.append(Sequence.from_request(request, arrival=self._num_arrived))
        self._num_arrived += 1

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its blocks at once. Unknown ids are ignored; nothing is put out."""
        seq = self._find(request_id)
        if seq is not None:
            self._finish(seq)

    def fail_all(self, error: str) -> None:
        """Ends every request with `error`; see `take_failures`. For when nothing can be served any more."""
        for seq in [*self._running.values(), *self._waiting]:
            self._fail(seq, error)

    def take_failures(self) -> list[TokenOutput]:
        """Requests that ended in an error since the last call. To be asked after every `schedule()`."""
        failures, self._failures = self._failures, []
        return failures

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    # --- the loop ---

    def schedule(self) -> Batch | None:
        """The next step's work; None when no request is left (the last may have failed just now)."""
        self._in_flight = None
        self._grow_running()
        plan = _Plan(self.pool, num_tokens=self._budget)
        for seq in self._running.values():
            self._skip_cached(seq)
        for seq in sorted(self._running.values(), key=lambda seq: (seq.num_pending_tokens, seq.arrival)):
            plan.add(seq)
        self._admit_waiting(plan)
        if not plan.chunks:
            assert not self.has_work(), "there is work, but none could be scheduled"
            return None
        self._step += 1
        batch = Batch(step=self._step, seqs=tuple(_scheduled(seq, num) for seq, num in plan.chunks))
        self._in_flight = (batch, [seq for seq, _ in plan.chunks])
        return batch

    def postprocess(
        self, batch: Batch, sampled: Mapping[str, SampledToken], eos_token_ids: Collection[int]
    ) -> list[TokenOutput]:
        """Takes in what a batch computed. `sampled`: by request id, of the entries with `sample`.

        Only the newest batch, once, and not if its KV was lost meanwhile (`on_kv_lost`). Entries whose
        request was aborted or preempted since are dropped; the preempted sample the same token again.
        An end-of-sequence or stop token is put out like any other, with `finish_reason="stop"`.
        """
        assert self._in_flight is not None and self._in_flight[0].step == batch.step, "not the batch in flight"
        seqs, self._in_flight = self._in_flight[1], None
        self._budget = min(self.max_batch_tokens, 2 * self._budget)
        outputs = []
        for entry, seq in zip(batch.seqs, seqs, strict=True):
            if seq.state is not SequenceState.RUNNING:
                continue
            self._advance(seq, entry.position)
            if entry.sample:
                outputs.append(self._emit(seq, sampled[entry.request_id], eos_token_ids))
        return outputs

    # --- memory comes and goes ---

    def on_kv_lost(self) -> None:
        """A part of every block is gone (a device with its KV heads): all running sequences start over.

        They keep their blocks and their tokens. A batch in flight is void.

        All of them replay at once, so a full step would make the shortest wait for the longest. The first step
        is only as large as the shortest sequence, and each further one may be twice as large: the first answer
        comes early, and the last hardly later than with full steps.
        """
        shortest = min((seq.num_tokens for seq in self._running.values()), default=0)
        self._budget = min(self.max_batch_tokens, max(shortest, self.max_num_seqs, MIN_REPLAY_TOKENS))
        for seq in self._running.values():
            seq.num_computed_tokens = 0
        self.pool.invalidate_all()
        self._in_flight = None

    def set_num_blocks(self, num_blocks: int) -> None:
        """The cache now has the block ids `[0, num_blocks)`. Who holds others is preempted.

        On return no sequence refers to a vanished block, so their memory may be given back.
        """
        if num_blocks >= self.pool.num_blocks:
            self.pool.grow(num_blocks)
            return
        vanishing = self.pool.shrink(num_blocks)
        for seq in list(self._running.values()):
            if not vanishing.isdisjoint(seq.block_ids):
                self._preempt(seq)

    def validate(self) -> None:
        """Asserts every invariant between sequences and blocks. For tests, and when idle."""
        running = list(self._running.values())
        self.pool.validate([seq.block_ids for seq in running])
        arrivals = [seq.arrival for seq in self._waiting]
        assert arrivals == sorted(set(arrivals)), "waiting is not in order of arrival"
        assert len(running) <= self.max_num_seqs
        for seq in self._waiting:
            assert seq.state is SequenceState.WAITING and not seq.block_ids and seq.num_computed_tokens == 0
        for request_id, seq in self._running.items():
            assert seq.state is SequenceState.RUNNING and seq.request_id == request_id
            assert 0 <= seq.num_computed_tokens < seq.num_tokens, "nothing is left to compute"
            assert seq.num_computed_tokens <= len(seq.block_ids) * self.pool.block_size

    # --- inside: requests ---

    def _check(self, request: EngineRequest) -> None:
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if num_prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; the model takes {self.max_model_len}, prompt "
                f"and answer together. Shorten the prompt."
            )
        if request.params.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.params.max_tokens}; ask for at least 1")
        if self._find(request.request_id) is not None:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another")

    def _find(self, request_id: str) -> Sequence | None:
        seq = self._running.get(request_id)
        return seq or next((seq for seq in self._waiting if seq.request_id == request_id), None)

    def _finish(self, seq: Sequence) -> None:
        self._unlink(seq)
        seq.state = SequenceState.FINISHED

    def _fail(self, seq: Sequence, error: str) -> None:
        self._finish(seq)
        self._failures.append(
            TokenOutput(
                request_id=seq.request_id,
                tokens=(),
                finish_reason="error",
                error=error,
                num_cached_tokens=seq.num_cached_tokens or 0,
            )
        )

    def _unlink(self, seq: Sequence) -> None:
        if seq.state is SequenceState.RUNNING:
            del self._running[seq.request_id]
        else:
            self._waiting.remove(seq)
        self.pool.free(seq.block_ids)
        seq.block_ids = []
        seq.num_computed_tokens = 0

    # --- inside: blocks ---

    def _grow_running(self) -> None:
        """Gives every running sequence blocks for all its tokens, earliest arrival first."""
        for seq in sorted(self._running.values(), key=lambda seq: seq.arrival):
            if seq.state is SequenceState.RUNNING:  # may have been preempted for an earlier one
                self._grow(seq)

    def _grow(self, seq: Sequence) -> None:
        num_new = self.pool.num_blocks_for(seq.num_tokens) - len(seq.block_ids)
        if num_new <= 0 or self._fail_if_too_long(seq):
            return
        while not self.pool.can_allocate(num_new):
            victim = max(self._running.values(), key=lambda seq: seq.arrival)
            self._preempt(victim)
            if victim is seq:
                return
        seq.block_ids += self.pool.allocate(num_new)

    def _preempt(self, seq: Sequence) -> None:
        self._unlink(seq)
        seq.state = SequenceState.WAITING
        insort(self._waiting, seq, key=lambda seq: seq.arrival)
        self.num_preempted += 1

    def _fail_if_too_long(self, seq: Sequence) -> bool:
        num_needed = self.pool.num_blocks_for(seq.num_tokens)
        if num_needed <= self.pool.num_blocks:
            return False
        self._fail(
            seq,
            f"{seq.num_tokens} tokens need {num_needed} KV blocks of {self.pool.block_size} tokens; the "
            f"cache has {self.pool.num_blocks}. Shorten the prompt or the answer, or enlarge the KV cache.",
        )
        return True

    def _skip_cached(self, seq: Sequence) -> None:
        """Skips what another sequence has recomputed in a block that both hold (after `on_kv_lost`)."""
        block_size = self.pool.block_size
        stop = (seq.num_computed_tokens // block_size + 1) * block_size
        while stop < seq.num_tokens and self.pool.is_cached(seq.block_ids[stop // block_size - 1]):
            seq.num_computed_tokens = stop
            stop += block_size

    # --- inside: steps ---

    def _admit_waiting(self, plan: _Plan) -> None:
        while self._waiting and plan.num_tokens > 0 and len(self._running) < self.max_num_seqs:
            seq = self._waiting[0]
            if self._fail_if_too_long(seq):
                continue
            if not self._admit(seq):
                return
            plan.add(seq)

    def _admit(self, seq: Sequence) -> bool:
        """Moves a waiting sequence to running, with blocks for all its tokens, if there are enough."""
        extend_block_hashes(seq.block_hashes, seq.token_ids, self.pool.block_size)
        hit = self.pool.match(seq.block_hashes, seq.num_tokens)
        num_blocks = self.pool.num_blocks_for(seq.num_tokens)
        # Without the reserve a newcomer could take the block that a running one needs next, and be preempted.
        if not self.pool.can_allocate(num_blocks, hit, reserve=len(self._running)):
            return False
        self._waiting.remove(seq)
        seq.block_ids = self.pool.allocate(num_blocks, hit)
        seq.num_computed_tokens = len(hit) * self.pool.block_size
        self.pool.count_query(seq.num_tokens, seq.num_computed_tokens)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
        seq.state = SequenceState.RUNNING
        self._running[seq.request_id] = seq
        return True

    def _advance(self, seq: Sequence, position: int) -> None:
        """The KV of tokens `[num_computed_tokens, position)` is in the cache now."""
        extend_block_hashes(seq.block_hashes, seq.token_ids, self.pool.block_size)
        first, last = seq.num_computed_tokens // self.pool.block_size, position // self.pool.block_size
        for index in range(first, last):
            self.pool.register(seq.block_ids[index], seq.block_hashes[index])
        seq.num_computed_tokens = position

    def _emit(self, seq: Sequence, token: SampledToken, eos_token_ids: Collection[int]) -> TokenOutput:
        seq.token_ids.append(token.token_id)
        reason = self._finish_reason(seq, token.token_id, eos_token_ids)
        if reason is not None:
            self._finish(seq)
        return TokenOutput(
            request_id=seq.request_id,
            tokens=(token,),
            finish_reason=reason,
            num_cached_tokens=seq.num_cached_tokens or 0,
        )

    def _finish_reason(self, seq: Sequence, token_id: int, eos_token_ids: Collection[int]) -> FinishReason | None:
        params = seq.request.params
        if token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos):
            return "stop"
        if seq.num_output_tokens >= params.max_tokens or seq.num_tokens >= self.max_model_len:
            return "length"
        return None


class _Plan:
    """The step being planned: how many tokens each sequence advances, and what of the budget is left."""

    def __init__(self, pool: BlockPool, *, num_tokens: int):
        self.num_tokens = num_tokens
        self.chunks: list[tuple[Sequence, int]] = []
        self._pool = pool
        self._written: set[int] = set()  # blocks that an entry writes to

    def add(self, seq: Sequence) -> None:
        """Gives the sequence as many of its pending tokens as the budget and the other entries allow."""
        num_tokens = min(seq.num_pending_tokens, self.num_tokens)
        if num_tokens > 0:
            num_tokens = self._up_to_shared(seq, num_tokens)
        if num_tokens > 0:
            self.num_tokens -= num_tokens
            self.chunks.append((seq, num_tokens))

    def _up_to_shared(self, seq: Sequence, num_tokens: int) -> int:
        """Stops before a block that another entry writes or wrote, and marks those before it as written.

        Only after `on_kv_lost` do sequences share blocks that are not computed. One of them computes such a
        block; the others find it done in a later step (`_skip_cached`) and never write over what is shared.
        """
        start, block_size = seq.num_computed_tokens, self._pool.block_size
        for index in range(start // block_size, self._pool.num_blocks_for(start + num_tokens)):
            block_id = seq.block_ids[index]
            if block_id in self._written or self._pool.is_cached(block_id):
                return max(0, index * block_size - start)
            self._written.add(block_id)
        return num_tokens


def _scheduled(seq: Sequence, num_tokens: int) -> ScheduledSeq:
    start, position = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
    params = seq.request.params
    return ScheduledSeq(
        request_id=seq.request_id,
        token_ids=tuple(seq.token_ids[start:position]),
        start=start,
        position=position,
        block_ids=tuple(seq.block_ids),
        sample=position == seq.num_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=seq.seed,
        logprobs=params.logprobs,
    )
