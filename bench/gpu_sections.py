"""What `bench.gpu_check` measures, a section per process: `python -m bench.gpu_sections NAME --kind cuda`.

Each prints one JSON object as its last line. `--kind sim` runs the same code on simulated devices, at small sizes:
its numbers mean nothing, but it keeps the code alive where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchortp.arena import MemfdArena
from anchortp.config import parse_model_config
from anchortp.devices import parse_device
from anchortp.engine.accelerator import Accelerator
from anchortp.engine.kv_blocks import KVBlocks
from anchortp.engine.mirror_addresses import MirrorAddresses
from anchortp.layout import KVAddresses
from anchortp.state.client import AnchorClient
from anchortp.state.process import open_pidfd, wait_gone
from anchortp.transfer.tensors import tensor_of
from bench.gpu_ranks import EPOCH, TIMEOUT_S, anchors, decode_with_and_without_graphs, run_ranks, timed
from tests.tiny_model import TINY, write_model

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large: the GPU's sizes, or what a test can afford."""

    kind: str
    arena_bytes: int
    repeats: int
    hidden: int
    model: dict[str, Any]
    tokens: int
    large_model: dict[str, Any]
    large_tokens: int
    large_memory_bytes: int

    def device(self, part: int) -> str:
        return f"{self.kind}:0/{part}"


QWEN3_8B = {  # its config.json
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}

# The engine's model on a GPU: 8 layers with the widths of a 1 B model, 1.1 GB in bf16, made up on the spot.
SCALES = {
    "cuda": Scale(
        kind="cuda",
        arena_bytes=2 * GIB,
        repeats=7,
        hidden=4096,
        model={
            "num_hidden_layers": 8,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "vocab_size": 32000,
            "dtype": "bfloat16",
            "max_position_embeddings": 2048,
        },
        tokens=256,
        large_model=QWEN3_8B,
        large_tokens=160,
        large_memory_bytes=19 * GIB,  # also for the engine of one; committed as it is used
    ),
    "sim": Scale(
        kind="sim",
        arena_bytes=16 << 20,
        repeats=2,
        hidden=64,
        model={},
        tokens=120,
        large_model={"tie_word_embeddings": False},
        large_tokens=60,
        large_memory_bytes=1 << 28,
    ),
}


