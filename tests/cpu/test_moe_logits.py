"""Mixtures of experts at every degree, cut in both ways, with replicas and after losses, against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from anchortp.config import load_model_config
from anchortp.layout import EXPERT, Layout, ModelUnits, initial_layout, model_units
from tests.cpu.model_tools import (
    BASE_SHAPE,
    MOE_KINDS,
    Entry,
    TPGroup,
    check_group,
    devices,
    load_group,
    make_tiny_model,
    random_layout,
    reference_logits,
    scrambled_tables,
)
from tests.losses import after_loss, arrivals

CUTS = ("experts", "columns")
NUM_Q_HEADS = BASE_SHAPE["num_attention_heads"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        kind: make_tiny_model(root / kind, kind, seed=i, original_format=i % 2 == 0) for i, kind in enumerate(MOE_KINDS)
    }


def units_of(folder: Path, expert_cut: str = "experts") -> ModelUnits:
    return model_units(load_model_config(folder, expert_cut=expert_cut))


def with_replicas(layout: Layout, units: ModelUnits, rng: random.Random, count: int) -> Layout:
    """`count` further copies of experts, on devices that lack them."""
    copies = [(d, u) for d in layout.devices for u in range(units.num_units[EXPERT]) if u not in layout[d][EXPERT]]
    for device, unit in rng.sample(copies, min(count, len(copies))):
        layout = layout.with_shard(layout[device].appended(EXPERT, [unit]))
    return layout


@pytest.mark.parametrize("expert_cut", CUTS)
@pytest.mark.parametrize("degree", range(1, NUM_Q_HEADS + 1))
@pytest.mark.parametrize("kind", MOE_KINDS)
def test_every_degree(folders, kind, degree, expert_cut, kernels):
    with load_group(folders[kind], degree, expert_cut=expert_cut, kernels=kernels) as group:
        assert len(group.decoders) == degree
        check_group(folders[kind], group, random.Random(degree))


@pytest.mark.parametrize("expert_cut", CUTS)
@pytest.mark.parametrize("seed", range(8))
def test_random_layouts(folders, seed, expert_cut, kernels):
    """Devices without an expert of some layer, or of any; experts in any slots; some of them twice or more."""
    rng = random.Random(seed)
    kind = sorted(MOE_KINDS)[seed % len(MOE_KINDS)]
    layout = random_layout(units_of(folders[kind], expert_cut), rng.randint(2, 5), rng, num_replicas=seed)
    with load_group(folders[kind], layout, expert_cut=expert_cut, kernels=kernels) as group:
        check_group(folders[kind], group, rng)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_every_expert_everywhere(folders, kind):
    units = units_of(folders[kind])
    layout = with_replicas(initial_layout(units, devices(3)), units, random.Random(0), units.num_units[EXPERT] * 3)
    assert all(len(shard[EXPERT]) == units.num_units[EXPERT] for shard in layout.shards)
    with load_group(folders[kind], layout) as group:
        check_group(folders[kind], group, random.Random(1))


@pytest.mark.parametrize("expert_cut", CUTS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_after_every_shrink_of_a_random_sequence_of_losses(folders, kind, expert_cut):
    """As for dense models, with some replicas to begin with: what has another copy is not loaded again."""
    folder, rng = folders[kind], random.Random(kind)
    units = units_of(folder, expert_cut)
    layout = initial_layout(units, devices(NUM_Q_HEADS))
    if expert_cut == "experts":
        layout = with_replicas(layout, units, rng, 12)
    with load_group(folder, layout, expert_cut=expert_cut) as group:
        while len(layout.devices) > 1:
            lost = rng.sample(layout.devices, rng.randint(1, min(2, len(layout.devices) - 1)))
            plan = after_loss(units, layout, lost)
            items = {d: arrivals(plan, d) for d in plan.after.devices}
            group.rebind(plan.after, items)
            check_group(folder, group, rng, lengths=(17, 6))
            layout = plan.after


@pytest.mark.parametrize("expert_cut", CUTS)
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_bfloat16(folders, kind, expert_cut):
    """Most tokens stay near float32; one whose routing is nearly a tie may take another expert."""
    rng = random.Random(7)
    tokens = tuple(rng.randrange(101) for _ in range(60))
    expected = reference_logits(folders[kind], tokens)
    with load_group(folders[kind], 3, dtype="bfloat16", expert_cut=expert_cut) as group:
        table = scrambled_tables(1, group, rng)[0]
        errors = []
        for stop in range(1, 61):
            entry = Entry(token_ids=tokens[stop - 1 : stop], start=stop - 1, block_ids=table)
            found, wanted = group.forward([entry])[0], expected[stop - 1]
            errors.append(float((found - wanted).norm() / wanted.norm()))
    assert 0 < sorted(errors)[30] < 0.05, errors


def decode(group: TPGroup, positions: int, table: tuple[int, ...]) -> None:
    for position in range(positions):
        group.forward([Entry(token_ids=(position % 101,), start=position, block_ids=table)])


def test_load_is_what_the_router_chose(folders):
    """Counted on rank 0 for all ranks, equal at every degree and for every cut."""
    folder, found = folders["qwen3-moe"], []
    for degree, expert_cut in ((1, "experts"), (3, "experts"), (4, "columns")):
        with load_group(folder, degree, expert_cut=expert_cut) as group:
            decode(group, 20, scrambled_tables(1, group, random.Random(0))[0])
            loads = [decoder.moe.load for decoder in group.decoders]
            assert not any(load.any() for load in loads[1:])
            found.append(loads[0])
    moe = load_model_config(folder).moe
    assert found[0].dtype == torch.int32 and found[0].shape == (2, moe.num_experts)
    assert found[0].sum(1).tolist() == [20 * moe.top_k] * 2
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_load_is_reported_once(folders):
    with load_group(folders["mixtral"], 2) as group:
        decode(group, 3, scrambled_tables(1, group, random.Random(0))[0])
        moe = group.decoders[0].moe
        counted = moe.load.clone()
        first, second = (torch.frombuffer(bytearray(moe.take_load()), dtype=torch.int32) for _ in range(2))
    assert torch.equal(first.view(counted.shape), counted) and int(first.sum()) == 3 * 2 * 2
    assert not second.any()


class _OnDevice(torch.Tensor):
    """Like a tensor on a GPU: only a copy on the host becomes an array."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert a tensor on a device to numpy")


