"""Pictures of runs: throughput over time, with the fault, the first success and the stable peak."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchortp.errors import ConfigError

SMOOTH_S = 1.0  # a mean over so much, so that single steps do not hide the shape
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#7f7f7f")
OUTAGE_COLOR, SUCCESS_COLOR, PEAK_COLOR = "#f2c6c6", "#2ca02c", "#9467bd"


def throughput(runs: Mapping[str, dict[str, Any]], path: Path, *, title: str) -> None:
    """All systems on one axis; 0 is the first fault of each."""
    figure, axes = _axes(title, "seconds after the fault")
    for color, (name, run) in zip(COLORS * len(runs), runs.items(), strict=False):
        fault_s = run["faults"][0]["at_s"] if run["faults"] else 0.0
        times, rates = _curve(run)
        axes.plot([t - fault_s for t in times], rates, label=name, color=color, linewidth=1.4)
    axes.axvline(0, color="black", linewidth=1, linestyle=":")
    _save(figure, axes, path)


def run(document: dict[str, Any], path: Path, *, title: str) -> None:
    """One system: for each fault its outage as an area, the first success and the begin of the stable peak."""
    figure, axes = _axes(title, "seconds")
    axes.plot(*_curve(document), color=COLORS[0], linewidth=1.4, label="throughput")
    for index, fault in enumerate(document["faults"]):
        named = {"outage": "outage", "success": "first success", "peak": "stable peak"} if index == 0 else {}
        axes.axvline(fault["at_s"], color="black", linewidth=1, linestyle=":", label=None if index else "fault")
        if fault["tfs_s"] is None:
            continue
        success_s = fault["at_s"] + fault["tfs_s"]
        axes.axvspan(fault["at_s"], success_s, color=OUTAGE_COLOR, label=named.get("outage"))
        axes.axvline(success_s, color=SUCCESS_COLOR, linewidth=1, label=named.get("success"))
        if fault["peak_at_s"] is not None:
            peak = fault["peak_tokens_per_s"]
            axes.plot([fault["peak_at_s"]], [peak], "v", color=PEAK_COLOR, label=named.get("peak"))
            axes.annotate(f"{peak:.0f} tok/s", (fault["peak_at_s"], peak), textcoords="offset points", xytext=(6, 4))
    _save(figure, axes, path)


def _curve(document: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(seconds, tokens per second), as means over `SMOOTH_S` around each bin."""
    bin_s, tokens = document["curve"]["bin_s"], document["curve"]["tokens"]
    half = max(0, round(SMOOTH_S / bin_s / 2))
    rates = []
    for index in range(len(tokens)):
        window = tokens[max(0, index - half) : index + half + 1]
        rates.append(sum(window) / (len(window) * bin_s))
    return [(index + 0.5) * bin_s for index in range(len(tokens))], rates


def _axes(title: str, label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib; install anchortp[bench].") from None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("tokens per second, all clients")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    figure.savefig(path, dpi=110, metadata={"Software": ""})
