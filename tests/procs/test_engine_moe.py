"""Mixtures of experts through faults: every stream says what one device alone would have said."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from anchortp.cli.status import expert_line
from anchortp.engine.faults import Strike
from anchortp.layout import EXPERT, KV, Layout
from anchortp.recovery import Coordinator
from anchortp.recovery.events import Form
from anchortp.server.metrics import EngineCollector
from tests.procs.engine_tools import check_bytes, nothing_left, prompt_of, running_engine, wait_balanced
from tests.tiny_model import write_model

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 48}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    models = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}
    return {name: write_model(root / name, **raw) for name, raw in models.items()}


@pytest.mark.parametrize(("name", "expert_cut"), [("mixtral", "experts"), ("qwen3_moe", "columns")])
def test_devices_lost_while_streams_speak(folders, name, expert_cut):
    """Two of four devices, one after the other, and a worker that crashes in between."""
    strikes = (
        Strike(device="cpu:3", point="decode", nth=20, kind="lost"),
        Strike(device="cpu:0", point="decode", nth=40, kind="crash"),
        Strike(device="cpu:1", point="collective", nth=400, kind="lost"),
    )
    with running_engine(folders[name], 4, strikes, expert_cut=expert_cut) as driver:
        for stream in driver.speak(3, 100):
            stream.check()
        driver.check_fired()
        episodes = driver.wait_recovered(4)
        assert sorted(device for e in episodes for device in e["devices_lost"]) == ["cpu:1", "cpu:3"]
        check_bytes(episodes[1:])
        devices = driver.engine.status()["devices"].values()
        if expert_cut == "experts":
            assert [device["expert_units"] for device in devices] == [5, 5]
        else:
            assert sum(device["mlp_units"] for device in devices) == 16 // 2


def test_a_restart_attaches_to_experts_that_are_cut_alike(folders):
    with nothing_left() as runtime_dir:
        with running_engine(folders["mixtral"], 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.submit(prompt_of(1), 20).check()
        with running_engine(folders["mixtral"], 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            assert driver.episodes[0]["bytes"]["loaded"] == 0
            driver.submit(prompt_of(2), 20).check()
        with running_engine(folders["mixtral"], 3, runtime_dir=runtime_dir, expert_cut="columns") as driver:
            assert driver.episodes[0]["bytes"]["loaded"] > 0, "columns in an arena of whole experts"
            driver.submit(prompt_of(3), 20).check()


def one_collector(engine):
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return registry


def around_loss(recovery: Coordinator, lost: str) -> tuple[Layout, Layout]:
    """What all devices held when `lost` was, and what the group held that was formed without it; from the log."""
    again, before = Coordinator(recovery.units, recovery.config), None
    for at_s, event in list(recovery.log):
        held = again.layout
        commands = again.handle(event, at_s)
        if before is None and lost in again.episodes[-1].devices_lost:
            before = held
        formed = [command.layout for command in commands if isinstance(command, Form)]
        if before is not None and formed:
            return before, formed[-1]
    raise AssertionError(f"{lost} was not lost, or no group was formed without it")


def test_hot_experts_get_replicas_while_streams_speak_and_what_has_one_is_not_loaded_again(folders):
    with running_engine(folders["mixtral"], 3, eplb_interval_s=0.2, eplb_replica_choices=0.0) as driver:
        status = wait_balanced(driver, 1)
        experts = status["experts"]
        text = generate_latest(one_collector(driver.engine)).decode()
        for line in ('experts{name="imbalance"}', 'expert_load{name="4"}', 'devices_expert_load{name="cpu:2"}'):
            assert f"anchortp_{line} " in text
        loads = [device["expert_load"] for device in status["devices"].values()]
        assert sum(loads) == pytest.approx(sum(status["expert_load"].values())) and min(loads) > 0
        assert f"imbalance (slowest device over mean): {experts['first_imbalance']:.3f} at first" in expert_line(status)
        assert experts["replicas"] > 0 and experts["imbalance"] < experts["first_imbalance"]
        assert any(change["outcome"] == "serving" and change["bytes"]["copied"] > 0 for change in status["changes"])
        streams = driver.speak(3, 150)
        recovered = len(driver.episodes)
        driver.inject("cpu:1", "lost")
        for stream in streams:
            stream.check()
        driver.wait_recovered(recovered + 1)
        (fault,) = driver.engine.status()["faults"]
        before, after = around_loss(driver.engine.recovery, "cpu:1")
        rest, unit_bytes = before.without(["cpu:1"]), driver.engine.units.unit_bytes
        lost = {f: set(before["cpu:1"][f]) - rest.held(f) for f in driver.engine.units.families}
        assert len(lost[EXPERT]) < len(before["cpu:1"][EXPERT]), "some of its experts have a replica elsewhere"
        lost_bytes = sum(unit_bytes[family] * len(units) for family, units in lost.items())
        new_kv = sum(len(set(after[device][KV]) - set(before[device][KV])) for device in after.devices)
        moved = fault["bytes"]
        assert moved["lost"] == lost_bytes, "what is lost is what had no replica"
        more = (new_kv - len(lost[KV])) * unit_bytes[KV]  # KV heads that both survivors need now
        assert moved["loaded"] + moved["copied"] == lost_bytes + more, "and nothing else is loaded"
        for device in after.devices:
            assert set(before[device][EXPERT]) <= set(after[device][EXPERT]), "no expert was passed on"
        driver.submit(prompt_of(5), 40).check()
