"""The decoder's parts on their own: norms, rotary embedding, batches, views."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchortp.config import ModelConfig, parse_model_config
from anchortp.layout import FAMILIES, KVAddresses, WeightAddresses, empty_shard, initial_layout, model_units
from anchortp.model import ForwardBatch, KVCache, WeightViews
from anchortp.model.batch import MAX_GROUP_TOKENS, MAX_PADDING_TOKENS
from anchortp.model.decoder import Decoder
from anchortp.model.rope import RopeTables, inverse_frequencies
from tests.cpu.model_tools import LINEAR_ROPE, LLAMA3_ROPE, Entry, nan_buffer

RAW = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "dtype": "float32",
}


def config(**changes: object) -> ModelConfig:
    return parse_model_config({**RAW, **changes})


@pytest.mark.parametrize("rope", [None, LINEAR_ROPE, {**LLAMA3_ROPE, "rope_theta": 500000.0}])
def test_rotary_embedding_is_that_of_transformers(rope: dict | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    theirs = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
    )
    ours = config(rope_parameters=theirs.rope_parameters)
    embedding = LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(inverse_frequencies(ours), embedding.inv_freq, atol=0, rtol=1e-6)

    x, positions = torch.randn(1, 1, 256, 16), torch.arange(256)
    cos, sin = embedding(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    tables = RopeTables(ours, 256)
    found = x * tables.cos[positions] + x.roll(8, -1) * tables.sin[positions]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    identity = x * tables.cos[tables.identity] + x.roll(8, -1) * tables.sin[tables.identity]
    assert torch.equal(identity, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_is_that_of_transformers(dtype: str) -> None:
    """Bit for bit: float32 inside, rounded once, then the weight in the model's dtype."""
    ours = config(dtype=dtype)
    units = model_units(ours)
    layout = initial_layout(units, ["cpu:0"])
    weights = WeightAddresses(units=units)
    cache = KVAddresses(config=ours, block_size=4, num_blocks=2)
    decoder = Decoder(
        units,
        layout,
        0,
        WeightViews(nan_buffer(weights.reserved_bytes), weights, layout.shards[0]),
        KVCache(nan_buffer(cache.reserved_bytes), cache, layout.shards[0]),
        8,
    )
    x, weight = (torch.randn(*shape).to(getattr(torch, dtype)) for shape in ((7, 32), (32,)))
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ours.rms_eps)).to(x.dtype)
    before = x.clone()
    torch.testing.assert_close(
        decoder.add_norm(x, None, weight), expected, atol=0, rtol=1e-6 if dtype == "float32" else 0
    )
    assert torch.equal(x, before)


def test_views_lie_where_the_addresses_say() -> None:
    ours = config(tie_word_embeddings=False)
    units = model_units(ours)
    weights = WeightAddresses(units=units)
    cache = KVAddresses(config=ours, block_size=4, num_blocks=3)
    buffer, kv_buffer = nan_buffer(weights.reserved_bytes), nan_buffer(cache.reserved_bytes)
    shard = initial_layout(units, ["cpu:0", "cpu:1"]).shards[1]
    views, kv = WeightViews(buffer, weights, shard), KVCache(kv_buffer, cache, shard)
    base = buffer.data_ptr()
    for layer, of_layer in enumerate(views.layers):
        for tensor in units.tensors:
            if tensor.per_layer:
                view = getattr(of_layer, tensor.key)
                assert view.data_ptr() - base == weights.offset(tensor.key, layer)
                assert view.nbytes == len(shard[tensor.family]) * units.block_bytes(tensor)
        assert of_layer.q_norm is not None and of_layer.q_norm.shape == (16,)
        assert kv.layer(layer).data_ptr() - kv_buffer.data_ptr() == cache.layer_offset(layer)
        assert kv.layer(layer).shape == (2 * len(shard["kv"]), 12, 16)
    assert views.lm_head.data_ptr() - base == weights.offset("lm_head")


