"""Processes of the engine that die: workers, spares, the zygote, anchors; one after another and together."""

from __future__ import annotations

import signal

import pytest

from anchortp.errors import ChannelClosed, ConfigError, EngineStopped
from anchortp.state.client import AnchorClient
from tests.procs.engine_tools import (
    Driver,
    check_bytes,
    kill_process,
    nothing_left,
    processes_naming,
    prompt_of,
    running_engine,
    wait_dead,
    wait_state,
)
from tests.tiny_model import write_model

LONG, SHORT = 200, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    changes = {
        "model_type": "qwen3",
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "tie_word_embeddings": False,
        "intermediate_size": 320,
    }
    return write_model(tmp_path_factory.mktemp("qwen3") / "model", seed=3, **changes)


def loaded_after_start(driver: Driver) -> int:
    return sum(episode["bytes"]["loaded"] for episode in driver.episodes[1:])


def zygote_pid(driver: Driver) -> int:
    return driver.engine._processes._zygote.pid


def spare_pids(driver: Driver) -> list[int]:
    return [process.pid for process in driver.engine._processes._spares]


def ready_bytes(driver: Driver) -> dict[str, int]:
    return {device: found["ready_bytes"] for device, found in driver.engine.status()["devices"].items()}


def adopted(driver: Driver, device: str, old_pid: int) -> None:
    """Waits until a new anchor holds the device's memory."""
    driver.wait(
        lambda: (
            any(
                f"new anchor of {device} holds its memory" in line["text"]
                for episode in driver.episodes
                for line in episode["timeline"]
            )
            and driver.engine.status()["devices"][device]["has_anchor"]
        ),
        f"a new anchor of {device}",
    )
    assert driver.anchor_pid(device) != old_pid


# ----------------------------------------------------------------------------------------- down to the last


@pytest.mark.parametrize("order", [(5, 0, 3, 1, 4, 2), (0, 1, 2, 3, 4, 5)])
def test_all_devices_are_lost_one_by_one(folder, order):
    with running_engine(folder, 6) as driver:
        for device in order[:-1]:
            streams = driver.speak(3, 60)
            driver.inject(f"cpu:{device}", "lost")
            for stream in streams:
                stream.check()
        streams = driver.speak(2, 400)
        episodes = driver.wait_recovered(6)
        check_bytes(episodes[1:])
        driver.inject(f"cpu:{order[-1]}", "lost")
        for stream in streams:
            assert stream.wait_end() == "error"
            assert "no device is left" in stream.error
        driver.wait(lambda: driver.state == "refusing", "the refusal")
        with pytest.raises(EngineStopped, match="no device is left"):
            driver.submit(prompt_of(1), 4)


def test_every_degree_of_a_qwen3_model(qwen):
    """Untied embeddings, q and k norms, and as many KV heads as q heads: nothing but the last copy is anywhere."""
    with running_engine(qwen, 5) as driver:
        for device in (2, 0, 4, 3):
            streams = driver.speak(3, 50)
            driver.inject(f"cpu:{device}", "lost")
            for stream in streams:
                stream.check()
        driver.submit(prompt_of(5, 40), 30).check()
        for episode in driver.wait_recovered(5)[1:]:
            assert episode["bytes"]["loaded"] == episode["bytes"]["lost"] > 0
            assert episode["bytes"]["copied"] == episode["bytes"]["replica"] == 0


def test_several_devices_lost_at_once(folder):
    with running_engine(folder, 5) as driver:
        streams = driver.speak(4, LONG)
        for device in ("cpu:1", "cpu:3", "cpu:4"):
            driver.inject(device, "lost")
        for stream in streams:
            stream.check()
        assert set(driver.engine.status()["devices"]) == {"cpu:0", "cpu:2"}


def test_memory_is_made_ready_for_each_next_loss(folder):
    with running_engine(folder, 4) as driver:
        for lost in ("cpu:2", "cpu:0", "cpu:3"):
            driver.wait(lambda: all(ready_bytes(driver).values()), "memory that is ready")
            streams = driver.speak(2, LONG)
            driver.inject(lost, "lost")
            for stream in streams:
                stream.check()
        assert ready_bytes(driver) == {"cpu:1": 0}  # there is no next one


