"""The scheduler's rules, one at a time. Random histories are in test_scheduler_simulation.py."""

from __future__ import annotations

import msgspec
import pytest

from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool, extend_block_hashes
from anchortp.engine.scheduler import Batch, Scheduler
from anchortp.engine.sequence import Sequence, seed_of
from anchortp.errors import ConfigError, EngineFull, RequestError

BLOCK_SIZE = 4
EOS = frozenset({99})


@pytest.fixture
def make():
    """Makes schedulers; each is validated and left empty at the end."""
    made: list[Scheduler] = []

    def make(*, num_blocks=64, max_num_seqs=4, max_batch_tokens=16, max_model_len=256, max_waiting=8):
        scheduler = Scheduler(
            BlockPool(num_blocks, BLOCK_SIZE),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_model_len=max_model_len,
            max_waiting=max_waiting,
        )
        made.append(scheduler)
        return scheduler

    yield make
    for scheduler in made:
        scheduler.validate()
        scheduler.fail_all("the test is over")
        scheduler.take_failures()
        scheduler.validate()
        assert not scheduler.has_work()
        assert scheduler.pool.num_free == scheduler.pool.num_blocks


def request(request_id, num_prompt_tokens=3, *, first=1, max_tokens=8, **params):
    prompt = tuple(range(first, first + num_prompt_tokens))
    params = SamplingParams(max_tokens=max_tokens, **params)
    return EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)


def step(scheduler, token_id=50):
    """One step in which every sampled token is `token_id`."""
    batch = scheduler.schedule()
    sampled = {s.request_id: SampledToken(token_id=token_id) for s in batch.seqs if s.sample}
    outputs = scheduler.postprocess(batch, sampled, EOS)
    scheduler.validate()
    return batch, outputs


def shape(batch):
    return {s.request_id: (s.start, s.position, s.sample) for s in batch.seqs}


def test_prefill_in_chunks_then_decode(make):
    scheduler = make(max_batch_tokens=8)
    scheduler.add(request("a", 19, max_tokens=2))
    assert [shape(step(scheduler)[0])["a"] for _ in range(4)] == [
        (0, 8, False),
        (8, 16, False),
        (16, 19, True),
        (19, 20, True),
    ]
    assert scheduler.schedule() is None and not scheduler.has_work()


def test_a_batch_says_all_that_a_worker_needs_and_survives_the_wire(make):
    scheduler = make()
    params = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-1, logprobs=3)
    scheduler.add(request("a", 6, first=10, **params))
    batch = scheduler.schedule()
    entry = batch.seqs[0]
    assert entry.token_ids == (10, 11, 12, 13, 14, 15) and (entry.start, entry.position) == (0, 6)
    assert len(entry.block_ids) == 2 and entry.sample
    assert (batch.num_tokens, batch.num_samples) == (6, 1)
    wanted = params | {"seed": 2**64 - 1}
    assert {name: getattr(entry, name) for name in wanted} == wanted
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch) == batch
    assert hash(batch) == hash(msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch))


def test_decodes_come_first_then_the_shortest_prefill(make):
    scheduler = make(max_batch_tokens=20)
    scheduler.add(request("decoding", 3))
    step(scheduler)
    scheduler.add(request("long", 40, first=100))
    step(scheduler)  # "long" gets the 19 tokens that the decode leaves
    scheduler.add(request("short", 5, first=200))
    batch, _ = step(scheduler)
    assert shape(batch) == {"decoding": (4, 5, True), "long": (19, 38, False)}  # newcomers take what is left
    batch, _ = step(scheduler)
    assert [s.request_id for s in batch.seqs] == ["decoding", "long", "short"]


def test_after_a_loss_the_shortest_replay_goes_first(make):
    scheduler = make(max_batch_tokens=16)
    for name, length, first in (("long", 14, 10), ("short", 2, 50)):
        scheduler.add(request(name, length, first=first))
    step(scheduler)
    scheduler.on_kv_lost()
    batch, outputs = step(scheduler)
    assert [s.request_id for s in batch.seqs] == ["short", "long"]
    assert shape(batch) == {"short": (0, 3, True), "long": (0, 13, False)}
    assert [o.request_id for o in outputs] == ["short"]


