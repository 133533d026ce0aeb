"""Loads in a running engine: sources that fail, weights kept as arenas hold them, and no wrong token."""

from __future__ import annotations

import time

import pytest

from anchortp.config import load_model_config
from anchortp.engine.faults import Strike
from anchortp.layout import WeightAddresses, model_units
from anchortp.transfer.packed import PackedWeights
from anchortp.transfer.work import Geometry
from tests.procs.engine_tools import running_engine
from tests.tiny_model import write_model

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("kind", ["error", "corrupt", "short", "slow"])
def test_the_host_fails_once_in_a_recovery(folder, kind):
    """The bytes are read again; streams go on with the right tokens."""
    with running_engine(folder, 3) as driver:
        driver.speak(1, 5)[0].check()
        pid = driver.worker_pid("cpu:0")
        driver.arm(Strike(device="cpu:0", point="read", kind=kind, at_byte=5000))
        driver.inject("cpu:0", "crash")
        driver.replaced("cpu:0", pid)
        streams = driver.speak(3, 100)
        driver.inject("cpu:2", "lost")
        for stream in streams:
            stream.check()
        driver.check_fired()


def test_weights_are_packed_while_serving_and_read_in_a_recovery(folder, tmp_path):
    with running_engine(folder, 3, packed_folder=str(tmp_path)) as driver:
        driver.speak(1, 20)[0].check()
        units = model_units(load_model_config(folder))
        (path,) = tmp_path.iterdir()
        packed = PackedWeights(path, Geometry(WeightAddresses(units=units)))
        deadline_s = time.monotonic() + DEADLINE_S
        while not all(packed._table):
            assert time.monotonic() < deadline_s, "the file is not filled"
            driver.speak(1, 5)[0].check()
        packed.close()
        streams = driver.speak(3, 100)
        driver.inject("cpu:1", "lost")
        for stream in streams:
            stream.check()
