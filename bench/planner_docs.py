"""Writes docs/planner.md and docs/planner.png: how the planner thinks, and the paper's changes under every policy.

    python -m bench.planner_docs [--check]

Nothing is measured and nothing is random: the same code gives the same page on every machine. `--check` writes
nothing and fails if the page is not what the code says. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from anchortp.cli.plan import PlanOptions, build_problem
from anchortp.cli.plan_plot import draw
from anchortp.cli.plan_view import duration, size
from anchortp.errors import CapacityError
from anchortp.plan import PAPER_MODELS, POLICIES, SHAPES, Refused, Row, compare, preset
from bench.common import finish

DOCS = Path(__file__).parents[1] / "docs"
TOPOLOGIES = ("mi210-2x4", "dgx-h100")
CHANGES = ((4, 2), (8, 6), (8, 7))
PLOTTED = PlanOptions(model="Qwen3-30B-A3B", num_before=8, lost="3", topology="mi210-2x4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model and change on one topology: per loss the rows of all policies, or why it does not fit."""

    topology: str
    model: str
    num_before: int
    num_after: int
    losses: tuple[dict[str, Row], ...]
    refused: str = ""

    @property
    def change(self) -> str:
        return f"{self.num_before}→{self.num_after}"

    def values(self, policy: str, figure: str) -> list[float]:
        return [getattr(rows[policy], figure) for rows in self.losses]


def cases(topology: str, models: Sequence[str] = PAPER_MODELS) -> Iterator[Case]:
    """Every loss of as many devices as the change takes away, models in the paper's order."""
    for model in models:
        for num_before, num_after in CHANGES:
            yield _case(topology, model, num_before, num_after)


def _case(topology: str, model: str, num_before: int, num_after: int) -> Case:
    losses: list[dict[str, Row]] = []
    refused = ""
    for lost in combinations(range(num_before), num_before - num_after):
        names = ",".join(map(str, lost))
        options = PlanOptions(model=model, num_before=num_before, lost=names, topology=topology)
        try:
            rows = compare(build_problem(options))
        except CapacityError as error:  # not even the old group has room
            refused = str(error)
            break
        refused = next((row.why for row in rows if isinstance(row, Refused)), "")
        if refused:
            break
        losses.append({row.policy: row for row in rows if isinstance(row, Row)})
    return Case(
        topology=topology,
        model=model,
        num_before=num_before,
        num_after=num_after,
        losses=() if refused else tuple(losses),
        refused=refused,
    )


# --------------------------------------------------------------------------------------------------- the page


def page(found: Sequence[Case]) -> str:
    parts = [_INTRODUCTION, _says(found)]
    for topology in TOPOLOGIES:
        of_it = [case for case in found if case.topology == topology]
        parts.append(f"## Every loss on `{topology}`\n\n{_table(of_it)}")
    parts.append(_SILENCE)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(found: Sequence[Case]) -> str:
    lines = ["| model | change | policy | loaded | copied | busiest link | predicted | of the bound |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for case in found:
        if case.refused:
            lines.append(f"| {case.model} | {case.change} | refused | {_refusal(case)} |||||")
            continue
        for number, policy in enumerate(POLICIES):
            head = f"{case.model} | {case.change} ({len(case.losses)})" if number == 0 else " | "
            lines.append(f"| {head} | {policy} | {' | '.join(_cells(case, policy))} |")
    return "\n".join(lines)


def _refusal(case: Case) -> str:
    memory = min(place.memory_bytes or 0 for place in preset(case.topology).places if place.kind == "device")
    share = SHAPES[case.model].total_bytes / case.num_after
    assert share > memory, f"{case.model} {case.change} was refused for another reason: {case.refused}"
    return f"{size(share)} of weights a device, {size(memory)} of memory"


def _cells(case: Case, policy: str) -> list[str]:
    figures: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("loaded_bytes", size),
        ("copied_bytes", size),
        ("busiest_bytes", size),
        ("predicted_s", duration),
    )
    cells = [_median_worst(case.values(policy, figure), show) for figure, show in figures]
    ratios = [rows[policy].predicted_s / rows[policy].bound_s for rows in case.losses]
    return [*cells, _median_worst(ratios, lambda ratio: f"{ratio:.2f}")]