# ------------------------------------------------------------------------------------ spares and the zygote


def test_workers_spares_and_the_zygote_die(folder):
    with running_engine(folder, 3) as driver:
        streams = driver.speak(3, LONG)
        # Two at once, with one spare.
        pids = {device: driver.worker_pid(device) for device in ("cpu:0", "cpu:2")}
        for pid in pids.values():
            kill_process(pid)
        for device, pid in pids.items():
            driver.replaced(device, pid)
        # One right after it was replaced.
        kill_process(driver.worker_pid("cpu:2"))
        for stream in streams:
            stream.check()

        driver.submit(prompt_of(1), SHORT).check()
        driver.wait(lambda: driver.engine.status()["num_spares"] == 1 and spare_pids(driver), "a spare")
        # An idle spare: another takes its place, and nobody else notices.
        epoch, (spare,) = driver.engine.status()["epoch"], spare_pids(driver)
        streams = driver.speak(2, LONG)
        kill_process(spare)
        driver.wait(lambda: spare_pids(driver) not in ([], [spare]), "another spare")
        # The zygote: its workers live on.
        zygote = zygote_pid(driver)
        kill_process(zygote)
        for stream in streams:
            stream.check()
        assert driver.engine.status()["epoch"] == epoch
        driver.wait(lambda: zygote_pid(driver) != zygote, "another zygote")
        # All workers and the zygote with its spare: nothing is left that computes.
        streams = driver.speak(2, LONG)
        pids = {device: driver.worker_pid(device) for device in ("cpu:0", "cpu:1", "cpu:2")}
        for pid in (zygote_pid(driver), *spare_pids(driver), *pids.values()):
            kill_process(pid)
        for stream in streams:
            stream.check()
        assert loaded_after_start(driver) == 0


def test_a_worker_dies_while_no_process_can_be_forked(folder):
    """A device waits for a process that is yet to be forked when the next fault raises the epoch."""
    with running_engine(folder, 3, num_spares=0) as driver:
        streams = driver.speak(2, LONG)
        kill_process(zygote_pid(driver))
        kill_process(driver.worker_pid("cpu:1"))
        driver.wait(lambda: driver.engine.status()["phase"] == "attaching", "the device to wait for a process")
        kill_process(driver.worker_pid("cpu:2"))
        for stream in streams:
            stream.check()
        (episode,) = driver.wait_recovered(2)[1:]
        assert episode["bytes"]["loaded"] == 0 and episode["devices_lost"] == []
        assert not any("did not answer in time" in line["text"] for line in episode["timeline"])


# -------------------------------------------------------------------------------------------------- anchors


def test_an_anchor_crash_does_not_stop_serving_and_keeps_every_byte(folder):
    with running_engine(folder, 3) as driver:
        streams = driver.speak(3, LONG)
        epoch, anchor = driver.engine.status()["epoch"], driver.anchor_pid("cpu:1")
        kill_process(anchor)
        adopted(driver, "cpu:1", anchor)
        assert driver.engine.status()["epoch"] == epoch
        # Only the new anchor's memory is left when the worker that had handed it over dies.
        pid = driver.worker_pid("cpu:1")
        kill_process(pid)
        for stream in streams:
            stream.check()
        driver.replaced("cpu:1", pid)
        assert loaded_after_start(driver) == 0
        with AnchorClient.connect(driver.runtime_dir, "cpu:1", role="tool") as tool:
            status = tool.status()
        with AnchorClient.connect(driver.runtime_dir, "cpu:0", role="tool") as tool:
            assert {arena.name for arena in status.arenas} == {arena.name for arena in tool.status().arenas}
        assert status.committed_bytes > 0


