"""Copies of KV blocks against a slow reference that moves one head of one block at a time, exact to the byte.

Memory is random bytes (so NaNs of every kind are among them), and every test compares whole buffers: what was not
meant to change did not.
"""

from __future__ import annotations

import mmap
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.config import ModelConfig, RopeConfig
from anchortp.engine.kv_blocks import KVBlocks, _runs
from anchortp.engine.mirror_addresses import MirrorAddresses
from anchortp.errors import ConfigError
from anchortp.layout import FAMILIES, KV, KVAddresses, Shard
from anchortp.layout.addresses import ALIGN_BYTES
from anchortp.model import KVCache


def kv_addresses(
    *,
    layers: int = 3,
    heads: int = 4,
    head_dim: int = 8,
    block_size: int = 4,
    blocks: int = 9,
    dtype="bfloat16",
) -> KVAddresses:
    config = ModelConfig(
        architecture="llama",
        num_layers=layers,
        hidden_size=heads * head_dim,
        num_q_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_width=8,
        vocab_size=16,
        tie_embeddings=True,
        qk_norm=False,
        rms_eps=1e-5,
        rope=RopeConfig(),
        max_position=64,
        dtype=dtype,
    )
    return KVAddresses(config=config, block_size=block_size, num_blocks=blocks)


@dataclass(frozen=True)
class Case:
    """One drawn world: shapes, slot orders of two devices, block sets, and a seed for the bytes."""

    kv: KVAddresses
    mine: tuple[int, ...]
    peers: tuple[int, ...]
    seed: int

    @property
    def rng(self) -> random.Random:
        return random.Random(self.seed)

    def noise(self, num_bytes: int, tag: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(random.Random(f"{self.seed} {tag}").randbytes(num_bytes)), dtype=torch.uint8)

    def arena(self, tag: str) -> torch.Tensor:
        # Rounded up as an arena is, and somewhat longer: the rest must stay as it is, too.
        return self.noise(self.kv.reserved_bytes + ALIGN_BYTES, tag)


@st.composite
def cases(draw) -> Case:
    heads = draw(st.integers(1, 5))
    kv = kv_addresses(
        layers=draw(st.integers(1, 4)),
        heads=heads,
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        block_size=draw(st.integers(1, 5)),
        blocks=draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
    )
    some_heads = st.permutations(range(heads)).flatmap(lambda p: st.integers(0, heads).map(lambda n: tuple(p[:n])))
    return Case(kv, draw(some_heads), draw(some_heads), draw(st.integers(0, 2**32)))


def some(rng: random.Random, items, num: int | None = None) -> list[int]:
    """A random subset: now a shuffled one, now a run of neighbours."""
    items = list(items)
    num = rng.randint(0, len(items)) if num is None else num
    if rng.random() < 0.5:
        return rng.sample(items, num)
    start = rng.randint(0, len(items) - num)
    return items[start : start + num]


# ------------------------------------------------------------------------------------------- the reference


def read(arena: torch.Tensor, kv: KVAddresses, slot: int, block: int) -> bytes:
    ranges = kv.slot_ranges(slot, slot + 1, block, block + 1)
    return b"".join(bytes(arena[start:stop].tolist()) for start, stop in ranges)


def write(arena: torch.Tensor, kv: KVAddresses, slot: int, block: int, data: bytes) -> None:
    at = 0
    for start, stop in kv.slot_ranges(slot, slot + 1, block, block + 1):
        arena[start:stop] = torch.tensor(list(data[at : at + stop - start]), dtype=torch.uint8)
        at += stop - start
    assert at == len(data) == kv.block_bytes


# --------------------------------------------------------------------------------------- against the reference


