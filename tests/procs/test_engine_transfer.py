"""Loads in a running engine: sources that fail, weights kept as arenas hold them, and no wrong token."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from anchortp.config import load_model_config, reads_panels
from anchortp.engine.api import DeviceChange
from anchortp.engine.faults import Strike, fired_strikes
from anchortp.layout import FAMILIES, WeightAddresses, model_units
from anchortp.state.client import AnchorClient
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_units
from anchortp.transfer.packed import PackedWeights
from anchortp.transfer.work import Geometry
from tests.procs.engine_tools import running_engine
from tests.procs.test_engine_changes import change
from tests.tiny_model import write_model

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("kind", ["error", "corrupt", "short", "slow", "gone"])
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


def test_a_peer_fails_in_every_way_while_a_device_joins(folder):
    """Once: the bytes are read again. For good: they come from the host. Streams go on."""
    kinds = ("error", "corrupt", "short", "slow", "hang", "gone")
    with running_engine(folder, 3) as driver:
        for kind in kinds:
            times = 10**6 if kind in ("error", "corrupt", "short") else 1
            driver.arm(Strike(device="cpu:3", point="read", source="cpu:0", kind=kind, at_byte=3000, times=times))
            streams = driver.speak(2, 60)
            (joined,) = change(driver, add=("cpu:3",))
            assert joined["outcome"] == "serving", (kind, joined)
            told = [line["text"] for line in joined["timeline"]]
            assert any("came from the host" in text for text in told) == (times > 1 or kind == "gone"), (kind, told)
            driver.check_fired()
            streams += driver.speak(2, 20)  # with what has come
            for stream in streams:
                stream.check()
            (left,) = change(driver, remove=("cpu:3",))
            assert left["outcome"] == "serving"


def test_a_peer_dies_in_the_middle_of_a_copy_while_a_device_joins(folder):
    with running_engine(folder, 3) as driver:
        driver.arm(Strike(device="cpu:3", point="read", source="cpu:0", kind="hang", at_byte=3000))
        streams = driver.speak(2, 300)
        change_id = driver.engine.change_devices(DeviceChange(add=("cpu:3",)))
        driver.check_fired()  # the copy hangs now, for two seconds
        driver.inject("cpu:0", "lost")
        for stream in streams:
            stream.check()
        driver.wait(lambda: "cpu:0" not in driver.engine.status()["devices"], "the loss")
        driver.wait(lambda: len(tries_of(driver, change_id)) > 1, "another try")
        driver.wait(lambda: tries_of(driver, change_id)[-1]["outcome"] == "serving", "the change")
        assert sorted(driver.engine.status()["devices"]) == ["cpu:1", "cpu:2", "cpu:3"]
        driver.speak(1, 20)[0].check()


def tries_of(driver, change_id):
    return [e for e in driver.engine.status()["changes"] if e["change_id"] == change_id]


@pytest.mark.parametrize("kind", ["corrupt", "gone", "slow"])
def test_peers_fail_in_a_recovery_that_copies_from_them(folder, kind):
    """Contiguous intervals move from survivor to survivor after a loss."""
    survivors = ("cpu:1", "cpu:2", "cpu:3")
    strikes = [
        Strike(device=device, point="read", source=source, kind=kind, at_byte=3000)
        for device in survivors
        for source in survivors
        if source != device
    ]
    with running_engine(folder, 4, tuple(strikes), plan_policy="cmm") as driver:
        streams = driver.speak(3, 100)
        driver.inject("cpu:0", "lost")
        for stream in streams:
            stream.check()
        lost = driver.wait_recovered(2)[1]
        fired = {line["strike"] for line in fired_strikes(driver.runtime_dir)}
        assert fired and fired <= {strike.key for strike in strikes}
        if kind == "slow":
            assert lost["bytes"]["copied"] > 0
        driver.speak(1, 20)[0].check()


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
