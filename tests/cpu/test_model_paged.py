"""Attention by libraries: through FlashInfer's interface, over planes where they lie, and by torch's own, over what is
gathered of them. The logits are those of transformers.

`FakeFlashInfer` is held to what the package's sources ask of their arguments, and its one kernel reads, as theirs do,
nothing but device memory: block tables and lengths from buffers, keys and values through strides.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anchortp import config as config_module
from anchortp.config import load_model_config, resolve_engine_config
from anchortp.errors import ConfigError
from anchortp.model import DecodeGraphs, ForwardBatch
from anchortp.model import paged as paged_module
from anchortp.model.paged import FlashInfer, Pages, Sdpa, as_paged
from tests.cpu.model_tools import Entry, TPGroup, check_group, load_group, make_tiny_model, random_layout
from tests.cpu.test_model_graphs import Graphed, begin, decode
from tests.tiny_model import write_model

BUFFERS = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")


@torch.library.custom_op("fake_flashinfer::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, starts: Tensor, blocks: Tensor, last: Tensor) -> Tensor:
    """Causal attention of each sequence's last tokens, one sequence and head at a time."""
    out, group = torch.full_like(q, float("nan")), q.shape[1] // k.shape[1]
    for seq in range(len(last)):
        pages = blocks[starts[seq] : starts[seq + 1]].long()
        num_keys = (len(pages) - 1) * k.shape[2] + int(last[seq])
        first, stop = int(rows[seq]), int(rows[seq + 1])
        hidden = torch.ones(stop - first, num_keys, dtype=torch.bool).triu(num_keys - (stop - first) + 1)
        for head in range(q.shape[1]):
            keys, values = (x[pages, head // group].flatten(0, 1)[:num_keys] for x in (k, v))
            scores = (q[first:stop, head] @ keys.T / q.shape[2] ** 0.5).masked_fill(hidden, float("-inf"))
            out[first:stop, head] = scores.softmax(-1) @ values
    return out


class Wrapper:
    def __init__(self, workspace, layout, *, use_cuda_graph=False, backend, **buffers):
        assert workspace.dtype == torch.uint8 and (layout, backend) == ("HND", "fa2")
        assert set(buffers) == (set(BUFFERS) if use_cuda_graph else set())
        self._buffers = [buffers[name] for name in BUFFERS] if use_cuda_graph else None
        self._max_rows = None
        self.plans = 0

    def plan(
        self, rows, starts, blocks, last, num_q, num_kv, head_dim, page_size, *, causal, q_data_type, kv_data_type
    ):
        given = (rows, starts, blocks, last)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in given) and causal
        assert num_q % num_kv == 0 and len(rows) == len(starts) == len(last) + 1 and starts[-1] == len(blocks)
        assert (last >= 1).all() and (last <= page_size).all() and q_data_type == kv_data_type
        if self._buffers is None:
            self._now = [t.clone() for t in given]
        else:
            self._max_rows = self._max_rows or int(rows[-1])
            assert int(rows[-1]) <= self._max_rows and len(rows) == len(self._buffers[0])
            for buffer, values in zip(self._buffers, given, strict=True):
                buffer[: len(values)].copy_(values)
            self._now = self._buffers
        self._shape = (num_q, num_kv, head_dim, page_size, int(rows[-1]))
        self._dtype = q_data_type
        self.plans += 1

    def run(self, q, cache):
        k, v = cache
        num_q, num_kv, head_dim, page_size, num_rows = self._shape
        assert q.shape == (num_rows, num_q, head_dim) and q.dtype == k.dtype == self._dtype
        assert k.shape == v.shape == (k.shape[0], num_kv, page_size, head_dim)
        assert k.stride() == v.stride() and k.stride(3) == 1 and max(k.stride()) < 1 << 32
        return attend(q, k, v, *self._now)


FakeFlashInfer = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)


def use_flashinfer(group: TPGroup) -> None:
    for decoder in group.decoders:
        decoder.paged = FlashInfer(FakeFlashInfer, group.units.config, group.block_size, torch.device("cpu"))


def use_sdpa(group: TPGroup) -> None:
    for decoder in group.decoders:
        decoder.paged = Sdpa(group.units.config, group.block_size)


LIBRARIES = {"flashinfer": use_flashinfer, "sdpa": use_sdpa}


