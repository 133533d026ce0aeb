"""Faults at named places of an engine's life: every request is answered as if nothing had happened."""

from __future__ import annotations

import math

import pytest

from anchortp.engine.faults import Strike, fired_strikes
from tests.procs.engine_tools import prompt_of, running_engine
from tests.tiny_model import write_model

# Waits that are long enough on a loaded machine, and short enough for a test of hangs.
QUICK = {
    "leave_timeout_s": 1.0,
    "attach_timeout_s": 3.0,
    "form_timeout_s": 1.5,
    "load_timeout_s": 1.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


def check_bytes(episodes, *, lost: tuple[str, ...] = ()):
    """Loaded is what was lost; what no device has lost is neither loaded nor copied."""
    assert sorted(device for e in episodes for device in e["devices_lost"]) == sorted(lost)
    allowed, loaded, cut = 0, 0, False
    for episode in episodes:
        moved = episode["bytes"]
        assert moved["copied"] == moved["replicated"] == 0
        assert episode["outcome"] == "serving"
        allowed += moved["lost"] + moved["replica"]
        loaded += moved["loaded"]
        if episode["whole_after_s"] is None:
            cut = True
            continue  # the next fault came before the last weights: they are loaded in its episode
        # What was on its way to a device that was then lost counts as lost twice, and is loaded once.
        assert loaded == allowed if not cut else loaded <= allowed
        allowed, loaded, cut = 0, 0, False


def test_devices_lost_at_every_point_of_a_step(folder):
    strikes = (
        Strike(device="cpu:5", point="prefill", nth=2, kind="lost"),
        Strike(device="cpu:4", point="decode", nth=20, kind="lost"),
        Strike(device="cpu:3", point="collective", nth=300, kind="lost"),
        Strike(device="cpu:2", point="between", nth=100, kind="lost"),
    )
    with running_engine(folder, 6, strikes) as driver:
        driver.submit(prompt_of(9), 4).check()
        for stream in driver.speak(4, 200):
            stream.check()
        driver.check_fired()
        check_bytes(driver.wait_recovered(2)[1:], lost=("cpu:2", "cpu:3", "cpu:4", "cpu:5"))
        assert set(driver.engine.status()["devices"]) == {"cpu:0", "cpu:1"}


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_workers_crash_or_hang_at_every_point_of_a_step(folder, kind):
    strikes = (
        Strike(device="cpu:0", point="prefill", nth=2, kind=kind),
        Strike(device="cpu:1", point="decode", nth=20, kind=kind),
        Strike(device="cpu:2", point="collective", nth=300, kind=kind),
        Strike(device="cpu:3", point="between", nth=100, kind=kind),
    )
    with running_engine(folder, 4, strikes, min_step_deadline_s=0.5) as driver:
        driver.submit(prompt_of(9), 4).check()  # until a step was seen the deadline is a minute
        for stream in driver.speak(4, 200):
            stream.check()
        driver.check_fired()
        check_bytes(driver.wait_recovered(2)[1:])
        assert len(driver.engine.status()["devices"]) == 4


class Script:
    """A second fault in the middle of the recovery from a first one, at each point that a recovery passes."""

    def __init__(self, driver, kind):
        self.driver, self.kind = driver, kind

    def strike_at(self, point, device, *, nth=1, first=None):
        """A new worker of `device` knows the strike. `first`: the fault whose recovery it then strikes."""
        driver = self.driver
        streams = driver.speak(3, 150)
        driver.arm(Strike(device=device, point=point, nth=nth, kind=self.kind))
        pid = driver.worker_pid(device)
        driver.inject(device, "crash")
        if first is not None:
            driver.replaced(device, pid)
            driver.inject(*first)
        for stream in streams:
            stream.check()
        # The streams may have ended before the last fault struck.
        driver.submit(prompt_of(7), 5).check()
        driver.check_fired()
        self.check_second_fault_of_a_recovery()
        driver.validate()

    def check_second_fault_of_a_recovery(self):
        struck_s = fired_strikes(self.driver.runtime_dir)[-1]["at_s"]
        episodes = self.driver.wait_recovered(len(self.driver.episodes))
        # A group serves before its last weights have come: a fault between the two is an episode of its own.
        assert any(
            0 < struck_s - episode["began_s"] < (episode["whole_after_s"] or math.inf) for episode in episodes[-2:]
        )

    def everywhere(self, *devices):
        at_attach, at_leave, at_form, at_load = devices
        self.strike_at("attach", at_attach)
        self.strike_at("leave", at_leave, first=("cpu:0", "crash"))
        self.strike_at("form", at_form, nth=2, first=("cpu:0", "crash"))
        self.strike_at("load", at_load, first=("cpu:1", "lost"))


def test_devices_lost_in_the_middle_of_recoveries(folder):
    with running_engine(folder, 6) as driver:
        Script(driver, "lost").everywhere("cpu:5", "cpu:4", "cpu:3", "cpu:2")
        lost = ("cpu:1", "cpu:2", "cpu:3", "cpu:4", "cpu:5")
        check_bytes(driver.wait_recovered(5)[1:], lost=lost)


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_workers_crash_or_hang_in_the_middle_of_recoveries(folder, kind):
    with running_engine(folder, 4, min_step_deadline_s=0.5, recovery=QUICK) as driver:
        Script(driver, kind).everywhere("cpu:3", "cpu:2", "cpu:3", "cpu:2")
        check_bytes(driver.wait_recovered(5)[1:], lost=("cpu:1",))


def test_a_worker_whose_first_load_was_cut_off_loads_into_the_arena_that_its_successor_maps(folder):
    """As long as a device has nothing its arenas are made anew by every attempt."""
    strikes = (
        Strike(device="cpu:1", point="read", kind="slow", times=10**6),
        Strike(device="cpu:0", point="load", nth=1, kind="crash"),
        Strike(device="cpu:1", point="form", nth=1, kind="crash"),
    )
    with running_engine(folder, 2, strikes, recovery=QUICK) as driver:
        driver.submit(prompt_of(1), 20).check()
        fired = {line["strike"] for line in fired_strikes(driver.runtime_dir)}
        assert fired == {strike.key for strike in strikes}
        (start,) = driver.episodes
        assert start["workers_replaced"] == ["cpu:0", "cpu:1", "cpu:0", "cpu:1"]


@pytest.mark.parametrize("kind", ["crash", "hang", "lost"])
def test_a_fault_while_the_engine_starts(folder, kind):
    strikes = (
        Strike(device="cpu:0", point="load", nth=3, kind=kind),
        Strike(device="cpu:1", point="form", nth=1, kind=kind),
        Strike(device="cpu:2", point="attach", nth=1, kind=kind),
    )
    with running_engine(folder, 4, strikes, recovery=QUICK) as driver:
        driver.submit(prompt_of(1), 20).check()
        driver.check_fired()
        (start,) = driver.episodes
        assert start["outcome"] == "serving"
        assert sorted(start["devices_lost"]) == (["cpu:0", "cpu:1", "cpu:2"] if kind == "lost" else [])
