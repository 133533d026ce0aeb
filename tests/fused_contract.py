"""Triton's kernels against torch's: equal but for the last bit of some numbers.

On a GPU (`tests/gpu/test_fused.py`), or in Triton's interpreter (`tests/cpu/test_fused.py`): each runs this file in a
process of its own, with TRITON_INTERPRET set in the latter.
"""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from anchortp.config import RopeConfig
from anchortp.model.kernels import Places, TorchKernels
from anchortp.model.rope import RopeTables
from tests.triton_interpreter import interpret

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpret()

from anchortp.model.fused import TritonKernels  # noqa: E402

DTYPES = ("bfloat16", "float32")
ROWS = (1, 3) if INTERPRETED else (1, 3, 16, 300)
EPS = 1e-6


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.inference_mode(), torch.device("cpu" if INTERPRETED else "cuda"):
        yield


def random_values(seed: int, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))


def check(found: Tensor, wanted: Tensor) -> None:
    """Equal, or the next number, of the size of the row's largest: of two large numbers a small one may be left."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    step = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}[wanted.dtype]
    apart = (found.float() - wanted.float()).abs() / wanted.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    assert float(apart.max()) <= step
    if wanted.dtype == torch.bfloat16 and wanted.numel() > 500:
        assert float((found == wanted).float().mean()) > 0.99, "rounded at other places"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, 100, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_residual_and_norm(rows: int, width: int, dtype: str) -> None:
    x, more = (random_values(seed, rows, width, dtype=dtype, scale=3.0) for seed in (1, 2))
    weight = random_values(3, width, dtype=dtype)
    found_x, wanted_x = x.clone(), x.clone()
    found = TritonKernels().add_norm(found_x, more, weight, EPS)
    wanted = TorchKernels().add_norm(wanted_x, more, weight, EPS)
    assert torch.equal(found_x, wanted_x), "the residual stream, bit for bit"
    check(found, wanted)
    before = x.clone()
    check(TritonKernels().add_norm(x, None, weight, EPS), TorchKernels().add_norm(x, None, weight, EPS))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_norms_of_heads(head_dim: int, dtype: str) -> None:
    heads, weight = random_values(1, 3, 5, head_dim, dtype=dtype), random_values(2, head_dim, dtype=dtype)
    check(TritonKernels().norm(heads, weight, EPS), TorchKernels().norm(heads, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "block"), [(1, 64), (7, 64), (192, 64), (5, 24), (3, 1), (40, 6), (1, 3000)])
@pytest.mark.parametrize("rows", ROWS)
def test_gate(rows: int, blocks: int, block: int, dtype: str) -> None:
    both = random_values(rows, rows, 2 * block * blocks, dtype=dtype, scale=5.0)
    check(TritonKernels().gate(both, block), TorchKernels().gate(both, block))


# q heads, KV heads, and the q heads that attention wants, in its order
HEADS = [(1, 1, (0,)), (6, 2, (0, 2, 1, 3, 5, 4)), (5, 3, (4, 0, 2, 0, 1, 3)), (8, 1, tuple(range(8)))]

HEADS_OF_ALL_SIZES = list(zip([128, 64, 128, 64, 24, 2], [*HEADS, HEADS[2], HEADS[1]], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("head_dim", "heads"), HEADS_OF_ALL_SIZES)
@pytest.mark.parametrize("rows", ROWS[1:])
def test_from_projections_to_queries_and_cache(rows, head_dim, heads, has_norms, dtype) -> None:
    num_q, num_kv, pick = heads
    num_tokens, num_positions = rows + 5, 900
    rng = random.Random(rows)
    q = random_values(1, rows, num_q * head_dim, dtype=dtype, scale=3.0)
    kv = random_values(2, rows, num_kv * 2 * head_dim, dtype=dtype, scale=3.0)
    norms = tuple(random_values(3, 2, head_dim, dtype=dtype)) if has_norms else None
    rope = RopeTables(SimpleNamespace(rope=RopeConfig(), head_dim=head_dim, dtype=dtype), num_positions)
    # As in a graph's bucket the last row repeats the first one, all of it: both write the same.
    first = [rng.randrange(num_positions) for _ in range(rows)], rng.sample(range(num_tokens), rows)
    positions, cache_slots = (torch.tensor(values) for values in first)
    for given in (q, kv, positions, cache_slots):
        given[-1] = given[0]
    around = random_values(4, 2 * num_kv + 2, num_tokens, head_dim, dtype=dtype)  # planes of others on both sides
    results = []
    for kernels in (TritonKernels(), TorchKernels()):
        memory = around.clone()
        cos, sin = kernels.rotation(rope, positions, num_q, num_kv)
        places = Places(positions=positions, cache_slots=cache_slots, cos=cos, sin=sin)
        queries = kernels.rotate_store(q, kv, norms, EPS, places, memory[1:-1], torch.tensor(pick))
        results.append((queries, memory))
    (found, found_memory), (wanted, wanted_memory) = results
    check(found, wanted)
    check(found_memory[1:-1:2][:, cache_slots], wanted_memory[1:-1:2][:, cache_slots])  # keys
    for memory in (found_memory, wanted_memory):
        memory[1:-1:2][:, cache_slots] = 0
    assert torch.equal(found_memory, wanted_memory), "values are copied, and nothing else is written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: str) -> None:
    """Which torch's do not take."""
    kernels, none = TritonKernels(), torch.zeros(0, dtype=torch.int64)
    x, weight = random_values(1, 0, 48, dtype=dtype), random_values(2, 48, dtype=dtype)
    assert kernels.add_norm(x, x.clone(), weight, EPS).shape == (0, 48)
    assert kernels.gate(random_values(1, 0, 48, dtype=dtype), 12).shape == (0, 24)
    cache = random_values(3, 2, 4, 8, dtype=dtype)
    before = cache.clone()
    places = Places(positions=none, cache_slots=none, cos=cache[0], sin=cache[0])
    q, kv = random_values(1, 0, 16, dtype=dtype), random_values(1, 0, 16, dtype=dtype)
    queries = kernels.rotate_store(q, kv, None, EPS, places, cache, torch.tensor([1, 0]))
    assert queries.shape == (0, 2, 8) and torch.equal(cache, before)


def test_a_number_that_is_none_is_not_hidden() -> None:
    """It would hide weights or a cache that are not there; and it stays in its row."""
    kernels, nan = TritonKernels(), float("nan")
    x = torch.ones(2, 64)
    x[0, 3] = nan
    out = kernels.add_norm(x, torch.ones(2, 64), torch.ones(64), EPS)
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert kernels.gate(x, 16).isnan().nonzero().tolist() == [[0, 3]]
    slots = torch.tensor([2, 0])
    places = Places(positions=slots, cache_slots=slots, cos=torch.ones(3, 32), sin=torch.ones(3, 32))
    for norms in (None, (torch.ones(32), torch.ones(32))):
        cache = torch.zeros(2, 3, 32)
        queries = kernels.rotate_store(x, x, norms, EPS, places, cache, torch.tensor([1, 0]))
        nans = [(1, 3), (1, 19)] if norms is None else [(1, column) for column in range(32)]
        assert [tuple(at) for at in queries[0].isnan().nonzero().tolist()] == nans
        assert cache[0, 2].isnan().nonzero().flatten().tolist() == [column for _, column in nans]
        assert not queries[1].isnan().any() and not cache[1].isnan().any() and not cache[0, :2].isnan().any()