@pytest.fixture(scope="module", autouse=True)
def small_workspace():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchortp.model.paged.WORKSPACE_BYTES", 64)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_tiny_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "qwen3", "mixtral")}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_prefill_and_decode_in_any_mixture_are_transformers(folders, kind: str) -> None:
    """On random layouts: groups of q heads of unequal sizes, and ranks without any."""
    rng = random.Random(11)
    with load_group(folders[kind], 1) as probe:
        layout = random_layout(probe.units, 3, rng)
    with load_group(folders[kind], layout) as group:
        use_flashinfer(group)
        check_group(folders[kind], group, rng)
        used = [d.paged._of_steps.plans > 1 for d in group.decoders]
        assert used == [bool(shard["attention"]) for shard in group.layout.shards] and any(used)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize("seed", range(2))
def test_torchs_attention_gives_the_logits_of_transformers(folders, kind: str, seed: int, monkeypatch) -> None:
    """On random layouts, with chunks that begin a sequence and that go on with one, and groups with and without
    padding; what was never written is NaN."""
    rng, calls = random.Random(seed), set()

    def watched(*args, attn_mask=None, is_causal=False, **more):
        calls.add("causal" if is_causal else "masked" if attn_mask is not None else "plain")
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    real = paged_module.scaled_dot_product_attention
    monkeypatch.setattr(paged_module, "scaled_dot_product_attention", watched)
    with load_group(folders[kind], 1) as probe:
        layout = random_layout(probe.units, 3, rng)
    with load_group(folders[kind], layout) as group:
        use_sdpa(group)
        check_group(folders[kind], group, rng)
        check_group(folders[kind], group, rng, lengths=(8, 16))
        assert not any(d._gathered.numel() for d in group.decoders), "nothing went another way"
    assert {"causal", "masked"} <= calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [(1, 1), (6, 2), (15, 3)])
