"""What the engine's status and the metrics say while workers load, with processes and anchors left out."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from anchortp.config import EngineConfig, parse_model_config
from anchortp.engine import messages as m
from anchortp.engine.controller import ElasticEngine
from anchortp.recovery import events as ev
from anchortp.server.metrics import ServerMetrics
from tests.pure.test_engine_adopting import MODEL

DEVICES = ("cpu:0", "cpu:1")


class _Worker:
    def __init__(self, device: str):
        self.device, self.pid = device, os.getpid()
        self.channel = SimpleNamespace(post=lambda message, fds: None)


class Loading:
    """An engine that starts: both devices have been told to load."""

    def __init__(self, engine: ElasticEngine, commands: list[ev.Command], clock: SimpleNamespace):
        self.engine, self._clock = engine, clock
        engine._handle(
            ev.Start(devices=tuple(ev.DeviceFound(device=d, budget_bytes=1 << 30) for d in DEVICES), epoch=1)
        )
        engine._handle(ev.CensusTaken(epoch=1, alive=DEVICES))
        for device in DEVICES:
            engine._workers[device] = _Worker(device)
            engine._handle(ev.Attached(device=device, epoch=1))
        (reserve,) = [c for c in commands if isinstance(c, ev.Reserve)]
        engine._handle(ev.Reserved(epoch=1, ticket=reserve.ticket))
        self.orders = {c.device: c for c in commands if isinstance(c, ev.Load)}
        assert set(self.orders) == set(DEVICES)

    def say(self, device: str, message: object) -> None:
        self.engine._on_worker_message(self.engine._workers[device], message)

    def report(self, device: str, at_s: float, num_bytes: int, *, ticket: int | None = None, **links) -> None:
        self._clock.now = at_s
        ticket = self.orders[device].ticket if ticket is None else ticket
        self.say(device, m.LoadProgress(epoch=1, ticket=ticket, num_bytes=num_bytes, total_bytes=1000, links=links))

    def done(self, device: str) -> None:
        done = m.LoadDone(
            epoch=1, ticket=self.orders[device].ticket, num_bytes=1000, seconds=1.0, links={"host": (1000, 5e8)}
        )
        self.say(device, done)

    def shown(self) -> dict:
        return {key: value for key, value in self.engine.status().items() if key.startswith("loading_")}

    def lines(self) -> list[str]:
        return [line["text"] for line in self.engine.status()["episodes"][-1]["timeline"]]


@pytest.fixture
def loading(monkeypatch):
    config = EngineConfig(
        model_folder="",
        runtime_dir="",
        model=parse_model_config(MODEL),
        devices=DEVICES,
        device_memory_bytes=1 << 24,
        max_model_len=256,
        kv_block_size=16,
        kv_blocks=16,
    )
    engine, clock = ElasticEngine(config), SimpleNamespace(now=100.0)
    commands: list[ev.Command] = []
    monkeypatch.setattr(engine, "_perform", commands.append)
    monkeypatch.setattr("anchortp.engine.controller.time", SimpleNamespace(monotonic=lambda: clock.now))
    engine._plane = SimpleNamespace(ready_bytes=lambda device: 0)
    yield Loading(engine, commands, clock)
    engine.recovery.validate()
    engine._selector.close()
    engine._wake_in.close()
    engine._wake_out.close()


def test_reports_are_summed_shown_and_told_and_gone_at_the_end(loading):
    assert loading.shown()["loading_total_bytes"] == 0
    loading.report("cpu:0", 101.0, 0)
    loading.report("cpu:1", 101.0, 0)
    assert loading.shown() == {
        "loading_bytes": 0,
        "loading_total_bytes": 2000,
        "loading_left_s": None,
        "loading_links": {},
    }
    loading.report("cpu:0", 103.0, 400, host=(300, 4e8), **{"cpu:9": (100, 9e8)})
    loading.report("cpu:1", 103.0, 800, host=(800, 8e8))
    assert loading.shown() == {
        "loading_bytes": 1200,
        "loading_total_bytes": 2000,
        "loading_left_s": 600 / (400 / 2.0),
        "loading_links": {
            "host>cpu:0": {"bytes": 300, "bytes_per_s": 4e8},
            "cpu:9>cpu:0": {"bytes": 100, "bytes_per_s": 9e8},
            "host>cpu:1": {"bytes": 800, "bytes_per_s": 8e8},
        },
    }
    devices = loading.engine.status()["devices"]
    assert (devices["cpu:1"]["loading_bytes"], devices["cpu:1"]["loading_total_bytes"]) == (800, 1000)
    told = [line for line in loading.lines() if "are there" in line]
    assert len(told) == 1 and told[0].endswith(
        "3.0 s left; host>cpu:0 0.4 GB/s, host>cpu:1 0.8 GB/s, cpu:9>cpu:0 0.9 GB/s"
    )

    loading.done("cpu:1")
    assert loading.shown()["loading_bytes"] == 1400 and loading.shown()["loading_total_bytes"] == 2000
    loading.done("cpu:0")
    assert loading.shown() == {
        "loading_bytes": 0,
        "loading_total_bytes": 0,
        "loading_left_s": 0.0,
        "loading_links": {},
    }
    assert loading.engine.status()["devices"]["cpu:0"]["loading_total_bytes"] == 0
    (line,) = [line for line in loading.lines() if "of weights came in" in line]
    assert line.endswith("; host>cpu:1 0.5 GB/s, host>cpu:0 0.5 GB/s")


def test_however_often_workers_report_the_story_has_a_line_per_quarter(loading):
    loading.report("cpu:0", 101.0, 0)
    loading.report("cpu:1", 101.0, 0)
    for size in range(0, 1000, 3):
        for device in DEVICES:
            loading.report(device, 101.0 + size / 100, size, host=(size, 1e8))
    told = [line for line in loading.lines() if "are there" in line]
    assert len(told) == 3
    assert sum(isinstance(event, ev.Progressed) for _, event in loading.engine.recovery.log) == 3


def test_a_report_of_a_load_that_was_called_off_is_dropped(loading):
    other = max(order.ticket for order in loading.orders.values()) + 1
    loading.report("cpu:0", 101.0, 500, ticket=other)
    assert loading.shown()["loading_total_bytes"] == 0


def test_a_load_that_failed_does_not_count(loading):
    loading.report("cpu:0", 101.0, 500)
    loading.report("cpu:1", 101.0, 500)
    ticket = loading.orders["cpu:0"].ticket
    loading.say("cpu:0", m.LoadRefused(epoch=1, ticket=ticket, reason="no such file"))
    assert loading.engine.status()["state"] == "refusing"
    assert loading.shown()["loading_total_bytes"] == 1000
    loading.done("cpu:1")
    assert loading.shown()["loading_total_bytes"] == 0


def samples(loading) -> dict[tuple[str, str], float]:
    text = ServerMetrics(loading.engine).exposition().decode()
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, sample.labels.get("name", "")): sample.value for sample in found}


def test_metrics_while_weights_move(loading):
    loading.report("cpu:0", 101.0, 0)
    before = samples(loading)
    assert ("anchortp_loading_left_seconds", "") not in before, "nobody knows yet"
    loading.report("cpu:0", 104.0, 600, host=(600, 2e8))
    now = samples(loading)
    assert now["anchortp_loading_bytes", ""] == 600 and now["anchortp_loading_total_bytes", ""] == 1000
    assert now["anchortp_loading_left_seconds", ""] == 400 / (600 / 3.0)
    assert now["anchortp_loading_links_bytes", "host>cpu:0"] == 600
    assert now["anchortp_loading_links_bytes_per_s", "host>cpu:0"] == 2e8
    assert now["anchortp_devices_loading_bytes", "cpu:0"] == 600
    loading.done("cpu:0")
    loading.done("cpu:1")
    after = samples(loading)
    assert after["anchortp_loading_bytes", ""] == after["anchortp_loading_left_seconds", ""] == 0
    assert not [name for name, _ in after if name.startswith("anchortp_loading_links")]
