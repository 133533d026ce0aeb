"""Ranks of one group as processes on one GPU (or a simulated one), each with its virtual device and its anchor.

For `bench.gpu_sections` and `tests/gpu`. The process that starts them must not have touched CUDA: they are forked.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from anchortp.arena import round_up
from anchortp.comm import Group, ShmRegion
from anchortp.config import GROUPS_WITH_SLOTS, load_model_config
from anchortp.devices import parse_device
from anchortp.engine.accelerator import GROUPS, Accelerator, Formation
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import KVAddresses, Layout, ModelUnits, WeightAddresses, initial_layout, model_units
from anchortp.model import DecodeGraphs, Decoder, ForwardBatch, KVCache, WeightViews
from anchortp.state.client import AnchorClient
from anchortp.state.launch import start_anchor
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_replicated, load_units
from anchortp.transfer.tensors import tensor_of

EPOCH = 1
TIMEOUT_S = 60.0
BLOCK_SIZE = 4

Program = Callable[..., Any]  # (group, accelerator, *args) in every rank; what it returns is sent back


@contextlib.contextmanager
def anchors(runtime_dir: Path, devices: tuple[str, ...], budget_bytes: int) -> Iterator[None]:
    """An anchor per device, gone at the end."""
    started = []
    try:
        for device in devices:
            start_anchor(device=device, budget_bytes=budget_bytes, runtime_dir=runtime_dir, timeout_s=TIMEOUT_S)
            started.append(device)
        yield
    finally:
        for device in started:
            with AnchorClient.connect(runtime_dir, device, role="tool", timeout_s=TIMEOUT_S) as client:
                client.shutdown()


def run_ranks(
    kind: str,
    runtime_dir: Path,
    devices: tuple[str, ...],
    slot_bytes: int,
    program: Program,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """What `program` returns on each rank of a group of `kind` ("shm", "peer", "nccl", "mixed"). The anchors must run.

    Raises RuntimeError with the traceback of a rank that failed, TimeoutError for one that does not answer.
    """
    assert not torch.cuda.is_initialized(), "ranks are forked: this process must not have touched CUDA"
    context = multiprocessing.get_context("fork")
    region = ShmRegion.create(EPOCH, len(devices), slot_bytes)
    store = runtime_dir / f"store-{kind}"
    store.unlink(missing_ok=True)
    if kind in GROUPS_WITH_SLOTS:
        _commit_slots(runtime_dir, devices, region.slot_bytes)
    pipes, processes = [], []
    try:
        for rank in range(len(devices)):
            here, there = context.Pipe()
            where = (kind, str(runtime_dir), devices, rank, region.fd, str(store))
            process = context.Process(target=_rank_main, args=(*where, there, program, args), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        return [_answer(pipe, rank, timeout_s) for rank, pipe in enumerate(pipes)]
    finally:
        region.abort("the benchmark is over")
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
        region.close()


def timed(accelerator: Accelerator, repeats: int, work: Callable[[], object]) -> float:
    """Median seconds of `work`, device included, after one run that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        accelerator.synchronize()
        began_s = time.perf_counter()
        work()
        accelerator.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def _commit_slots(runtime_dir: Path, devices: tuple[str, ...], slot_bytes: int) -> None:
    for device in devices:
        num_bytes = round_up(2 * slot_bytes, parse_device(device).page_bytes)
        with AnchorClient.connect(runtime_dir, device, role="tool", timeout_s=TIMEOUT_S) as client:
            if all(arena.name != "slots" for arena in client.status().arenas):
                client.create_arena("slots", num_bytes, EPOCH).close()
            client.commit("slots", [(0, num_bytes)], EPOCH)