def test_torchs_attention_is_that_of_each_query_alone(dtype: torch.dtype, num_heads: tuple[int, int]) -> None:
    """Against the plain formula in float64, for a step with decoding and chunks, short, long and first ones."""
    block_size, head_dim, num_blocks = 4, 16, 40
    config = SimpleNamespace(head_dim=head_dim, dtype=str(dtype).removeprefix("torch."))
    rng = random.Random(num_heads[0])
    blocks = rng.sample(range(num_blocks), num_blocks)
    entries = []
    for start, num_new in ((0, 1), (7, 1), (15, 1), (3, 1), (0, 9), (5, 6), (16, 40), (12, 2)):
        table = tuple(blocks.pop() for _ in range(-(-(start + num_new) // block_size)))
        entries.append(Entry(token_ids=(1,) * num_new, start=start, block_ids=table))
    batch = ForwardBatch.build(entries, block_size)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(len(batch.positions), num_heads[0], head_dim, generator=generator).to(dtype)
    cache = torch.zeros(2 * num_heads[1], num_blocks * block_size, head_dim, dtype=dtype)
    row_of = {}
    for entry in entries:
        for position in range(entry.start + len(entry.token_ids)):
            place = entry.block_ids[position // block_size] * block_size + position % block_size
            cache[:, place] = torch.randn(2 * num_heads[1], head_dim, generator=generator).to(dtype)
            row_of[place] = entry, position
    found = Sdpa(config, block_size).plan(batch, num_heads)(queries, cache)
    assert found.shape == queries.shape and found.dtype == dtype
    for row, place in enumerate(batch.cache_slots.tolist()):
        entry, position = row_of[place]
        places = [entry.block_ids[p // block_size] * block_size + p % block_size for p in range(position + 1)]
        for head in range(num_heads[0]):
            plane = 2 * (head * num_heads[1] // num_heads[0])
            keys, values = cache[plane, places].double(), cache[plane + 1, places].double()
            weights = (keys @ queries[row, head].double() / head_dim**0.5).softmax(0)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[row, head].double(), weights @ values, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("captures", [0, 1, 9])
def test_steps_that_are_captured_are_planned_anew_each_time(folders, captures: int, library: str) -> None:
    """A replay attends to what the last plan says, longer contexts and all."""
    rng = random.Random(captures)
    with load_group(folders["llama"], 2) as group:
        LIBRARIES[library](group)
        graphed = Graphed(group, captures_per_step=captures)
        sequences, tables = begin(group, (5, 14, 22), rng)
        decode(folders["llama"], group, sequences, tables, 8, rng)
        assert all((tape.num_replayed > 0) == (captures > 0) for tape in graphed.tapes)
        assert all(not d._gathered.numel() for d in group.decoders), "nothing went another way"


def test_a_rank_without_heads_plans_nothing(folders) -> None:
    with load_group(folders["llama"], 4) as group:  # three KV heads
        use_flashinfer(group)
        assert [DecodeGraphs(d, lambda work: work)._bucket((1, 8))._paged is None for d in group.decoders] == [
            not shard["attention"] for shard in group.layout.shards
        ]


def test_pages_are_made_in_host_memory_whatever_device_is_the_default() -> None:
    decoding = Entry(token_ids=(1,), start=4, block_ids=(3, 5))
    prefilled = Entry(token_ids=(1, 2, 3), start=6, block_ids=(9, 8, 7))
    batch = ForwardBatch.build([prefilled, decoding], 4)
    with torch.device("meta"):
        pages = Pages.of_batch(batch)
    assert [t.tolist() for t in (pages.rows, pages.starts, pages.blocks, pages.last_tokens)] == [
        [0, 1, 4],
        [0, 2, 5],
        [3, 5, 9, 8, 7],
        [1, 1],
    ]


def test_planes_are_viewed_and_not_copied() -> None:
    cache = torch.arange(2 * 3 * 8 * 4).view(6, 8, 4)  # three slots, two blocks of four tokens
    keys, values = as_paged(cache, 4)
    assert keys.shape == values.shape == (2, 3, 4, 4) and keys.stride() == values.stride()
    assert keys.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    for block in range(2):
        for slot in range(3):
            assert torch.equal(keys[block, slot], cache[2 * slot, 4 * block : 4 * block + 4])
            assert torch.equal(values[block, slot], cache[2 * slot + 1, 4 * block : 4 * block + 4])


sequences = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), sequences, st.integers(1, 3))
def test_pages_say_where_each_sequence_lies(block_size: int, drawn: list[tuple[int, int]], cut: int) -> None:
    tables = [list(range(100 * i, 100 * i + -(-keys // block_size))) for i, (keys, _) in enumerate(drawn)]
    parts = []
    for at in range(0, len(drawn), cut):  # padded to the longest of each part, as decode groups are
        width = max(map(len, tables[at : at + cut]))
        padded = [table + table[:1] * (width - len(table)) for table in tables[at : at + cut]]
        keys, rows = zip(*drawn[at : at + cut], strict=True)
        parts.append((torch.tensor(padded), torch.tensor(keys), torch.tensor(rows)))
    pages = Pages.of(block_size, parts)
    bounds, starts, last = (t.tolist() for t in (pages.rows, pages.starts, pages.last_tokens))
    assert pages.blocks.dtype == pages.rows.dtype == torch.int32
    for i, (keys, rows) in enumerate(drawn):
        assert bounds[i + 1] - bounds[i] == rows
        assert pages.blocks[starts[i] : starts[i + 1]].tolist() == tables[i]
        assert (len(tables[i]) - 1) * block_size + last[i] == keys


def test_where_it_cannot_be_used_the_engine_says_so_before_it_starts(tmp_path, monkeypatch) -> None:
    options = {"runtime_dir": tmp_path, "device_memory_bytes": 1 << 28, "attention": "flashinfer"}
    tiny = write_model(tmp_path / "tiny")
    fits = write_model(tmp_path / "fits", dtype="bfloat16", head_dim=64)
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None)
    for folder, devices, why in (
        (tiny, ("cpu:0",), "devices are of kind cpu"),
        (tiny, ("cuda:0",), "heads are of 16 in float32"),
        (fits, ("cuda:0",), "not installed"),
    ):
        with pytest.raises(ConfigError, match=why):
            resolve_engine_config(folder, devices=devices, **options)
    with pytest.raises(ConfigError, match="have a faster one"):
        resolve_engine_config(tiny, devices=("cpu:0",), **options | {"attention": "sdpa"})
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: object())
    assert resolve_engine_config(fits, devices=("cuda:0",), **options).attention == "flashinfer"
    assert load_model_config(fits).head_dim == 64
    for attention, device, resolved in (
        ("auto", "cuda:0", "sdpa"),
        ("torch", "cuda:0", "torch"),
        ("sdpa", "sim:0", "sdpa"),
        ("auto", "sim:0", "torch"),
        ("auto", "cpu:0", "torch"),
    ):
        found = resolve_engine_config(tiny, devices=(device,), **options | {"attention": attention, "kernels": "torch"})
        assert found.attention == resolved