@settings(max_examples=60, deadline=None)
@given(cases())
def test_save_and_restore_move_just_those_planes(case):
    kv, rng = case.kv, case.rng
    slots = MirrorAddresses(kv=kv, num_slots=rng.randint(1, 12))
    num_pairs = rng.randint(0, min(kv.num_blocks, slots.num_slots))
    pairs = list(
        zip(
            some(rng, range(kv.num_blocks), num_pairs),
            some(rng, range(slots.num_slots), num_pairs),
            strict=True,
        )
    )
    heads = some(rng, case.mine)
    arena, mirror = case.arena("arena"), case.noise(slots.reserved_bytes, "mirror")

    expected, untouched = mirror.clone(), arena.clone()
    for block, slot in pairs:
        for head in heads:
            start, stop = slots.head_range(slot, head)
            data = read(arena, kv, case.mine.index(head), block)
            expected[start:stop] = torch.tensor(list(data), dtype=torch.uint8)
    num_bytes = KVBlocks(arena, kv, case.mine).save(mirror, pairs, heads)
    assert num_bytes == len(pairs) * len(heads) * kv.block_bytes
    assert torch.equal(mirror, expected) and torch.equal(arena, untouched)

    # Into another device's arena, which holds the same heads in other slots.
    other = tuple(rng.sample(case.mine, len(case.mine)))
    target = case.arena("target")
    expected, untouched = target.clone(), mirror.clone()
    for block, slot in pairs:
        for head in heads:
            start, stop = slots.head_range(slot, head)
            write(expected, kv, other.index(head), block, bytes(mirror[start:stop].tolist()))
    num_bytes = KVBlocks(target, kv, other).restore(mirror, pairs, heads)
    assert num_bytes == len(pairs) * len(heads) * kv.block_bytes
    assert torch.equal(target, expected) and torch.equal(mirror, untouched)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_copy_from_a_peer_moves_just_those_planes(case):
    kv, rng = case.kv, case.rng
    heads = some(rng, [head for head in case.mine if head in case.peers])
    blocks = some(rng, range(kv.num_blocks))
    arena, peer = case.arena("arena"), case.arena("peer")
    expected, untouched = arena.clone(), peer.clone()
    for block in blocks:
        for head in heads:
            write(expected, kv, case.mine.index(head), block, read(peer, kv, case.peers.index(head), block))
    num_bytes = KVBlocks(arena, kv, case.mine).copy_from(peer, case.peers, blocks, heads)
    assert num_bytes == len(blocks) * len(heads) * kv.block_bytes
    assert torch.equal(arena, expected) and torch.equal(peer, untouched)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_move_within_the_arena_moves_all_heads_of_just_those_blocks(case):
    kv, rng = case.kv, case.rng
    num_pairs = rng.randint(0, kv.num_blocks // 2)
    targets = some(rng, range(kv.num_blocks), num_pairs)
    sources = some(rng, [block for block in range(kv.num_blocks) if block not in targets], num_pairs)
    pairs = list(zip(sources, targets, strict=True))
    arena = case.arena("arena")
    expected = arena.clone()
    for source, target in pairs:
        for slot in range(len(case.mine)):
            write(expected, kv, slot, target, read(arena, kv, slot, source))
    num_bytes = KVBlocks(arena, kv, case.mine).move(pairs)
    assert num_bytes == len(pairs) * len(case.mine) * kv.block_bytes
    assert torch.equal(arena, expected)


@given(st.dictionaries(st.integers(0, 30), st.integers(0, 30)))
def test_runs_cover_the_pairs_and_no_two_could_be_one(pairs):
    runs = _runs(pairs.items())
    covered = [(target + i, source + i) for target, source, length in runs for i in range(length)]
    assert covered == sorted(pairs.items())
    ends = {(target + length, source + length) for target, source, length in runs}
    assert not ends & {(target, source) for target, source, _ in runs}


# ------------------------------------------------------------------------------------------- as the model sees it


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_decoder_wrote_comes_back_on_another_device(dtype):
    """Through `KVCache`, and through the mirror's documented shape: head 2 moves from slot 0 here to slot 1 there."""
    kv = kv_addresses(dtype=dtype)
    case = Case(kv, (2, 0), (3, 2), seed=1)
    here, there = case.arena("here"), case.arena("there")
    slots = MirrorAddresses(kv=kv, num_slots=3)
    mirror = case.noise(slots.reserved_bytes, "mirror")
    cache, other = KVCache(here, kv, shard((2, 0))), KVCache(there, kv, shard((3, 2)))
    rows = slice(5 * kv.block_size, 6 * kv.block_size)  # block 5
    for layer in range(kv.config.num_layers):
        for plane in range(4):
            cache.layer(layer)[plane, rows] = 100 * layer + 10 * plane + torch.arange(kv.block_size)[:, None]

    KVBlocks(here, kv, (2, 0)).save(mirror, [(5, 1)], [2])
    KVBlocks(there, kv, (3, 2)).restore(mirror, [(5, 1)], [2])
    for layer in range(kv.config.num_layers):
        assert torch.equal(other.layer(layer)[2:, rows], cache.layer(layer)[:2, rows])

    shape = (slots.num_slots, 4, kv.config.num_layers, 2, kv.block_size, kv.config.head_dim)
    typed = mirror[: slots.num_slots * slots.slot_bytes].view(getattr(torch, dtype)).view(shape)
    assert torch.equal(typed[1, 2], torch.stack([cache.layer(i)[:2, rows] for i in range(shape[2])]))


def shard(heads: tuple[int, ...]) -> Shard:
    return Shard(device="cpu:0", slots=tuple(heads if family == KV else () for family in FAMILIES))


def test_every_mix_of_inference_mode_and_shared_memory():
    """The worker maps its buffers outside inference mode; a buffer made within it must do as well."""
    kv = kv_addresses()
    slots = MirrorAddresses(kv=kv, num_slots=kv.num_blocks)
    case = Case(kv, (1, 3), (), seed=2)
    mapped = torch.frombuffer(mmap.mmap(-1, kv.reserved_bytes), dtype=torch.uint8)
    mapped.copy_(case.arena("arena")[: kv.reserved_bytes])
    with torch.inference_mode():
        inner = torch.zeros_like(mapped)
    pairs = [(block, block) for block in range(kv.num_blocks)]
    for outside in (True, False):
        mirror = torch.zeros(slots.reserved_bytes, dtype=torch.uint8)
        with torch.inference_mode(not outside):
            KVBlocks(mapped, kv, (1, 3)).save(mirror, pairs, [1, 3])
            blocks = KVBlocks(inner, kv, (1, 3))
            blocks.restore(mirror, pairs, [3, 1])
            for slot in (0, 1):
                for block in range(kv.num_blocks):
                    assert read(inner, kv, slot, block) == read(mapped, kv, slot, block)
            blocks.move([(0, 1)])
            assert read(inner, kv, 1, 1) == read(mapped, kv, 1, 0)
    mapped.add_(1)  # still an ordinary tensor for those who use it


# ------------------------------------------------------------------------------------------- our own mistakes


def test_our_own_mistakes_are_caught():
    kv = kv_addresses()
    slots = MirrorAddresses(kv=kv, num_slots=3)
    case = Case(kv, (2, 0), (), seed=3)
    arena, mirror = case.arena("arena"), case.noise(slots.num_slots * slots.slot_bytes, "mirror")
    before = arena.clone(), mirror.clone()
    blocks = KVBlocks(arena, kv, (2, 0))
    with pytest.raises(AssertionError, match="head 1 is not here"):
        blocks.restore(mirror, [(0, 0)], [1])
    with pytest.raises(AssertionError, match="target twice"):
        blocks.save(mirror, [(0, 1), (1, 1)], [0])
    with pytest.raises(AssertionError, match="target twice"):
        blocks.restore(mirror, [(0, 1), (0, 2)], [0])
    with pytest.raises(AssertionError, match="target twice"):
        blocks.save(mirror, [(0, 1)], [0, 0])
    with pytest.raises(AssertionError, match="chain"):
        blocks.move([(2, 1), (1, 0)])
    for pair in ((9, 0), (0, 3), (-1, 0), (0, -1)):
        with pytest.raises(AssertionError, match="blocks"):
            blocks.save(mirror, [pair], [0])
    assert torch.equal(arena, before[0]) and torch.equal(mirror, before[1])
    with pytest.raises(AssertionError):
        KVBlocks(arena[: kv.reserved_bytes - 1], kv, (0,))
    with pytest.raises(AssertionError, match="twice"):
        KVBlocks(arena, kv, (0, 0))


# ------------------------------------------------------------------------------------------- the mirror's addresses


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(0, 1 << 16),
    st.sampled_from([2, 3, 64]),
)
def test_the_mirror_is_dense_and_within_its_budget(layers, heads, block_size, budget_bytes, head_dim):
    kv = kv_addresses(layers=layers, heads=heads, head_dim=head_dim, block_size=block_size)
    try:
        mirror = MirrorAddresses.within(kv, budget_bytes)
    except ConfigError as error:
        least_bytes = int(str(error).split("at least ")[1].split()[0])
        assert budget_bytes < least_bytes
        assert MirrorAddresses.within(kv, least_bytes).num_slots >= 1
        return
    assert mirror.reserved_bytes <= budget_bytes and mirror.reserved_bytes % ALIGN_BYTES == 0
    assert MirrorAddresses(kv=kv, num_slots=mirror.num_slots + 1).reserved_bytes > budget_bytes
    end = 0
    for slot in range(min(mirror.num_slots, 4)):
        assert mirror.slot_range(slot)[0] == end
        for head in range(heads):
            start, stop = mirror.head_range(slot, head)
            assert start == end and stop - start == kv.block_bytes
            end = stop
        assert mirror.slot_range(slot)[1] == end <= mirror.reserved_bytes


def test_the_mirror_in_the_numbers_of_a_real_model():
    """SmolLM2-135M in bfloat16, blocks of 16 tokens: 122,880 bytes a head."""
    kv = kv_addresses(layers=30, heads=3, head_dim=64, block_size=16, blocks=100)
    mirror = MirrorAddresses.within(kv, 256 << 20)
    assert (mirror.head_bytes, mirror.slot_bytes, mirror.num_slots) == (122_880, 368_640, 728)
