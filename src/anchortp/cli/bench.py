"""`anchortp bench`: what is asked for, from the command line; the last line on stdout is one JSON document."""

from __future__ import annotations

import asyncio
import json
import sys
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
        help="Comma-separated: anchortp, anchortp-restart, anchortp-published, vllm-tp1-eager, vllm-tp1-compiled, "
        "or a JSON file that says how to start another one."
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
    """Build an environment with vLLM for CPUs, as a baseline (about 2 GB)."""
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
    served_name: Annotated[str | None, typer.Option(help="The model's name at --url. Default: the folder's.")] = None,
    vllm_dir: VllmDir = None,
    serve_option: ServeOption = None,
) -> None:
    """Throughput and latency while nothing fails, of one or more systems."""
    from anchortp.bench import machine, vllm_env
    from anchortp.bench import serving as bench
    from anchortp.bench import systems as adapters
    from anchortp.bench.client import Target
    from anchortp.bench.prompts import vocabulary_size
    from anchortp.cli.serving import resolve_folder

    folder = resolve_folder(model)
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
        "model": folder.name,
        "tp": tp,
        "conditions": machine.conditions(),
        "systems": {},
    }
    if url is not None:
        place = urlsplit(url)
        if not place.hostname or not place.port:
            raise ConfigError(f"--url {url}: give an address with its port, as http://127.0.0.1:8000.")
        target = Target(host=place.hostname, port=place.port, model=served_name or folder.name)
        document["systems"][url] = asyncio.run(bench.measure(target, vocabulary_size(folder), options, tell))
    else:
        chosen = adapters.resolve(systems.split(","), vllm_dir or vllm_env.default_folder(), tuple(serve_option or ()))
        devices = tuple(f"cpu:{i}" for i in range(tp))
        try:
            for name, measured in bench.run(chosen, folder, devices, options, tell):
                document["systems"][name] = measured
        except KeyboardInterrupt:
            document["interrupted"] = True
            tell("interrupted; this is what was measured so far")
    _show_serving(document)
    finish(document)


def _show_serving(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

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
    Console(file=sys.stderr).print(table)
