"""A checkpoint that is replaced under a running engine: old weights or new ones, refused or served, and never mixed."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from anchortp.layout import WeightAddresses
from anchortp.transfer.packed import PackedWeights
from anchortp.transfer.work import Geometry
from tests.procs.engine_tools import nothing_left, running_engine
from tests.procs.test_engine_changes import change
from tests.tiny_model import write_model

DEADLINE_S = 60.0
CHANGED, WRITTEN = "was changed since it was first served", "was written to while it was being served"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("old") / "model", seed=0)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("new") / "model", seed=1)


@pytest.fixture
def served(old, tmp_path):
    return shutil.copytree(old, tmp_path / "served")


def replace_weights(served, new):
    """As a download does it: under another name first."""
    shutil.copy(new / "model.safetensors", served / "part")
    os.replace(served / "part", served / "model.safetensors")


def wait_packed(driver, folder):
    """Until all files of packed weights are full."""
    deadline_s = time.monotonic() + DEADLINE_S
    for path in folder.iterdir():
        packed = PackedWeights(path, Geometry(WeightAddresses(units=driver.engine.units)))
        while not all(packed._table):
            assert time.monotonic() < deadline_s, f"{path} is not filled"
            driver.speak(1, 5)
        packed.close()


def test_old_weights_are_not_packed_as_the_new_ones(served, old, new, tmp_path):
    """A worker that comes after the change maps the old weights, and packs them as such."""
    packed = tmp_path / "packed"
    with running_engine(served, 1, packed_folder=str(packed)) as driver:
        wait_packed(driver, packed)
        replace_weights(served, new)
        pid = driver.worker_pid("cpu:0")
        driver.inject("cpu:0", "crash")
        driver.replaced("cpu:0", pid)
        wait_packed(driver, packed)
        driver.folder = old  # whose tokens these are to be
        driver.speak(1, 20)[0].check()
    with running_engine(served, 1, packed_folder=str(packed)) as driver:
        driver.folder = new
        driver.speak(1, 20)[0].check()
        assert len(list(packed.iterdir())) == 2, "each has a file of its own"


@pytest.mark.parametrize("way", ["another file", "written to"])
def test_a_loss_after_a_warm_restart_mixes_no_weights_of_two_checkpoints(served, old, new, way):
    """Nobody remembers what the bytes should add up to. A file that was opened before another one took its place is
    still the old one, so what it gives is right."""
    with nothing_left() as runtime_dir:
        with running_engine(served, 3, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            driver.speak(1, 5)[0].check()
        with running_engine(served, 3, runtime_dir=runtime_dir) as driver:
            assert driver.episodes[0]["bytes"]["loaded"] == 0
            driver.folder = old
            streams = driver.speak(2, 300)
            if way == "another file":
                replace_weights(served, new)
            else:
                shutil.copy(new / "model.safetensors", served / "model.safetensors")
            driver.inject("cpu:1", "lost")
            if way == "another file" and {stream.wait_end() for stream in streams} == {"length"}:
                for stream in streams:
                    stream.check()
                return
            for stream in streams:
                assert stream.wait_end() == "error", "new weights were believed"
                assert CHANGED in stream.error or WRITTEN in stream.error, stream.error
            assert driver.state == "refusing"


def test_a_device_that_joins_needs_no_checkpoint_where_others_have_all(served, old, new):
    with running_engine(served, 2) as driver:
        replace_weights(served, new)
        driver.folder = old
        streams = driver.speak(2, 100)
        (joined,) = change(driver, add=("cpu:2",))
        assert joined["outcome"] == "serving"
        for stream in streams:
            stream.check()