def test_anchors_die_in_the_middle_of_everything(folder):
    with running_engine(folder, 4) as driver:
        # With its worker: the device is lost, and no anchor is started for it that nobody asked for.
        streams = driver.speak(3, LONG)
        for pid in (driver.anchor_pid("cpu:3"), driver.worker_pid("cpu:3")):
            kill_process(pid)
        for stream in streams:
            stream.check()
        assert "cpu:3" not in driver.engine.status()["devices"]
        # While another worker's crash is recovered from.
        streams = driver.speak(3, LONG)
        anchor = driver.anchor_pid("cpu:1")
        kill_process(driver.worker_pid("cpu:0"))
        kill_process(anchor)
        for stream in streams:
            stream.check()
        adopted(driver, "cpu:1", anchor)
        # All of them at the same time.
        streams = driver.speak(3, LONG)
        anchors = {device: driver.anchor_pid(device) for device in ("cpu:0", "cpu:1", "cpu:2")}
        for pid in anchors.values():
            kill_process(pid)
        for device, pid in anchors.items():
            adopted(driver, device, pid)
        for device in anchors:
            kill_process(driver.worker_pid(device))
        for stream in streams:
            stream.check()
        assert set(driver.engine.status()["devices"]) == set(anchors)
        assert loaded_after_start(driver) == driver.episodes[1]["bytes"]["loaded"]


def test_an_anchor_that_hangs_is_fenced_and_replaced(folder, monkeypatch):
    monkeypatch.setattr("anchortp.engine.plane.PING_TIMEOUT_S", 0.5)
    with running_engine(folder, 3) as driver:
        streams = driver.speak(2, LONG)
        anchor = driver.anchor_pid("cpu:2")
        kill_process(anchor, signal.SIGSTOP)
        kill_process(driver.worker_pid("cpu:1"))
        for stream in streams:
            stream.check()
        adopted(driver, "cpu:2", anchor)
        driver.submit(prompt_of(2), SHORT).check()
        assert loaded_after_start(driver) == 0
        assert set(driver.engine.status()["devices"]) == {"cpu:0", "cpu:1", "cpu:2"}


# ------------------------------------------------------------------------------------- starting and stopping


def test_stopping_while_a_worker_hangs(folder):
    with running_engine(folder, 3) as driver:
        streams = driver.speak(2, 400)
        pid = driver.worker_pid("cpu:1")
        driver.inject("cpu:1", "hang")
        wait_state(pid, "T")
        driver.engine.stop()
        for stream in streams:
            assert (stream.wait_end(), stream.error) == ("error", "the engine stopped")
        with pytest.raises(EngineStopped):
            driver.submit(prompt_of(1), 4)


def test_anchors_that_are_kept_serve_the_next_engine_without_a_load(folder):
    with nothing_left() as runtime_dir:
        with running_engine(folder, 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.submit(prompt_of(1), SHORT).check()
            with pytest.raises(ConfigError, match="another engine serves"):
                Driver(folder, runtime_dir, 3, (), {}).engine.start()
            driver.inject("cpu:1", "lost")
            driver.submit(prompt_of(2), SHORT).check()
        anchors = processes_naming(str(runtime_dir))
        # Two devices and the host are left.
        assert len(anchors) == 3 and all("anchortp.state.anchor" in line for line in anchors.values())
        # The device that was lost is back, empty: what is whole and uneven is laid out anew.
        with running_engine(folder, 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.submit(prompt_of(3), SHORT).check()
        with running_engine(folder, 3, runtime_dir=runtime_dir) as driver:
            assert driver.episodes[0]["bytes"]["loaded"] == 0
            driver.submit(prompt_of(1), SHORT).check()
            anchor = driver.anchor_pid("cpu:1")
        wait_dead(anchor)
        with pytest.raises(ChannelClosed):
            AnchorClient.connect(runtime_dir, "cpu:1", role="tool")


@pytest.mark.parametrize("kind", ["crash", "lost"])
def test_gloo_instead_of_shared_memory(folder, kind):
    with nothing_left() as runtime_dir:
        (runtime_dir / "gloo-1").write_bytes(b"left by an engine that was killed")
        with running_engine(folder, 3, runtime_dir=runtime_dir, collectives="gloo") as driver:
            streams = driver.speak(2, 60)
            driver.inject("cpu:1", kind)
            for stream in streams:
                stream.check()
            driver.wait_recovered(2)
        assert not list(runtime_dir.glob("gloo-*"))