def _answer(pipe: Connection, rank: int, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
    ok, value = pipe.recv()
    if not ok:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _rank_main(
    kind: str,
    runtime_dir: str,
    devices: tuple[str, ...],
    rank: int,
    region_fd: int,
    store: str,
    pipe: Connection,
    program: Program,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    try:
        accelerator = Accelerator.of(parse_device(devices[rank]))
        region = ShmRegion.attach(region_fd, epoch=EPOCH)
        mapped = devices if kind in GROUPS_WITH_SLOTS else ()
        formation = Formation(
            region=region,
            rank=rank,
            timeout_s=TIMEOUT_S,
            members=devices,
            store_path=store,
            slots=[open_tensor(runtime_dir, device, "slots", accelerator) for device in mapped],
        )
        group: Group = GROUPS[kind](formation, accelerator)
        result = program(group, accelerator, *args)
        group.close()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def open_tensor(runtime_dir: str | Path, device: str, name: str, accelerator: Accelerator) -> torch.Tensor:
    """An arena of any device's anchor, mapped for `accelerator`."""
    with (
        AnchorClient.connect(
            runtime_dir, device, role="tool", timeout_s=TIMEOUT_S, open_driver=accelerator.open_driver
        ) as client,
        client.open_arena(name, EPOCH) as arena,
    ):
        client.refresh(arena, EPOCH)
        return tensor_of(arena)


def decode_with_and_without_graphs(
    group: Group, accelerator: Accelerator, folder: str, attention: str = "torch", kernels: str = "torch"
) -> dict[str, float]:
    """[a rank] Decodes three sequences with one decoder plainly and with another over graphs, captured on the way, and
    over another library's attention or kernels if wanted."""
    units = model_units(load_model_config(folder))
    layout = initial_layout(units, [f"cpu:{rank}" for rank in range(group.size)])
    plain, graphed = (_decoder_of(folder, units, layout, group.rank, accelerator) for _ in range(2))
    graphed.paged = accelerator.paged(attention, units.config, BLOCK_SIZE)
    if kernels == "triton":
        graphed.kernels = accelerator.fused(units.config)
    capture, num_captured, largest = accelerator.capture(), 0, 0.0
    assert capture is not None
    graphs = DecodeGraphs(graphed, capture)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for step in range(12):
            seqs = [_token(index, step, generator) for index in range(3)]
            with accelerator.placing():
                wanted = plain.forward(ForwardBatch.build(seqs, BLOCK_SIZE), group)
            batch = ForwardBatch.build(seqs, BLOCK_SIZE)
            assert graphs.takes(seqs)
            with accelerator.placing():
                found = graphs.forward(batch, group)
                num_captured += graphs.capture_next()
            if wanted is not None and found is not None:
                largest = max(largest, float((found - wanted).abs().max()))
    accelerator.synchronize()
    return {"num_captured": num_captured, "largest_difference": largest}


def _decoder_of(folder: str, units: ModelUnits, layout: Layout, rank: int, accelerator: Accelerator) -> Decoder:
    shard, addresses = layout.shards[rank], WeightAddresses(units=units)
    kv = KVAddresses(config=units.config, block_size=BLOCK_SIZE, num_blocks=16)
    host = torch.zeros(addresses.reserved_bytes, dtype=torch.uint8)
    checkpoint = Checkpoint.open(Path(folder), units)
    load_replicated(checkpoint, host, addresses)
    load_units(checkpoint, host, addresses, [(f, u, slot) for f in units.families for slot, u in enumerate(shard[f])])
    with torch.inference_mode(), accelerator.placing():
        weights = WeightViews(host.to(accelerator.torch_device or "cpu"), addresses, shard)
        cache = KVCache(torch.full((kv.reserved_bytes,), 0xFF, dtype=torch.uint8), kv, shard)
        return Decoder(units, layout, rank, weights, cache, max_model_len=64)


def _token(index: int, step: int, generator: torch.Generator) -> ScheduledSeq:
    """The next token of a sequence: random, the same on every rank."""
    return ScheduledSeq(
        request_id=str(index),
        token_ids=(int(torch.randint(250, (), generator=generator)),),
        start=step,
        position=step + 1,
        block_ids=tuple(range(5 * index, 5 * index + 5)),
        sample=True,
    )
