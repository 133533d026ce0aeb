"""Where the time of a step goes, on every rank, beside the least it could take on this machine.

`python -m bench.profile_step [--tp 1,2,4 --batch 1,16 --context 192 --prefill 256]` profiles decode steps and a
prefill; `--scale docs/speed.png` also sweeps batch size, context length and number of ranks, and plots them.

Every rank is a process, as in the engine, over a region of shared memory, with weights as the engine would lay them
out. Times are the median of some steps: `wall`, and `cpu`, the rank's processor time in all its threads. On a
machine that others use, believe the second. A phase's time is its own, without the phases inside it. The floor is
what must be read (weights and context, once) at the speed at which all cores together read memory, or what must be
multiplied at the speed of a large bfloat16 matmul, whichever takes longer.

The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from anchortp.cli.serving import resolve_folder
from anchortp.config import ModelConfig, cache_folder, load_model_config, reads_panels
from anchortp.engine import messages as m
from anchortp.engine.api import EngineRequest, SampledToken, SamplingParams
from anchortp.engine.blocks import BlockPool
from anchortp.engine.pool import SPIN_COUNT
from anchortp.engine.scheduler import Batch, ScheduledSeq, Scheduler
from anchortp.layout import FAMILIES, KV, KVAddresses, Layout, WeightAddresses, initial_layout, model_units
from anchortp.native import Library, build_kernels
from bench.common import conditions, console, finish

BLOCK = 16
GROUP_TIMEOUT_S = 300.0
PHASES = {  # method of the decoder -> what it is called here
    "prepare": "prepare",
    "embed": "embed",
    "add_norm": "norms",
    "_rotate_store": "q, k, v, rope",
    "_attend": "attend",
    "attention": "o",
    "_gather": "gather KV",
    "_attend_together": "attend",
    "_attend_alone": "attend",
    "mlp": "mlp",
    "logits": "lm_head",
}
COLLECTIVES = "collectives"  # the wait for the slowest rank included


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`rows` tokens for each of `batch` sequences, the last of them at the end of `context` tokens."""

    tp: int
    batch: int
    context: int
    rows: int = 1
    kernels: str = "native"

    @property
    def name(self) -> str:
        what = "decode" if self.rows == 1 else f"prefill of {self.rows}"
        return f"tp {self.tp}, {what}, {self.batch} x {self.context}"

    @property
    def num_blocks(self) -> int:
        return self.batch * -(-self.context // BLOCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", choices=("auto", "plain"), default="auto")
    parser.add_argument("--kernels", choices=("native", "torch"), default="native")
    parser.add_argument("--tp", default="1,2,4")
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--scale", type=Path, help="sweep, and plot to this file")
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    folder = resolve_folder(options.model)
    config = served_config(folder, options.weights)
    machine = in_child(measure_machine)
    result: dict[str, Any] = {
        "benchmark": "profile_step",
        "options": {k: str(v) for k, v in vars(options).items()},
        "conditions": in_child(conditions),
        "machine": machine,
        "panels": config.panels,
        "around_step_s": around(config, max(map(int, options.batch.split(",")))),
        "cases": [],
    }
    degrees = [int(tp) for tp in options.tp.split(",")]
    for tp in degrees:
        common = {"tp": tp, "kernels": options.kernels}
        cases = [Case(batch=int(b), context=options.context, **common) for b in options.batch.split(",")]
        cases.append(Case(batch=1, context=options.prefill, rows=options.prefill, **common))
        result["cases"] += [profile(folder, config, case, options.steps, machine) for case in cases]
    show(result)
    if options.scale is not None:
        result["scale"] = sweep(folder, config, degrees, options.steps, machine)
        plot(result["scale"], options.scale)
    finish(result)


def served_config(folder: Path, weights: str) -> ModelConfig:
    config = load_model_config(folder)
    panels = weights == "auto" and config.dtype == "bfloat16" and reads_panels()
    return replace(config, panels=panels)


# ----------------------------------------------------------------------------------------------------- one case


def profile(folder: Path, config: ModelConfig, case: Case, steps: int, machine: dict[str, float]) -> dict[str, Any]:
    from anchortp.comm import ShmRegion

    region = ShmRegion.create(1, case.tp, case.batch * case.rows * config.hidden_size * 4)
    try:
        ranks = in_children(
            [lambda r=rank: run_rank(folder, config, case, r, region.fd, steps) for rank in range(case.tp)]
        )
    finally:
        region.close()
    return {
        **asdict(case),
        "name": case.name,
        "floor_s": floor(config, case, machine),
        "wall_s": max(rank["wall_s"] for rank in ranks),
        "wall_min_s": max(rank["wall_min_s"] for rank in ranks),
        "cpu_s": sum(rank["cpu_s"] for rank in ranks),
        "ranks": ranks,
    }


def floor(config: ModelConfig, case: Case, machine: dict[str, float]) -> dict[str, float]:
    """Seconds for the bytes and for the products of one step, and the larger of them."""
    units = model_units(config)
    context_bytes = 2 * config.num_kv_heads * config.head_dim * config.dtype_bytes * config.num_layers * case.context
    num_bytes = units.total_bytes + case.batch * context_bytes
    num_rows = case.batch * case.rows
    embed = config.vocab_size * config.hidden_size
    layers = units.total_bytes // config.dtype_bytes - embed * (1 if config.tie_embeddings else 2)
    seen = case.context - (case.rows - 1) / 2  # tokens that a row attends to, on average
    attention = 4 * seen * config.num_q_heads * config.head_dim * config.num_layers
    num_flops = num_rows * (2 * layers + attention) + case.batch * 2 * embed
    read_s, multiply_s = num_bytes / machine["read_bytes_per_s"], num_flops / machine["flops_per_s"]
    return {
        "bytes": num_bytes,
        "flops": num_flops,
        "read_s": read_s,
        "multiply_s": multiply_s,
        "s": max(read_s, multiply_s),
    }


def run_rank(folder: Path, config: ModelConfig, case: Case, rank: int, region_fd: int, steps: int) -> dict[str, Any]:
    """[child] Some steps of one rank, the first two of which are not counted: as they are, then as many taken apart."""
    import torch

    from anchortp.comm import ShmGroup, ShmRegion
    from anchortp.model import ForwardBatch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // case.tp))
    decoder = make_decoder(folder, config, case, rank)
    region = ShmRegion.attach(region_fd, epoch=1)
    library = decoder.kernels.library if case.kernels == "native" else None
    group = ShmGroup(region, rank, GROUP_TIMEOUT_S, library=library)
    entries = [entry(index, case) for index in range(case.batch)]

    def step() -> None:
        decoder.forward(ForwardBatch.build(entries, BLOCK), group)

    walls, cpus = [], []
    for number in range(steps + 2):
        group.barrier()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        step()
        if number >= 2:
            walls.append(time.perf_counter() - began_s)
            cpus.append(time.process_time() - began_cpu_s)
    clock, phases = take_apart(decoder, group), defaultdict(list)
    for _ in range(steps):
        group.barrier()
        clock.self_s.clear()
        step()
        for phase, seconds in clock.self_s.items():
            phases[phase].append(seconds)
    group.close()
    region.close()
    return {
        "threads": torch.get_num_threads(),
        "wall_s": statistics.median(walls),
        "wall_min_s": min(walls),
        "cpu_s": statistics.median(cpus),
        "phases_s": {phase: statistics.median(values) for phase, values in sorted(phases.items())},
    }


def take_apart(decoder: Any, group: Any) -> Clock:
    """From now on the decoder calls its parts one by one, and they are timed."""
    clock = Clock()
    for method, phase in PHASES.items():
        if hasattr(decoder, method):
            setattr(decoder, method, clock.timed(phase, getattr(decoder, method)))
    group.memory_for = lambda num: None
    group.all_reduce = clock.timed(COLLECTIVES, group.all_reduce)
    group.gather = clock.timed(COLLECTIVES, group.gather)
    return clock


class Clock:
    """Adds up the time spent in functions, each without the timed functions that it calls."""

    def __init__(self) -> None:
        self.self_s: dict[str, float] = defaultdict(float)
        self._inner_s = 0.0  # spent so far in functions called by the one that runs

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer_s, self._inner_s = self._inner_s, 0.0
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took_s = time.perf_counter() - began_s
                self.self_s[phase] += took_s - self._inner_s
                self._inner_s = outer_s + took_s

        return call


def make_decoder(folder: Path, config: ModelConfig, case: Case, rank: int) -> Any:
    import torch

    from anchortp.model import Decoder, KVCache, NativeDecoder, NativeKernels, WeightViews
    from anchortp.transfer.checkpoint import Checkpoint
    from anchortp.transfer.loader import load_replicated, load_units

    units = model_units(config)
    layout: Layout = initial_layout(units, tuple(f"cpu:{i}" for i in range(case.tp)))
    shard, addresses = layout.shards[rank], WeightAddresses(units=units)
    buffer = torch.empty(addresses.reserved_bytes, dtype=torch.uint8)
    checkpoint = Checkpoint.open(folder, units)
    load_replicated(checkpoint, buffer, addresses)
    load_units(checkpoint, buffer, addresses, [(f, u, slot) for f in FAMILIES for slot, u in enumerate(shard[f])])
    kv = KVAddresses(config=config, block_size=BLOCK, num_blocks=case.num_blocks)
    cache = torch.empty(kv.reserved_bytes, dtype=torch.uint8)
    for start, stop in kv.slot_ranges(0, len(shard[KV]), 0, case.num_blocks):
        cache[start:stop].zero_()
    views, planes = WeightViews(buffer, addresses, shard), KVCache(cache, kv, shard)
    common = (units, layout, rank, views, planes, case.context + 1)
    if case.kernels == "torch":
        return Decoder(*common)
    library = Library(str(build_kernels(cache_folder() / "kernels")), config.dtype)
    return NativeDecoder(*common, kernels=NativeKernels(library))


def entry(index: int, case: Case) -> ScheduledSeq:
    each = -(-case.context // BLOCK)
    start = case.context - case.rows
    return ScheduledSeq(
        request_id=str(index),
        token_ids=tuple((index * 7 + position) % 1000 for position in range(start, case.context)),
        start=start,
        position=case.context,
        block_ids=tuple(range(index * each, (index + 1) * each)),
        sample=True,
    )


# ------------------------------------------------------------------------------------------- around, and machine


def around(config: ModelConfig, batch_size: int) -> dict[str, float]:
    """Seconds of processor time per decode step that are no computation of the model, for `batch_size` sequences."""
    pool = BlockPool(num_blocks=64 * batch_size, block_size=BLOCK)
    scheduler = Scheduler(
        pool,
        max_num_seqs=batch_size,
        max_batch_tokens=max(512, 192 * batch_size),
        max_model_len=4096,
        max_waiting=batch_size,
    )
    params = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    for index in range(batch_size):
        prompt = tuple(range(index, index + 192))
        scheduler.add(EngineRequest(request_id=f"cmpl-{index:032x}-0", prompt_token_ids=prompt, params=params))
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(m.RunStep)
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began_s = time.thread_time()
        value = work()
        spent[name].append(time.thread_time() - began_s)
        return value

    for _ in range(60):
        batch: Batch = timed("schedule", scheduler.schedule)
        data = timed("encode", lambda batch=batch: encoder.encode(m.RunStep(epoch=1, batch=batch)))
        timed("decode", lambda data=data: decoder.decode(data))
        sampled = {seq.request_id: SampledToken(token_id=7) for seq in batch.seqs}
        timed("postprocess", lambda batch=batch, sampled=sampled: scheduler.postprocess(batch, sampled, (2,)))
    return {name: statistics.median(values) for name, values in spent.items()}


def measure_machine(num_bytes: int = 256 << 20, size: int = 2048) -> dict[str, float]:
    """[child] What all cores together read, and multiply in bfloat16, per second: the best of a few."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    values = torch.ones(num_bytes // 4)
    a = torch.ones(size, size, dtype=torch.bfloat16)
    read_s = min(seconds(lambda: values.sum()) for _ in range(9))
    multiply_s = min(seconds(lambda: a @ a) for _ in range(9))
    return {"read_bytes_per_s": num_bytes / read_s, "flops_per_s": 2 * size**3 / multiply_s}


def seconds(work: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def in_child(work: Callable[[], Any]) -> Any:
    return in_children([work])[0]


def in_children(works: list[Callable[[], Any]]) -> list[Any]:
    """Each in a process of its own, at the same time: this one never starts torch's threads, so it may fork."""
    context = multiprocessing.get_context("fork")
    started = []
    for work in works:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=lambda work=work, theirs=theirs: theirs.send(work()))
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return [ours.recv() for _, ours in started]
    finally:
        for process, _ in started:
            process.join(GROUP_TIMEOUT_S)


# ------------------------------------------------------------------------------------------------ sweep and show


def sweep(
    folder: Path, config: ModelConfig, degrees: list[int], steps: int, machine: dict[str, float]
) -> dict[str, list[dict[str, Any]]]:
    axes = {
        "batch": [Case(tp=1, batch=b, context=192) for b in (1, 2, 4, 8, 16, 32, 64, 128, 200)],
        "context": [Case(tp=1, batch=4, context=c) for c in (128, 512, 1024, 2048, 4096, 8192)],
        "ranks": [Case(tp=tp, batch=16, context=192) for tp in sorted({1, 2, 3, 4, 6, 9, *degrees})],
    }
    return {axis: [profile(folder, config, case, steps, machine) for case in cases] for axis, cases in axes.items()}


def show(result: dict[str, Any]) -> None:
    out = console()
    rates = result["machine"]
    out.print(
        f"all cores read {rates['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply {rates['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    table = Table(title="a step, in ms")
    for column in ("case", "floor", "wall", "least", "cpu, all ranks", "phases of the slowest rank (wall)"):
        table.add_column(column, justify="left" if column.startswith(("case", "phases")) else "right")
    for case in result["cases"]:
        slowest = max(case["ranks"], key=lambda rank: rank["cpu_s"])
        phases = sorted(slowest["phases_s"].items(), key=lambda item: -item[1])
        values = (case["floor_s"]["s"], case["wall_s"], case["wall_min_s"], case["cpu_s"])
        cells = [f"{1e3 * value:.1f}" for value in values]
        table.add_row(case["name"], *cells, ", ".join(f"{name} {1e3 * s:.1f}" for name, s in phases))
    out.print(table)
    spent = ", ".join(f"{name} {1e6 * s:.0f}" for name, s in result["around_step_s"].items())
    out.print(f"around a step, in microseconds of processor time: {spent}")


def plot(scale: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "batch": ("sequences (1 rank, 192 tokens each)", lambda case: case["batch"]),
        "context": ("tokens of context (1 rank, 4 sequences)", lambda case: case["context"]),
        "ranks": ("ranks (16 sequences, 192 tokens each)", lambda case: case["tp"]),
    }
    cores = len(os.sched_getaffinity(0))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, (name, (title, value)) in zip(axes, titles.items(), strict=True):
        at = [value(case) for case in scale[name]]
        axis.plot(at, [1e3 * case["wall_min_s"] for case in scale[name]], "o-", label="least wall time")
        axis.plot(
            at, [1e3 * case["cpu_s"] / cores for case in scale[name]], "s--", label=f"processor time / {cores} cores"
        )
        axis.plot(at, [1e3 * case["floor_s"]["read_s"] for case in scale[name]], ":", label="floor: reading")
        axis.plot(at, [1e3 * case["floor_s"]["multiply_s"] for case in scale[name]], ":", label="floor: multiplying")
        axis.set_xlabel(title)
        axis.set_ylabel("ms per decode step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
