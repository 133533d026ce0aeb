"""Logits of every kind of model, at every degree and under odd layouts, against transformers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from anchortp.config import load_model_config
from anchortp.layout import ATTENTION, MLP, VOCAB, Layout, initial_layout, model_units, shard_from_dict
from anchortp.model import ForwardBatch, batch
from tests.cpu.model_tools import (
    KINDS,
    Entry,
    check_group,
    devices,
    load_group,
    make_tiny_model,
    random_layout,
    reference_logits,
    scrambled_tables,
    shard_items,
)
from tests.losses import after_loss, arrivals

DEGREES = [
    (kind, degree)
    for kind, (_, changes) in KINDS.items()
    for degree in range(1, changes.get("num_attention_heads", 6) + 1)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    # Half of them in many files, with an index.
    sizes = dict(zip(KINDS, ["50GB", "40KB"] * len(KINDS), strict=False))
    return {
        kind: make_tiny_model(root / kind, kind, seed=i, max_shard_size=sizes[kind]) for i, kind in enumerate(KINDS)
    }


def test_models_come_in_one_file_and_in_many(folders: dict[str, Path]) -> None:
    num_files = {len(list(folder.glob("*.safetensors"))) for folder in folders.values()}
    assert 1 in num_files and max(num_files) > 1


@pytest.mark.parametrize(("kind", "degree"), DEGREES)
def test_every_degree(folders: dict[str, Path], kind: str, degree: int, kernels: str) -> None:
    with load_group(folders[kind], degree, kernels=kernels) as group:
        assert len(group.decoders) == degree
        check_group(folders[kind], group, random.Random(degree))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_prompt(folders: dict[str, Path], kind: str, kernels: str) -> None:
    rng = random.Random(kind)
    with load_group(folders[kind], 2, kernels=kernels) as group:
        tokens = tuple(rng.randrange(101) for _ in range(100))  # more than one tile of queries
        table = scrambled_tables(1, group, rng)[0]
        logits = group.forward([Entry(token_ids=tokens, start=0, block_ids=table)])
    expected = reference_logits(folders[kind], tokens)[-1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["together", "alone", "native"])
@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(folders: dict[str, Path], seed: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "alone":  # short chunks as long ones do
        monkeypatch.setattr("anchortp.model.decoder.SHORT_CHUNK_TOKENS", 0)
    rng = random.Random(seed)
    kind = sorted(KINDS)[seed % len(KINDS)]
    units = model_units(load_model_config(folders[kind]))
    layout = random_layout(units, rng.randint(2, 5), rng)
    with load_group(folders[kind], layout, kernels="native" if how == "native" else "torch") as group:
        check_group(folders[kind], group, rng)


def test_random_layouts_are_irregular(folders: dict[str, Path]) -> None:
    """The layouts of the test above cover what they are meant to."""
    seen: set[str] = set()
    for seed in range(12):
        rng = random.Random(seed)
        units = model_units(load_model_config(folders[sorted(KINDS)[seed % len(KINDS)]]))
        for shard in random_layout(units, rng.randint(2, 5), rng).shards:
            seen |= {f"no {family}" for family in (ATTENTION, MLP, VOCAB) if not shard[family]}
            counts = {kv: 0 for kv in range(units.config.num_kv_heads)}
            for q_head in shard[ATTENTION]:
                counts[units.kv_head_of(q_head)] += 1
            if len({count for count in counts.values() if count}) > 1:
                seen.add("ragged")
    assert seen == {"no attention", "no mlp", "no vocab", "ragged"}


def test_weighted_speeds(folders: dict[str, Path], kernels: str) -> None:
    units = model_units(load_model_config(folders["llama"]))
    speeds = {"cpu:0": 3.0, "cpu:1": 1.0, "cpu:2": 0.1}
    layout = initial_layout(units, devices(3), speeds)
    assert not layout["cpu:2"][ATTENTION]
    with load_group(folders["llama"], layout, kernels=kernels) as group:
        check_group(folders["llama"], group, random.Random(1))


def test_rebind_keeps_what_survives(folders: dict[str, Path], kernels: str) -> None:
    """A shrink by hand: the survivors' slots stay, the lost units are appended and alone are loaded."""
    folder = folders["qwen3"]
    units = model_units(load_model_config(folder))
    before = initial_layout(units, devices(3))
    lost, survivors = before["cpu:1"], [before["cpu:0"], before["cpu:2"]]
    shards, items = [], {}
    for index, shard in enumerate(survivors):
        grown = {family: list(units_held) for family, units_held in shard.as_dict().items()}
        for family in (ATTENTION, MLP, VOCAB):
            grown[family] += lost[family][index::2]
        needed = sorted({units.kv_head_of(q) for q in grown[ATTENTION]})
        grown["kv"] += [kv for kv in needed if kv not in grown["kv"]]
        shards.append(shard_from_dict(shard.device, grown))
        items[shard.device] = [item for item in shard_items(shards[-1]) if item not in shard_items(shard)]
    with load_group(folder, before, kernels=kernels) as group:
        check_group(folder, group, random.Random(2))
        group.rebind(Layout(shards=tuple(shards)), items)
        check_group(folder, group, random.Random(3))


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "qwen3"])
def test_after_every_shrink_of_a_random_sequence_of_losses(folders: dict[str, Path], kind: str, kernels: str) -> None:
    """The planner's own moves, one loss after another in random order and number, down to one device."""
    folder, rng = folders[kind], random.Random(kind)
    units = model_units(load_model_config(folder))
    layout = initial_layout(units, devices(units.config.num_q_heads))
    with load_group(folder, layout, kernels=kernels) as group:
        while len(layout.devices) > 1:
            lost = rng.sample(layout.devices, rng.randint(1, min(3, len(layout.devices) - 1)))
            plan = after_loss(units, layout, lost)
            items = {d: arrivals(plan, d) for d in plan.after.devices}
            group.rebind(plan.after, items)
            check_group(folder, group, rng, lengths=(17, 6))
            layout = plan.after


