"""The engine on virtual devices of one GPU: faults change no token."""

from __future__ import annotations

import importlib.util

import pytest

from tests.procs.engine_tools import Driver, running_engine
from tests.tiny_model import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    shape = {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 48}
    return write_model(tmp_path_factory.mktemp("mixtral") / "model", **shape)


def lose(driver: Driver, device: str) -> None:
    """The first fault: while streams speak, who go on as if nothing were."""
    streams = driver.speak(3, 60)
    driver.inject(device, "lost")
    for stream in streams:
        stream.check()
    assert driver.wait_recovered(2)[-1]["devices_lost"] == [device]


@pytest.mark.parametrize("collectives", ["peer", "shm"])
def test_a_lost_device_and_a_crashed_worker_change_no_token(folder, collectives):
    options = {"kind": "cuda:0/", "collectives": collectives, "device_memory_bytes": 1 << 30}
    with running_engine(folder, 3, min_step_deadline_s=10.0, **options) as driver:
        lose(driver, "cuda:0/2")
        streams, pid = driver.speak(3, 60), driver.worker_pid("cuda:0/1")
        driver.inject("cuda:0/1", "crash")
        driver.replaced("cuda:0/1", pid)
        for stream in streams:
            stream.check()
        assert driver.wait_recovered(3)[-1]["bytes"]["loaded"] == 0


def test_kernels_by_triton_change_no_token(folder):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    options = {"kind": "cuda:0/", "device_memory_bytes": 1 << 30, "kernels": "triton"}
    with running_engine(folder, 3, min_step_deadline_s=10.0, **options) as driver:
        lose(driver, "cuda:0/2")


def test_a_mixture_of_experts_loses_a_device(mixture):
    """Rank 0 also reports how busy its experts were, from its first step on."""
    options = {"kind": "cuda:0/", "device_memory_bytes": 1 << 30}
    with running_engine(mixture, 3, min_step_deadline_s=10.0, **options) as driver:
        lose(driver, "cuda:0/2")
