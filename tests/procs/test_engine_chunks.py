"""The engine on devices whose memory comes in chunks, as a GPU's does: simulated ones, several to one "GPU"."""

from __future__ import annotations

import signal

import pytest

from anchortp.engine.faults import Strike
from anchortp.errors import ConfigError
from tests.procs.engine_tools import kill_process, nothing_left, prompt_of, running_engine
from tests.procs.test_engine_changes import change, members
from tests.tiny_model import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(("collectives", "attention"), [("peer", "sdpa"), ("shm", "torch")])
def test_devices_workers_and_anchors_die_and_no_token_is_wrong(folder, collectives, attention):
    strikes = (Strike(device="sim:0/3", point="collective", nth=200, kind="lost"),)
    options = {"kind": "sim:0/", "collectives": collectives, "attention": attention}
    with running_engine(folder, 4, strikes, **options) as driver:
        for stream in driver.speak(3, 80):
            stream.check()
        driver.check_fired()
        (_, lost) = driver.wait_recovered(2)
        assert lost["devices_lost"] == ["sim:0/3"]
        assert lost["bytes"]["loaded"] == lost["bytes"]["lost"] + lost["bytes"]["replica"] > 0

        streams, pid = driver.speak(3, 80), driver.worker_pid("sim:0/1")
        driver.inject("sim:0/1", "crash")
        driver.replaced("sim:0/1", pid)
        anchor_pid = driver.anchor_pid("sim:0/0")
        kill_process(anchor_pid, signal.SIGKILL)
        for stream in streams:
            stream.check()
        driver.wait(lambda: told(driver, "new anchor of sim:0/0 holds its memory"), "the adoption")
        assert driver.anchor_pid("sim:0/0") != anchor_pid

        # What the new anchor adopted it owns: the next worker gets all of it from there.
        streams, pid = driver.speak(2, 80), driver.worker_pid("sim:0/0")
        driver.inject("sim:0/0", "crash")
        driver.replaced("sim:0/0", pid)
        for stream in streams:
            stream.check()
        for episode in driver.wait_recovered(4)[2:]:
            assert episode["devices_lost"] == [] and episode["bytes"]["loaded"] == 0
        assert set(driver.engine.status()["devices"]) == {"sim:0/0", "sim:0/1", "sim:0/2"}


def told(driver, text):
    return any(line["text"] == text for episode in driver.episodes for line in episode["timeline"])


def test_a_cache_that_shrinks_makes_room_on_the_device_that_is_left(folder):
    """KV chunks are given back and used again for weights and other planes, under a worker that has them mapped."""
    options = {"device_memory_bytes": 14 << 20, "kv_tokens": 1 << 15, "max_model_len": 256, "max_batch_tokens": 64}
    with running_engine(folder, 2, kind="sim:0/", collectives="peer", **options) as driver:
        assert driver.engine.status()["kv"]["blocks"] == (1 << 15) // driver.config.kv_block_size
        streams = driver.speak(4, 100)
        driver.inject("sim:0/1", "lost")
        for stream in streams:
            stream.check()
        episode = driver.wait_recovered(2)[-1]
        assert (episode["outcome"], episode["devices_lost"]) == ("serving", ["sim:0/1"])
        assert 256 // 16 <= driver.engine.status()["kv"]["blocks"] < (1 << 15) // driver.config.kv_block_size


def test_an_engine_attaches_to_chunks_that_an_earlier_one_left(folder):
    with nothing_left() as runtime_dir:
        with running_engine(folder, 2, kind="sim:1/", runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.submit(prompt_of(1), 20).check()
        with running_engine(folder, 2, kind="sim:1/", runtime_dir=runtime_dir) as driver:
            (start,) = driver.wait_recovered(1)
            assert start["bytes"]["loaded"] == 0
            driver.submit(prompt_of(2), 20).check()


def test_streams_go_on_while_devices_join_and_leave(folder):
    """Chunks are committed under workers that compute, and taken back from them between two epochs."""
    with running_engine(folder, 3, kind="sim:0/", collectives="peer") as driver:
        streams = driver.speak(4, 300)
        (joined,) = change(driver, add=("sim:0/3", "sim:1/0"))
        (weighed,) = change(driver, speeds=(("sim:0/1", 3.0),))
        (left,) = change(driver, remove=("sim:0/0", "sim:0/2"))
        assert [e["outcome"] for e in (joined, weighed, left)] == ["serving"] * 3
        driver.inject("sim:1/0", "lost")
        for stream in streams:
            stream.check()
        assert members(driver) == {"sim:0/1", "sim:0/3"}
        with pytest.raises(ConfigError, match="do not mix"):
            change(driver, add=("cpu:0",))