def test_a_long_prompt_is_not_starved_by_newcomers(make):
    scheduler = make(max_batch_tokens=4, max_num_seqs=4, max_waiting=100)
    scheduler.add(request("long", 30, first=1000, max_tokens=1))
    finished = []
    for number in range(60):
        scheduler.add(request(f"short{number}", 1, first=number, max_tokens=2))
        finished += [o.request_id for o in step(scheduler)[1] if o.finish_reason]
        if "long" in finished:
            break
    # Nobody was there before it, and newcomers get only what it leaves: it advances by 4 tokens a step.
    assert number == 7 and finished == ["long"]


def test_a_long_prompt_advances_while_all_others_decode(make):
    scheduler = make(max_batch_tokens=4, max_num_seqs=4)
    for name in "abc":
        scheduler.add(request(name, 1, first=ord(name), max_tokens=100))
    step(scheduler)
    scheduler.add(request("long", 10, first=1000, max_tokens=1))
    outputs = [o for _ in range(10) for o in step(scheduler)[1]]
    assert [o.finish_reason for o in outputs if o.request_id == "long"] == ["length"]


def test_waiting_is_first_come_first_served_even_if_a_later_one_would_fit(make):
    scheduler = make(num_blocks=6)
    scheduler.add(request("running", 15, max_tokens=20))
    step(scheduler)
    scheduler.add(request("large", 16, first=100))
    scheduler.add(request("small", 1, first=200))
    batch, _ = step(scheduler)
    assert set(shape(batch)) == {"running"} and scheduler.num_waiting == 2


def test_the_latest_arrival_is_preempted_and_goes_on_with_a_new_token(make):
    scheduler = make(num_blocks=4, max_batch_tokens=32)
    scheduler.add(request("early", 7, first=10, max_tokens=9))
    scheduler.add(request("late", 3, first=100, max_tokens=9))
    _, outputs = step(scheduler)
    seen = {o.request_id: [o.tokens[0].token_id] for o in outputs}
    for number in range(30):
        _, outputs = step(scheduler, token_id=200 + number)
        for o in outputs:
            seen[o.request_id].append(o.tokens[0].token_id)
        if not scheduler.has_work():
            break
    assert scheduler.num_preempted >= 1
    assert [len(seen[name]) for name in ("early", "late")] == [9, 9]
    # The early one never waited; the late one was put aside, and no token of either came twice.
    assert seen["early"] == [50, *range(200, 208)]
    assert len(set(seen["late"])) == 9 and seen["late"][-1] > 207


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_into(make):
    scheduler = make(num_blocks=5)
    scheduler.add(request("a", 3, first=10))
    step(scheduler)
    scheduler.add(request("b", 14, first=100))  # 4 blocks, and 4 are free
    assert set(shape(step(scheduler)[0])) == {"a"}
    scheduler.abort("b")
    scheduler.add(request("c", 7, first=200))
    assert set(shape(step(scheduler)[0])) == {"a", "c"}
    assert scheduler.num_preempted == 0


def test_what_can_never_fit_fails_with_the_numbers(make):
    scheduler = make(num_blocks=3)
    scheduler.add(request("huge", 13))
    scheduler.add(request("fits", 4, first=100, max_tokens=1))
    batch, outputs = step(scheduler)
    assert set(shape(batch)) == {"fits"} and outputs[0].finish_reason == "length"
    (failure,) = scheduler.take_failures()
    assert (failure.request_id, failure.finish_reason, failure.tokens) == ("huge", "error", ())
    assert failure.error.startswith("13 tokens need 4 KV blocks of 4 tokens; the cache has 3.")
    assert scheduler.take_failures() == []


def test_what_outgrows_the_cache_fails_after_its_last_token(make):
    scheduler = make(num_blocks=2)
    scheduler.add(request("a", 6, max_tokens=50))
    outputs = []
    while scheduler.has_work():
        batch = scheduler.schedule()
        if batch is not None:
            sampled = {s.request_id: SampledToken(token_id=5) for s in batch.seqs if s.sample}
            outputs += scheduler.postprocess(batch, sampled, EOS)
    (failure,) = scheduler.take_failures()
    assert len(outputs) == 3 and "9 tokens need 3 KV blocks" in failure.error


