"""Measured rates find their way into plans."""

from __future__ import annotations

import pytest

from anchortp.layout import initial_layout, model_units
from anchortp.plan import Problem, Rates, makespan, predict
from tests.pure.test_layout_and_shrink import devices, make_config

UNITS = model_units(make_config(kv_heads=3, group=3))


def test_newer_measurements_count_more_and_small_ones_not_at_all():
    rates = Rates(measured={}).fold("cpu:0", {"host": (1 << 30, 8e9), "cpu:1": (10, 1.0)})
    assert rates.measured == {("host", "cpu:0"): 8e9}
    for _ in range(10):
        rates = rates.fold("cpu:0", {"host": (1 << 30, 2e9)})
    assert rates.measured["host", "cpu:0"] == pytest.approx(2e9, rel=0.01)


def test_a_device_that_takes_bytes_in_slowly_is_planned_for():
    names = devices(4)
    before = initial_layout(UNITS, names).without(["cpu:1"])

    def load_s(rates: Rates) -> tuple[float, int]:
        problem = Problem(
            units=UNITS, before=before, devices=before.devices, topology=rates.topology(before.devices), relays=False
        )
        plan = makespan(problem)
        return predict(plan, problem.network).makespan_s, plan.bytes_by_device()["cpu:0"]

    fast_s, fast = load_s(Rates(measured={}))
    slow_s, slow = load_s(Rates(measured={}).fold("cpu:0", {"host": (1 << 30, 2e8)}))
    assert slow < fast and slow_s > fast_s, "the odd units go to the others"
