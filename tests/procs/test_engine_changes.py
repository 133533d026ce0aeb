"""Devices join, leave and change their speed while streams go on; faults strike in the middle of it."""

from __future__ import annotations

import pytest

from anchortp.engine.api import DeviceChange
from anchortp.engine.faults import Strike
from anchortp.errors import ConfigError
from tests.procs.engine_tools import nothing_left, prompt_of, running_engine
from tests.tiny_model import write_model

QUICK = {"leave_timeout_s": 1.0, "attach_timeout_s": 3.0, "form_timeout_s": 1.5, "load_timeout_s": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


def change(driver, **wish) -> list[dict]:
    """Asks for a change and waits for its end; returns the episodes that it took."""
    change_id = driver.engine.change_devices(DeviceChange(**wish))

    def tries() -> list[dict]:
        return [e for e in driver.engine.status()["changes"] if e["change_id"] == change_id]

    def ended() -> bool:
        outcome = tries()[-1]["outcome"] if tries() else ""
        return bool(outcome) and not outcome.startswith(("interrupted", "first "))

    driver.wait(ended, f"the end of change {wish}")
    return tries()


def members(driver) -> set[str]:
    return set(driver.engine.status()["devices"])


def anchors(driver) -> set[str]:
    return {path.stem.removeprefix("anchor-") for path in driver.runtime_dir.glob("anchor-*.sock")}


def test_streams_go_on_while_devices_join_leave_and_change_their_speed(folder):
    with running_engine(folder, 3) as driver:
        streams = driver.speak(4, 400)
        (joined,) = change(driver, add=("cpu:3", "cpu:5"))
        assert joined["outcome"] == "serving" and joined["kv"] == "whole"
        assert members(driver) == {"cpu:0", "cpu:1", "cpu:2", "cpu:3", "cpu:5"}
        (weighed,) = change(driver, speeds=(("cpu:1", 3.0),))
        assert weighed["outcome"] == "serving"
        devices = driver.engine.status()["devices"]
        assert devices["cpu:1"]["mlp_units"] > devices["cpu:0"]["mlp_units"]
        (left,) = change(driver, remove=("cpu:0", "cpu:2"))
        assert left["outcome"] == "serving" and left["kv"] == "whole"
        assert members(driver) == {"cpu:1", "cpu:3", "cpu:5"}
        assert anchors(driver) == {"cpu-1", "cpu-3", "cpu-5", "host"}, "who left holds no memory"
        driver.inject("cpu:5", "lost")
        for stream in streams:
            stream.check()
        assert members(driver) == {"cpu:1", "cpu:3"}
        assert driver.engine.status()["kv"]["replayed_tokens"] == 0 or driver.episodes[-1]["kv"] != "whole"


def test_a_lost_device_returns(folder):
    with running_engine(folder, 3) as driver:
        streams = driver.speak(3, 300)
        driver.inject("cpu:1", "lost")
        driver.wait_recovered(2)
        (joined,) = change(driver, add=("cpu:1",))
        assert joined["outcome"] == "serving" and members(driver) == {"cpu:0", "cpu:1", "cpu:2"}
        for stream in streams:
            stream.check()


@pytest.mark.parametrize(
    ("point", "device", "kind"),
    [
        ("attach", "cpu:3", "crash"),
        ("load", "cpu:3", "crash"),
        ("load", "cpu:3", "lost"),
        ("leave", "cpu:3", "crash"),
        ("restore", "cpu:3", "crash"),
        ("form", "cpu:3", "crash"),
        ("form", "cpu:3", "lost"),
        ("form", "cpu:3", "hang"),
    ],
)
def test_a_joining_device_dies_at_every_point(folder, point, device, kind):
    strike = Strike(device=device, point=point, nth=1, kind=kind)
    with running_engine(folder, 3, (strike,), min_step_deadline_s=0.5, recovery=QUICK) as driver:
        streams = driver.speak(3, 300)
        tries = change(driver, add=("cpu:3",))
        for stream in streams:
            stream.check()
        driver.check_fired()
        if kind != "lost":
            assert tries[-1]["outcome"] == "serving" and "cpu:3" in members(driver)
        elif point == "load":
            assert "cpu:3" in tries[-1]["outcome"] and "cpu:3" not in members(driver)


@pytest.mark.parametrize("kind", ["crash", "lost"])
@pytest.mark.parametrize("point", ["decode", "leave", "arrange", "form"])
def test_a_member_dies_in_the_middle_of_a_change(folder, point, kind):
    with running_engine(folder, 4, min_step_deadline_s=0.5, recovery=QUICK) as driver:
        streams = driver.speak(3, 400)
        pid = driver.worker_pid("cpu:2")
        driver.arm(Strike(device="cpu:2", point=point, nth=5 if point == "decode" else 2, kind=kind))
        driver.inject("cpu:2", "crash")  # its next worker knows the strike
        driver.replaced("cpu:2", pid)
        change(driver, remove=("cpu:0",))
        for speed in (3.0, 0.3, 1.0):  # units come and go, so that slots have to be closed
            if "cpu:2" in members(driver):
                change(driver, speeds=(("cpu:2", speed),))
        for stream in streams:
            stream.check()
        driver.check_fired() if point != "arrange" else None
        assert "cpu:0" not in members(driver)


def test_what_cannot_be_is_refused_and_serving_goes_on(folder):
    with running_engine(folder, 2) as driver:
        streams = driver.speak(2, 200)
        for wish, words in (
            ({"add": ("gpu:1",)}, "gpu:1"),
            ({}, "at least one device"),
            ({"add": ("cpu:2",), "remove": ("cpu:2",)}, "each once"),
        ):
            with pytest.raises(ConfigError, match=words):
                driver.engine.change_devices(DeviceChange(**wish))
        for wish, words in (
            ({"add": ("cpu:1",)}, "in the group already"),
            ({"remove": ("cpu:7",)}, "is not in the group"),
            ({"remove": ("cpu:0", "cpu:1")}, "no device is left"),
            ({"add": ("cpu:2",), "memory_bytes": 100_000}, "budget"),
            ({"add": tuple(f"cpu:{i}" for i in range(2, 20))}, "q heads"),
        ):
            (refused,) = change(driver, **wish)
            assert refused["outcome"].startswith("refused") and words in refused["outcome"], refused["outcome"]
        for stream in streams:
            stream.check()
        assert members(driver) == {"cpu:0", "cpu:1"} and len(driver.episodes) == 1 + 5
        assert anchors(driver) == {"cpu-0", "cpu-1", "host"}


def test_an_engine_that_attaches_again_finds_the_changed_group(folder):
    """The manifests tell of the group as it is after a change."""
    with nothing_left() as runtime_dir:
        with running_engine(folder, 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.submit(prompt_of(3), 8).check()
            change(driver, remove=("cpu:2",))
        with running_engine(folder, 2, runtime_dir=runtime_dir) as driver:
            assert driver.episodes[0]["bytes"]["loaded"] == 0
            driver.submit(prompt_of(3), 8).check()
