"""Layers in one call: the bits of the layers one by one, in any mixture of both, and out of it when the group ends."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anchortp.comm import ShmGroup, ShmRegion
from anchortp.config import load_model_config, reads_panels
from anchortp.errors import GroupAborted, GroupTimeout
from anchortp.layout import initial_layout, model_units
from anchortp.model import ForwardBatch
from tests.cpu.model_tools import (
    Entry,
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
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 300,
    "num_hidden_layers": 3,
}
SLOT_BYTES = 1 << 20
EPOCH = 3


@pytest.fixture(scope="module", params=["llama-tied", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("layers"), request.param, dtype="bfloat16", **SHAPE)


class OneByOne:
    """A group that kernels know nothing of, as one that passes fault points."""

    def __init__(self, group: ShmGroup):
        self.rank, self.size = group.rank, group.size
        self.all_reduce, self.gather = group.all_reduce, group.gather


class Counting(ShmGroup):
    """Counts what kernels did for themselves."""

    num_calls = 0

    def check(self, outcome: int) -> None:
        self.num_calls += 1
        super().check(outcome)


@contextmanager
def shared_groups(tp: TPGroup, timeout_s: float = 30.0) -> Iterator[list[Counting]]:
    """Each rank's side of one region, as workers have them."""
    region = ShmRegion.create(EPOCH, len(tp.decoders), SLOT_BYTES)
    try:
        library = tp.decoders[0].kernels.library
        yield [Counting(region, rank, timeout_s, library=library) for rank in range(region.size)]
    finally:
        region.close()


def steps_of(tp: TPGroup, seed: int) -> list[list[Entry]]:
    rng = random.Random(seed)
    sequences = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(length)] for length in (19, 4, 33, 1)]
    steps = random_steps(sequences, scrambled_tables(len(sequences), tp, rng), rng, num_decode=3)
    return [[entry for _, entry in step] for step in steps]


@pytest.mark.parametrize("seed", range(6))
def test_the_same_bits_as_one_by_one(folder: Path, seed: int) -> None:
    """In the odd runs some ranks call the layers one by one, beside others that do not."""
    rng = random.Random(seed)
    units = model_units(load_model_config(folder))
    num_ranks = 1 + seed % 4
    layout = random_layout(units, num_ranks, rng) if seed > 1 else initial_layout(units, devices(num_ranks))
    with load_group(folder, layout, panels=True, kernels="native") as tp:
        steps = steps_of(tp, seed)
        wanted = [tp.forward(step) for step in steps]
    with load_group(folder, layout, panels=True, kernels="native") as tp, shared_groups(tp) as groups:
        apart = set(range(num_ranks)) if num_ranks == 1 else set(rng.sample(range(num_ranks), num_ranks // 2))
        tp.groups = [OneByOne(g) if seed % 2 and g.rank in apart else g for g in groups]
        assert all(torch.equal(tp.forward(step), logits) for step, logits in zip(steps, wanted, strict=True))
        small = sum(sum(len(entry.token_ids) for entry in step) <= 64 for step in steps)
        for group in groups:
            own = 2 * SHAPE["num_hidden_layers"] + 1 if seed % 2 and group.rank in apart else 2
            expected = small * own if num_ranks > 1 else small * (seed % 2 == 0)
            assert group.num_calls == expected, "sums of a kernel, or calls of one for all layers and the embedding"


def test_a_gate_opens_before_each_layer(folder: Path) -> None:
    with load_group(folder, 1, panels=True, kernels="native") as tp, shared_groups(tp) as groups:
        decoder, batch = tp.decoders[0], ForwardBatch.build(steps_of(tp, 1)[0], tp.block_size)
        opened: list[tuple[int, int]] = []
        logits = decoder.forward(batch, groups[0], lambda layer: opened.append((layer, groups[0].num_calls)))
        assert opened == [(0, 0), (1, 1), (2, 2), (3, 3)], "each after the layer before it"
        assert torch.equal(decoder.forward(batch, groups[0]), logits)


def test_it_leaves_a_group_that_ends(folder: Path) -> None:
    """A peer never comes: the call is in its first sum when the flag goes up."""
    with load_group(folder, 2, panels=True, kernels="native") as tp, shared_groups(tp) as groups:
        batch = ForwardBatch.build(steps_of(tp, 1)[0], tp.block_size)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                tp.decoders[0].forward(batch, groups[0])
            except GroupAborted as error:
                raised.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        region = groups[0]._region
        while region.progress()[0] == 0:  # it has put its part of the embedding down
            pass
        groups[1].all_reduce(torch.zeros(batch.token_ids.shape[0], SHAPE["hidden_size"], dtype=torch.bfloat16))
        while region.progress()[0] == 1:
            pass
        region.abort("cpu:1 was lost")
        thread.join(timeout=30.0)
        assert not thread.is_alive() and "cpu:1 was lost" in str(raised[0])
        with pytest.raises(GroupAborted):
            tp.decoders[0].forward(batch, groups[0])


def test_it_names_who_did_not_come(folder: Path) -> None:
    with load_group(folder, 3, panels=True, kernels="native") as tp, shared_groups(tp, timeout_s=0.2) as groups:
        batch = ForwardBatch.build(steps_of(tp, 1)[0], tp.block_size)
        with pytest.raises(GroupTimeout) as caught:
            tp.decoders[1].forward(batch, groups[1])
        assert caught.value.missing == (0, 2)


def test_another_collective_is_no_partner(folder: Path) -> None:
    with load_group(folder, 2, panels=True, kernels="native") as tp, shared_groups(tp) as groups:
        x = torch.zeros(4, 8, dtype=torch.bfloat16)
        groups[1]._rendezvous.arrive(7)
        with pytest.raises(AssertionError, match="different collectives"):
            groups[0].all_reduce(x)
