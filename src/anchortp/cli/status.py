"""`anchortp status`: what the anchors hold and what the engine does."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from anchortp.cli.progress import loading_lines
from anchortp.cli.serving import serving_url
from anchortp.config import default_runtime_dir
from anchortp.devices import parse_file_name
from anchortp.errors import AnchorTPError, ConfigError
from anchortp.state.client import AnchorClient

TIMEOUT_S = 5.0
MAX_EXPERTS = 16  # shown, the hottest


def show(runtime_dir: Path | None, *, json_output: bool, api_key: str | None) -> None:
    """Prints both. Raises ConfigError if there is neither an anchor nor a server."""
    folder = runtime_dir or default_runtime_dir()
    anchors = {device: _anchor(folder, device) for device in devices_in(folder)}
    engine = _engine(folder, api_key)
    if not anchors and engine is None:
        raise ConfigError(f"nothing runs under {folder}: no anchor, no server. Start `anchortp serve MODEL`.")
    if json_output:
        print(json.dumps({"anchors": anchors, "engine": engine}))
        return
    console = Console()
    console.print(_anchor_table(anchors))
    if engine is None:
        console.print("no server")
        return
    console.print(
        f"engine: [bold]{engine['state']}[/bold], epoch {engine['epoch']}, {engine['num_running']} running, "
        f"{engine['num_waiting']} waiting, {engine['num_spares']} spare(s)"
        + (f"\n{engine['reason']}" if engine["reason"] else "")
    )
    for line in loading_lines(engine):
        console.print(line)
    if engine.get("expert_load"):
        console.print(_expert_table(engine))
        console.print(expert_line(engine))
    episodes = [episode for episode in engine["episodes"] if episode["cause"] != "start"]
    if episodes:
        console.print(_episode_table(episodes))


def devices_in(folder: Path) -> list[str]:
    """The devices whose anchors have a socket in the folder."""
    devices = []
    for path in folder.glob("anchor-*.sock"):
        with contextlib.suppress(ConfigError):  # somebody else's file
            devices.append(parse_file_name(path.stem.removeprefix("anchor-")))
    return [device.name for device in sorted(devices, key=lambda device: device.order)]


def _anchor(folder: Path, device: str) -> dict[str, Any]:
    try:
        with AnchorClient.connect(folder, device, role="tool", timeout_s=TIMEOUT_S) as client:
            found = client.status()
    except AnchorTPError as error:
        return {"error": str(error)}
    return {
        "pid": found.pid,
        "epoch": found.epoch,
        "budget_bytes": found.budget_bytes,
        "committed_bytes": found.committed_bytes,
        "used_bytes": sum(arena.committed_bytes for arena in found.arenas),
        "arenas": {arena.name: arena.accounted_bytes for arena in found.arenas},
        "worker_pid": found.lease.pid if found.lease else None,
        "uptime_s": found.uptime_s,
    }


def _engine(folder: Path, api_key: str | None) -> dict[str, Any] | None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with serving_url(folder) as url:
            answer = httpx.get(f"{url}/status", timeout=TIMEOUT_S, headers=headers)
    except (ConfigError, httpx.HTTPError):
        return None
    if answer.status_code == 401:
        raise ConfigError("the server asks for a key; give it with --api-key.")
    return answer.json()


def _anchor_table(anchors: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="anchors")
    for column in ("device", "pid", "worker", "epoch", "weights", "KV", "in use", "budget"):
        table.add_column(column, justify="left" if column == "device" else "right")
    for device, found in anchors.items():
        if "error" in found:
            table.add_row(device, f"[red]{found['error']}[/red]")
            continue
        arenas = found["arenas"]
        sizes = [arenas.get("weights", 0), arenas.get("kv", 0), found["used_bytes"], found["budget_bytes"]]
        table.add_row(
            device,
            str(found["pid"]),
            str(found["worker_pid"] or "-"),
            str(found["epoch"]),
            *(f"{size / 1e6:.1f} MB" for size in sizes),
        )
    return table


def _expert_table(engine: dict[str, Any]) -> Table:
    """What each device computes and holds."""
    table = Table(title="experts")
    for column in ("device", "choices per step", "part", "expert units held"):
        table.add_column(column, justify="left" if column == "device" else "right")
    total = sum(engine["expert_load"].values()) or 1.0
    for name, device in engine["devices"].items():
        load = device.get("expert_load", 0.0)
        table.add_row(name, f"{load:.1f}", f"{load / total:.1%}", str(device["expert_units"]))
    return table


def expert_line(engine: dict[str, Any]) -> str:
    """Load per expert and how even the devices are, in words."""
    experts, loads = engine["experts"], engine["expert_load"]
    total = sum(loads.values()) or 1.0
    hottest = sorted(loads.items(), key=lambda item: -item[1])[:MAX_EXPERTS]
    first = experts["first_imbalance"]
    return (
        f"imbalance (slowest device over mean): {f'{first:.3f} at first, ' if first else ''}{experts['imbalance']:.3f} "
        f"now; {experts['replicas']} replica(s), {experts['rebalanced']} change(s)\n"
        f"experts by load, all layers: {', '.join(f'{name}: {load / total:.1%}' for name, load in hottest)}"
        f"{' ...' if len(loads) > MAX_EXPERTS else ''}"
    )


def _episode_table(episodes: list[dict[str, Any]]) -> Table:
    table = Table(title="recoveries and changes")
    for column in ("epoch", "cause", "lost", "loaded", "copied", "KV", "recovered", "first token"):
        table.add_column(column, justify="left" if column == "cause" else "right")
    for episode in episodes:
        moved = episode["bytes"]
        table.add_row(
            str(episode["epoch"]),
            episode["cause"],
            *(f"{moved[kind] / 1e6:.2f} MB" for kind in ("lost", "loaded", "copied")),
            episode["kv"],
            _milliseconds(episode["seconds"]),
            _milliseconds(episode["first_token_s"]),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f} ms"
