"""Experts rebalanced after a loss: throughput and imbalance with EPLB against without, and what a loss costs.

`python -m bench.moe [--runs 3]`. Each run serves SmolLM2 as a mixture of experts with uneven load on four devices, lets
it speak (with EPLB: until no more experts move), loses a device, lets it speak until experts rest again, and then
measures. With EPLB some experts of the lost device have replicas elsewhere: these are not loaded. The modelled step is
the work of the slowest device of each layer, in choices of experts, over the mean; on cores that devices share the
clock cannot tell (`bench.moe_step` can). So few tokens a step are seldom worth a replica; `--replica-cost 0` makes the
balancer believe that they are, so that there are replicas for a loss to find. The last line on stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress
from rich.table import Table

from anchortp.cli.client import CLIENT_TIMEOUT_S, Stream, http_client, private_tmp, served
from anchortp.cli.demo import PROMPTS
from anchortp.cli.serving import resolve_folder
from anchortp.state.client import AnchorClient
from bench.common import conditions, console, finish, spread

START_TIMEOUT_S = 300.0
REST_S = 6.0  # so long nothing was rebalanced: the balancer looks every 2 s here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of all streams, timed")
    parser.add_argument(
        "--replica-cost", type=float, help="as serve's --eplb-replica-cost; 0: replicas wherever they even"
    )
    options = parser.parse_args()
    folder = resolve_folder(options.model)
    result: dict[str, Any] = {"benchmark": "moe", "options": vars(options), "conditions": conditions()}
    runs: dict[str, list[dict[str, Any]]] = {"eplb": [], "no-eplb": []}
    with Progress(console=console()) as bars:
        task = bars.add_task("runs", total=options.runs * len(runs))
        for index in range(options.runs):
            for system, done in runs.items():
                bars.update(task, description=f"{system}, run {index + 1} of {options.runs}")
                done.append(run_once(system, folder, options))
                bars.advance(task)
    result["runs"] = runs
    result["summary"] = summarise(runs)
    show(result["summary"])
    finish(result)


def run_once(system: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    runtime_dir = private_tmp("bench")
    arguments = [str(folder), "--device-memory", "2G", "--tp", str(options.tp), f"--{system}", "--eplb-interval", "2"]
    if options.replica_cost is not None:
        arguments += ["--eplb-replica-cost", str(options.replica_cost)]
    try:
        with served(runtime_dir, arguments, timeout_s=START_TIMEOUT_S, quiet=True) as (url, _):
            rest(url, folder.name, options)
            with AnchorClient.connect(runtime_dir, f"cpu:{options.tp - 2}", role="tool") as tool:
                tool.inject("lost")
            rest(url, folder.name, options)
            tokens_per_s = asyncio.run(speak(url, folder.name, options, options.rounds))
            status = httpx.get(f"{url}/status", timeout=CLIENT_TIMEOUT_S).json()
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)
    (fault,) = status["faults"]
    moved = fault["bytes"]
    assert moved["loaded"] + moved["copied"] == moved["lost"] + moved["replica"], moved
    return {
        "tokens_per_s": tokens_per_s,
        "imbalance": status["experts"].get("imbalance"),
        "first_imbalance": status["experts"].get("first_imbalance"),
        "replicas": status["experts"].get("replicas"),
        "changes": sum(change["outcome"] == "serving" for change in status["changes"]),
        "bytes": moved,
    }


def rest(url: str, name: str, options: argparse.Namespace) -> None:
    """Speaks until experts have not moved for a while."""
    last, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < REST_S:
        asyncio.run(speak(url, name, options, 1))
        experts = httpx.get(f"{url}/status", timeout=CLIENT_TIMEOUT_S).json()["experts"]
        if experts.get("rebalanced", 0) != last:
            last, since_s = experts.get("rebalanced", 0), time.monotonic()


async def speak(url: str, name: str, options: argparse.Namespace, rounds: int) -> float:
    """Tokens per second of `rounds` rounds of all streams."""
    streams = [
        Stream(
            body={
                "model": name,
                "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
                "max_tokens": options.tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            }
        )
        for i in range(options.streams * rounds)
    ]
    began_s = time.monotonic()
    async with http_client(url) as client:
        for i in range(rounds):
            part = streams[i * options.streams : (i + 1) * options.streams]
            await asyncio.gather(*(stream.run(client) for stream in part))
    assert all(stream.finished for stream in streams), [stream.error for stream in streams]
    return sum(stream.num_tokens for stream in streams) / (time.monotonic() - began_s)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for system, done in runs.items():
        summary[system] = {"tokens_per_s": spread([run["tokens_per_s"] for run in done])}
        summary[system]["lost_bytes"] = statistics.median(run["bytes"]["lost"] for run in done)
        summary[system]["loaded_bytes"] = statistics.median(run["bytes"]["loaded"] for run in done)
    balanced = runs["eplb"]
    after = statistics.median(run["imbalance"] for run in balanced)
    before = statistics.median(run["first_imbalance"] for run in balanced)
    with_eplb, without = (summary[s]["tokens_per_s"]["median"] for s in ("eplb", "no-eplb"))
    summary |= {
        "imbalance_before": before,
        "imbalance_after": after,
        "modelled_gain": before / after - 1,
        "measured_gain": with_eplb / without - 1,
    }
    return summary


def show(summary: dict[str, Any]) -> None:
    table = Table(title="after a loss, experts with uneven load")
    for column in ("system", "tokens/s", "min", "max", "lost", "loaded"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in ("eplb", "no-eplb"):
        row = summary[system]
        rates = (f"{row['tokens_per_s'][key]:.1f}" for key in ("median", "min", "max"))
        table.add_row(system, *rates, *(f"{row[key] / 1e6:.1f} MB" for key in ("lost_bytes", "loaded_bytes")))
    console().print(table)
    console().print(
        f"imbalance {summary['imbalance_before']:.2f} -> {summary['imbalance_after']:.2f}: modelled expert time "
        f"{summary['modelled_gain']:+.1%}, throughput {summary['measured_gain']:+.1%}"
    )


if __name__ == "__main__":
    main()