@pytest.mark.parametrize(
    "params, token_id, reason",
    [
        ({}, 99, "stop"),
        ({"ignore_eos": True}, 99, None),
        ({"stop_token_ids": (7,)}, 7, "stop"),
        ({"stop_token_ids": (7,), "ignore_eos": True}, 7, "stop"),
        ({"stop_token_ids": (7,)}, 8, None),
        ({"max_tokens": 1}, 8, "length"),
        ({"max_tokens": 1}, 99, "stop"),
    ],
)
def test_finish_reasons(make, params, token_id, reason):
    scheduler = make()
    scheduler.add(request("a", **params))
    (output,) = step(scheduler, token_id)[1]
    assert output.finish_reason == reason and output.tokens[0].token_id == token_id
    assert scheduler.has_work() == (reason is None)


def test_the_model_length_ends_an_answer(make):
    scheduler = make(max_model_len=5)
    scheduler.add(request("a", 3))
    assert [step(scheduler)[1][0].finish_reason for _ in range(2)] == [None, "length"]


def test_cached_tokens_are_reported_and_not_computed_again(make):
    scheduler = make(max_batch_tokens=32)
    scheduler.add(request("first", 10, max_tokens=1))
    assert step(scheduler)[1][0].num_cached_tokens == 0
    scheduler.add(request("again", 10, max_tokens=2))
    batch, outputs = step(scheduler)
    assert shape(batch)["again"] == (8, 10, True) and outputs[0].num_cached_tokens == 8
    assert (scheduler.pool.num_hit_tokens, scheduler.pool.num_queried_tokens) == (8, 20)
    scheduler.on_kv_lost()
    batch, outputs = step(scheduler)
    assert shape(batch)["again"] == (0, 11, True) and outputs[0].num_cached_tokens == 8


def test_what_a_preempted_sequence_finds_again_is_not_reported_as_cached(make):
    scheduler = make(num_blocks=8, max_batch_tokens=32)
    for name in "ab":
        scheduler.add(request(name, 10, first=100 * ord(name)))
    step(scheduler)
    scheduler.resize(5)  # "b" is put aside and loses one of its blocks, and finds the others again later
    scheduler.abort("a")
    batch, (output,) = step(scheduler)
    assert shape(batch)["b"] == (8, 11, True) and output.num_cached_tokens == 0


def test_sequences_that_share_lost_blocks_compute_them_once(make):
    scheduler = make(max_batch_tokens=64)
    scheduler.add(request("a", 13))
    step(scheduler)
    for name in "bc":
        scheduler.add(request(name, 13))
    step(scheduler)
    scheduler.on_kv_lost()
    batch, outputs = step(scheduler)
    # "b" and "c" have the fewest tokens to replay; one of them computes the three shared blocks for all.
    assert shape(batch) == {"b": (0, 14, True)} and [o.request_id for o in outputs] == ["b"]
    batch, outputs = step(scheduler)
    assert shape(batch) == {"b": (14, 15, True), "c": (12, 14, True), "a": (12, 15, True)}


def test_a_batch_that_is_cut_off_is_planned_again(make):
    scheduler = make()
    scheduler.add(request("a", 10))
    scheduler.add(request("b", 3, first=100))
    lost = scheduler.schedule()
    again = scheduler.schedule()
    assert set(again.seqs) == set(lost.seqs) and again.step == lost.step + 1
    with pytest.raises(AssertionError, match="not the batch in flight"):
        scheduler.postprocess(lost, {"b": SampledToken(token_id=1)}, EOS)


def test_a_batch_whose_kv_was_lost_cannot_be_taken_in(make):
    scheduler = make()
    scheduler.add(request("a", 3))
    batch = scheduler.schedule()
    scheduler.on_kv_lost()
    with pytest.raises(AssertionError, match="not the batch in flight"):
        scheduler.postprocess(batch, {"a": SampledToken(token_id=1)}, EOS)


def test_abort_between_schedule_and_postprocess(make):
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, 5, first=ord(name)))
    batch = scheduler.schedule()
    scheduler.abort("a")
    assert scheduler.num_running == 1 and scheduler.pool.num_held == 2
    scheduler.add(request("a", 4, first=300))  # the same id again is another request
    outputs = scheduler.postprocess(batch, {name: SampledToken(token_id=1) for name in "ab"}, EOS)
    assert [o.request_id for o in outputs] == ["b"]
    assert shape(step(scheduler)[0])["a"] == (0, 4, True)


