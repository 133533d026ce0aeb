"""What to compute next: continuous batching with chunked prefill, in one rule.

Every step, every scheduled sequence advances by some of its pending tokens,
`token_ids[num_computed_tokens:]`, within the step's token budget; it samples when it reaches their end.
Decode (1 pending), prefill, replay after a preemption and replay after a lost KV plane are the same thing.

Who gets the budget
1. Decodes. They are never delayed by a prefill, and by a replay no more than `replay_chunk_tokens` allow.
2. While sequences replay lost KV, they share what is left with prefills, three to one; what one side does not
   need the other gets. Shortest replay first, so that the first answer after a fault comes soonest.
3. Prefills: running sequences, fewest pending tokens first (ties: earliest arrival). With what they leave,
   waiting sequences in order of arrival, none overtaking another, each as soon as blocks for all its tokens
   are free and every running sequence keeps one free block to grow into.
The first step after a recovery has decodes alone, if there are any: who was speaking speaks again soonest, and all
others wait for no more than that step.

Why nobody starves: who replays was there when the fault struck, so a replay is overtaken by no newcomer and
done after all replays' tokens at three quarters of the rate; prefills have their quarter meanwhile. Newcomers
get only what the running prefills leave, so whoever is running is overtaken by no more than those that were
running beside it, and `max_batch_tokens >= max_num_seqs` leaves a token for it even when all others decode.
Waiting is in order of arrival always, also for the preempted. Where blocks run out the latest arrival is
preempted, so the earliest always goes on, finishes and frees its blocks.

How large a step may be during replays: it takes `a + b * tokens`. On our machines `a` is about 40 ms and `b`
0.6 ms, and a step's overhead weighs as much as `a / b` = 67 tokens. Twice that many replay at two thirds of the
highest rate there is, in steps that take three times as long as a decode alone: 128 tokens, about 120 ms. While
nobody speaks that is too slow for the last and too fast for the first: then steps start as small as the
shortest replay and double, which costs the last hardly more than full steps from the start.

Runs in the engine process, on the engine's thread. No torch, no clock, no IO.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile

import msgspec

from anchortp.engine.api import EngineRequest, FinishReason, SampledToken, TokenOutput
from anchortp.engine.blocks import BlockPool, extend_block_hashes
from anchortp.engine.sequence import Sequence, SequenceState
from anchortp.errors import ConfigError, EngineFull, RequestError

MIN_REPLAY_TOKENS = 64  # smaller steps cost hardly less time
SMALL_REPLAY_TOKENS = 256  # of all sequences together; one step of so many costs less than two of half as many
REPLAY_CHUNK_TOKENS = 128  # beside decodes; see above
PREFILL_SHARE = 4  # while others replay, prefills have one part in so many


class ScheduledSeq(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one step computes for one sequence; goes to every worker.

    `token_ids` are the tokens at positions `[start, position)`; their KV is written to the slots that
    `block_ids`, the sequence's whole table, gives these positions. With `sample`, the token at `position` is
    drawn from the logits of the last of them, by the fields below it (see `SamplingParams`): greedily by default.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    position: int
    block_ids: tuple[int, ...]
    sample: bool
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None


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

    `num_replayed_tokens` and `num_recomputed_tokens` count tokens computed a second time, after a KV loss and
    after a preemption; `num_tokens_to_replay` is how many of the first are still due.

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
        replay_chunk_tokens: int = REPLAY_CHUNK_TOKENS,
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
        self.replay_chunk_tokens = replay_chunk_tokens
        self.num_preempted = 0
        self.num_replayed_tokens = 0
        self.num_recomputed_tokens = 0
        self._num_arrived = 0
        self._step = 0
        self._running: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by arrival
        self._failures: list[TokenOutput] = []
        self._in_flight: tuple[Batch, list[Sequence]] | None = None
        self._slow_start = max_batch_tokens  # replays' part of a step while nobody decodes
        self._is_first_step = False  # after a recovery

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

    @property
    def num_tokens_to_replay(self) -> int:
        """Tokens of running sequences that are to be computed again because of a KV loss.

        Those of a block that several sequences share count for each of them, and are computed once.
        """
        return sum(seq.num_tokens_to_replay for seq in self._running.values())

    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    # --- the loop ---

    def schedule(self) -> Batch | None:
        """The next step's work; None when no request is left (the last may have failed just now)."""
        self._in_flight = None
        self._grow_running()
        for seq in self._running.values():
            self._skip_cached(seq)
        plan = self._plan()
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
        self._slow_start = min(self.max_batch_tokens, 2 * self._slow_start)
        outputs = []
        for entry, seq in zip(batch.seqs, seqs, strict=True):
            if seq.state is not SequenceState.RUNNING:
                continue
            self._advance(seq, entry.position)
            if entry.sample:
                outputs.append(self._emit(seq, sampled[entry.request_id], eos_token_ids))
        return outputs

    # --- memory comes and goes ---

    def on_kv_lost(self, whole: Collection[int] = ()) -> None:
        """Devices are gone with their planes. What had been computed in the blocks `whole` is there all the same.

        (Kept, or got back from a mirror or a replica.) Every other block lost something: nobody finds it any
        more, and each running sequence goes on after the longest prefix of its blocks that is whole. It keeps its
        blocks and its tokens. A batch in flight is void.
        """
        whole = frozenset(whole)
        for seq in self._running.values():
            num_whole = sum(1 for _ in takewhile(whole.__contains__, seq.block_ids))
            seq.set_back(min(seq.num_computed_tokens, num_whole * self.pool.block_size), lost_kv=True)
        self.pool.keep_only(whole)
        self._in_flight = None
        replays = [seq.num_pending_tokens for seq in self._running.values() if seq.num_tokens_to_replay]
        first = min(replays, default=self.max_batch_tokens)
        if sum(replays) <= SMALL_REPLAY_TOKENS:
            first = sum(replays)  # the tails that a mirror does not have: nobody gains by waiting for a second step
        self._slow_start = min(self.max_batch_tokens, max(first, self.max_num_seqs, MIN_REPLAY_TOKENS))

    def on_recovered(self) -> None:
        """The group is whole again, and the next step is its first."""
        self._is_first_step = True

    def resize(self, num_blocks: int) -> list[tuple[int, int]]:
        """The cache is to have the block ids `[0, num_blocks)`. Returns moves of contents, (from, to).

        Growing moves nothing. When it shrinks, the least recently used go first: cached blocks that nobody
        holds, then those of running sequences, the latest arrival first, only as many as must; these wait and
        are replayed on demand. What survives above moves below: the caller has the moves executed, in any order,
        before the next batch, and may give the memory above back after that. A batch in flight is void then.
        """
        if num_blocks >= self.pool.num_blocks:
            self.pool.grow(num_blocks)
            return []
        self._in_flight = None
        while self.pool.num_held > num_blocks:
            self._preempt(self._latest())
        moves = self.pool.compact(num_blocks)
        to = dict(moves)
        for seq in self._running.values():
            seq.block_ids = [to.get(block_id, block_id) for block_id in seq.block_ids]
        written = self._written()
        return [move for move in moves if move[1] in written]

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
        seq.num_computed_tokens = 0
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
            victim = self._latest()
            self._preempt(victim)
            if victim is seq:
                return
        seq.block_ids += self.pool.allocate(num_new)

    def _latest(self) -> Sequence:
        return max(self._running.values(), key=lambda seq: seq.arrival)

    def _written(self) -> set[int]:
        """Blocks with anything in them that somebody may read."""
        written = {block_id for block_id, _ in self.pool.sealed()}
        for seq in self._running.values():
            written.update(seq.block_ids[: self.pool.num_blocks_for(seq.num_computed_tokens)])
        return written

    def _preempt(self, seq: Sequence) -> None:
        self._unlink(seq)
        seq.set_back(0, lost_kv=False)
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
        """Takes over blocks of its next tokens that somebody else has computed since it was admitted.

        Such as a prefix that two sequences began to compute side by side, or blocks that both hold and lost.
        """
        block_size = self.pool.block_size
        index = seq.num_computed_tokens // block_size
        while (index + 1) * block_size < seq.num_tokens:
            known = self.pool.block_of(seq.block_hashes[index])
            if known is None:
                return
            seq.block_ids[index] = self.pool.exchange(seq.block_ids[index], known)
            index += 1
            seq.num_computed_tokens = index * block_size

    # --- inside: steps ---

    def _plan(self) -> _Plan:
        decoding, replaying, prefilling = self._by_kind()
        plan = _Plan(self.pool, num_tokens=self.max_batch_tokens)
        plan.add_all(decoding)
        is_first_step, self._is_first_step = self._is_first_step, False
        if is_first_step and decoding:
            return plan
        if not replaying:
            plan.add_all(prefilling)
            self._admit_waiting(plan)
            return plan
        num_tokens = self._replay_budget(len(decoding), has_prefills=bool(prefilling or self._waiting))
        num_wanted = sum(seq.num_pending_tokens for seq in replaying)
        for_prefills = max(num_tokens // PREFILL_SHARE, num_tokens - num_wanted)
        plan.num_tokens = for_prefills
        plan.add_all(prefilling)
        self._admit_waiting(plan)
        plan.num_tokens += num_tokens - for_prefills
        plan.add_all(replaying)
        return plan

    def _by_kind(self) -> tuple[list[Sequence], list[Sequence], list[Sequence]]:
        """The running sequences that decode, replay and prefill; each list fewest pending tokens first."""
        decoding, replaying, prefilling = [], [], []
        for seq in sorted(self._running.values(), key=lambda seq: (seq.num_pending_tokens, seq.arrival)):
            if seq.num_pending_tokens == 1:
                decoding.append(seq)
            elif seq.num_tokens_to_replay:
                replaying.append(seq)
            else:
                prefilling.append(seq)
        return decoding, replaying, prefilling

    def _replay_budget(self, num_decoding: int, *, has_prefills: bool) -> int:
        """Tokens of a step for replays and prefills together, at least 1."""
        if num_decoding:
            return min(self.replay_chunk_tokens, self.max_batch_tokens - num_decoding)
        # The prefills' share comes on top, lest it make the first answer wait for another step.
        extra = self._slow_start // (PREFILL_SHARE - 1) if has_prefills else 0
        return min(self.max_batch_tokens, self._slow_start + extra)

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
            seq.block_ids[index] = self.pool.register(seq.block_ids[index], seq.block_hashes[index])
        num_again = max(0, min(position, seq.num_once_computed) - seq.num_computed_tokens)
        if seq.lost_kv:
            self.num_replayed_tokens += num_again
        else:
            self.num_recomputed_tokens += num_again
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
    """The step being planned: how many tokens each sequence advances.

    `num_tokens` is what is left of the budget for those that are being added.
    """

    def __init__(self, pool: BlockPool, *, num_tokens: int):
        self.num_tokens = num_tokens
        self.chunks: list[tuple[Sequence, int]] = []
        self._pool = pool
        self._written: set[int] = set()  # blocks that an entry writes to

    def add_all(self, seqs: Iterable[Sequence]) -> None:
        for seq in seqs:
            self.add(seq)

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
        block; the others take it over in a later step (`_skip_cached`) and never write over what is shared.
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
