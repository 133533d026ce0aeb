"""What `anchortp bench` shows while it runs and at its end, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from anchortp.bench.load import Load
from anchortp.bench.recovery import Case

TELL_EVERY_S = 20.0  # without a terminal


def _console() -> Console:
    """stderr; in a file lines are as wide as tables need."""
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 180)


class Progress:
    """Two bars on a terminal (runs; requests of the present one), else a line now and then."""

    def __init__(self, num_cases: int):
        self._console = _console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        columns += (TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=self._console, disable=not self._console.is_terminal)
        self._runs = self._bars.add_task("runs", total=num_cases, rate="")
        self._load = self._bars.add_task("requests", total=None, rate="")
        self._told_s = time.monotonic()

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def tell(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
        self._bars.reset(self._load, total=None)

    def done(self) -> None:
        self._bars.advance(self._runs)

    def observe(self, case: Case, load: Load) -> None:
        """Called twice a second while a load is played."""
        elapsed_s = max(1e-9, time.monotonic() - load.began_s)
        rate = f"{load.num_tokens / elapsed_s:.0f} tok/s"
        self._bars.update(
            self._load, description=case.system.name, total=load.num_requests, completed=load.num_finished, rate=rate
        )
        if not self._console.is_terminal and time.monotonic() - self._told_s > TELL_EVERY_S:
            self._told_s = time.monotonic()
            left_s = (load.num_requests - load.num_finished) * elapsed_s / max(1, load.num_finished)
            counts = f"{load.num_finished} of {load.num_requests} answered, {len(load.sent)} sent"
            self.tell(f"  {counts}, {rate}, about {left_s:.0f} s left")


def show_recovery(runs: list[dict[str, Any]]) -> None:
    """One line per fault of each run."""
    table = Table(title="a fault under load, as the clients see it")
    for column in (
        "system",
        "change",
        "fault",
        "TFS",
        "TTP",
        "worst gap",
        "P99 gap",
        "before",
        "during",
        "after",
        "failed",
        "retried",
    ):
        table.add_column(column, justify="left" if column in ("system", "fault") else "right")
    for run in runs:
        if "error" in run:
            table.add_row(run["system"]["name"], run["change"], run["error"][:60])
            continue
        throughput = [_number(run["throughput"][when]) for when in ("before", "during", "after")]
        counts = [str(run["requests"][which]) for which in ("failed", "retried")]
        for fault in run["faults"] or [{"kind": "none", "devices": [], "tfs_s": None, "ttp_s": None}]:
            table.add_row(
                run["system"]["name"],
                run["change"],
                f"{fault['kind']} {','.join(fault['devices'])}",
                seconds(fault["tfs_s"]),
                seconds(fault["ttp_s"]),
                seconds(run["gap_s"]["max"]),
                seconds(run["gap_s"]["p99"]),
                *throughput,
                *counts,
            )
    _console().print(table)


def show_plans(plans: list[dict[str, Any]]) -> None:
    """One line per plan."""
    table = Table(title="plans by policy")
    for column in ("model", "topology", "change", "policy", "predicted", "loaded", "copied", "planning"):
        table.add_column(column, justify="left" if column in ("model", "topology", "policy") else "right")
    for row in plans:
        sizes = [f"{row[kind] / 1e9:.2f} GB" for kind in ("loaded_bytes", "copied_bytes")]
        planning = f"{row['planning_ms']:.1f} ms"
        names = [row[key] for key in ("model", "topology", "change", "policy")]
        table.add_row(*names, seconds(row["predicted_s"]), *sizes, planning)
    _console().print(table)


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def show_serving(document: dict[str, Any]) -> None:
    """Medians of the parts, one line per system."""
    table = Table(title=f"{document['model']}: tokens per second, medians")
    for column in ("system", "start", "many", "first token", "alone", "first token", "prefill"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, found in document["systems"].items():
        many, alone, prefill = found["batched"], found["alone"], found["prefill"]
        table.add_row(
            name,
            f"{found['start_s']:.1f} s" if "start_s" in found else "-",
            f"{many['output_tokens_per_s']:.1f}",
            f"{1e3 * many['first_token_s']:.0f} ms",
            f"{alone['output_tokens_per_s']:.1f}",
            f"{1e3 * alone['first_token_s']:.0f} ms",
            f"{prefill['prompt_tokens_per_s']:.0f}",
        )
    _console().print(table)
