"""Experts from checkpoints: one by one or fused, cut as units or as columns, the same bytes reach the arena."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchortp.config import load_model_config
from anchortp.errors import CheckpointError
from anchortp.layout import EXPERT, MLP, ModelUnits, WeightAddresses, model_units
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.fingerprint import fingerprint
from anchortp.transfer.loader import load_replicated, load_units
from tests.cpu.model_tools import make_tiny_model, nan_buffer, random_layout, shard_items

KINDS = ("mixtral", "qwen3-moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """(kind, fused) -> a model; those of a kind are equal."""
    root = tmp_path_factory.mktemp("models")
    return {
        (kind, fused): make_tiny_model(root / f"{kind}-{fused}", kind, original_format=not fused)
        for kind in KINDS
        for fused in (False, True)
    }


def loaded(folder: Path, units: ModelUnits, items: list) -> torch.Tensor:
    addresses, checkpoint = WeightAddresses(units=units), Checkpoint.open(folder, units)
    buffer = nan_buffer(addresses.reserved_bytes)
    load_replicated(checkpoint, buffer, addresses)
    total = load_units(checkpoint, buffer, addresses, items)
    assert total == sum(units.unit_bytes[family] for family, _, _ in items)
    return buffer


def cut(folder: Path, expert_cut: str) -> ModelUnits:
    return model_units(load_model_config(folder, expert_cut=expert_cut))


def test_the_forms_are_what_they_are_called(folders):
    for kind in KINDS:
        names = {fused: set(load_file(folders[kind, fused] / "model.safetensors")) for fused in (False, True)}
        assert any(".experts.0." in name for name in names[False])
        assert not any(".experts.0." in name for name in names[True])
        assert "model.layers.1.mlp.experts.gate_up_proj" in names[True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert_cut", ["experts", "columns"])
def test_fused_and_single_experts_give_the_same_arena(folders, kind, expert_cut):
    units = cut(folders[kind, False], expert_cut)
    for shard in random_layout(units, 3, random.Random(0), num_replicas=4).shards:
        single, fused = (loaded(folders[kind, form], units, shard_items(shard)) for form in (False, True))
        assert torch.equal(single, fused)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expert_cut", ["experts", "columns"])
def test_every_unit_lands_in_its_slot(folders, kind, expert_cut):
    """Index by index against the fused tensors."""
    folder = folders[kind, True]
    units, weights = cut(folder, expert_cut), load_file(folder / "model.safetensors")
    moe, hidden, block = units.config.moe, units.config.hidden_size, units.mlp_block
    family = EXPERT if expert_cut == "experts" else MLP
    addresses = WeightAddresses(units=units)
    by_key = {tensor.key: tensor for tensor in units.tensors}
    for shard in random_layout(units, 2, random.Random(1), num_replicas=3).shards:
        buffer = loaded(folder, units, shard_items(shard))
        for slot, unit in enumerate(shard[family]):
            for copy in range(units.num_copies(by_key["down"])):
                index = unit if family == EXPERT else copy
                layer, expert = divmod(index, moe.num_experts)
                first = 0 if family == EXPERT else unit * block
                gate_up = weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
                down = weights[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
                columns = slice(first, first + block)
                wanted = {
                    "gate_up": torch.cat((gate_up[: moe.width][columns], gate_up[moe.width :][columns])),
                    "down": down[:, columns].t(),
                }
                for key, rows in wanted.items():
                    start, stop = addresses.block(by_key[key], copy, slot)
                    found = buffer[start:stop].view(torch.float32).view(-1, hidden)
                    assert torch.equal(found, rows), (key, layer, expert)


def test_a_router_of_another_size_is_refused(folders, tmp_path):
    folder = folders["mixtral", False]
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    weights[name] = weights[name][:-1].contiguous()
    with pytest.raises(CheckpointError, match=f"{name} has shape .* expected .* from config.json"):
        opened(tmp_path, folder, weights)


def test_fused_experts_of_another_number_are_refused(folders, tmp_path):
    folder = folders["qwen3-moe", True]
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weights[name] = weights[name][:-1].contiguous()
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        opened(tmp_path, folder, weights)


def test_a_missing_expert_is_named(folders, tmp_path):
    folder = folders["qwen3-moe", False]
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del weights[name]
    with pytest.raises(CheckpointError, match=f"{name} .* is missing"):
        opened(tmp_path, folder, weights)


def opened(tmp_path: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Checkpoint:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path, cut(tmp_path, "experts"))


def test_arenas_cut_in_two_ways_do_not_pass_for_each_other(folders):
    folder = folders["mixtral", False]
    prints = {fingerprint(folder, load_model_config(folder, expert_cut=cut)) for cut in ("experts", "columns")}
    assert len(prints) == 2
