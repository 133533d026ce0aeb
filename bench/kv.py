"""The KV cache through faults: mirror against replay, its cost while healthy, warm restart, eviction.

`python -m bench.kv [--runs 3]`. The parts:

- `loss`: 16 streams with 1,000 tokens of context each; a device that holds the only copy of a KV head is lost at
  4→3. Time until every stream has spoken again, with the mirror and without, run by run in turn.
- `switch`: a device leaves and comes back while as many streams speak: how long no step runs at each switch.
- `healthy`: decode throughput with the mirror against without: two servers side by side, one of them idle at any
  time, bursts in turn.
- `restart`: `kill -9` of the server while anchors stay (warm), against `kill -9` of everything (cold): time from the
  kill to the first token of a conversation that was held before, bytes loaded, tokens found in the cache.
- `eviction`: a multi-turn trace (ShareGPT, growing prefixes) with a cache of half its working set: tokens found
  by this engine's scheduler, against an ideal LRU cache of blocks on the same trace.

The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress
from rich.table import Table

from anchortp.cli.client import Stream, http_client, last_episode, private_tmp, served
from anchortp.cli.serving import resolve_folder
from anchortp.config import load_model_config
from anchortp.state.client import AnchorClient
from bench.common import conditions, console, finish, spread
from bench.eviction import eviction
from bench.recovery import kill_everything

START_TIMEOUT_S = 300.0
VICTIM = "cpu:0"  # at 4 devices and 3 KV heads, the only holder of KV head 0
PIECES_BEFORE_FAULT = 8
PIECES_AFTER_FAULT = 24
BEHIND_STEPS = ("attaching", "making room", "reserving", "loading", "ready")  # the phases of a change while steps run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--parts", default="loss,switch,healthy,restart,eviction")
    options = parser.parse_args()
    folder = resolve_folder(options.model)
    parts = {"loss": loss, "switch": switch, "healthy": healthy, "restart": restart, "eviction": eviction}
    result: dict[str, Any] = {"benchmark": "kv", "options": vars(options), "conditions": conditions()}
    with Progress(console=console()) as bars:
        for name in options.parts.split(","):
            task = bars.add_task(name, total=None)
            result[name] = parts[name](folder, options)
            bars.update(task, total=1, completed=1)
    show(result)
    finish(result)


def arguments_of(folder: Path, options: argparse.Namespace, mirror: str) -> list[str]:
    length = options.context + 256
    return [
        *(str(folder), "--tp", str(options.tp), "--device-memory", "3G", "--kv-mirror", mirror),
        *("--max-model-len", str(length), "--kv-tokens", str(options.streams * length)),
        *("--max-num-seqs", str(options.streams)),
    ]


def make_streams(folder: Path, options: argparse.Namespace, num_tokens: int, seed: int) -> list[Stream]:
    """Contexts of random tokens, none of which share a prefix."""
    vocab = load_model_config(folder).vocab_size
    rng = random.Random(seed)
    return [
        Stream(
            path="/v1/completions",
            body={
                "model": folder.name,
                "prompt": [rng.randrange(100, vocab) for _ in range(options.context)],
                "max_tokens": num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            },
        )
        for _ in range(options.streams)
    ]


def loss(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"host": [], "off": []}
    for index in range(options.runs):
        for mirror, done in runs.items():
            runtime_dir = private_tmp("bench")
            try:
                with served(
                    runtime_dir, arguments_of(folder, options, mirror), timeout_s=START_TIMEOUT_S, quiet=True
                ) as (url, _):
                    done.append(lose_once(url, runtime_dir, folder, options, index))
            finally:
                shutil.rmtree(runtime_dir, ignore_errors=True)
    summary = {
        mirror: {
            "all_spoke_again_s": spread([run["all_spoke_again_s"] for run in done]),
            "first_spoke_again_s": spread([run["first_spoke_again_s"] for run in done]),
            "worst_gap_s": spread([run["worst_gap_s"] for run in done]),
            "failed": sum(run["failed"] for run in done),
        }
        for mirror, done in runs.items()
    }
    ratio = summary["off"]["all_spoke_again_s"]["median"] / summary["host"]["all_spoke_again_s"]["median"]
    return {"runs": runs, "summary": summary, "off_over_host": ratio}


def lose_once(url: str, runtime_dir: Path, folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    streams = make_streams(folder, options, PIECES_BEFORE_FAULT + PIECES_AFTER_FAULT + 64, seed)

    async def play() -> float:
        async with http_client(url) as client:
            speaking = asyncio.gather(*(s.run(client) for s in streams))
            # Random tokens often decode to nothing printable, so some streams say fewer pieces than tokens.
            while min(len(s.times_s) for s in streams) < PIECES_BEFORE_FAULT:
                await asyncio.sleep(0.002)
            with AnchorClient.connect(runtime_dir, VICTIM, role="tool") as tool:
                fault_s = time.monotonic()
                await asyncio.to_thread(tool.inject, "lost")
            await speaking
        return fault_s

    fault_s = asyncio.run(play())
    episode = last_episode(url)
    again_s = episode["began_s"] + episode["seconds"]
    first = [min((t for t in s.times_s if t >= again_s), default=float("inf")) - fault_s for s in streams]
    return {
        "kv": episode["kv"],
        "all_spoke_again_s": max(first),
        "first_spoke_again_s": min(first),
        "worst_gap_s": max(gap_across(s, fault_s) for s in streams),
        "serving_again_s": episode["seconds"],
        "phases_s": episode["phases"],
        "bytes": episode["bytes"],
        "failed": sum(not s.finished for s in streams),
    }


def gap_across(stream: Stream, fault_s: float) -> float:
    """The longest gap between two pieces of a stream from the fault on (prefills of the start left out)."""
    times = [t for t in stream.times_s if t <= fault_s][-1:] + [t for t in stream.times_s if t > fault_s]
    return max(b - a for a, b in itertools.pairwise(times))


def switch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    runtime_dir = private_tmp("bench")
    try:
        with served(runtime_dir, arguments_of(folder, options, "off"), timeout_s=START_TIMEOUT_S, quiet=True) as (
            url,
            _,
        ):
            wishes = [{"remove": [VICTIM]}, {"add": [VICTIM]}] * options.runs
            runs = [switch_once(url, folder, options, wish, seed) for seed, wish in enumerate(wishes)]
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)
    keys = ("pause_s", "worst_gap_s", "usual_gap_s", "pause_steps")
    return {
        "runs": runs,
        "summary": {
            kind: {key: spread([run[key] for run in runs if run["kind"] == kind]) for key in keys}
            for kind in ("remove", "add")
        },
        "failed": sum(run["failed"] for run in runs),
    }


def switch_once(url: str, folder: Path, options: argparse.Namespace, wish: dict[str, Any], seed: int) -> dict[str, Any]:
    streams = make_streams(folder, options, 200, seed)

    async def play() -> tuple[float, dict[str, Any]]:
        async with http_client(url) as client:
            speaking = asyncio.gather(*(s.run(client) for s in streams))
            while min(len(s.times_s) for s in streams) < PIECES_BEFORE_FAULT:
                await asyncio.sleep(0.002)
            asked_s = time.monotonic()
            change_id = (await client.post("/devices", json=wish)).json()["change_id"]
            episode: dict[str, Any] = {}
            while not episode.get("outcome"):
                await asyncio.sleep(0.05)
                changes = (await client.get("/devices")).json()["changes"]
                episode = next((c for c in changes if c["change_id"] == change_id), {})
            await speaking
        return asked_s, episode

    asked_s, episode = asyncio.run(play())
    assert episode["outcome"] == "serving", episode
    usual_s = statistics.median(b - a for s in streams for a, b in itertools.pairwise(s.times_s))
    phases = episode["phases"]
    pause_s = sum(seconds for name, seconds in phases.items() if name not in BEHIND_STEPS)
    return {
        "kind": next(iter(wish)),
        "pause_s": pause_s,
        "usual_gap_s": usual_s,
        "pause_steps": pause_s / usual_s,
        "worst_gap_s": max(gap_across(s, asked_s) for s in streams),
        "phases_s": phases,
        "bytes": episode["bytes"],
        "failed": sum(not s.finished for s in streams),
    }


def healthy(folder: Path, options: argparse.Namespace, rounds: int = 9, num_tokens: int = 48) -> dict[str, Any]:
    """Both servers are loaded the same way; each burst decodes `streams` sequences at once."""
    folders = {mirror: private_tmp("bench") for mirror in ("host", "off")}
    rates: dict[str, list[float]] = {"host": [], "off": []}
    ratios = []
    short = argparse.Namespace(**{**vars(options), "context": 64, "streams": 8})
    try:
        with (
            served(folders["host"], arguments_of(folder, short, "host"), timeout_s=START_TIMEOUT_S, quiet=True) as (
                with_mirror,
                _,
            ),
            served(folders["off"], arguments_of(folder, short, "off"), timeout_s=START_TIMEOUT_S, quiet=True) as (
                without,
                _,
            ),
        ):
            urls = {"host": with_mirror, "off": without}
            for turn in range(rounds + 1):
                took = {
                    mirror: burst(urls[mirror], folder, short, num_tokens, turn)
                    for mirror in (("host", "off") if turn % 2 else ("off", "host"))
                }
                if turn:  # the first round warms both up
                    for mirror, rate in took.items():
                        rates[mirror].append(rate)
                    ratios.append(took["host"] / took["off"])
            mirrored = httpx.get(f"{with_mirror}/status").json()["kv"]["blocks_mirrored"]
    finally:
        for runtime_dir in folders.values():
            shutil.rmtree(runtime_dir, ignore_errors=True)
    return {
        "tokens_per_s": {mirror: spread(values) for mirror, values in rates.items()},
        "host_over_off": spread(ratios),
        "blocks_mirrored": mirrored,
    }


def burst(url: str, folder: Path, options: argparse.Namespace, num_tokens: int, seed: int) -> float:
    """Decoded tokens per second of one burst, from the moment when all streams speak."""
    streams = make_streams(folder, options, num_tokens, 1000 + seed)

    async def play() -> None:
        async with http_client(url) as client:
            await asyncio.gather(*(s.run(client) for s in streams))

    asyncio.run(play())
    begin_s = max(s.times_s[0] for s in streams)
    end_s = min(s.times_s[-1] for s in streams)
    return len(streams) * num_tokens / (end_s - begin_s)


def restart(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    for index in range(options.runs):
        for kind, done in runs.items():
            runtime_dir = private_tmp("bench")
            try:
                done.append(restart_once(kind, runtime_dir, folder, options, index))
            finally:
                shutil.rmtree(runtime_dir, ignore_errors=True)
    summary = {
        kind: {
            "first_token_s": spread([run["first_token_s"] for run in done]),
            "bytes_loaded": statistics.median(run["bytes_loaded"] for run in done),
            "tokens_cached": statistics.median(run["tokens_cached"] for run in done),
        }
        for kind, done in runs.items()
    }
    return {"runs": runs, "summary": summary}


def restart_once(kind: str, runtime_dir: Path, folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    arguments = arguments_of(folder, options, "host")
    one = argparse.Namespace(**{**vars(options), "streams": 1})

    def speak(url: str) -> Stream:
        (stream,) = make_streams(folder, one, 16, 2000 + seed)

        async def play() -> None:
            async with http_client(url) as client:
                await stream.run(client)

        asyncio.run(play())
        return stream

    with served(runtime_dir, arguments, timeout_s=START_TIMEOUT_S, quiet=True) as (url, process):
        before = speak(url)
        killed_s = time.monotonic()
        if kind == "cold":
            kill_everything(process, runtime_dir, options.tp)
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
    with served(runtime_dir, arguments, timeout_s=START_TIMEOUT_S, quiet=True) as (url, _):
        ready_s = time.monotonic()
        after = speak(url)
        episode = httpx.get(f"{url}/status").json()["episodes"][0]
    assert after.text == before.text, "the answer changed over a restart"
    return {
        "first_token_s": after.times_s[0] - killed_s,
        "ready_s": ready_s - killed_s,
        "prefill_s": after.times_s[0] - ready_s,
        "bytes_loaded": episode["bytes"]["loaded"],
        "tokens_cached": after.num_cached_tokens,
    }


def show(result: dict[str, Any]) -> None:
    out = console()
    if "loss" in result:
        table = Table(title="device lost, the only holder of a KV head")
        for column in ("mirror", "all spoke again", "first", "worst gap", "failed"):
            table.add_column(column, justify="right")
        for mirror, row in result["loss"]["summary"].items():
            keys = ("all_spoke_again_s", "first_spoke_again_s", "worst_gap_s")
            table.add_row(mirror, *(f"{1e3 * row[key]['median']:.0f} ms" for key in keys), str(row["failed"]))
        out.print(table)
        out.print(f"without the mirror it takes {result['loss']['off_over_host']:.1f} times as long")
    if "healthy" in result:
        ratio = result["healthy"]["host_over_off"]["median"]
        out.print(f"decode throughput with the mirror over without: {ratio:.4f}")
    if "restart" in result:
        for kind, row in result["restart"]["summary"].items():
            out.print(
                f"{kind} restart: first token after {row['first_token_s']['median']:.2f} s, "
                f"{row['bytes_loaded']:.0f} bytes loaded, {row['tokens_cached']:.0f} tokens found in the cache"
            )
    if "eviction" in result:
        row = result["eviction"]
        out.print(f"eviction: hit rate {row['hit_rate']:.4f}, ideal LRU {row['ideal_hit_rate']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
