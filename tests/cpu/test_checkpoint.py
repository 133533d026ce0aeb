"""Checkpoints: what is read lands where it should, and what is wrong is said by name."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from anchortp.config import cache_folder, load_model_config
from anchortp.errors import CheckpointError, ConfigError
from anchortp.layout import (
    ATTENTION,
    FAMILIES,
    KV,
    MLP,
    VOCAB,
    ModelUnits,
    UnitTensor,
    WeightAddresses,
    initial_layout,
    model_units,
)
from anchortp.native import build_kernels
from anchortp.transfer import checkpoint as checkpoint_module
from anchortp.transfer.checkpoint import INDEX_NAME, STRIP_COLUMNS, Checkpoint, _transpose
from anchortp.transfer.fingerprint import fingerprint
from anchortp.transfer.hub import resolve_model
from anchortp.transfer.loader import Item, coalesce, load_replicated, load_units
from anchortp.transfer.streamed import Streamer
from tests.cpu.model_tools import devices, nan_buffer, random_layout, shard_items

HIDDEN, HEAD_DIM, Q_HEADS, KV_HEADS, WIDTH, VOCABULARY, LAYERS = 24, 8, 4, 2, 96, 45, 2
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "head_dim": HEAD_DIM,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LAYER_SHAPES = {
    "self_attn.q_proj": (Q_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, Q_HEADS * HEAD_DIM),
    "self_attn.q_norm": (HEAD_DIM,),
    "self_attn.k_norm": (HEAD_DIM,),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "lm_head.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
} | {f"model.layers.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in LAYER_SHAPES.items()}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, weights: dict[str, torch.Tensor], **changes: object) -> tuple[Path, ModelUnits]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(weights, folder / "model.safetensors")
    return folder, model_units(load_model_config(folder))


def expected_block(units: ModelUnits, tensor: UnitTensor, layer: int, unit: int, weights: dict) -> torch.Tensor:
    """The slow and obvious way: index by index, zeros beyond the end, columns as rows."""
    rows = []
    for part in tensor.parts:
        stored = weights[part.name.format(layer=layer)]
        for index in range(unit * part.extent, (unit + 1) * part.extent):
            if index >= stored.shape[part.axis]:
                rows.append(torch.zeros(HIDDEN))
            else:
                rows.append(stored[index] if part.axis == 0 else stored[:, index])
    return torch.stack(rows)


@pytest.fixture(scope="module")
def kernels() -> Streamer:
    return Streamer(str(build_kernels(cache_folder() / "kernels")))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
@pytest.mark.parametrize("by", ["torch", "kernels"])
def test_every_unit_lands_in_its_slot(
    tmp_path: Path, stored: torch.dtype, served: str, by: str, kernels: Streamer
) -> None:
    weights = tensors(stored)
    folder, _ = write(tmp_path / "m", weights)
    units = model_units(load_model_config(folder, served))
    addresses = WeightAddresses(units=units)
    checkpoint = Checkpoint.open(folder, units, stream=kernels if by == "kernels" else None)
    for shard in random_layout(units, 3, random.Random(0)).shards:
        buffer = nan_buffer(addresses.reserved_bytes)
        load_replicated(checkpoint, buffer, addresses)
        items = shard_items(shard)
        assert load_units(checkpoint, buffer, addresses, items) == sum(units.unit_bytes[f] for f, _, _ in items)
        used = torch.zeros(addresses.reserved_bytes, dtype=torch.bool)
        for tensor in units.tensors:
            for slot, unit in enumerate(shard[tensor.family]):
                for layer in range(units.num_copies(tensor)):
                    start, stop = addresses.block(tensor, layer, slot)
                    found = buffer[start:stop].view(getattr(torch, served)).view(-1, HIDDEN)
                    wanted = expected_block(units, tensor, layer, unit, weights).to(found.dtype)
                    assert torch.equal(found, wanted), (tensor.key, layer, unit)
                    used[start:stop] = True
        for replicated in units.replicated:
            for layer in range(units.num_copies(replicated)):
                start = addresses.offset(replicated.key, layer)
                stop = start + addresses.replicated_bytes(replicated)
                found = buffer[start:stop].view(getattr(torch, served))
                assert torch.equal(found, weights[replicated.name.format(layer=layer)].to(found.dtype))
                used[start:stop] = True
        assert (buffer[~used] == 0xFF).all(), "bytes beside the slots were written"


def test_many_files(tmp_path: Path) -> None:
    weights = tensors()
    folder, units = write(tmp_path / "m", weights)
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for index in range(3):
        file = f"model-{index}.safetensors"
        save_file({name: weights[name] for name in names[index::3]}, folder / file)
        weight_map |= dict.fromkeys(names[index::3], file)
    without_index = Checkpoint.open(folder, units)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    for checkpoint in (without_index, Checkpoint.open(folder, units)):
        assert all(torch.equal(checkpoint.tensor(name), weights[name]) for name in names)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        Checkpoint.open(folder, units)


def test_index_that_lies(tmp_path: Path) -> None:
    weights = tensors()
    folder, units = write(tmp_path / "m", weights)
    weight_map = dict.fromkeys(weights, "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != Q_PROJ}, folder / "model.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {Q_PROJ} .* is missing, though"):
        Checkpoint.open(folder, units)
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        Checkpoint.open(folder, units)


def test_tensors_are_views_of_the_page_cache(tmp_path: Path) -> None:
    """Opening and looking costs no memory: the bytes of the file are mapped, not read."""
    width = 64 * 1024
    weights = tensors() | {
        f"model.layers.{layer}.mlp.{name}_proj.weight": torch.zeros(shape)
        for layer in range(LAYERS)
        for name, shape in {"gate": (width, HIDDEN), "up": (width, HIDDEN), "down": (HIDDEN, width)}.items()
    }
    folder, units = write(tmp_path / "m", weights, intermediate_size=width)
    checkpoint = Checkpoint.open(folder, units)
    before = _anonymous_bytes()
    views = [checkpoint.tensor(name) for name in weights]
    assert all(view[..., -1].sum().isfinite() for view in views)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 30_000_000 and _anonymous_bytes() - before < size // 10


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in smaps_rollup")


def test_missing_tensor(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", {n: t for n, t in tensors().items() if n != Q_PROJ})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} of shape \(32, 24\) is missing"):
        Checkpoint.open(folder, units)


def test_lm_head_is_needed_unless_tied(tmp_path: Path) -> None:
    weights = tensors()
    head = weights.pop("lm_head.weight")
    folder, units = write(tmp_path / "m", weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* is missing"):
        Checkpoint.open(folder, units)
    folder, units = write(tmp_path / "tied", weights, tie_word_embeddings=True)
    Checkpoint.open(folder, units)
    folder, units = write(tmp_path / "both", {**weights, "lm_head.weight": head[:1]}, tie_word_embeddings=True)
    Checkpoint.open(folder, units)


def test_wrong_shape(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", {**tensors(), Q_PROJ: torch.zeros(16, HIDDEN)})
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: tensor {Q_PROJ} has shape \(16, 24\), expected \(32, 24\)"
    ):
        Checkpoint.open(folder, units)


def test_unsupported_dtype(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", {**tensors(), Q_PROJ: torch.zeros(32, HIDDEN, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has dtype I8, expected one of BF16, F16, F32"):
        Checkpoint.open(folder, units)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_short_file(tmp_path: Path, keep: int) -> None:
    folder, units = write(tmp_path / "m", tensors())
    file = folder / "model.safetensors"
    content = file.read_bytes()[:keep]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors \({len(content)} bytes\) is not a whole"):
        Checkpoint.open(folder, units)


def test_no_weights(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", tensors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        Checkpoint.open(folder, units)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 2 * STRIP_COLUMNS + 3),
    wider=st.integers(0, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(max_examples=40)
def test_transposed_copies(rows: int, columns: int, wider: int, dtype: torch.dtype) -> None:
    source = torch.arange(rows * (columns + wider), dtype=torch.float32).view(rows, -1)[:, wider:].to(dtype)
    out = torch.full((columns, rows), float("nan"))
    _transpose(out, source)
    assert torch.equal(out, source.t().float())


@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), unique_by=lambda p: p[1]))
def test_runs_cover_the_items_and_none_can_be_joined(pairs: list[tuple[int, int]]) -> None:
    runs = coalesce((MLP, unit, slot) for unit, slot in pairs)[MLP]
    covered = [(r.first_unit + i, r.first_slot + i) for r in runs for i in range(r.num_units)]
    assert sorted(covered) == sorted(pairs) and len(covered) == len(pairs)
    ends = {(r.first_unit + r.num_units, r.first_slot + r.num_units) for r in runs}
    assert not ends & {(r.first_unit, r.first_slot) for r in runs}


def test_load_order_progress_and_check(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", tensors())
    addresses, checkpoint = WeightAddresses(units=units), Checkpoint.open(folder, units)
    buffer = nan_buffer(addresses.reserved_bytes)
    items = shard_items(initial_layout(units, devices(1)).shards[0])
    read: list[tuple[str, int]] = []
    original = checkpoint.read

    def spy(tensor: UnitTensor, layer: int, first: int, num: int, out: torch.Tensor) -> None:
        assert num == units.num_units[tensor.family], "a whole family in order is one run"
        read.append((tensor.key, layer))
        original(tensor, layer, first, num, out)

    checkpoint.read = spy  # type: ignore[method-assign]
    seen: list[int] = []
    checks: list[int] = []
    total = load_units(
        checkpoint, buffer, addresses, items, on_progress=seen.append, check=lambda: checks.append(len(seen))
    )
    layer_keys = ["q", "o", "kv", "gate_up", "down"]
    assert read == [("embed", 0), *[(k, layer) for layer in range(LAYERS) for k in layer_keys], ("lm_head", 0)]
    assert sum(seen) == total and checks == list(range(len(read)))
    seen.clear()
    replicated = load_replicated(checkpoint, buffer, addresses, on_progress=seen.append)
    assert replicated == sum(seen) == units.replicated_bytes


def test_a_load_can_be_cancelled(tmp_path: Path) -> None:
    class Cancelled(Exception):
        pass

    folder, units = write(tmp_path / "m", tensors())
    addresses, checkpoint = WeightAddresses(units=units), Checkpoint.open(folder, units)
    progress: list[int] = []

    def check() -> None:
        if len(progress) == 3:
            raise Cancelled

    items: list[Item] = [(MLP, 1, 0), (VOCAB, 0, 0), (KV, 1, 0), (ATTENTION, 2, 0)]
    with pytest.raises(Cancelled):
        load_units(
            checkpoint,
            nan_buffer(addresses.reserved_bytes),
            addresses,
            items,
            on_progress=progress.append,
            check=check,
        )
    assert len(progress) == 3
    assert set(FAMILIES) == {family for family, _, _ in items}


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "m", tensors())
    config = load_model_config(folder)
    first = fingerprint(folder, config)
    assert first == fingerprint(str(folder), load_model_config(folder))
    seen = {first, fingerprint(folder, load_model_config(folder, "bfloat16"))}
    file = folder / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.add(fingerprint(folder, config))
    file.write_bytes(file.read_bytes() + b" ")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.add(fingerprint(folder, config))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5.0}))
    seen.add(fingerprint(folder, config))
    assert len(seen) == 5
    with pytest.raises(ConfigError, match="cannot be read"):
        fingerprint(tmp_path / "nowhere", config)


def rewritten(folder: Path) -> None:
    """In place: the bytes are others, and as many."""
    file = folder / "model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def replaced(folder: Path) -> None:
    """Another file under the same name."""
    rewritten(write(folder / "other", tensors())[0])
    os.replace(folder / "other" / "model.safetensors", folder / "model.safetensors")


def reconfigured(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 5.0}))


def joined(folder: Path) -> None:
    save_file({"another": torch.zeros(1)}, folder / "model-2.safetensors")


@pytest.mark.parametrize("change", [rewritten, replaced, reconfigured, joined])
def test_a_checkpoint_that_was_changed_before_it_is_opened_is_refused(tmp_path: Path, change) -> None:
    folder, units = write(tmp_path / "m", tensors())
    expected = fingerprint(folder, units.config)
    Checkpoint.open(folder, units, expected)
    change(folder)
    Checkpoint.open(folder, units)  # it is a good one, but another
    with pytest.raises(CheckpointError, match=r"was changed since it was first served.*restart with the new weights"):
        Checkpoint.open(folder, units, expected)


def test_a_checkpoint_that_is_replaced_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch) -> None:
    folder, units = write(tmp_path / "m", tensors())
    expected = fingerprint(folder, units.config)
    opened = checkpoint_module._open_files

    def change_too(folder: Path):
        replaced(folder)
        return opened(folder)

    monkeypatch.setattr(checkpoint_module, "_open_files", change_too)
    with pytest.raises(CheckpointError, match="was changed"):
        Checkpoint.open(folder, units, expected)


def test_an_open_checkpoint_stays_what_it_is_when_another_takes_its_name(tmp_path: Path) -> None:
    folder, units = write(tmp_path / "m", tensors())
    checkpoint = Checkpoint.open(folder, units, fingerprint(folder, units.config))
    before = checkpoint.tensor(Q_PROJ).clone()
    replaced(folder)
    checkpoint.check_unchanged()
    (q,) = [tensor for tensor in units.tensors if tensor.key == "q"]
    out = torch.empty(Q_HEADS * HEAD_DIM, HIDDEN)
    checkpoint.read(q, 1, 0, Q_HEADS, out)
    assert torch.equal(out, before)


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(name: str, **_: object) -> str:
        asked.append(name)
        if name == "owner/unknown":
            raise OSError("no such model\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model(tmp_path) == tmp_path and not asked
    assert resolve_model("owner/model") == tmp_path and asked == ["owner/model"]
    with pytest.raises(ConfigError, match=r"'owner/unknown' is neither .*\(no such model\)\. Check the name"):
        resolve_model("owner/unknown")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        resolve_model(tmp_path / "file")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model(tmp_path / "nowhere")
    assert asked == ["owner/model", "owner/unknown"]
