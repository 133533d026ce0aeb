"""From a GPU's error to what is lost, and to whom the worker says so."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from anchortp.arena.vmm import DriverError
from anchortp.engine import messages as m
from anchortp.engine.device_errors import CRASHED, LOST, LOST_AT_ATTACH, verdict_of
from anchortp.engine.worker import Worker
from anchortp.errors import ChannelClosed, ChannelTimeout, ConfigError, StateError


def torch_error(code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError("CUDA error: as torch raises it")
    error.error_code = code
    return error


@pytest.mark.parametrize("make", [torch_error, lambda code: DriverError("cuMemMap failed", error_code=code)])
def test_every_code_has_its_verdict(make):
    for code in (*LOST, *CRASHED, *LOST_AT_ATTACH, 2, 600, 1, 12345):
        serving, attaching = verdict_of(make(code), attaching=False), verdict_of(make(code), attaching=True)
        assert serving[0] == ("lost" if code in LOST else "crashed" if code in CRASHED else "ours")
        assert attaching[0] == ("lost" if code in LOST or code in LOST_AT_ATTACH else serving[0])
        assert f"CUDA error {code}" in serving[1]


def test_the_names_are_the_drivers():
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    names = {code: driver.CUresult(code).name for code in (*LOST, *CRASHED, *LOST_AT_ATTACH)}
    assert names[214] == "CUDA_ERROR_ECC_UNCORRECTABLE" and names[220] == "CUDA_ERROR_NVLINK_UNCORRECTABLE"
    assert names[226] == "CUDA_ERROR_CONTAINED" and names[46] == "CUDA_ERROR_DEVICE_UNAVAILABLE"
    assert names[802] == "CUDA_ERROR_SYSTEM_NOT_READY" and names[999] == "CUDA_ERROR_UNKNOWN"
    assert (names[700], names[710]) == ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_ASSERT")
    assert (names[3], names[100]) == ("CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_NO_DEVICE")


def test_the_code_is_found_behind_the_error_that_came_of_it():
    with pytest.raises(ConfigError) as caught:
        try:
            raise DriverError("cuInit failed", error_code=100)
        except DriverError as error:
            raise ConfigError("there is no GPU") from error
    assert verdict_of(caught.value, attaching=True)[0] == "lost"
    assert verdict_of(ValueError("no GPU in this"), attaching=True) == ("ours", "")


class Anchor:
    def __init__(self, error: Exception | None = None):
        self.error, self.reported = error, []

    def report_lost(self, reason: str, epoch: int) -> None:
        self.reported.append((reason, epoch))
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, ChannelTimeout("stuck")])
def test_a_worker_tells_the_anchor_of_a_lost_device_and_of_nothing_else(error):
    worker = Worker(channel=None)
    worker._anchor, worker._epoch, worker._assignment = Anchor(error), 7, object()
    assert "[crashed: device-side assert (CUDA error 710)]" in worker.explain(torch_error(710))
    assert worker.explain(ValueError("a bug")) == "ValueError: a bug"
    assert worker._anchor.reported == []
    assert "[lost: uncorrectable ECC error (CUDA error 214)]" in worker.explain(torch_error(214))
    assert worker._anchor.reported == [("uncorrectable ECC error (CUDA error 214)", 7)]


def test_before_it_has_an_anchor_a_worker_has_nobody_to_tell():
    assert "no device" in Worker(channel=None).explain(torch_error(100))


class Exit(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def loading(monkeypatch) -> tuple[Worker, list[m.WorkerFailed]]:
    """A worker that has a load, and what it sends."""

    def leave(status: int) -> NoReturn:
        raise Exit(status)

    monkeypatch.setattr(os, "_exit", leave)
    sent: list[m.WorkerFailed] = []
    worker = Worker(channel=SimpleNamespace(send=sent.append))
    worker._anchor, worker._epoch, worker._assignment = Anchor(), 7, object()
    return worker, sent


def test_a_device_that_fails_in_a_load_ends_the_worker_as_in_a_step(loading):
    worker, sent = loading
    with pytest.raises(Exit, match="1"):
        worker._load_met(torch_error(214))
    assert worker._anchor.reported == [("uncorrectable ECC error (CUDA error 214)", 7)]
    assert ["lost: uncorrectable ECC error" in message.reason for message in sent] == [True]


def test_a_context_that_broke_in_a_load_ends_the_worker_alone(loading):
    worker, sent = loading
    with pytest.raises(Exit):
        worker._load_met(DriverError("cuMemMap failed", error_code=700))
    assert worker._anchor.reported == [] and "crashed: illegal address" in sent[0].reason


def test_who_cannot_say_why_it_ends_ends_all_the_same(loading):
    worker, _ = loading

    def send(message: object) -> NoReturn:
        raise ChannelClosed("the controller is gone")

    worker._channel = SimpleNamespace(send=send)
    with pytest.raises(Exit):
        worker._load_met(torch_error(214))


@pytest.mark.parametrize("error", [OSError("the disk"), StateError("a peer went away"), torch_error(2)])
def test_what_is_no_statement_about_the_device_is_the_loads_to_deal_with(loading, error):
    worker, sent = loading
    worker._load_met(error)
    assert sent == [] and worker._anchor.reported == []
