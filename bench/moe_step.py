"""What a step of a mixture of experts takes if every device has a core of its own: experts balanced, and not.

`python -m bench.moe_step [--changes 4:3,8:7 --runs 7]`. Cores that ranks share hide a gain of balance: while one rank
waits another computes. Here the ranks of a group take turns on one core, from one collective to the next, and the
processor time of each turn is measured. A step takes the sum over its turns of what the slowest rank took; that is the
wall clock of ranks with cores of their own, but for the collectives (left out, alike in all cases) and for the memory
bandwidth that such cores share. It is measured, not modelled: real weights, real routing, and the decoder, balancer and
planner of the engine.

Per case the group loses a device. Without EPLB its experts go where there is room; with it the balancer, asked as the
engine asks it, decides until it wants no more change. Steps of few tokens wait for weights to be read, which replicas
cannot help; there the balancer is to leave things alone. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from anchortp.bench.prompts import random_prompts
from anchortp.cli.serving import resolve_folder
from anchortp.config import ModelConfig
from anchortp.engine.balancer import FIRST_STEPS, ExpertBalancer
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import EXPERT, KVAddresses, Layout, ModelUnits, Part, WeightAddresses, initial_layout, model_units
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews
from anchortp.plan import plan_change
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_replicated, load_units
from bench.common import conditions, console, finish, spread
from bench.profile_step import BLOCK, served_config

TURN_TIMEOUT_S = 300.0
TAUGHT = 4  # steps whose load the balancer sees, each several times
WORKLOADS = {  # name: sequences, new tokens of each, tokens of context
    "prefill of 4 x 512": (4, 512, 512),
    "decode of 64": (64, 1, 192),
    "decode of 8": (8, 1, 192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--changes", default="4:3,8:7", help="FROM:TO devices")
    parser.add_argument(
        "--slots", type=int, default=2, help="experts per layer and device that fit beyond an even part"
    )
    parser.add_argument("--runs", type=int, default=7, help="steps of each kind, after one that is not counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_folder(options.model)
    config = served_config(folder, "auto")
    changes = [tuple(map(int, change.split(":"))) for change in options.changes.split(",")]
    result: dict[str, Any] = {
        "benchmark": "moe_step",
        "options": vars(options),
        "conditions": conditions(),
        "cases": [],
    }
    with Progress(console=console()) as bars:
        task = bars.add_task("cases", total=len(changes))
        for before, after in changes:
            bars.update(task, description=f"{before} -> {after}")
            result["cases"].append(measure(folder, config, before, after, options))
            bars.advance(task)
    show(result["cases"])
    finish(result)


def measure(folder: Path, config: ModelConfig, before: int, after: int, options: argparse.Namespace) -> dict[str, Any]:
    """One loss: the steps of the group that is left, as it is left and as the balancer would have it for each workload,
    had the service nothing else to do."""
    units = model_units(config)
    names = tuple(f"cpu:{i}" for i in range(before))
    held = initial_layout(units, names).without(names[after:])
    layout = plan_change(units, held, held.devices, experts="stay").after
    balancers = {name: ExpertBalancer(units, every_s=0.0) for name in WORKLOADS}
    rows = {}
    with Group(folder, units, layout, balancers[next(iter(WORKLOADS))].parts(layout)) as plain:
        for name, balancer in balancers.items():
            plain.teach(balancer, name)
            row = {"imbalance_before": balancer.status(layout)["imbalance"]}
            other, row["copies"] = settled(balancer, layout, options.slots * config.num_layers)
            status = balancer.status(other)
            row |= {"imbalance_after": status["imbalance"], "replicas": status["replicas"], "gain": 0.0}
            if status["rebalanced"]:
                with Group(folder, units, other, balancer.parts(other)) as balanced:
                    row |= compared(plain, balanced, name, options.runs)
            else:
                row["without_eplb_s"] = row["with_eplb_s"] = spread(seconds_of([plain], name, options.runs)[0])
            rows[name] = row
    return {"before": before, "after": after, "workloads": rows}


def compared(plain: Group, balanced: Group, workload: str, runs: int) -> dict[str, Any]:
    """Both in turns, so that what else the machine does hits both; `gain` is the median over pairs of steps."""
    without, with_ = seconds_of([plain, balanced], workload, runs)
    gain = statistics.median(a / b - 1 for a, b in zip(without, with_, strict=True))
    return {"without_eplb_s": spread(without), "with_eplb_s": spread(with_), "gain": gain}


def seconds_of(groups: Sequence[Group], workload: str, runs: int) -> list[list[float]]:
    """Seconds of as many steps of each group, after one that is not counted, each with other tokens."""
    found: list[list[float]] = [[] for _ in groups]
    for run in range(runs + 1):
        batch = batch_of(groups[0].config, *WORKLOADS[workload], seed=f"{workload} {run}")
        for group, seconds in zip(groups, found, strict=True):
            seconds.append(group.step(batch))
    return [seconds[1:] for seconds in found]


def settled(balancer: ExpertBalancer, layout: Layout, more_slots: int) -> tuple[Layout, int]:
    """The layout with which the balancer is content, and how many copies led there."""
    even = -(-sum(len(shard[EXPERT]) for shard in layout.shards) // len(layout.shards))
    copies = 0
    while True:
        answer = balancer.decide(layout, dict.fromkeys(layout.devices, even + more_slots), {}, now_s=0.0)
        if not answer.is_change:
            return layout, copies
        balancer.adopt(answer.placement)
        for stage in answer.stages:
            plan = balancer.plan(stage, layout, answer.reason)
            layout, copies = plan.after, copies + len(plan.moves)


def batch_of(config: ModelConfig, num_seqs: int, num_new: int, context: int, seed: str) -> ForwardBatch:
    each = -(-context // BLOCK)
    prompts = random_prompts(num_seqs, num_new, config.vocab_size, seed)
    return ForwardBatch.build(
        [
            ScheduledSeq(
                request_id=str(index),
                token_ids=tuple(prompt),
                start=context - num_new,
                position=context,
                block_ids=tuple(range(index * each, (index + 1) * each)),
                sample=True,
            )
            for index, prompt in enumerate(prompts)
        ],
        BLOCK,
    )


# ------------------------------------------------------------------------------------------------ ranks that take turns


class Turns:
    """Lets one rank compute at a time, from one collective to the next, and counts what each turn takes."""

    def __init__(self, size: int):
        self.size = size
        self.seconds: list[list[float]] = [[] for _ in range(size)]  # processor time, by rank
        self._changed = threading.Condition()
        self._turn = 0
        self._parts: list[torch.Tensor] = []
        self._result: Any = None

    def begin(self, rank: int) -> float:
        """Waits until it is the rank's turn; returns when that began, for `end`."""
        with self._changed:
            number = len(self.seconds[rank]) * self.size + rank
            assert self._changed.wait_for(lambda: self._turn == number, TURN_TIMEOUT_S), "another rank is stuck"
        return time.thread_time()

    def end(self, rank: int, began_s: float, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], Any]) -> None:
        """`x` is the rank's part in the collective; the last one combines them."""
        self.seconds[rank].append(time.thread_time() - began_s)
        with self._changed:
            self._parts.append(x)
            if rank == self.size - 1:
                self._result, self._parts = combine(self._parts), []
            self._turn += 1
            self._changed.notify_all()

    def result(self) -> Any:
        return self._result