def _median_worst(values: Sequence[float], show: Callable[[float], str]) -> str:
    median, worst = show(statistics.median(values)), show(max(values))
    return median if median == worst else f"{median} / {worst}"


def _gain(found: Sequence[Case], policy: str) -> tuple[float, float, float]:
    """How many times as long as with `makespan` the move takes: least, median, most over all losses."""
    ratios = [rows[policy].predicted_s / rows["makespan"].predicted_s for case in found for rows in case.losses]
    return min(ratios), statistics.median(ratios), max(ratios)


def _says(found: Sequence[Case]) -> str:
    num_losses = sum(len(case.losses) for case in found)
    lines = ["| policy | " + " | ".join(f"`{topology}`" for topology in TOPOLOGIES) + " |", "|---|--:|--:|"]
    for policy in POLICIES:
        gains = [_gain([c for c in found if c.topology == topology], policy) for topology in TOPOLOGIES]
        cells = " | ".join(f"{low:.2f} / {middle:.2f} / {high:.2f}" for low, middle, high in gains)
        lines.append(f"| {policy} | {cells} |")
    return _SAYS.format(num_losses=num_losses, table="\n".join(lines))


_INTRODUCTION = """
# The planner

What moves when devices come and go, over which links, and how long that takes. `anchortp plan` shows it for any
model and topology; no weights, no devices are needed. This page is written by `python -m bench.planner_docs`.

```
anchortp plan Qwen/Qwen3-30B-A3B --from 8 --to 7 --lost 3 --plot plan.png
anchortp plan Qwen/Qwen3-30B-A3B --from 8 --lost 3 --explain expert:12.3
anchortp plan Qwen/Qwen3-30B-A3B --already-lost 6,1 --lost 3      # a fault after two others
anchortp plan Qwen/Qwen3-30B-A3B --from 4 --onto 4,5,6,7 --topology 2-nodes-8 --kv-tokens 10000
anchortp plan ./config.json --from 4 --to 6 --topology box.yaml --json
anchortp topology show dgx-h100 --yaml > box.yaml      # a file to begin with
anchortp topology measure --output here.yaml           # this machine
```

## How it thinks

1. **The question is a value** (`plan/problem.py`): which units are where, which devices are lost, which go on, what
   is wired to what. Shrink, grow, replace, other speeds, other nodes: one question with other numbers.
2. **A shard is a set of units, not an interval.** So a survivor keeps all it holds, the lost units are dealt out
   evenly, and nothing has to travel between survivors to keep intervals contiguous.
3. **The target is the time at which the last device is ready**, not bytes. Who receives which unit, from which
   source (a survivor's replica, host memory, disk, another node) and over which links is one question: the fullest
   link decides, so the load is spread until no link can be relieved (`plan/routing.py`). A source can be split over
   several links; what cannot be reached directly goes through the host, and the plan says so.
4. **Widths stay balanced** to within one unit, or follow the speeds of the devices; memory is reserved before the
   first byte moves, and what does not fit is refused with the numbers.
5. **A lower bound** comes with every plan: no plan at all, into any balanced layout, can be faster. It lets units
   and copies of KV heads be split, so where those are large nothing may reach it: `python -m bench.planner` then asks
   HiGHS, a solver of its own, what whole ones can reach. Of 8,000 random problems with small units (`--problems 2000`
   with `--seed 0`, 100000, 200000, 300000) all but 15 plans are within 2 % of the bound as HiGHS has it (0.04 % above
   it on average), and 14 of those 15 it proves within 2 % of the best that whole units allow. The last, after a loss
   among copies of experts, is 6.3 % above the bound and 4.3 % above what whole units can reach. Of 250 with large
   units 92.8 % are within 2 %, 98.4 % with those that are proven. No other policy that brings as much is faster.

| policy | what it does | source |
|---|---|---|
| `reload` | drops everything and loads the new shards whole | restart-and-reload, the usual baseline |
| `greedy` | contiguous intervals; keeps its own overlap, reloads the rest | baseline in the paper |
| `cmm` | the same intervals; copies what survivors hold, reloads what is left | the paper, arXiv 2511.11617 |
| `units` | sets of units: loads the lost bytes, evenly, copies nothing else | design, ideas 3 and 4 |
| `makespan` | sets of units; destination, source and route so that the last device is ready first | the default |
"""