def test_abort_of_waiting_and_unknown_requests(make):
    scheduler = make(max_num_seqs=1)
    for name in "ab":
        scheduler.add(request(name, 5, first=ord(name)))
    step(scheduler)
    scheduler.abort("b")
    scheduler.abort("nobody")
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 0)


def test_too_many_waiting(make):
    scheduler = make(max_waiting=2)
    for name in "ab":
        scheduler.add(request(name))
    with pytest.raises(EngineFull, match="2 requests are waiting"):
        scheduler.add(request("c"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (request("a", 0), "prompt is empty"),
        (request("a", 16), "16 tokens; the model takes 16"),
        (request("a", max_tokens=0), "max_tokens is 0"),
        (request("taken"), "'taken' is in use"),
    ],
)
def test_wrong_requests(make, wrong, message):
    scheduler = make(max_model_len=16)
    scheduler.add(request("taken"))
    with pytest.raises(RequestError, match=message):
        scheduler.add(wrong)


def test_a_budget_under_which_a_prefill_could_starve_is_refused():
    with pytest.raises(ConfigError, match="max_num_seqs=5"):
        Scheduler(BlockPool(4, 4), max_num_seqs=5, max_batch_tokens=4, max_model_len=9, max_waiting=1)


def test_fail_all_tells_everyone_once(make):
    scheduler = make(max_num_seqs=1)
    for name in "ab":
        scheduler.add(request(name, first=ord(name)))
    batch = scheduler.schedule()
    scheduler.fail_all("no layout fits")
    assert [(o.request_id, o.error) for o in scheduler.take_failures()] == [
        ("a", "no layout fits"),
        ("b", "no layout fits"),
    ]
    assert scheduler.postprocess(batch, {}, EOS) == [] and scheduler.take_failures() == []


def test_a_request_without_a_seed_has_the_same_one_wherever_it_resumes():
    assert seed_of(request("a")) == seed_of(request("a", 9)) != seed_of(request("b"))
    assert seed_of(request("a", seed=5)) == seed_of(request("b", seed=5)) == 5
    assert Sequence.from_request(request("a"), arrival=0).seed == seed_of(request("a")) == 3405396810240292928


# --- lost, moved and shared blocks ---


def test_what_is_whole_after_a_loss_is_not_computed_again(make):
    scheduler = make(max_batch_tokens=64)
    for name, first in (("a", 10), ("b", 100)):
        scheduler.add(request(name, 14, first=first))
    step(scheduler)
    a, b = (scheduler._find(name) for name in "ab")
    whole = {*a.block_ids, *b.block_ids[:1], *b.block_ids[2:]}
    scheduler.on_kv_lost(whole)
    scheduler.validate()
    assert scheduler.num_tokens_to_replay == 10
    assert {block_id for block_id, _ in scheduler.pool.sealed()} == {*a.block_ids[:3], b.block_ids[0], b.block_ids[2]}
    batch, outputs = step(scheduler)
    assert shape(batch) == {"a": (14, 15, True), "b": (4, 8, False)}
    assert [o.request_id for o in outputs] == ["a"]
    # The third block was whole all the time; only the second and the part of the fourth are computed again.
    assert shape(step(scheduler)[0])["b"] == (12, 15, True)
    assert (scheduler.num_replayed_tokens, scheduler.num_tokens_to_replay) == (4 + 2, 0)
    assert scheduler.num_recomputed_tokens == 0


def test_tokens_computed_again_after_a_preemption_are_counted_apart(make):
    scheduler = make(num_blocks=8, max_batch_tokens=32)
    for name in "ab":
        scheduler.add(request(name, 10, first=100 * ord(name)))
    step(scheduler)
    assert scheduler.resize(4) == []
    scheduler.abort("a")
    scheduler.pool.keep_only(())
    assert shape(step(scheduler)[0]) == {"b": (0, 11, True)}
    assert (scheduler.num_preempted, scheduler.num_recomputed_tokens) == (1, 10)
    assert scheduler.num_replayed_tokens == 0