class TurnGroup:
    """The collectives of one rank (`model.decoder.ReduceGroup`)."""

    def __init__(self, turns: Turns, rank: int):
        self.rank, self.size, self._turns = rank, turns.size, turns
        self._began_s = 0.0

    def enter(self) -> None:
        self._began_s = self._turns.begin(self.rank)

    def leave(self) -> None:
        self._turns.end(self.rank, self._began_s, torch.empty(0), list)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._meet(x, lambda parts: torch.stack(parts).sum(0, dtype=torch.float32).to(x.dtype)).clone()

    def gather(self, x: torch.Tensor, cols: tuple[int, ...], root: int = 0) -> list[torch.Tensor] | None:
        parts = self._meet(x, list)
        return parts if self.rank == root else None

    def _meet(self, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], Any]) -> Any:
        self._turns.end(self.rank, self._began_s, x, combine)
        began_s = self._turns.begin(self.rank)
        result = self._turns.result()
        self._began_s = began_s
        return result


class Group:
    """All ranks of a layout in this process. A context manager."""

    def __init__(self, folder: Path, units: ModelUnits, layout: Layout, parts: Mapping[str, Mapping[int, Part]]):
        self.config = units.config
        self.decoders = [make_decoder(folder, units, layout, rank) for rank in range(len(layout.shards))]
        for decoder, device in zip(self.decoders, layout.devices, strict=True):
            assert decoder.moe is not None
            decoder.moe.share(parts[device])
        self._pool = ThreadPoolExecutor(len(self.decoders), initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self.decoders.clear()  # weights, before the next group loads its own

    def teach(self, balancer: ExpertBalancer, workload: str) -> None:
        """Shows the balancer the load of steps with tokens that are not those measured."""
        moe = self.decoders[0].moe
        assert moe is not None
        moe.take_load()
        for index in range(TAUGHT):
            self.step(batch_of(self.config, *WORKLOADS[workload], seed=f"{workload}, taught {index}"))
            load = moe.take_load()
            for _ in range(FIRST_STEPS // TAUGHT):
                balancer.step_done(1.0, load)

    def step(self, batch: ForwardBatch) -> float:
        """Seconds that the step would take if each rank had a core of its own."""
        turns = Turns(len(self.decoders))
        done = [
            self._pool.submit(_forward, decoder, batch, TurnGroup(turns, rank))
            for rank, decoder in enumerate(self.decoders)
        ]
        for rank in done:
            rank.result(TURN_TIMEOUT_S)
        return sum(map(max, zip(*turns.seconds, strict=True)))


def _forward(decoder: Decoder, batch: ForwardBatch, group: TurnGroup) -> None:
    group.enter()
    decoder.forward(batch, group)
    group.leave()


def make_decoder(folder: Path, units: ModelUnits, layout: Layout, rank: int) -> Decoder:
    """A rank with its weights and an empty cache, large enough for every workload."""
    num_blocks = max(num_seqs * -(-context // BLOCK) for num_seqs, _, context in WORKLOADS.values())
    shard, addresses = layout.shards[rank], WeightAddresses(units=units)
    buffer = torch.empty(addresses.reserved_bytes, dtype=torch.uint8)
    checkpoint = Checkpoint.open(folder, units)
    load_replicated(checkpoint, buffer, addresses)
    load_units(checkpoint, buffer, addresses, [(f, u, slot) for f in units.families for slot, u in enumerate(shard[f])])
    kv = KVAddresses(config=units.config, block_size=BLOCK, num_blocks=num_blocks)
    cache = torch.zeros(kv.reserved_bytes, dtype=torch.uint8)
    views, planes = WeightViews(buffer, addresses, shard), KVCache(cache, kv, shard)
    return Decoder(
        units, layout, rank, views, planes, max_model_len=max(context for *_, context in WORKLOADS.values()) + 1
    )


# ------------------------------------------------------------------------------------------------------------- report


def show(cases: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="a step if every device has a core of its own")
    for column in ("loss", "imbalance", "workload", "without EPLB", "with", "gain"):
        table.add_column(column, justify="left" if column in ("loss", "workload") else "right")
    for case in cases:
        for name, row in case["workloads"].items():
            table.add_row(
                f"{case['before']} -> {case['after']}",
                f"{row['imbalance_before']:.2f} -> {row['imbalance_after']:.2f}",
                name,
                *(f"{1e3 * row[key]['median']:.1f} ms" for key in ("without_eplb_s", "with_eplb_s")),
                f"{row['gain']:+.1%}",
            )
    console().print(table)


if __name__ == "__main__":
    main()