_SAYS = """
## What the numbers say

{num_losses} cases: the four models of the paper, every loss of two devices of four, of one and of two of eight, on both
machines. How many times as long as with `makespan` the same change takes (least / median / most over all losses):

{table}

![Transfers per link over time](planner.png)

One of them, Qwen3-30B-A3B without gpu:3: each row is a link, the length of a bar is time and its height the share
of the bandwidth that is used. Grey is idle.

In the tables below figures are `median / worst` over all losses of a change (one figure where they agree); the
number of losses is behind the change. `loaded` comes out of host memory, `copied` from other devices,
`busiest link` is what passes the link that is waited for. "Of the bound" is the predicted time over the lower bound.
"""

_SILENCE = """
## What they do not say

- They are **predictions of a model** (`plan/cost.py`: links are fluids, transfers are cut small and pipelined), not
  measurements. No MI210 and no DGX was used. They count the move alone: no detection, no new communicator, no
  graph capture, no replay of lost KV cache.
- **Bandwidths are assumptions**: nominal figures of the makers times 0.85; `plan/topology.py` names the sources.
  The page cache holds the checkpoint; a host whose loader reaches 1.4 GB/s, as the paper's does, waits for its
  loader whatever the planner does, and there the bytes loaded are what counts.
- Every device here has a way of its own to the host, so `cmm` is hardly faster than `greedy`: both wait for the
  device whose new interval holds most of what was lost. What `cmm` saves, bytes from the host, pays where loading is
  slow and shared.
- `cmm` takes the quickest way that the topology has; the paper looks at neither reachability nor bandwidth.
- Experts move as whole units. Mixtral has 8 a layer, so on 7 devices one of them has two in every layer; widths are
  even over all layers together, under every policy.
- "Refused" means what it says: so much of the model does not fit in the memory that is left.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planner_docs", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args()
    found = [case for topology in TOPOLOGIES for case in cases(topology)]
    text = page(found)
    if arguments.check:
        if (DOCS / "planner.md").read_text(encoding="utf-8") != text:
            sys.exit("docs/planner.md is not what the code says; run python -m bench.planner_docs")
    else:
        (DOCS / "planner.md").write_text(text, encoding="utf-8")
        problem = build_problem(PLOTTED)
        draw(problem, compare(problem), PLOTTED.policy, DOCS / "planner.png")
    finish({"benchmark": "planner_docs", "cases": [_as_dict(case) for case in found]})


def _as_dict(case: Case) -> dict[str, Any]:
    figures = ("loaded_bytes", "copied_bytes", "busiest_bytes", "predicted_s", "bound_s")
    result: dict[str, Any] = {"topology": case.topology, "model": case.model, "change": case.change}
    if case.refused:
        return result | {"refused": case.refused}
    return result | {
        "num_losses": len(case.losses),
        "policies": {
            policy: {
                figure: {"median": statistics.median(values), "worst": max(values)}
                for figure in figures
                for values in [case.values(policy, figure)]
            }
            for policy in POLICIES
        },
    }


if __name__ == "__main__":
    main()
