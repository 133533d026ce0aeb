"""Weights in panels: the same logits bit for bit, in shards that grow in place."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchortp.config import load_model_config, reads_panels, resolve_engine_config
from anchortp.errors import CheckpointError, ConfigError
from anchortp.layout import (
    FAMILIES,
    PANEL_ROWS,
    Layout,
    WeightAddresses,
    initial_layout,
    model_units,
)
from anchortp.model import panels
from anchortp.model.panels import Panels
from anchortp.transfer.checkpoint import _to_panels
from anchortp.transfer.fingerprint import fingerprint
from tests.cpu.model_tools import (
    TPGroup,
    devices,
    load_group,
    make_tiny_model,
    random_layout,
    random_steps,
    scrambled_tables,
)

pytestmark = pytest.mark.skipif(not reads_panels(), reason="no panels are known for this CPU")

SHAPE = {
    "hidden_size": 192,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("panels"), "llama-tied", dtype="bfloat16", **SHAPE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("untied"), "qwen3", dtype="bfloat16", **SHAPE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = SHAPE | {"moe_intermediate_size": 256, "num_experts": 6}
    return make_tiny_model(tmp_path_factory.mktemp("mixture"), "qwen3-moe", dtype="bfloat16", **shape)


def outputs(group: TPGroup, seed: int) -> list[torch.Tensor]:
    rng = random.Random(seed)
    sequences = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in (19, 4, 33)]
    steps = random_steps(sequences, scrambled_tables(len(sequences), group, rng), rng, num_decode=3)
    return [group.forward([entry for _, entry in step]) for step in steps]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_panels_and_plain_weights_give_the_same_bits(folder: Path, untied: Path, seed: int) -> None:
    model = (folder, untied)[seed % 2]
    rng = random.Random(seed)
    units = model_units(load_model_config(model))
    layout = random_layout(units, seed + 1, rng) if seed else initial_layout(units, devices(1))
    with load_group(model, layout) as plain, load_group(model, layout, panels=True) as in_panels:
        assert any(isinstance(weight, Panels) for d in in_panels.decoders for weight in (d.weights.layers[0].q,))
        assert_same(outputs(plain, seed), outputs(in_panels, seed))


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_our_kernels_read_panels(folder: Path, mixture: Path, kind: str) -> None:
    """Other sums, in another order: as near to what float32 gives as torch's kernels are."""
    model = folder if kind == "dense" else mixture
    layout = random_layout(model_units(load_model_config(model)), 3, random.Random(1))
    with (
        load_group(model, layout, dtype="float32") as exact,
        load_group(model, layout) as plain,
        load_group(model, layout, panels=True, kernels="native") as native,
    ):
        wanted = torch.cat(outputs(exact, 1))
        by_torch = (torch.cat(outputs(plain, 1)) - wanted).norm()
        assert (torch.cat(outputs(native, 1)) - wanted).norm() < 1.2 * by_torch < 0.1 * wanted.norm()


@pytest.mark.parametrize("cut", ["experts", "columns"])
def test_experts_in_panels_give_the_same_bits(mixture: Path, cut: str) -> None:
    units = model_units(load_model_config(mixture, expert_cut=cut))
    layout = random_layout(units, 2, random.Random(3), num_replicas=2)
    with (
        load_group(mixture, layout, expert_cut=cut) as plain,
        load_group(mixture, layout, expert_cut=cut, panels=True) as in_panels,
    ):
        held = [gate_up for d in in_panels.decoders for gate_up, _ in d.weights.experts.values()]
        assert held and all(isinstance(gate_up, Panels) for gate_up in held)
        assert_same(outputs(plain, 5), outputs(in_panels, 5))


def test_a_shard_in_panels_grows_in_place(folder: Path) -> None:
    units = model_units(replace(load_model_config(folder), panels=True))
    before = initial_layout(units, devices(3))
    addresses = WeightAddresses(units=units)
    with load_group(folder, before, panels=True) as group:
        outputs(group, 1)
        held = {d: used_bytes(group, addresses, before, d) for d in before.devices[:2]}
        shards, items = list(before.shards[:2]), {d: [] for d in before.devices[:2]}
        for family in FAMILIES:
            for index, unit in enumerate(sorted(set(before.shards[2][family]))):
                taker = shards[index % 2]
                if unit not in taker[family]:
                    items[taker.device].append((family, unit, len(taker[family])))
                    shards[index % 2] = taker.appended(family, [unit])
        after = Layout(shards=tuple(shards))
        group.rebind(after, items)
        assert any(items.values())
        for device, chunks in held.items():
            now = used_bytes(group, addresses, before, device)
            assert all(torch.equal(a, b) for a, b in zip(chunks, now, strict=True)), "a surviving byte has changed"
        with load_group(folder, after) as plain:
            assert_same(outputs(plain, 2), outputs(group, 2))


def used_bytes(group: TPGroup, addresses: WeightAddresses, layout: Layout, device: str) -> list[torch.Tensor]:
    """Copies of the bytes of the slots that `device` has under `layout`."""
    shard, buffer = layout[device], group.weights[device]
    ranges = [r for family in FAMILIES for r in addresses.slot_ranges(family, 0, len(shard[family]))]
    return [buffer[start:stop].clone() for start, stop in ranges]


@given(num_panels=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_rows_are_found_again(num_panels: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(num_panels * PANEL_ROWS, 32 * columns, generator=generator).bfloat16()
    out = torch.empty_like(plain)
    _to_panels(plain, out)
    rows = torch.randint(plain.shape[0], (17,), generator=generator)
    assert torch.equal(panels.take_rows(out, rows), plain[rows])


@given(
    num_panels=st.integers(1, 30),
    columns=st.integers(1, 40),
    num_rows=st.sampled_from([1, 2, 16, 130]),
    seed=st.integers(0),
)
def test_a_matrix_of_any_size_is_described_rightly(num_panels: int, columns: int, num_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    plain = torch.randn(num_panels * PANEL_ROWS, 32 * columns, generator=generator).bfloat16()
    x = torch.randn(num_rows, plain.shape[1], generator=generator).bfloat16()
    panelled = torch.empty_like(plain)
    _to_panels(plain, panelled)
    found = panels.linear(x, panels.panel_matrix(panelled))
    torch.testing.assert_close(found, panels.linear(x, plain), rtol=2e-2, atol=5e-2)


def test_a_torch_that_packs_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    panels.check_panels(96)
    monkeypatch.setattr(panels, "PANEL_ROWS", 32)
    with pytest.raises(CheckpointError, match="--weights plain"):
        panels.check_panels(160)


def test_what_lies_in_panels_and_what_does_not(folder: Path, tmp_path: Path) -> None:
    config = load_model_config(folder)
    units = model_units(replace(config, panels=True))
    keys = {tensor.key for tensor in units.tensors if units.in_panels(tensor)}
    assert keys == {"q", "kv", "gate_up", "embed"}
    assert not any(model_units(config).in_panels(tensor) for tensor in units.tensors)
    narrow = model_units(replace(config, panels=True, hidden_size=80))
    assert not any(narrow.in_panels(tensor) for tensor in narrow.tensors)
    assert fingerprint(folder, config) != fingerprint(folder, units.config)

    def resolved(**options: str) -> bool:
        options = {"runtime_dir": str(tmp_path), **options}
        return resolve_engine_config(folder, devices=("cpu:0",), **options).model.panels

    assert resolved() and not resolved(weights="plain") and not resolved(dtype="float32")
    with pytest.raises(ConfigError, match="'auto' or 'plain'"):
        resolved(weights="transposed")
