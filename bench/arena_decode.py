"""Decode with weights in an arena, in small pages and in huge ones, against weights in private memory: in one process,
turn by turn, with the kernels and the layout of weights that the engine uses.

`python -m bench.arena_decode [--batch 8 --steps 40 --rounds 9]`. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import collections
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anchortp.arena import MemfdArena
from anchortp.cli.serving import resolve_folder
from anchortp.config import cache_folder, load_model_config, reads_panels
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import KVAddresses, WeightAddresses, initial_layout, model_units
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews
from anchortp.model.native import NativeDecoder, NativeKernels
from anchortp.native import Library, build_kernels
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.idle import huge_pages
from anchortp.transfer.loader import load_replicated, load_units
from anchortp.transfer.tensors import tensor_of
from bench.common import conditions, console, finish, spread

BLOCK = 16


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, cols: tuple[int, ...], root: int = 0) -> list[torch.Tensor]:
        return [x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_folder(options.model)
    decoders = {kind: make_decoder(folder, options, kind) for kind in ("private", "arena", "huge")}
    batch = ForwardBatch.build([decode_entry(i, options) for i in range(options.batch)], BLOCK)
    for decoder in decoders.values():
        run(decoder, batch, 3)
    seconds: dict[str, list[float]] = {kind: [] for kind in decoders}
    ratios: dict[str, list[float]] = {"arena": [], "huge": []}
    for turn in range(options.rounds):
        order = list(decoders) if turn % 2 else list(decoders)[::-1]
        took = {kind: run(decoders[kind], batch, options.steps) for kind in order}
        for kind, value in took.items():
            seconds[kind].append(value)
        for kind, values in ratios.items():
            values.append(took[kind] / took["private"])
    result: dict[str, Any] = {
        "benchmark": "arena_decode",
        "options": vars(options),
        "conditions": conditions(),
        "step_s": {kind: spread(values) for kind, values in seconds.items()},
        "arena_over_private": spread(ratios["arena"]),
        "huge_over_private": spread(ratios["huge"]),
    }
    for kind, values in result["step_s"].items():
        console().print(f"{kind:8s} {1e3 * values['median']:.2f} ms per step (min {1e3 * values['min']:.2f})")
    for kind in ratios:
        median = result[f"{kind}_over_private"]["median"]
        console().print(f"{kind} over private, median of {options.rounds} rounds: {median:.4f}")
    finish(result)


def make_decoder(folder: Path, options: argparse.Namespace, kind: str) -> Decoder:
    config = replace(load_model_config(folder), panels=reads_panels())
    units = model_units(config)
    layout = initial_layout(units, ("cpu:0",))
    addresses = WeightAddresses(units=units)
    if kind == "private":
        buffer = torch.empty(addresses.reserved_bytes, dtype=torch.uint8)
    else:
        with MemfdArena.create("weights", addresses.reserved_bytes) as arena:
            buffer = tensor_of(arena)
    checkpoint = Checkpoint.open(folder, units)
    load_replicated(checkpoint, buffer, addresses)
    load_units(checkpoint, buffer, addresses, [(f, u, u) for f in units.families for u in range(units.num_units[f])])
    if kind == "huge":
        collections.deque(huge_pages(addresses, layout.shards[0], buffer), maxlen=0)
    blocks = options.batch * blocks_per_sequence(options)
    kv = KVAddresses(config=config, block_size=BLOCK, num_blocks=blocks)
    cache = torch.zeros(kv.reserved_bytes, dtype=torch.uint8)
    shard = layout.shards[0]
    views, planes = WeightViews(buffer, addresses, shard), KVCache(cache, kv, shard)
    kernels = NativeKernels(Library(str(build_kernels(cache_folder() / "kernels")), config.dtype))
    return NativeDecoder(units, layout, 0, views, planes, max_model_len=config.max_position, kernels=kernels)


def blocks_per_sequence(options: argparse.Namespace) -> int:
    return -(-(options.context + 1) // BLOCK)


def decode_entry(index: int, options: argparse.Namespace) -> ScheduledSeq:
    each = blocks_per_sequence(options)
    return ScheduledSeq(
        request_id=str(index),
        token_ids=(100 + index,),
        start=options.context,
        position=options.context + 1,
        block_ids=tuple(range(index * each, (index + 1) * each)),
        sample=True,
    )


def run(decoder: Decoder, batch: ForwardBatch, steps: int) -> float:
    """Seconds per step, the best half's mean: what the machine does when nobody interrupts it."""
    took = []
    for _ in range(steps):
        began_s = time.perf_counter()
        decoder.forward(batch, Alone())
        took.append(time.perf_counter() - began_s)
    best = sorted(took)[: max(1, steps // 2)]
    return sum(best) / len(best)


if __name__ == "__main__":
    main()
