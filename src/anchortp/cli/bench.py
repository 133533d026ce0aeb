"""`anchortp bench`: what is asked for, from the command line; the last line on stdout is one JSON document."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from anchortp.errors import ConfigError

app = typer.Typer(help="Measure this engine and others, healthy and through faults.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Hugging Face folder or hub name; 'smollm2' for the packaged model.")]
Systems = Annotated[
    str,
    typer.Option(
        help="Comma-separated: anchortp, anchortp-restart, anchortp-published, vllm-tpN-eager, vllm-tpN-compiled "
        "(N: its degree), or a JSON file that says how to start another one."
    ),
]
VllmDir = Annotated[
    Path | None, typer.Option(help="Where `anchortp bench setup-vllm` put vLLM. Default: in the cache folder.")
]
ServeOption = Annotated[
    list[str] | None,
    typer.Option(help="For every `anchortp serve`, as --serve-option=--kv-mirror=off; repeat."),
]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finish(document: dict[str, Any]) -> None:
    """The last line on stdout is the result."""
    print(json.dumps(document), flush=True)


@app.command("setup-vllm")
def setup_vllm(
    folder: Annotated[Path | None, typer.Argument(help="Where to. Default: in the cache folder.")] = None,
) -> None:
    """Build an environment with vLLM for CPUs, as a baseline (about 3.5 GB)."""
    from anchortp.bench import vllm_env

    vllm_env.set_up(folder or vllm_env.default_folder(), tell)


@app.command()
def serving(
    model: Model = "smollm2",
    systems: Systems = "anchortp",
    tp: Annotated[int, typer.Option(min=1)] = 1,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    input_tokens: Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option("--output", min=2, help="Tokens of each answer.")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of each prompt of the prefill part.")] = 512,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    seed: int = 0,
    url: Annotated[str | None, typer.Option(help="Measure this running server, as http://127.0.0.1:8000.")] = None,
    served_name: Annotated[
        str | None, typer.Option(help="The model's name at --url. Default: as `anchortp serve` names it.")
    ] = None,
    vllm_dir: VllmDir = None,
    serve_option: ServeOption = None,
) -> None:
    """Throughput and latency while nothing fails, of one or more systems."""
    from anchortp.bench import machine, vllm_env
    from anchortp.bench import serving as bench
    from anchortp.bench import systems as adapters
    from anchortp.bench.client import Target
    from anchortp.bench.prompts import vocabulary_size
    from anchortp.cli.bench_view import show_serving
    from anchortp.cli.serving import default_model_name, resolve_folder

    folder = resolve_folder(model)
    name = default_model_name(model, folder)
    options = bench.Options(
        requests=requests,
        input=input_tokens,
        output=output_tokens,
        concurrency=concurrency,
        prefill=prefill,
        runs=runs,
        seed=seed,
    )
    document: dict[str, Any] = {
        "benchmark": "serving",
        "model": name,
        "tp": tp,
        "conditions": machine.conditions(),
        "systems": {},
    }
    if url is not None:
        place = urlsplit(url)
        if not place.hostname or not place.port:
            raise ConfigError(f"--url {url}: give an address with its port, as http://127.0.0.1:8000.")
        target = Target(host=place.hostname, port=place.port, model=served_name or name)
        document["systems"][url] = asyncio.run(bench.measure(target, vocabulary_size(folder), options, tell))
    else:
        chosen = adapters.resolve(
            systems.split(","), folder, vllm_dir or vllm_env.default_folder(), tuple(serve_option or ())
        )
        devices = tuple(f"cpu:{i}" for i in range(tp))
        try:
            for system, measured in bench.run(chosen, folder, devices, options, tell):
                document["systems"][system] = measured
        except KeyboardInterrupt:
            document["interrupted"] = True
            tell("interrupted; this is what was measured so far")
    show_serving(document)
    finish(document)


class Kind(StrEnum):
    lost = "lost"
    crash = "crash"
    hang = "hang"


class Trace(StrEnum):
    sharegpt = "sharegpt"
    synthetic = "synthetic"


class Arrivals(StrEnum):
    fixed = "fixed"
    poisson = "poisson"
    bursty = "bursty"


Output = Annotated[
    Path | None, typer.Option(help="Keep each run in this folder; runs that it holds already are not run again.")
]
Budget = Annotated[
    float | None, typer.Option(help="Seconds, after which what is running is stopped; the same command goes on.")
]


@app.command()
def recovery(
    model: Model = "smollm2",
    systems: Systems = "anchortp,anchortp-restart",
    tp: Annotated[int, typer.Option(min=2)] = 4,
    at: Annotated[list[float] | None, typer.Option(help="Share of the requests sent at the fault; repeat.")] = None,
    lose: Annotated[int, typer.Option(min=1, help="Devices that each fault strikes.")] = 1,
    kind: Annotated[Kind, typer.Option(help="As in `anchortp fault`.")] = Kind.lost,
    fault_script: Annotated[
        Path | None,
        typer.Option(help='Instead: a JSON list of {"at": 0.25, "devices": ["cpu:2"], "kind": "lost", "after_s": 0}.'),
    ] = None,
    trace: Annotated[Trace, typer.Option(help="sharegpt, or synthetic: all prompts and answers of one length.")] = (
        Trace.sharegpt
    ),
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    arrivals: Annotated[Arrivals, typer.Option(help="bursty: gaps with twice their mean as deviation.")] = (
        Arrivals.fixed
    ),
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2.5,
    max_input: Annotated[int, typer.Option(min=1, help="Tokens of a prompt; what is longer is cut.")] = 128,
    max_output: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 96,
    multi_turn: Annotated[bool, typer.Option("--multi-turn", help="Whole conversations, with their history.")] = False,
    seed: int = 0,
    device_memory: Annotated[str, typer.Option(help="Of each device of `anchortp serve`.")] = "2G",
    output: Output = None,
    budget_s: Budget = None,
    vllm_dir: VllmDir = None,
    serve_option: ServeOption = None,
) -> None:
    """A load with a fault in the middle: TFS, TTP, gaps, throughput, failed requests, for each system."""
    from anchortp.bench import faults, vllm_env
    from anchortp.bench import recovery as bench
    from anchortp.bench import systems as adapters
    from anchortp.bench.workload import WorkloadOptions
    from anchortp.cli.serving import resolve_folder

    folder = resolve_folder(model)
    devices = tuple(f"cpu:{i}" for i in range(tp))
    if fault_script is not None:
        struck = faults.read_script(fault_script, devices)
    else:
        struck = faults.standard(tuple(at or [0.25]), kind.value, devices, lose)
    serve_options = (f"--device-memory={device_memory}", *(serve_option or ()))
    chosen = adapters.resolve(systems.split(","), folder, vllm_dir or vllm_env.default_folder(), serve_options)
    workload = WorkloadOptions(
        trace=trace.value,
        requests=requests,
        arrivals=arrivals.value,
        rate=rate,
        max_input=max_input,
        max_output=max_output,
        multi_turn=multi_turn,
        seed=seed,
    )
    cases = [
        bench.Case(model=folder, devices=devices, faults=struck, workload=workload, system=system) for system in chosen
    ]
    finish(_run_cases(cases, output, budget_s))


@app.command()
def grid(
    models: Annotated[str, typer.Option(help="Comma-separated, as for --model of `bench recovery`.")] = "smollm2",
    systems: Systems = "anchortp,anchortp-published,anchortp-restart,vllm-tp1-eager",
    changes: Annotated[str, typer.Option(help="Comma-separated, devices before and after a loss.")] = "4-3,4-2,8-7,8-6",
    at: Annotated[list[float] | None, typer.Option(help="Share of the requests sent at the fault; repeat.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of the first change of each model.")] = 1000,
    requests_more: Annotated[int, typer.Option(min=1, help="Of all other runs.")] = 250,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 2.5,
    max_input: Annotated[int, typer.Option(min=1)] = 128,
    max_output: Annotated[int, typer.Option(min=2)] = 96,
    trace: Trace = Trace.sharegpt,
    seed: int = 0,
    device_memory: Annotated[str, typer.Option(help="Of each device of `anchortp serve`.")] = "2G",
    output: Annotated[Path, typer.Option(help="Folder for the runs; those that it holds are not run again.")] = Path(
        "bench-results"
    ),
    budget_s: Budget = None,
    vllm_dir: VllmDir = None,
    serve_option: ServeOption = None,
) -> None:
    """All of the evaluation: losses at every change, a crash and a hang at the first, every system. Goes on where it
    was interrupted."""
    from anchortp.bench import grid as bench
    from anchortp.bench import systems as adapters
    from anchortp.bench import vllm_env
    from anchortp.bench.workload import WorkloadOptions
    from anchortp.cli.serving import resolve_folder

    serve_options = (f"--device-memory={device_memory}", *(serve_option or ()))
    workload = WorkloadOptions(
        trace=trace.value, requests=requests, rate=rate, max_input=max_input, max_output=max_output, seed=seed
    )
    cases = bench.cases(
        models={
            folder: adapters.resolve(systems.split(","), folder, vllm_dir or vllm_env.default_folder(), serve_options)
            for folder in map(resolve_folder, models.split(","))
        },
        changes=bench.parse_changes(changes),
        shares=tuple(at or (0.25, 0.5)),
        workload=workload,
        requests_more=requests_more,
    )
    finish(_run_cases(cases, output, budget_s))


@app.command()
def planner(
    models: Annotated[str | None, typer.Option(help="Comma-separated. Default: those of the paper.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Plans per timed case.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the result into this file too, for the report.")] = None,
) -> None:
    """What every planner moves at the changes of the paper, how long that takes, and how long planning takes."""
    from anchortp.bench import machine
    from anchortp.bench import planner as bench
    from anchortp.cli.bench_view import show_plans
    from anchortp.plan import PAPER_MODELS, SHAPES

    names = models.split(",") if models else list(PAPER_MODELS)
    if unknown := sorted(set(names) - set(SHAPES)):
        raise ConfigError(f"{', '.join(unknown)}: no such shape; there are {', '.join(SHAPES)}.")
    document: dict[str, Any] = {"benchmark": "planner", "conditions": machine.conditions(), "plans": []}
    with contextlib.suppress(KeyboardInterrupt):
        for row in bench.run(names, repeats, tell):
            document["plans"].append(row)
    show_plans(document["plans"])
    if output is not None:
        output.write_text(json.dumps(document), encoding="utf-8")
    finish(document)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files and folders that `anchortp bench` has written.")],
    output: Annotated[Path, typer.Option(help="Folder for the pages and plots.")] = Path("."),
    name: Annotated[str | None, typer.Option(help="Of the pages. Default: today's date.")] = None,
) -> None:
    """Make a Markdown and an HTML page with plots out of results."""
    from datetime import date

    from anchortp.bench import report as pages

    markdown, page = pages.write(results, output, name or date.today().isoformat())
    finish({"markdown": str(markdown), "html": str(page)})


def _run_cases(cases: list[Any], output: Path | None, budget_s: float | None) -> dict[str, Any]:
    """Runs them with progress on stderr; the document of all. Curves stay in the files, or here if there are none."""
    from anchortp.bench import machine
    from anchortp.bench import recovery as bench
    from anchortp.cli.bench_view import Progress, show_recovery

    runs = []
    with Progress(len(cases)) as progress, contextlib.suppress(KeyboardInterrupt):
        for document in bench.run(cases, output, budget_s, progress.tell, progress.observe):
            runs.append(document)
            progress.done()
    show_recovery(runs)
    return {
        "benchmark": "recovery",
        "conditions": machine.conditions(),
        "num_cases": len(cases),
        "interrupted": len(runs) < len(cases) or any(run.get("interrupted") for run in runs),
        "runs": runs,
    }