def test_an_empty_shard_has_views_without_rows() -> None:
    units = model_units(config())
    addresses = WeightAddresses(units=units)
    views = WeightViews(nan_buffer(addresses.reserved_bytes), addresses, empty_shard("cpu:0"))
    assert all(getattr(views.layers[0], key).shape == (0, 32) for key in ("q", "kv", "o", "gate_up", "down"))
    assert views.embed.shape == (0, 32) and len(FAMILIES) == 4


def test_tied_embeddings_are_the_same_memory() -> None:
    units = model_units(config(tie_word_embeddings=True))
    addresses = WeightAddresses(units=units)
    shard = initial_layout(units, ["cpu:0"]).shards[0]
    views = WeightViews(nan_buffer(addresses.reserved_bytes), addresses, shard)
    assert views.lm_head.data_ptr() == views.embed.data_ptr() and views.lm_head.shape == views.embed.shape


entry_lists = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 70]), st.integers(0, 600), st.booleans()), min_size=1, max_size=12
)


@given(shapes=entry_lists, seed=st.integers(0, 999))
def test_batch_against_a_row_by_row_reference(shapes: list[tuple[int, int, bool]], seed: int) -> None:
    rng, block_size = random.Random(seed), 8
    blocks = rng.sample(range(2000), 2000)
    entries = []
    for size, start, sample in shapes:
        num_blocks = -(-(start + size) // block_size) + rng.randint(0, 2)
        table = tuple(blocks.pop() for _ in range(num_blocks))
        tokens = tuple(rng.randrange(1000) for _ in range(size))
        entries.append(Entry(token_ids=tokens, start=start, block_ids=table, sample=sample))
    built = ForwardBatch.build(entries, block_size)

    # Every entry's tokens stand in consecutive rows; find them by their cache rows, which are unique.
    def cache_row(entry: Entry, position: int) -> int:
        return entry.block_ids[position // block_size] * block_size + position % block_size

    row_of = {slot: row for row, slot in enumerate(built.cache_slots.tolist())}
    assert len(row_of) == sum(size for size, _, _ in shapes) == built.token_ids.shape[0]

    def gathered(blocks: list[int], num_keys: int) -> list[int]:
        return [block * block_size + offset for block in blocks for offset in range(block_size)][:num_keys]

    contexts: dict[int, list[int]] = {}
    covered: list[int] = []
    for group in built.decode:
        shape = (group.stop - group.start, group.num_keys)
        assert shape[0] == 1 or group.num_keys * shape[0] <= MAX_GROUP_TOKENS
        kept = torch.ones(shape, dtype=torch.bool) if group.valid is None else group.valid
        assert kept.shape == shape and int((~kept).sum()) <= MAX_PADDING_TOKENS
        for row, blocks, real in zip(range(group.start, group.stop), group.blocks.tolist(), kept.tolist(), strict=True):
            rows = gathered(blocks, group.num_keys)
            assert real == sorted(real, reverse=True)
            contexts[row] = rows[: sum(real)]
            own = -(-sum(real) // block_size)
            assert set(blocks[own:]) <= {blocks[0]}, "padding reads another sequence"
        covered += range(group.start, group.stop)
    for chunk in built.prefill:
        contexts[chunk.stop - 1] = gathered(chunk.blocks[0].tolist(), chunk.num_keys)
        covered += range(chunk.start, chunk.stop)
    assert covered == list(range(len(row_of)))
    last_rows = []
    for entry in entries:
        stop = entry.start + len(entry.token_ids)
        rows = [row_of[cache_row(entry, p)] for p in range(entry.start, stop)]
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        assert built.token_ids[rows].tolist() == list(entry.token_ids)
        assert built.positions[rows].tolist() == list(range(entry.start, stop))
        assert contexts[rows[-1]] == [cache_row(entry, p) for p in range(stop)]
        last_rows.append(rows[-1])
    assert built.sample_rows.tolist() == [r for r, e in zip(last_rows, entries, strict=True) if e.sample]
    opened = {
        entry.block_ids[p // block_size]
        for entry in entries
        for p in range(entry.start, entry.start + len(entry.token_ids))
        if p % block_size == 0 and p + block_size > entry.start + len(entry.token_ids)
    }
    assert sorted(built.opened_blocks.tolist()) == sorted(opened)