def test_load_is_counted_on_the_device_and_reported_from_the_host(folders):
    with load_group(folders["mixtral"], 1) as group:
        moe = group.decoders[0].moe
        moe.load[0, 1] = 7
        moe.load = moe.load.as_subclass(_OnDevice)
        first, second = (torch.frombuffer(bytearray(moe.take_load()), dtype=torch.int32) for _ in range(2))
    assert first[1] == int(first.sum()) == 7 and not second.any()


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("num_replicas", [0, 7, 60])
def test_each_choice_is_computed_by_one_replica(folders, monkeypatch, num_tokens, num_replicas):
    """Of what all ranks take on in each layer, nothing is missing and nothing is double; replicas share evenly."""
    from anchortp.model.moe import MoE

    units = units_of(folders["qwen3-moe"])
    layout = with_replicas(initial_layout(units, devices(4)), units, random.Random(3), num_replicas)
    taken: dict[int, list[dict[int, list[int]]]] = {}
    original = MoE._mine

    def spy(self, experts, chosen, counts):
        mine = original(self, experts, chosen, counts)
        taken.setdefault(id(self), []).append({local.expert: pick.tolist() for local, pick in mine})
        return mine

    monkeypatch.setattr(MoE, "_mine", spy)
    with load_group(folders["qwen3-moe"], layout) as group:
        table, rng = scrambled_tables(1, group, random.Random(0))[0], random.Random(1)
        for step in range(3):
            tokens = tuple(rng.randrange(101) for _ in range(num_tokens))
            group.forward([Entry(token_ids=tokens, start=step * num_tokens, block_ids=table)])
        ranks = [taken[id(decoder.moe)] for decoder in group.decoders]
    for call, of_ranks in enumerate(zip(*ranks, strict=True)):
        choices = sorted(choice for mine in of_ranks for picks in mine.values() for choice in picks)
        assert choices == list(range(num_tokens * units.config.moe.top_k))
        layer = call % 2
        for expert in range(units.config.moe.num_experts):
            holders = layout.holders(EXPERT, layer * units.config.moe.num_experts + expert)
            shares = [len(of_ranks[layout.rank(device)].get(expert, ())) for device in holders]
            assert max(shares) - min(shares) <= 1
            others = [mine for rank, mine in enumerate(of_ranks) if layout.devices[rank] not in holders]
            assert not any(expert in mine for mine in others)


def test_replicas_take_turns_when_an_expert_has_one_token_a_step(folders, monkeypatch):
    from anchortp.model.moe import MoE

    folder = folders["mixtral-one"]  # one expert a token
    units = units_of(folder)
    layout = with_replicas(initial_layout(units, devices(2)), units, random.Random(0), 99)
    computed: dict[int, int] = {}
    original = MoE._compute

    def spy(self, mine, x):
        computed[id(self)] = computed.get(id(self), 0) + x.shape[0]
        return original(self, mine, x)

    monkeypatch.setattr(MoE, "_compute", spy)
    with load_group(folder, layout) as group:
        decode(group, 100, scrambled_tables(1, group, random.Random(0))[0])
        shares = [computed[id(decoder.moe)] for decoder in group.decoders]
    assert sum(shares) == 100 * units.config.num_layers
    assert min(shares) > 0.4 * sum(shares)