def memory(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """Commit, attach and hand over 2 GiB in chunks; bandwidths into, within and between arenas."""
    devices = (scale.device(0), scale.device(1))
    page, size = parse_device(devices[0]).page_bytes, scale.arena_bytes
    result: dict[str, Any] = {"arena_bytes": size, "chunk_bytes": page, "num_chunks": size // page}
    with (
        anchors(runtime_dir, devices, 2 * size),
        AnchorClient.connect(runtime_dir, devices[0], role="worker", timeout_s=TIMEOUT_S) as client,
    ):
        result["anchor_gpu_bytes_idle"] = _gpu_bytes_of(client.welcome.pid)
        began_s = time.perf_counter()
        accelerator = Accelerator.of(parse_device(devices[0]))
        result["context_s"] = time.perf_counter() - began_s
        arena = client.create_arena("weights", size, EPOCH)
        result["commit_s"] = _seconds(lambda: client.commit("weights", [(0, size)], EPOCH))
        result["attach_s"] = _seconds(lambda: client.refresh(arena, EPOCH))
        result["anchor_gpu_bytes"] = _gpu_bytes_of(client.welcome.pid)
        whole = tensor_of(arena)
        client.decommit("weights", [(0, size // 2)], EPOCH)
        result["recommit_half_s"] = _seconds(lambda: client.commit("weights", [(0, size // 2)], EPOCH))
        client.refresh(arena, EPOCH)
        result |= _mirror_rates(scale, accelerator)
        result |= _bandwidths(scale, accelerator, whole, runtime_dir, devices[1])
        result["reexport_of_imported"] = _reexport(arena)
        del whole
    return result


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _bandwidths(
    scale: Scale, accelerator: Accelerator, whole: torch.Tensor, runtime_dir: Path, other: str
) -> dict[str, float]:
    half = whole.numel() // 2
    with AnchorClient.connect(
        runtime_dir, other, role="tool", timeout_s=TIMEOUT_S, open_driver=accelerator.open_driver
    ) as client:
        arena = client.create_arena("weights", half, EPOCH)
        client.commit("weights", [(0, half)], EPOCH)
        client.refresh(arena, EPOCH)
        peer = tensor_of(arena)
    is_gpu = accelerator.torch_device is not None
    host = torch.empty(half, dtype=torch.uint8, pin_memory=is_gpu).fill_(3)
    plain, other_plain = (torch.zeros(half, dtype=torch.uint8, device=whole.device) for _ in range(2))
    copies = {
        "host_to_arena": lambda: whole[:half].copy_(host, non_blocking=True),
        "arena_to_host": lambda: host.copy_(whole[:half], non_blocking=True),
        "within_arena": lambda: whole[half:].copy_(whole[:half]),
        "peer_arena_to_arena": lambda: whole[:half].copy_(peer),
        "torch_memory_to_torch_memory": lambda: plain.copy_(other_plain),
    }
    words, plain_words = whole[:half].view(torch.int32), plain.view(torch.int32)
    copies["kernel_on_arena_read_write"] = lambda: words.add_(1)
    copies["kernel_on_torch_memory_read_write"] = lambda: plain_words.add_(1)
    return {f"{name}_bytes_per_s": half / timed(accelerator, scale.repeats, copy) for name, copy in copies.items()}


def _mirror_rates(scale: Scale, accelerator: Accelerator) -> dict[str, float]:
    """KV blocks to and from registered host memory, as a recovery copies them; the bytes are compared."""
    kv = KVAddresses(config=parse_model_config(TINY | scale.model), block_size=16, num_blocks=64)
    slots = MirrorAddresses(kv=kv, num_slots=64)
    heads = tuple(range(kv.config.num_kv_heads // 2))
    cache = torch.randint(0, 256, (kv.reserved_bytes,), dtype=torch.uint8, device=accelerator.torch_device)
    restored = torch.zeros_like(cache)
    blocks = KVBlocks(cache, kv, heads)
    pairs = [(block, (17 * block) % 64) for block in range(64)]  # no two are neighbours on both sides
    with MemfdArena.create("mirror", slots.reserved_bytes) as arena:
        pinned = accelerator.pinned(arena)
    assert pinned is not None
    pin_s = _seconds(lambda: pinned.pin([(0, slots.reserved_bytes)]))
    mirror = tensor_of(pinned)
    save_s = timed(accelerator, scale.repeats, lambda: blocks.save(mirror, pairs, heads))
    again = KVBlocks(restored, kv, heads)
    restore_s = timed(accelerator, scale.repeats, lambda: again.restore(mirror, pairs, heads))
    ranges = kv.slot_ranges(0, len(heads), 0, kv.num_blocks)
    num_bytes = len(pairs) * len(heads) * kv.block_bytes
    return {
        "mirror_pin_bytes_per_s": slots.reserved_bytes / pin_s,
        "mirror_save_bytes_per_s": num_bytes / save_s,
        "mirror_restore_bytes_per_s": num_bytes / restore_s,
        "mirror_is_whole": all(torch.equal(cache[a:b], restored[a:b]) for a, b in ranges),
    }


def _reexport(arena: Any) -> str:
    """Whether a chunk that was imported can be exported again: then nobody would have to keep descriptors."""
    (own, *_) = arena._attached.values()
    try:
        os.close(arena._driver.export(own.handle))
    except Exception as error:
        return str(error)
    return "works"


def _gpu_bytes_of(pid: int) -> int | None:
    """What nvidia-smi says this process takes of the GPU's memory; None where it is not listed (or there is none)."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    used = dict(line.split(", ") for line in listing.splitlines() if ", " in line)
    return int(used[str(pid)]) << 20 if used.get(str(pid), "").isdigit() else None


VICTIM = """
import os, sys, torch
from anchortp.devices import parse_device
from anchortp.engine.accelerator import Accelerator
from anchortp.engine.device_errors import verdict_of
from anchortp.state.client import AnchorClient
from anchortp.transfer.tensors import tensor_of
runtime_dir, device, how = sys.argv[1:4]
accelerator = Accelerator.of(parse_device(device))
client = AnchorClient.connect(runtime_dir, device, "worker", 60)
client.lease(1)
arena = client.open_arena("weights", 1)
client.refresh(arena, 1)
memory = tensor_of(arena)
memory[: 1 << 20] = 7
accelerator.synchronize()
print("ready", flush=True)
if how == "sigkill":
    sys.stdin.read()
try:
    if how == "assert":
        torch.zeros(4, device=memory.device)[torch.tensor([99], device=memory.device)].sum().item()
    else:
        words = memory.view(torch.int64)
        torch.as_strided(words, (1,), (1,), words.numel() - 1).add_(1)  # reserved, not committed
        accelerator.synchronize()
except Exception as error:
    print(type(error).__name__, getattr(error, "error_code", None), *verdict_of(error, attaching=False), flush=True)
"""


def survival(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """Workers that die by SIGKILL, by a device-side assert, by an illegal address: the bytes are still there."""
    device = scale.device(0)
    result: dict[str, Any] = {}
    with (
        anchors(runtime_dir, (device,), scale.arena_bytes),
        AnchorClient.connect(runtime_dir, device, role="controller", timeout_s=TIMEOUT_S) as client,
    ):
        client.create_arena("weights", scale.arena_bytes, EPOCH).close()
        client.commit("weights", [(0, scale.arena_bytes // 2)], EPOCH)
        for how in ("sigkill", "assert", "illegal") if scale.kind == "cuda" else ("sigkill",):
            result[how] = _kill_and_look(scale, runtime_dir, device, how)
    return result


def _kill_and_look(scale: Scale, runtime_dir: Path, device: str, how: str) -> dict[str, Any]:
    command = [sys.executable, "-c", VICTIM, str(runtime_dir), device, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        pidfd = open_pidfd(victim.pid)
        assert victim.stdout.readline() == "ready\n", "the victim did not get ready"
        began_s = time.perf_counter()
        if how == "sigkill":
            victim.send_signal(signal.SIGKILL)
        assert wait_gone(pidfd, TIMEOUT_S)
        dead_s = time.perf_counter() - began_s
        os.close(pidfd)
        said = victim.stdout.read().strip()
    # In a process of its own: this one's context must not be what keeps the memory.
    look = "import sys; from bench.gpu_sections import look; look(*sys.argv[1:])"
    spare = subprocess.run(
        [sys.executable, "-c", look, str(runtime_dir), device], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return {"dead_after_s": dead_s, "said": said} | _last_json(spare)


def look(runtime_dir: str, device: str) -> None:
    """[spare] Takes the lease and counts the bytes that are as the victim left them."""
    began_s = time.perf_counter()
    accelerator = Accelerator.of(parse_device(device))
    context_s = time.perf_counter() - began_s
    with AnchorClient.connect(runtime_dir, device, role="worker", timeout_s=TIMEOUT_S) as client:
        client.lease(EPOCH)
        with client.open_arena("weights", EPOCH) as arena:
            attach_s = _seconds(lambda: client.refresh(arena, EPOCH))
            whole = int((tensor_of(arena)[: 1 << 20] == 7).sum()) == 1 << 20
        accelerator.synchronize()
    print(json.dumps({"bytes_whole": whole, "spare_context_s": context_s, "spare_attach_s": attach_s}))


def collectives(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """Latency of all-reduces among ranks that share the GPU: through peer-mapped memory, and through the host."""
    result: dict[str, Any] = {}
    for num_ranks in (2, 4):
        devices = tuple(scale.device(part) for part in range(num_ranks))
        with anchors(runtime_dir, devices, 256 << 20):
            for kind in ("peer", "shm"):
                slot_bytes = 512 * scale.hidden * 4
                program = (_reduce_latency, scale.hidden, 100 * scale.repeats)
                (first, *_) = run_ranks(kind, runtime_dir, devices, slot_bytes, *program)
                result[f"{kind}, {num_ranks} ranks"] = first
    folder = str(write_model(runtime_dir / "model"))
    with anchors(runtime_dir, devices[:2], 256 << 20):
        graphs = run_ranks("peer", runtime_dir, devices[:2], 1 << 20, decode_with_and_without_graphs, folder)
    result["decode steps as graphs"] = graphs[0]
    if scale.kind == "cuda":
        with anchors(runtime_dir, (scale.device(0),), 64 << 20):
            alone = run_ranks("nccl", runtime_dir, (scale.device(0),), 1 << 20, _nccl_alone)
        result["nccl, 1 rank"] = alone[0]
    return result


def _reduce_latency(group: Any, accelerator: Accelerator, hidden: int, repeats: int) -> dict[str, float]:
    """Seconds of an all-reduce of a decode step of 16 sequences, and of a prefill of 512 tokens; sums are checked."""
    result = {}
    for rows in (1, 16, 512):
        x = torch.full((rows, hidden), float(group.rank + 1), dtype=torch.bfloat16, device=accelerator.torch_device)
        summed = group.all_reduce(x.clone())
        assert bool((summed == group.size * (group.size + 1) / 2).all()), "a wrong sum"
        num = repeats if rows < 512 else max(2, repeats // 20)
        group.barrier()
        began_s = time.perf_counter()
        for _ in range(num):
            group.all_reduce(x.clone())
        accelerator.synchronize()
        result[f"{rows}x{hidden}_bf16_s"] = (time.perf_counter() - began_s) / num
    return result


def _nccl_alone(group: Any, accelerator: Accelerator) -> dict[str, Any]:
    """One rank: the names of torch's NCCL interface are right, the communicator comes up, and an abort ends it."""
    parts = group.gather(torch.ones(2, 3, device=accelerator.torch_device), [3])
    group.barrier()
    communicator = group._process_group
    return {
        "gathered": [tuple(part.shape) for part in parts],
        "can_shrink": bool(communicator.supports_shrinking),
        "abort_s": _seconds(communicator.abort),
    }


def kernels(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """What lies between matmuls, by Triton's kernels and by torch's: the same results, and the time of a call."""
    from bench.gpu_kernels import run_kernels

    return run_kernels(scale)


def engine(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """Four virtual devices on one GPU; one is lost, then a worker crashes, while streams speak."""
    from bench.gpu_engine import run_engine

    return run_engine(scale, runtime_dir)


def qwen3_8b(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """The numbers of a dense model with Qwen3-8B's shapes (16.4 GB of random weights)."""
    from bench.gpu_engine import run_numbers

    return run_numbers(scale, runtime_dir)


def attention(scale: Scale, runtime_dir: Path) -> dict[str, Any]:
    """A layer's attention by multiplied matrices, by torch's fused one, and by FlashInfer where it is installed."""
    from bench import gpu_attention

    return gpu_attention.attention(scale)


SECTIONS = {
    "memory": memory,
    "survival": survival,
    "collectives": collectives,
    "kernels": kernels,
    "attention": attention,
    "engine": engine,
    "qwen3_8b": qwen3_8b,
}


def _last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--kind", choices=SCALES, default="cuda")
    options = parser.parse_args()
    runtime_dir = Path(tempfile.mkdtemp(prefix="atp-"))
    try:
        print(json.dumps(SECTIONS[options.section](SCALES[options.kind], runtime_dir)), flush=True)
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