def test_decode_groups_of_very_different_lengths(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(batch, "MAX_PADDING_TOKENS", 8)
    with load_group(folders["llama"], 2, kernels=kernels) as group:
        entries = [Entry(token_ids=(1,), start=s, block_ids=tuple(range(20))) for s in (0, 1, 30, 31)]
        assert len(ForwardBatch.build(entries, group.block_size).decode) == 2
        check_group(folders["llama"], group, random.Random(5), lengths=(6, 7, 40, 41, 42))


def test_the_ends_of_many_sequences_at_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """As after a loss, when a mirror lacks the newest tokens: short chunks of many lengths, in two groups."""
    rng = random.Random(6)
    monkeypatch.setattr(batch, "MAX_PADDING_TOKENS", 20)
    with load_group(folders["qwen3"], 3, kernels=kernels) as group:
        prompts = [tuple(rng.randrange(101) for _ in range(n)) for n in (38, 5, 40, 33, 36, 20)]
        tables = scrambled_tables(len(prompts), group, rng)
        ends = (2, 5, 32, 1, 33, 7)  # tokens each: one of them decodes, one is a long chunk
        begun = [
            Entry(token_ids=prompt[:-end], start=0, block_ids=table)
            for prompt, end, table in zip(prompts, ends, tables, strict=True)
            if len(prompt) > end
        ]
        group.forward(begun)
        entries = [
            Entry(token_ids=prompt[-end:], start=len(prompt) - end, block_ids=table)
            for prompt, end, table in zip(prompts, ends, tables, strict=True)
        ]
        logits = group.forward(entries)
    expected = torch.cat([reference_logits(folders["qwen3"], prompt)[-1:] for prompt in prompts])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_only_sampled_entries_have_logits(folders: dict[str, Path], kernels: str) -> None:
    tokens = (5, 6, 7)
    with load_group(folders["llama"], 3, kernels=kernels) as group:
        no, yes = (Entry(token_ids=tokens, start=0, block_ids=(block,), sample=block == 1) for block in range(2))
        assert group.forward([no]).shape == (0, 101)
        logits = group.forward([no, yes, no])
    torch.testing.assert_close(logits, reference_logits(folders["llama"], tokens)[-1:], atol=1e-4, rtol=1e-4)


def test_a_sequence_reads_no_byte_of_another(folders: dict[str, Path], kernels: str) -> None:
    """The cache is NaN wherever a sequence has not written: beside its last token, and in other blocks."""
    with load_group(folders["llama"], 2, num_blocks=8, kernels=kernels) as group:
        short = Entry(token_ids=(3,), start=0, block_ids=(7,))
        long = Entry(token_ids=tuple(range(9)), start=0, block_ids=(2, 5, 0))
        group.forward([short, long])
        logits = group.forward(
            [
                Entry(token_ids=(4,), start=1, block_ids=(7,)),
                Entry(token_ids=(9,), start=9, block_ids=(2, 5, 0)),
            ]
        )
    expected = torch.stack([reference_logits(folders["llama"], tokens)[-1] for tokens in ((3, 4), tuple(range(10)))])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("degree", [1, 3])
def test_bfloat16(folders: dict[str, Path], degree: int, kernels: str) -> None:
    """Served in bfloat16, the logits stay near the float32 ones: rounding, not another function."""
    rng = random.Random(7)
    tokens = tuple(rng.randrange(101) for _ in range(60))
    expected = reference_logits(folders["llama"], tokens)
    with load_group(folders["llama"], degree, dtype="bfloat16", kernels=kernels) as group:
        table = scrambled_tables(1, group, rng)[0]
        prompt = group.forward([Entry(token_ids=tokens[:-1], start=0, block_ids=table)])
        decoded = group.forward([Entry(token_ids=tokens[-1:], start=59, block_ids=table)])
    for found, wanted in ((prompt[0], expected[-2]), (decoded[0], expected[-1])):
        error = (found - wanted).norm() / wanted.norm()
        assert 0 < error < 0.03, f"relative error {error:.4f}"
