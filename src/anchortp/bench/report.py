"""`anchortp bench report`: results in, one page as Markdown and as HTML out, with plots; goals that were missed too."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp.bench import plots, stats
from anchortp.errors import ConfigError

OURS = "anchortp"
# The goals of this project, per baseline: TFS at least so many times shorter, TTP at least that share shorter.
TFS_GOALS = {"anchortp-restart": 10.0, "vllm": 50.0}
TTP_GOAL = 0.59


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    path: Path
    caption: str


Block = Heading | Text | Table | Image
Document = dict[str, Any]


def write(results: Sequence[Path], folder: Path, name: str) -> tuple[Path, Path]:
    """`name`.md, `name`.html and a folder of plots. Raises ConfigError for results that cannot be read."""
    documents = read(results)
    images = folder / name
    images.mkdir(parents=True, exist_ok=True)
    blocks = list(page(documents, images, name))
    markdown, page_html = folder / f"{name}.md", folder / f"{name}.html"
    markdown.write_text(as_markdown(blocks), encoding="utf-8")
    page_html.write_text(as_html(blocks, name), encoding="utf-8")
    return markdown, page_html


def read(results: Sequence[Path]) -> list[Document]:
    """The documents in files and folders; those that hold runs give these. Raises ConfigError."""
    files = [file for path in results for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"no results in {', '.join(map(str, results))}; run `anchortp bench recovery --output ...`.")
    found: dict[str, Document] = {}
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
            documents = document.get("runs", [document])
            found |= {json.dumps(one, sort_keys=True): one for one in documents if "benchmark" in one}
        except (OSError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"{file} is no result of `anchortp bench` ({error}); leave it out.") from None
    return list(found.values())


# ------------------------------------------------------------------------------------------------------ the page


def page(documents: Sequence[Document], images: Path, name: str) -> Iterator[Block]:
    yield Heading(text=f"Benchmarks, {name}", level=1)
    recoveries = [d for d in documents if d["benchmark"] == "recovery" and "error" not in d]
    yield from _conditions(documents)
    if recoveries:
        yield from _goals(recoveries)
        yield from _recovery_tables(recoveries, images)
        yield from _inside(recoveries)
    if failed := [d for d in documents if "error" in d]:
        yield Heading(text="Runs that came to nothing")
        yield Text(text="\n".join(f"- {_cell(d)}, {d['system']['name']}: {d['error'][:300]}" for d in failed))
    if servings := [d for d in documents if d["benchmark"] == "serving"]:
        yield from _serving(servings)
    if planners := [d for d in documents if d["benchmark"] == "planner"]:
        yield from _planner(planners)
    if recoveries:
        yield Heading(text="What the measures mean")
        yield Text(text=(stats.__doc__ or "").partition("\n\n")[2].strip())


def _conditions(documents: Sequence[Document]) -> Iterator[Block]:
    yield Heading(text="Conditions")
    names = ("cpu", "num_cores", "memory_bytes", "kernel", "python", "torch", "anchortp", "commit")
    rows = []
    for name in names:
        values = dict.fromkeys(str(d["conditions"][name]) for d in documents if name in d.get("conditions", {}))
        rows.append((name.replace("_", " "), ", ".join(values)))
    loads = [d["conditions"]["load_before"] for d in documents if "load_before" in d.get("conditions", {})]
    if loads:
        rows.append(("load before each run", f"{min(loads):.1f} to {max(loads):.1f}"))
    yield Table(columns=("what", "value"), rows=tuple(rows))
    settings = {d["system"]["name"]: d["system"] for d in documents if "system" in d}
    if settings:
        yield Text(text="Systems, each with its settings and the command that started it:")
        yield Text(
            text="\n".join(
                f"- **{name}**: {system['settings'] or 'as given'}; at a fault: {_FAULTS[system['faults']]}. "
                f"`{' '.join(system['command'])}`"
                for name, system in sorted(settings.items())
            )
        )


_FAULTS = {
    "anchor": "the device's anchor injects it, the system is on its own",
    "everything": "all its processes are killed at once and a supervisor starts it again at once",
    "victim": "one of its processes is killed, a supervisor starts it again when it has ended",
}


def _goals(runs: Sequence[Document]) -> Iterator[Block]:
    """What was to be shown, and whether it was."""
    rows: list[tuple[str, ...]] = []
    for cell, by_system in _cells(runs).items():
        ours = by_system.get(OURS)
        if ours is None:
            continue
        failed, lost = ours["requests"]["failed"], _lost_or_repeated(ours)
        rows.append((cell, "no request fails", str(failed), _verdict(failed == 0)))
        rows.append((cell, "no token lost or repeated", "-" if lost is None else str(lost), _verdict(lost == 0)))
        for name, other in by_system.items():
            goal = next((g for start, g in TFS_GOALS.items() if name.startswith(start)), None)
            if goal is not None and ours["faults"] and other["faults"]:
                rows += _compared(cell, name, ours["faults"][0], other["faults"][0], goal)
    if rows:
        yield Heading(text="Goals, and whether they were met")
        yield Table(columns=("run", "goal", "measured", "met"), rows=tuple(rows))


def _compared(cell: str, name: str, ours: Document, other: Document, goal: float) -> Iterator[tuple[str, ...]]:
    ratio = _ratio(other["tfs_s"], ours["tfs_s"])
    yield (cell, f"TFS at least {goal:g} times shorter than {name}", _times(ratio), _verdict(ratio >= goal))
    if ours["ttp_s"] is None or other["ttp_s"] is None:
        yield (cell, f"TTP at least {TTP_GOAL:.0%} shorter than {name}", "not measured", "-")
        return
    if other["ttp_s"] == 0:
        met = ours["ttp_s"] == 0
        said = f"{_seconds(ours['ttp_s'])}, {name} is at its peak at once"
        yield (cell, f"TTP at least {TTP_GOAL:.0%} shorter than {name}", said, "-" if met else "no")
        return
    shorter = 1 - ours["ttp_s"] / other["ttp_s"]
    said = f"{shorter:.0%} ({_seconds(ours['ttp_s'])}, {_seconds(other['ttp_s'])})"
    yield (cell, f"TTP at least {TTP_GOAL:.0%} shorter than {name}", said, _verdict(shorter >= TTP_GOAL))


def _recovery_tables(runs: Sequence[Document], images: Path) -> Iterator[Block]:
    yield Heading(text="Faults under load, as the clients see them")
    for number, (cell, by_system) in enumerate(_cells(runs).items()):
        yield Heading(text=cell, level=3)
        yield Text(text=_workload(next(iter(by_system.values()))))
        rows = [row for name, run in by_system.items() for row in _run_rows(name, run)]
        yield Table(columns=_RUN_COLUMNS, rows=tuple(rows))
        picture = images / f"throughput-{number}.png"
        plots.throughput(by_system, picture, title=cell)
        yield Image(path=picture, caption="throughput over time, all systems; the fault is at 0")
        for name, run in by_system.items():
            picture = images / f"throughput-{number}-{name}.png"
            plots.run(run, picture, title=f"{name}: {cell}")
            yield Image(path=picture, caption=f"{name}: fault, first success, stable peak")


_RUN_COLUMNS = ("system", "fault", "TFS", "TTP", "worst gap", "P99 gap", "streams hit", "their wait: median, worst")
_RUN_COLUMNS += ("tok/s before", "during", "after", "peak", "failed", "retried", "lost / repeated", "thrown away")


def _run_rows(name: str, run: Document) -> Iterator[tuple[str, ...]]:
    tokens, requests, throughput = run["tokens"], run["requests"], run["throughput"]
    for fault in run["faults"]:
        hit = fault["streams_hit"]
        yield (
            name + (" (interrupted)" if run.get("interrupted") else ""),
            f"{fault['kind']} {', '.join(fault['devices'])} at {fault['at_s']:.0f} s",
            _seconds(fault["tfs_s"]),
            _seconds(fault["ttp_s"]),
            _seconds(run["gap_s"]["max"]),
            _seconds(run["gap_s"]["p99"]),
            str(hit["n"]),
            f"{_seconds(hit['median'])}, {_seconds(hit['max'])}",
            *(_number(throughput[when]) for when in ("before", "during", "after")),
            _number(fault["peak_tokens_per_s"]),
            str(requests["failed"]),
            str(requests["retried"]),
            "not told" if tokens["lost"] is None else f"{tokens['lost']} / {tokens['repeated']}",
            str(tokens["thrown_away"]),
        )


def _inside(runs: Sequence[Document]) -> Iterator[Block]:
    """What the systems tell of their own recoveries: phases and bytes."""
    phases: list[tuple[str, ...]] = []
    moved: list[tuple[str, ...]] = []
    for cell, by_system in _cells(runs).items():
        for name, run in by_system.items():
            for episode in run.get("engine", {}).get("episodes", ()):
                what = ", ".join(f"{phase} {1e3 * s:.0f}" for phase, s in episode["phases"].items() if s >= 0.0005)
                phases.append((cell, name, _seconds(episode["seconds"]), what))
                sizes = (f"{kind.replace('_', ' ')} {_size(n)}" for kind, n in episode["bytes"].items() if n)
                moved.append((cell, name, str(episode.get("kv", "-")), ", ".join(sizes) or "none"))
            for again_s in run.get("restarts_s", ()):
                phases.append((cell, name, _seconds(again_s), "started again, until it answers"))
    if phases:
        yield Heading(text="Where the time goes, as the systems tell it")
        yield Table(columns=("run", "system", "until it serves again", "phases, ms"), rows=tuple(phases))
        yield Table(columns=("run", "system", "KV cache", "bytes"), rows=tuple(moved))


def _serving(documents: Sequence[Document]) -> Iterator[Block]:
    yield Heading(text="While nothing fails")
    rows = []
    for document in documents:
        for name, found in document["systems"].items():
            many, alone, prefill, size = found["batched"], found["alone"], found["prefill"], found["options"]
            gap_s = many["runs"][0]["gap_s"]
            rows.append(
                (
                    f"{document['model']}, TP {document['tp']}",
                    name,
                    f"{size['requests']} x {size['input']} in, {size['output']} out, {size['concurrency']} at a time",
                    _number(many["output_tokens_per_s"]),
                    _seconds(many["first_token_s"]),
                    f"{_seconds(gap_s['median'])}, {_seconds(gap_s['p99'])}",
                    f"{alone['output_tokens_per_s']:.1f}",
                    _seconds(alone["first_token_s"]),
                    _number(prefill["prompt_tokens_per_s"]),
                    _seconds(found.get("start_s")),
                )
            )
    columns = ("model", "system", "load", "tok/s", "first token", "gap: median, P99", "alone tok/s")
    yield Table(columns=(*columns, "alone first token", "prefill tok/s", "start"), rows=tuple(rows))


def _planner(documents: Sequence[Document]) -> Iterator[Block]:
    yield Heading(text="Plans, by policy")
    for document in documents:
        rows = tuple(
            (
                row["model"],
                row["topology"],
                row["change"],
                row["policy"],
                _seconds(row["predicted_s"]),
                _size(row["loaded_bytes"]),
                _size(row["copied_bytes"]),
                f"{row['planning_ms']:.1f} ms",
            )
            for row in document["plans"]
        )
        columns = ("model", "topology", "change", "policy", "predicted", "loaded", "copied", "planning")
        yield Table(columns=columns, rows=rows)


# ------------------------------------------------------------------------------------------------------- grouping


_VERBS = {"lost": "lost", "crash": "crashed", "hang": "hung"}


def _cell(run: Document) -> str:
    """What a run has in common with those that it is compared with."""
    kinds = ", ".join(
        f"{' and '.join(f['devices'])} {_VERBS[f['kind']]} at {f['at']:.0%}"
        + (f" + {f['after_s']:g} s" if f["after_s"] else "")
        for f in run["faults_planned"]
    )
    workload = run["workload"]
    turns = "conversations" if workload["multi_turn"] else "requests"
    return f"{run['model']}, {run['change']}, {kinds}, {workload['requests']} {turns} ({workload['arrivals']})"


def _cells(runs: Sequence[Document]) -> dict[str, dict[str, Document]]:
    """Runs by cell and system; of several alike the last."""
    cells: dict[str, dict[str, Document]] = {}
    for run in runs:
        cells.setdefault(_cell(run), {})[run["system"]["name"]] = run
    order = sorted(cells)
    return {cell: dict(sorted(cells[cell].items())) for cell in order}


def _workload(run: Document) -> str:
    w = run["workload"]
    what = "whole conversations" if w["multi_turn"] else "first turns"
    source = f"ShareGPT, {what}" if w["trace"] == "sharegpt" else "random prompts of one length"
    return (
        f"{run['requests']['sent']} of {w['requests']} requests sent ({source}), {w['arrivals']} arrivals at "
        f"{w['rate']:g} per second, up to {w['max_input']} tokens in and {w['max_output']} out, greedy, end of text "
        f"ignored, seed {w['seed']}."
    )


def _lost_or_repeated(run: Document) -> int | None:
    tokens = run["tokens"]
    return None if tokens["lost"] is None else tokens["lost"] + tokens["repeated"] + tokens["thrown_away"]


# -------------------------------------------------------------------------------------------------------- numbers


def _ratio(other_s: float | None, ours_s: float | None) -> float:
    """How many times longer the other takes; infinite if it never came back, 0 if we did not."""
    if ours_s is None:
        return 0.0
    return math.inf if other_s is None else other_s / max(ours_s, 1e-9)


def _times(ratio: float) -> str:
    return "it never came back" if math.isinf(ratio) else f"{ratio:.1f} times"


def _verdict(met: bool) -> str:
    return "yes" if met else "no"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


# ------------------------------------------------------------------------------------------------------ rendering


def as_markdown(blocks: Iterable[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(text=text, level=level):
                parts.append(f"{'#' * level} {text}")
            case Text(text=text):
                parts.append(text)
            case Table(columns=columns, rows=rows):
                lines = [columns, ("---",) * len(columns), *rows]
                parts.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines))
            case Image(path=path, caption=caption):
                parts.append(f"![{caption}]({path.parent.name}/{path.name})")
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: left; white-space: nowrap; }
th { background: #f3f3f3; } img { max-width: 100%; } pre { white-space: pre-wrap; }
figcaption { color: #666; font-size: 13px; } figure { margin: 1em 0; }
"""


def as_html(blocks: Iterable[Block], title: str) -> str:
    """One file: pictures are in it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text=text, level=level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Text(text=text):
                parts.append(f"<pre>{html.escape(text)}</pre>")
            case Table(columns=columns, rows=rows):
                head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
                body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
                parts.append(f"<table><tr>{head}</tr>{body}</table>")
            case Image(path=path, caption=caption):
                data = base64.b64encode(path.read_bytes()).decode()
                said = html.escape(caption)
                picture = f'<img alt="{said}" src="data:image/png;base64,{data}">'
                parts.append(f"<figure>{picture}<figcaption>{said}</figcaption></figure>")
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n{head}\n" + "\n".join(parts) + "\n"
