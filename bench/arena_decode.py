"""Decode with weights in an arena against weights in private memory, in one process, turn by turn.

`python -m bench.arena_decode [--batch 8 --steps 40 --rounds 9]`. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from anchortp.arena import MemfdArena
from anchortp.cli.serving import resolve_folder
from anchortp.config import load_model_config
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import KVAddresses, WeightAddresses, initial_layout, model_units
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_replicated, load_units
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
    decoders = {kind: make_decoder(folder, options, kind) for kind in ("private", "arena")}
    batch = ForwardBatch.build([decode_entry(i, options) for i in range(options.batch)], BLOCK)
    for decoder in decoders.values():
        run(decoder, batch, 3)
    seconds: dict[str, list[float]] = {kind: [] for kind in decoders}
    ratios = []
    for turn in range(options.rounds):
        order = list(decoders) if turn % 2 else list(decoders)[::-1]
        took = {kind: run(decoders[kind], batch, options.steps) for kind in order}
        for kind, value in took.items():
            seconds[kind].append(value)
        ratios.append(took["arena"] / took["private"])
    result: dict[str, Any] = {
        "benchmark": "arena_decode",
        "options": vars(options),
        "conditions": conditions(),
        "step_s": {kind: spread(values) for kind, values in seconds.items()},
        "arena_over_private": spread(ratios),
    }
    for kind, values in result["step_s"].items():
        console().print(f"{kind:8s} {1e3 * values['median']:.2f} ms per step (min {1e3 * values['min']:.2f})")
    console().print(
        f"arena over private, median of {options.rounds} rounds: {result['arena_over_private']['median']:.4f}"
    )
    finish(result)


def make_decoder(folder: Path, options: argparse.Namespace, kind: str) -> Decoder:
    config = load_model_config(folder)
    units = model_units(config)
    layout = initial_layout(units, ("cpu:0",))
    addresses = WeightAddresses(units=units)
    if kind == "arena":
        with MemfdArena.create("weights", addresses.reserved_bytes) as arena:
            buffer = torch.frombuffer(arena.map(), dtype=torch.uint8)
    else:
        buffer = torch.empty(addresses.reserved_bytes, dtype=torch.uint8)
    checkpoint = Checkpoint.open(folder, units)
    load_replicated(checkpoint, buffer, addresses)
    load_units(checkpoint, buffer, addresses, [(f, u, u) for f in units.families for u in range(units.num_units[f])])
    blocks = options.batch * blocks_per_sequence(options)
    kv = KVAddresses(config=config, block_size=BLOCK, num_blocks=blocks)
    cache = torch.zeros(kv.reserved_bytes, dtype=torch.uint8)
    shard = layout.shards[0]
    views, planes = WeightViews(buffer, addresses, shard), KVCache(cache, kv, shard)
    return Decoder(units, layout, 0, views, planes, max_model_len=config.max_position)


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
