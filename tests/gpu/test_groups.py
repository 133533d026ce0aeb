"""Groups of ranks that share a GPU: the sums are those of the host, bit for bit; NCCL with a rank to itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.gpu_ranks import anchors, run_ranks

DEVICES = ("cuda:0/0", "cuda:0/1", "cuda:0/2")
SLOT_BYTES = 64 << 10


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="atp-"))
    yield path
    shutil.rmtree(path)


def sample(rank: int, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * index + rank)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-3, 4, shape, generator=generator)
    return x.to(dtype)


CASES = [((1, 7), torch.float32), ((16, 1024), torch.bfloat16), ((300, 576), torch.bfloat16), ((0, 4), torch.float32)]


def mixed(group, accelerator) -> int:
    """Sums and gathers back to back, checked against the host's."""
    num_checked = 0
    for index, (shape, dtype) in enumerate(CASES * 8):
        parts = [sample(rank, index, shape, dtype) for rank in range(group.size)]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        mine = parts[group.rank].to(accelerator.torch_device)
        summed = group.all_reduce(mine.clone())
        assert torch.equal(summed.cpu(), total.to(dtype)), f"all-reduce {index}: {shape} {dtype}"
        gathered = group.gather(mine, [shape[1]] * group.size, root=index % group.size)
        assert (gathered is None) == (group.rank != index % group.size)
        for got, wanted in zip(gathered or [], parts, strict=gathered is not None):
            assert torch.equal(got.cpu(), wanted), f"gather {index}"
        num_checked += 1
    group.barrier()
    return num_checked


@pytest.mark.parametrize("kind", ["peer", "shm"])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_that_share_a_gpu_sum_as_the_host_does(kind: str, size: int, runtime_dir: Path) -> None:
    with anchors(runtime_dir, DEVICES[:size], 64 << 20):
        assert run_ranks(kind, runtime_dir, DEVICES[:size], SLOT_BYTES, mixed) == [len(CASES) * 8] * size


@pytest.mark.parametrize("kind", ["nccl", "mixed"])
def test_nccl_comes_up_and_computes(kind: str, runtime_dir: Path) -> None:
    with anchors(runtime_dir, ("cuda:0",), 64 << 20):
        assert run_ranks(kind, runtime_dir, ("cuda:0",), SLOT_BYTES, mixed) == [len(CASES) * 8]
