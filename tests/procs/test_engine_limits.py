"""Too little memory, too many requests, requests that go away, and one that kills whoever computes it."""

from __future__ import annotations

import pytest

from anchortp.config import resolve_engine_config
from anchortp.engine.faults import Strike
from anchortp.errors import EngineFull, EngineStopped, in_words
from anchortp.layout import KV, KVAddresses, WeightAddresses, initial_layout, model_units
from tests.procs.engine_tools import Driver, prompt_of, running_engine
from tests.tiny_model import write_model

MAX_MODEL_LEN = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


def budget_bytes(folder, num_devices: int, num_blocks: int) -> int:
    """Of each device: enough for `num_blocks` KV blocks beside the weights at that degree."""
    config = resolve_engine_config(folder, runtime_dir="/", devices=("cpu:0",), max_model_len=MAX_MODEL_LEN)
    units = model_units(config.model)
    weights = WeightAddresses(units=units)
    kv = KVAddresses(config=config.model, block_size=config.kv_block_size, num_blocks=config.kv_blocks)
    layout = initial_layout(units, tuple(f"cpu:{i}" for i in range(num_devices)))

    def needed(shard):
        room = next(r for r in range(0, 1 << 30, 4096) if kv.blocks_that_fit(len(shard[KV]), r) >= num_blocks)
        return weights.committed_bytes(shard) + room

    return max(needed(shard) for shard in layout.shards)


def test_a_budget_that_is_too_small_is_refused_with_the_numbers(folder):
    with running_engine(folder, 2, device_memory_bytes=1 << 16, wait=False) as driver:
        with pytest.raises(EngineStopped, match=r"cpu:\d would hold .* of weights, its budget is 65.5 kB"):
            driver.engine.wait_ready(60)
        with pytest.raises(EngineStopped, match="Give it more memory or use more devices"):
            driver.submit(prompt_of(1), 4)


def test_the_kv_cache_shrinks_and_then_the_weights_do_not_fit(tmp_path):
    # As many KV heads as q heads: what the survivors have to hold grows with every loss.
    folder = write_model(tmp_path / "model", num_key_value_heads=6)
    budget = budget_bytes(folder, 2, num_blocks=24)
    with running_engine(folder, 3, device_memory_bytes=budget, max_model_len=MAX_MODEL_LEN) as driver:
        before = driver.engine.status()["kv"]["blocks"]
        streams = driver.speak(6, 100)
        driver.inject("cpu:1", "lost")
        for stream in streams:
            stream.check()
        driver.wait_recovered(2)
        after = driver.engine.status()["kv"]["blocks"]
        assert driver.engine.config.min_kv_blocks <= after < before
        assert driver.engine.pool.num_blocks == after
        assert driver.engine.scheduler.num_preempted > 0
        # One device is too small for all of the weights: the requests are told so, and the state is kept.
        streams = driver.speak(2, 100)
        driver.inject("cpu:0", "lost")
        for stream in streams:
            assert stream.wait_end() == "error"
            assert f"its budget is {in_words(budget)}" in stream.error or "block(s) of 16 tokens" in stream.error
        driver.wait(lambda: driver.state == "refusing", "the refusal")
        assert driver.anchor_pid("cpu:2") > 0
        with pytest.raises(EngineStopped):
            driver.submit(prompt_of(1), 4)


def test_preemption_queues_and_aborts(folder):
    options = {"max_model_len": MAX_MODEL_LEN, "kv_tokens": 160, "max_num_seqs": 3, "max_waiting": 3}
    with running_engine(folder, 2, **options) as driver:
        # Three sequences of seven blocks each, and ten blocks in all.
        for stream in driver.speak(3, 100):
            stream.check()
        assert driver.engine.scheduler.num_preempted > 0
        check_full(driver)
        check_aborts(driver)


def check_full(driver: Driver) -> None:
    """Three run, three wait, and one more is refused; all that were taken are answered."""
    streams = driver.speak(3, 30)
    with pytest.raises(EngineFull, match="3 requests are waiting"):
        for i in range(7):
            streams.append(driver.submit(prompt_of(20 + i), 30))
    assert 3 <= len(streams) <= 9
    for stream in streams:
        stream.check()


def check_aborts(driver: Driver) -> None:
    """Those that go away leave nothing behind, and are never heard of again."""
    gone = driver.speak(3, 110)
    for stream in gone:
        driver.engine.abort(stream.request.request_id)
    driver.engine.abort("nobody")
    driver.submit(prompt_of(4), 50).check()
    assert all(stream.finish_reason is None for stream in gone)
    assert driver.engine.pool.num_held == 0 and not driver.engine.scheduler.has_work()


def test_a_request_that_kills_its_workers_is_ended_alone(folder):
    # Every attempt at the first prefill dies, each time a little later.
    strikes = [Strike(device="cpu:1", point="prefill", kind="crash")]
    strikes += [Strike(device="cpu:1", point="collective", nth=nth, kind="crash") for nth in range(1, 5)]
    with running_engine(folder, 2, strikes, max_num_seqs=1) as driver:
        poison, other = driver.submit(prompt_of(1), 10), driver.submit(prompt_of(2), 10)
        assert poison.wait_end() == "error"
        assert "cut off by faults 5 times in a row" in poison.error and poison.tokens == []
        other.check()
        driver.check_fired()
        assert all(episode["devices_lost"] == [] for episode in driver.episodes)
