"""Moves become chunks: every byte once, in the order of computing, whole segments or a part of one."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.config import parse_model_config
from anchortp.layout import FAMILIES, Shard, WeightAddresses, empty_shard, model_units
from anchortp.plan.plan import REPLICATED, FromHost, FromPeer, Move
from anchortp.transfer import work
from anchortp.transfer.work import HOST, Geometry, complete

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


@pytest.fixture(autouse=True, params=[(1 << 20, 4 << 20), (1024, 4096), (300, 1000)], ids=["large", "small", "odd"])
def sizes(request, monkeypatch):
    """Segments and chunks larger than blocks, smaller, and that fit neither blocks nor each other."""
    monkeypatch.setattr(work, "SEGMENT_BYTES", request.param[0])
    monkeypatch.setattr(work, "CHUNK_BYTES", request.param[1])


def geometry() -> Geometry:
    return Geometry(WeightAddresses(units=model_units(parse_model_config(CONFIG))))


def random_shard(rng: random.Random, geo: Geometry) -> Shard:
    shard = empty_shard("cpu:0")
    for family in FAMILIES:
        total = geo.units.num_units[family]
        shard = shard.appended(family, rng.sample(range(total), rng.randint(0, total)))
    return shard


def random_moves(rng: random.Random, geo: Geometry, before: Shard, after: Shard) -> list[Move]:
    """Some of the wanted units: from peers, in runs or in parts."""
    moves = []
    for family in FAMILIES:
        for slot in range(len(before[family]), len(after[family])):
            size = geo.unit_bytes(family)
            whole = Move(
                device="cpu:0",
                family=family,
                unit=after[family][slot],
                slot=slot,
                source=FromPeer(device=f"cpu:{rng.randint(1, 2)}", slot=rng.randint(0, 3)),
                num_bytes=size,
            )
            if rng.random() < 0.3:
                cuts = sorted(rng.sample(range(1, size), rng.randint(1, 3)))
                parts = [(a, b) for a, b in pairwise([0, *cuts, size]) if rng.random() < 0.7]
                moves += [replace(whole, first_byte=a, num_bytes=b - a) for a, b in parts]
            elif rng.random() < 0.5:
                moves.append(whole)
    return moves


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_every_wanted_byte_comes_once_and_nothing_else_is_touched(seed):
    rng, geo = random.Random(seed), geometry()
    full = random_shard(rng, geo)
    before = Shard(device="cpu:0", slots=tuple(s[: rng.randint(0, len(s))] for s in full.slots))
    moves = random_moves(rng, geo, before, full)
    fresh = rng.random() < 0.5
    chunks = geo.chunks(complete(geo, "cpu:0", before, full, moves, fresh))

    wanted = []
    for family in FAMILIES:
        for slot in range(len(before[family]), len(full[family])):
            for region in geo.regions[family]:
                wanted.append((geo.start(region, slot), geo.start(region, slot) + region.block_bytes))
    if fresh:
        wanted += [(geo.start(r, 0), geo.start(r, 0) + r.block_bytes) for r in geo.regions[REPLICATED]]
    assert joined((c.start, c.stop) for c in chunks) == joined(wanted)
    assert [c.position for c in chunks] == sorted(c.position for c in chunks)


def joined(ranges) -> list[tuple[int, int]]:
    """Ranges in order, those that touch made one; an overlap fails."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        assert not found or found[-1][1] <= start, "a byte twice"
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_a_chunk_is_whole_segments_or_a_part_of_one_and_knows_where_its_source_lies(seed):
    rng, geo = random.Random(seed), geometry()
    full = random_shard(rng, geo)
    moves = random_moves(rng, geo, empty_shard("cpu:0"), full)
    for chunk in geo.chunks(moves):
        segments = chunk.segments
        assert segments == [s for s in every_segment(geo, chunk) if s.start < chunk.stop and chunk.start < s.stop]
        covered = all(chunk.start <= s.start and s.stop <= chunk.stop for s in segments)
        assert covered == chunk.is_whole and (covered or len(segments) == 1)
        assert chunk.num_segments == len(segments) and chunk.first_segment_start == segments[0].start
        assert chunk.num_bytes <= max(work.CHUNK_BYTES, chunk.region.segment_bytes)
        assert min(s.stop - s.start for s in segments) >= chunk.region.shortest_segment_bytes
        # The same distance into the block here and there.
        here = geo.start(chunk.region, chunk.slot)
        there = geo.start(chunk.region, chunk.source_slot)
        assert chunk.source != HOST and chunk.start - here == chunk.source_start - there == chunk.first_byte
        assert 0 <= chunk.first_byte < chunk.region.block_bytes


def every_segment(geo: Geometry, chunk: work.Chunk) -> list[work.Segment]:
    """Of all units that the chunk has to do with, counted one by one."""
    region, found = chunk.region, []
    for number in range(chunk.num_units):
        start = geo.start(region, chunk.slot + number)
        index, stop = region.first_segment, start + region.block_bytes
        while start < stop:
            end = min(start + region.segment_bytes, stop)
            found.append(work.Segment(region.family, chunk.unit + number, chunk.slot + number, index, start, end))
            start, index = end, index + 1
    return found


def test_positions_follow_the_forward_pass():
    geo = geometry()
    everything = [
        Move(device="cpu:0", family=f, unit=0, slot=0, source=FromHost(), num_bytes=geo.unit_bytes(f))
        for f in (*FAMILIES, REPLICATED)
    ]
    by_position: dict[int, set[str]] = {}
    for chunk in geo.chunks(everything):
        by_position.setdefault(chunk.position, set()).add(chunk.region.tensor.key)
    layer = {"q", "o", "kv", "gate_up", "down"}
    assert by_position == {
        0: {"input_norm", "post_norm", "final_norm"},
        1: {"embed"},
        2: layer,
        3: layer,
        4: {"lm_head"},
    }
    assert geo.num_positions == 5 and geo.position_of_layer(1) == 3


def test_what_arrives_over_two_moves_is_an_error_of_ours():
    geo = geometry()
    shard = empty_shard("cpu:0").appended("mlp", [1])
    move = Move(device="cpu:0", family="mlp", unit=1, slot=0, source=FromHost(), num_bytes=geo.unit_bytes("mlp"))
    with pytest.raises(AssertionError, match="same bytes"):
        complete(geo, "cpu:0", empty_shard("cpu:0"), shard, [move, move], False)
