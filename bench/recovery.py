"""A fault while streams speak: time to first success, against restart-and-reload of this same engine.

`python -m bench.recovery [--runs 5]`. Every run starts a server, opens the streams through the OpenAI API, and
strikes when all of them are speaking. Systems, interleaved run by run so that the machine's moods hit all:

- `lost`: `anchortp fault --kind lost`; the victim rotates over the devices.
- `crash`: `anchortp fault --kind crash`.
- `restart`: a supervisor that kills everything at the fault and starts this engine again, cold, on the devices
  that are left, at once; the clients send their requests again as soon as it accepts them. The weights' file is
  in the page cache, as for the others.

The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from anchortp.cli.client import Stream, http_client, last_episode, private_tmp, served, time_to_first_success
from anchortp.cli.demo import PROMPTS
from anchortp.cli.serving import resolve_folder
from anchortp.state.client import AnchorClient
from bench.common import conditions, console, finish, memory_bandwidth, spread

START_TIMEOUT_S = 300.0
PIECES_BEFORE_FAULT = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--systems", default="lost,crash,restart")
    parser.add_argument("--serve-option", action="append", default=[], help="for `anchortp serve`, as =--spares=2")
    options = parser.parse_args()
    folder = resolve_folder(options.model)
    result: dict[str, Any] = {"benchmark": "recovery", "options": vars(options), "conditions": conditions()}
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in options.systems.split(",")}
    with Progress(console=console()) as bars:
        task = bars.add_task("runs", total=options.runs * len(runs))
        for index in range(options.runs):
            for system, done in runs.items():
                bars.update(task, description=f"{system}, run {index + 1} of {options.runs}")
                done.append(run_once(system, folder, options, index))
                bars.advance(task)
    result["runs"] = runs
    result["summary"] = summarise(runs)
    show(result)
    finish(result)


def run_once(system: str, folder: Path, options: argparse.Namespace, index: int) -> dict[str, Any]:
    runtime_dir = private_tmp("bench")
    victim = f"cpu:{(index + 2) % options.tp}"
    arguments = [str(folder), "--device-memory", "2G", *options.serve_option]
    try:
        with served(runtime_dir, [*arguments, "--tp", str(options.tp)], timeout_s=START_TIMEOUT_S, quiet=True) as (
            url,
            process,
        ):
            if system == "restart":
                return restart(url, process, runtime_dir, arguments, victim, folder.name, options)
            return recover(system, url, runtime_dir, victim, folder.name, options)
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


def make_streams(name: str, options: argparse.Namespace) -> list[Stream]:
    return [
        Stream(
            body={
                "model": name,
                "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
                "max_tokens": options.max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            }
        )
        for i in range(options.streams)
    ]


async def until_speaking(streams: list[Stream]) -> None:
    while min(len(s.times_s) for s in streams) < PIECES_BEFORE_FAULT:
        await asyncio.sleep(0.002)


def recover(
    kind: str, url: str, runtime_dir: Path, victim: str, name: str, options: argparse.Namespace
) -> dict[str, Any]:
    streams = make_streams(name, options)

    async def play() -> float:
        async with http_client(url) as client:
            speaking = asyncio.gather(*(s.run(client) for s in streams))
            await until_speaking(streams)
            with AnchorClient.connect(runtime_dir, victim, role="tool") as tool:
                fault_s = time.monotonic()
                await asyncio.to_thread(tool.inject, kind)
            await speaking
        return fault_s

    fault_s = asyncio.run(play())
    episode = last_episode(url)
    return {
        "victim": victim,
        "tfs_s": time_to_first_success(streams, fault_s, episode),
        "detected_s": episode["began_s"] - fault_s,
        "serving_again_s": episode["seconds"],
        "phases_s": episode["phases"],
        "worst_gap_s": max(s.longest_gap_s() for s in streams),
        "step_s": step_seconds(streams, fault_s),
        "failed": sum(not s.finished for s in streams),
        "bytes": episode["bytes"],
        "kv": episode["kv"],
    }


def step_seconds(streams: list[Stream], fault_s: float) -> float:
    """The median time between two pieces of one stream before the fault."""
    gaps = []
    for stream in streams:
        times = [t for t in stream.times_s if t < fault_s]
        gaps += [b - a for a, b in itertools.pairwise(times)]
    return statistics.median(gaps)


def restart(
    url: str,
    process: subprocess.Popen[bytes],
    runtime_dir: Path,
    arguments: list[str],
    victim: str,
    name: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Kill everything, start again cold on the devices that are left, send the requests again."""
    streams = make_streams(name, options)

    async def speak_until_fault() -> float:
        async with http_client(url) as client:
            speaking = asyncio.gather(*(s.run(client) for s in streams))
            await until_speaking(streams)
            fault_s = time.monotonic()
            kill_everything(process, runtime_dir, options.tp)
            await speaking
        return fault_s

    fault_s = asyncio.run(speak_until_fault())
    step_s = step_seconds(streams, fault_s)
    left = [f"cpu:{i}" for i in range(options.tp) if f"cpu:{i}" != victim]
    again = make_streams(name, options)
    command = [*arguments, "--devices", ",".join(left)]

    async def speak_again(new_url: str) -> None:
        async with http_client(new_url) as client:
            await asyncio.gather(*(s.run(client) for s in again))

    with served(runtime_dir, command, timeout_s=START_TIMEOUT_S, quiet=True) as (new_url, _):
        ready_s = time.monotonic()
        asyncio.run(speak_again(new_url))
    return {
        "victim": victim,
        "tfs_s": min(s.times_s[0] for s in again) - fault_s,
        "ready_s": ready_s - fault_s,
        "step_s": step_s,
        "failed": sum(not s.finished for s in streams),
        "failed_again": sum(not s.finished for s in again),
    }


