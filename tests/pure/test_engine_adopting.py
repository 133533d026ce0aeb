"""How the engine has a device's memory adopted when its anchor dies, with processes and anchors left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from anchortp.config import EngineConfig, parse_model_config
from anchortp.engine import messages as m
from anchortp.engine.controller import ElasticEngine, _Ahead
from anchortp.recovery import events as ev

DEVICE = "cpu:0"
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


class _Plane:
    """Anchors that start at once."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.dropped: list[str] = []

    def ensure_anchor(self, device: str) -> None:
        self.started.append(device)

    def reconnect(self, device: str, epoch: int) -> None:
        pass

    def committed_ranges(self, device: str) -> dict[str, list[tuple[int, int]]]:
        return {}

    def put_manifest(self, shard: object, num_kv_blocks: int, epoch: int) -> None:
        pass

    def drop(self, device: str) -> None:
        self.dropped.append(device)


class _Worker:
    def __init__(self) -> None:
        self.device, self.pid = DEVICE, os.getpid()
        self.heard: list[object] = []
        self.channel = SimpleNamespace(post=lambda message, fds: self.heard.append(message))

    def kill(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ElasticEngine]:
    monkeypatch.setattr("anchortp.engine.controller.wait_dead", lambda pid, timeout_s: False)
    config = EngineConfig(
        model_folder="",
        runtime_dir="",
        model=parse_model_config(MODEL),
        devices=(DEVICE,),
        device_memory_bytes=1 << 24,
        max_model_len=256,
        kv_block_size=16,
        kv_blocks=16,
    )
    engine = ElasticEngine(config)
    events: list[ev.Event] = []
    monkeypatch.setattr(engine, "_handle", events.append)
    engine.events = events
    engine.recovery = SimpleNamespace(members=(DEVICE,), epoch=1, layout={DEVICE: None}, num_kv_blocks=16)
    engine._plane = _Plane()
    engine._processes = SimpleNamespace(forget=lambda device: None)
    yield engine
    engine._selector.close()
    engine._wake_in.close()
    engine._wake_out.close()


def _order_hand_over(engine: ElasticEngine) -> _Worker:
    """A worker whose device's anchor has died, and which has been told of the new one."""
    worker = engine._workers[DEVICE] = _Worker()
    engine._adopt(DEVICE)
    engine._adopting[DEVICE].join()
    engine._run_inbox()
    assert [type(message) for message in worker.heard] == [m.HandOver]
    return worker


def test_a_worker_is_asked_once_until_it_answers(engine):
    worker = _order_hand_over(engine)
    engine._adopt(DEVICE)
    assert engine._plane.started == [DEVICE] and not engine._adopting
    engine._on_worker_message(worker, m.HandedOver(ok=True))
    assert engine.events == [ev.Adopted(device=DEVICE, ok=True)]
    _order_hand_over(engine)


def test_a_worker_that_dies_before_it_answers_does_not_keep_the_next_from_being_asked(engine):
    engine._on_worker_end(_order_hand_over(engine), "killed")
    _order_hand_over(engine)
    engine._perform(ev.Drop(device=DEVICE, reason="lost"))
    _order_hand_over(engine)
    assert engine._plane.started == 3 * [DEVICE] and engine._plane.dropped == [DEVICE]


def test_an_anchor_that_is_being_started_is_waited_for_though_its_worker_dies(engine):
    worker = engine._workers[DEVICE] = _Worker()
    engine._adopt(DEVICE)
    engine._on_worker_end(worker, "killed")
    engine._adopting[DEVICE].join()  # as when the engine stops
    engine._run_inbox()
    assert ev.Adopted(device=DEVICE, ok=False, reason="its worker is gone too") in engine.events
    assert not engine._adopting


def test_memory_is_made_ready_anew_when_a_device_has_an_anchor_again(engine):
    worker = _order_hand_over(engine)
    engine._ahead = _Ahead(epoch=1, due_s=0.0, work=iter(()))
    engine._on_worker_message(worker, m.HandedOver(ok=True))
    assert engine._ahead is None
