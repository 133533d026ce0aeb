"""Loads in a running engine: sources that fail, weights kept as arenas hold them, and no wrong token."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from anchortp.config import load_model_config, reads_panels
from anchortp.engine.faults import Strike
from anchortp.layout import FAMILIES, WeightAddresses, model_units
from anchortp.state.client import AnchorClient
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_units
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


def test_weights_move_into_huge_pages_while_serving_and_through_a_recovery(tmp_path):
    """Of what a device holds of the embedding and lm_head; nothing else is large enough here."""
    folder = write_model(tmp_path / "wide", vocab_size=64_000)
    with running_engine(folder, 3) as driver:
        streams = driver.speak(3, 200)
        for device in ("cpu:0", "cpu:1", "cpu:2"):
            wait_for_huge_pages(driver, device)
        driver.inject("cpu:1", "lost")
        driver.wait_recovered(2)
        driver.inject("cpu:0", "crash")
        for stream in streams:
            stream.check()
        for device in ("cpu:0", "cpu:2"):
            wait_for_huge_pages(driver, device)
        driver.speak(1, 20)[0].check()


def wait_for_huge_pages(driver, device):
    smaps, deadline_s = Path(f"/proc/{driver.worker_pid(device)}/smaps_rollup"), time.monotonic() + DEADLINE_S
    while not re.search(r"ShmemPmdMapped:\s+[1-9]", smaps.read_text()):
        assert time.monotonic() < deadline_s, "nothing was gathered into huge pages"
        driver.speak(1, 5)[0].check()


@pytest.mark.skipif(not reads_panels(), reason="no panels are known for this CPU")
def test_weights_in_panels_are_what_the_plain_loader_writes_after_a_recovery(tmp_path):
    shape = {"head_dim": 64, "intermediate_size": 512, "vocab_size": 600}
    folder = write_model(tmp_path / "wide", dtype="bfloat16", **shape)
    with running_engine(folder, 3) as driver:
        streams = driver.speak(3, 60)
        driver.inject("cpu:1", "lost")
        assert [(stream.wait_end(), stream.error) for stream in streams] == [("length", None)] * 3
        driver.wait_recovered(2)
        units, layout = driver.engine.units, driver.engine.recovery.layout
        held = {device: held_weights(driver, device) for device in layout.devices}
    assert sorted(held) == ["cpu:0", "cpu:2"]
    assert {t.key for t in units.tensors if units.in_panels(t)} == {"q", "kv", "gate_up", "embed"}
    addresses, checkpoint = WeightAddresses(units=units), Checkpoint.open(folder, units)
    for device, weights in held.items():
        slots = [(family, unit, slot) for family in FAMILIES for slot, unit in enumerate(layout[device][family])]
        expected = torch.empty_like(weights)
        load_units(checkpoint, expected, addresses, slots)
        for family, _, slot in slots:
            for start, stop in addresses.slot_ranges(family, slot, slot + 1):
                assert torch.equal(weights[start:stop], expected[start:stop]), (device, family, slot)


def held_weights(driver, device):
    """A copy of the device's weights arena."""
    with AnchorClient.connect(driver.runtime_dir, device, role="tool") as tool:
        arena = tool.open_arena("weights", driver.engine.recovery.epoch)
    copy = torch.frombuffer(arena.map(), dtype=torch.uint8).clone()
    arena.close()
    return copy