def test_what_two_begin_to_compute_side_by_side_is_computed_once(make):
    scheduler = make(max_batch_tokens=40)
    for name in "ab":
        scheduler.add(request(name, 30))
    assert shape(step(scheduler)[0]) == {"a": (0, 30, True), "b": (0, 10, False)}
    assert shape(step(scheduler)[0]) == {"a": (30, 31, True), "b": (28, 30, True)}
    a, b = (scheduler._find(name) for name in "ab")
    assert a.block_ids[:7] == b.block_ids[:7] and a.block_ids[7] != b.block_ids[7]


def test_two_whose_answers_are_equal_share_them(make):
    scheduler = make(max_batch_tokens=64)
    for name in "ab":
        scheduler.add(request(name, 6, max_tokens=30))
    for _ in range(8):
        step(scheduler)
    a, b = (scheduler._find(name) for name in "ab")
    assert a.token_ids == b.token_ids and len(a.token_ids) == 14
    assert a.block_ids[:3] == b.block_ids[:3] and scheduler.pool.num_held == 5


def test_a_smaller_cache_keeps_what_runs_and_what_was_used_last(make):
    scheduler = make(num_blocks=12, max_batch_tokens=64)
    for name in ("old", "recent"):
        scheduler.add(request(name, 12, first=100 * ord(name[0]), max_tokens=1))
        step(scheduler)
    scheduler.add(request("runs", 13, first=5000))
    step(scheduler)
    hashes = {name: [] for name in ("old", "recent")}
    for name, known in hashes.items():
        extend_block_hashes(known, range(100 * ord(name[0]), 100 * ord(name[0]) + 12), BLOCK_SIZE)
    moves = scheduler.resize(7)
    scheduler.validate()
    assert scheduler.num_preempted == 0
    assert all(block_id is None for block_id in map(scheduler.pool.block_of, hashes["old"]))
    assert all(block_id is not None for block_id in map(scheduler.pool.block_of, hashes["recent"]))
    assert moves and all(source >= 7 > to for source, to in moves)
    assert shape(step(scheduler)[0]) == {"runs": (13, 14, True)}


def test_a_smaller_cache_puts_the_latest_aside_and_no_more_than_it_must(make):
    scheduler = make(num_blocks=12, max_batch_tokens=64)
    for name in "abc":
        scheduler.add(request(name, 9, first=100 * ord(name), max_tokens=3))
    step(scheduler)
    scheduler.resize(7)
    scheduler.validate()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preempted) == (2, 1, 1)
    finished = []
    for _ in range(10):
        if not scheduler.has_work():
            break
        batch, outputs = step(scheduler)
        assert all(block_id < 7 for s in batch.seqs for block_id in s.block_ids)
        finished += [o.request_id for o in outputs if o.finish_reason == "length"]
    assert finished == ["a", "b", "c"]


def test_a_cache_that_grows_disturbs_nobody(make):
    scheduler = make(num_blocks=2)
    scheduler.add(request("a", 7, first=10))
    scheduler.add(request("b", 3, first=100))
    batch = scheduler.schedule()
    assert scheduler.resize(6) == []
    (output,) = scheduler.postprocess(batch, {"a": SampledToken(token_id=1)}, EOS)
    assert output.request_id == "a" and shape(step(scheduler)[0]) == {"a": (7, 8, True), "b": (0, 3, True)}


def test_blocks_with_nothing_in_them_are_not_moved(make):
    scheduler = make(num_blocks=8, max_batch_tokens=4)
    scheduler.add(request("short-lived", 1, first=900))
    step(scheduler)
    scheduler.add(request("long", 16))
    step(scheduler)
    scheduler.abort("short-lived")
    long = scheduler._find("long")
    assert (long.num_computed_tokens, long.block_ids) == (3, [1, 2, 3, 4])
    assert scheduler.resize(4) == [] and long.block_ids == [1, 2, 3, 0]
    scheduler.resize(8)
    assert shape(step(scheduler)[0]) == {"long": (3, 7, False)}


def test_a_batch_in_flight_is_void_when_blocks_may_have_moved(make):
    scheduler = make()
    scheduler.add(request("a", 3))
    batch = scheduler.schedule()
    scheduler.resize(60)
    with pytest.raises(AssertionError, match="not the batch in flight"):
        scheduler.postprocess(batch, {"a": SampledToken(token_id=1)}, EOS)