def kill_everything(process: subprocess.Popen[bytes], runtime_dir: Path, tp: int) -> None:
    """SIGKILL for the server (its workers die with it) and every anchor: nothing is kept."""
    pids = [process.pid]
    for index in range(tp):
        with AnchorClient.connect(runtime_dir, f"cpu:{index}", role="tool") as tool:
            pids.append(tool.welcome.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    bandwidth = memory_bandwidth()
    summary: dict[str, Any] = {"memory_bandwidth_bytes_per_s": bandwidth}
    for system, done in runs.items():
        summary[system] = {"tfs_s": spread([run["tfs_s"] for run in done])}
        summary[system]["failed"] = sum(run["failed"] for run in done)
        if system == "restart":
            continue
        floors = [run["bytes"]["lost"] / bandwidth + run["step_s"] for run in done]
        phases = {name for run in done for name in run["phases_s"]}
        summary[system] |= {
            "floor_s": spread(floors),
            "worst_gap_s": spread([run["worst_gap_s"] for run in done]),
            "detected_s": spread([run["detected_s"] for run in done]),
            "phases_s": {p: statistics.median(run["phases_s"].get(p, 0.0) for run in done) for p in sorted(phases)},
            "serving_again_s": spread([run["serving_again_s"] for run in done]),
            "bytes_loaded": sum(run["bytes"]["loaded"] for run in done),
            "bytes_lost_and_replicas": sum(run["bytes"]["lost"] + run["bytes"]["replica"] for run in done),
            "bytes_copied": sum(run["bytes"]["copied"] for run in done),
        }
    if "restart" in runs and "lost" in runs:
        ratio = summary["restart"]["tfs_s"]["median"] / summary["lost"]["tfs_s"]["median"]
        summary["restart_over_lost"] = ratio
    return summary


def show(result: dict[str, Any]) -> None:
    summary = result["summary"]
    table = Table(title=f"fault to first token at a client, {result['options']['streams']} streams")
    for column in ("system", "median", "min", "max", "floor", "worst gap", "requests failed"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in result["runs"]:
        row = summary[system]
        cells = [f"{1e3 * row['tfs_s'][key]:.0f} ms" for key in ("median", "min", "max")]
        cells.append(f"{1e3 * row['floor_s']['median']:.0f} ms" if "floor_s" in row else "-")
        cells.append(f"{1e3 * row['worst_gap_s']['median']:.0f} ms" if "worst_gap_s" in row else "-")
        table.add_row(system, *cells, str(row["failed"]))
    out = console()
    out.print(table)
    for system in ("lost", "crash"):
        if system in summary:
            phases = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in summary[system]["phases_s"].items())
            out.print(
                f"{system}: median ms per phase: {phases}; per victim, TFS in ms: "
                + ", ".join(
                    f"{run['victim']} {1e3 * run['tfs_s']:.0f} (KV {run['kv']})" for run in result["runs"][system]
                )
            )
    if "restart_over_lost" in summary:
        out.print(f"restart-and-reload takes {summary['restart_over_lost']:.1f} times as long")


if __name__ == "__main__":
    sys.exit(main())
