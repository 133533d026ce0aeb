"""`anchortp demo`: serve, speak, lose a device, go on speaking; then the figures, and a verdict."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from anchortp.cli.client import Stream, http_client, private_tmp, served, time_to_first_success
from anchortp.cli.progress import link_lines, loading_view
from anchortp.cli.serving import default_model_name, resolve_folder
from anchortp.errors import AnchorTPError, ConfigError
from anchortp.state.client import AnchorClient

START_TIMEOUT_S = 300.0
TOKENS_BEFORE_FAULT = 24  # pieces that every stream has said when the device dies
POLL_S = 0.1
PROMPTS = (
    "Tell me a long story about a lighthouse keeper and a storm.",
    "Explain step by step how bread is made, from grain to loaf.",
    "Describe a walk through an old city in the rain.",
    "Write a letter from a gardener to a friend about spring.",
    "Explain how the moon causes the tides, for a curious child.",
    "Tell me about the life of a honey bee, from egg to forager.",
    "Write a short story about a train that is late.",
    "Describe how a violin is built and why it sounds as it does.",
)


@dataclass(slots=True, kw_only=True)
class Show:
    """What the live view draws from: filled by the clients and by polling the server's status."""

    lose: str
    streams: list[Stream]
    status: dict[str, Any] = field(default_factory=dict)
    fault_s: float | None = None

    def episode(self) -> dict[str, Any] | None:
        faults = self.status.get("faults", ())
        return faults[-1] if faults else None


def run(*, model: str, tp: int, lose: str, num_streams: int, max_tokens: int, device_memory_bytes: int | None) -> int:
    """Runs the whole story in a private folder. Returns 0 if every promise was kept, else 1."""
    console = Console()
    if lose not in {f"cpu:{i}" for i in range(tp)}:
        raise ConfigError(f"--lose {lose}: the demo's devices are cpu:0 to cpu:{tp - 1}.")
    if max_tokens <= 2 * TOKENS_BEFORE_FAULT:
        raise ConfigError(
            f"--max-tokens {max_tokens}: streams must be speaking at the fault; take more than "
            f"{2 * TOKENS_BEFORE_FAULT}."
        )
    folder = resolve_folder(model)
    runtime_dir = private_tmp("demo")
    name = default_model_name(model, folder)
    arguments = [str(folder), "--tp", str(tp), "--max-num-seqs", str(max(16, num_streams)), "--served-model-name", name]
    if device_memory_bytes is not None:
        arguments += ["--device-memory", str(device_memory_bytes)]
    console.print(f"starting {tp} devices (an anchor and a worker each) and loading {name}")
    try:
        with served(runtime_dir, arguments, timeout_s=START_TIMEOUT_S) as (url, _):
            show = asyncio.run(_speak(console, url, name, runtime_dir, lose, num_streams, max_tokens))
        return _verdict(console, show)
    except AnchorTPError:
        log = runtime_dir / "serve.log"
        print(log.read_text(encoding="utf-8") if log.exists() else "", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(runtime_dir, ignore_errors=True)


async def _speak(
    console: Console, url: str, name: str, runtime_dir: Path, lose: str, num_streams: int, max_tokens: int
) -> Show:
    streams = [
        Stream(
            body={
                "model": name,
                "messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
                "max_tokens": max_tokens,
                "temperature": 0.7,
                "seed": i,
                "ignore_eos": True,
            }
        )
        for i in range(num_streams)
    ]
    show = Show(lose=lose, streams=streams)
    async with http_client(url) as client:
        speaking = asyncio.gather(*(stream.run(client) for stream in streams))
        watching = asyncio.create_task(_watch(console, client, show))
        injecting = asyncio.create_task(_inject(show, runtime_dir))
        await speaking
        injecting.cancel()
        show.status = (await client.get("/status")).json()
        watching.cancel()
        await asyncio.gather(watching, injecting, return_exceptions=True)
    return show


async def _inject(show: Show, runtime_dir: Path) -> None:
    """The device is lost once every stream is speaking."""
    while min(len(stream.times_s) for stream in show.streams) < TOKENS_BEFORE_FAULT:
        await asyncio.sleep(0.005)
    show.fault_s = time.monotonic()

    def strike() -> None:
        with AnchorClient.connect(runtime_dir, show.lose, role="tool") as client:
            client.inject("lost")

    await asyncio.to_thread(strike)


async def _watch(console: Console, client: httpx.AsyncClient, show: Show) -> None:
    """Redraws the live view; without a terminal, prints the recovery's lines as they come."""
    told = 0
    with Live(console=console, refresh_per_second=8, transient=True, auto_refresh=False) as live:
        while True:
            try:
                show.status = (await client.get("/status")).json()
            except httpx.HTTPError as error:
                console.print(f"[red]the server does not answer: {error}[/red]")
            if console.is_terminal:
                live.update(_view(show), refresh=True)
            else:
                told = _tell(console, show, told)
            await asyncio.sleep(POLL_S)


def _tell(console: Console, show: Show, told: int) -> int:
    episode = show.episode()
    lines = episode["timeline"] if episode else []
    for line in lines[told:]:
        console.print(f"  +{1e3 * line['at_s']:6.1f} ms  {line['text']}")
    return len(lines)


def _view(show: Show) -> Group:
    return Group(_device_panels(show), _stream_table(show), loading_view(show.status), _timeline(show))


def _device_panels(show: Show) -> Columns:
    alive = show.status.get("devices", {})
    panels = []
    names = dict.fromkeys([*alive, *([show.lose] if show.fault_s else [])])
    for name in sorted(names):
        if name not in alive:
            panels.append(Panel(Text("lost", style="bold red"), title=name, border_style="red", width=26))
            continue
        device = alive[name]
        heads = f"{device['attention_units']} q heads, {device['kv_units']} KV heads"
        body = f"{device['weight_bytes'] / 1e6:.1f} MB of weights\n{heads}"
        if device.get("expert_units"):
            body += f"\n{device['expert_units']} experts, all layers"
        panels.append(Panel(body, title=name, border_style="green", width=26))
    return Columns(panels)


def _stream_table(show: Show) -> Table:
    state = show.status.get("state", "")
    table = Table(title=f"{len(show.streams)} streams, engine {state}", expand=True)
    table.add_column("#", justify="right", width=2)
    table.add_column("pieces", justify="right", width=6)
    table.add_column("says", no_wrap=True, ratio=1)
    for index, stream in enumerate(show.streams):
        tail = stream.error or stream.text.replace("\n", " ")[-100:]
        style = "red" if stream.error else ("green" if stream.finish_reason else "")
        table.add_row(str(index), str(len(stream.times_s)), Text(tail, style=style))
    return table


def _timeline(show: Show) -> Panel:
    episode = show.episode()
    if episode is None:
        waiting = f"{show.lose} will be lost when every stream has said {TOKENS_BEFORE_FAULT} pieces"
        return Panel(waiting, title="recovery")
    lines = [f"+{1e3 * line['at_s']:7.1f} ms  {line['text']}" for line in episode["timeline"]]
    return Panel("\n".join(lines), title=f"recovery: {episode['cause']}", border_style="yellow")


def _verdict(console: Console, show: Show) -> int:
    """The table of figures, and what was promised against what was seen."""
    episode = show.episode()
    if show.fault_s is None or episode is None or episode["seconds"] is None:
        console.print("[red]the fault did not strike while the streams were speaking[/red]")
        return 1
    if console.is_terminal:
        console.print(_timeline(show))
    moved = episode["bytes"]
    failed = [stream for stream in show.streams if not stream.finished]
    tfs = time_to_first_success(show.streams, show.fault_s, episode)
    gap = max(stream.longest_gap_s() for stream in show.streams)
    phases = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in episode["phases"].items())
    table = Table(title=f"{show.lose} was lost while {len(show.streams)} streams were speaking")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = {
        "TFS: fault to first token at a client": f"{1e3 * tfs:.0f} ms",
        "longest gap between two tokens of a stream": f"{1e3 * gap:.0f} ms",
        "engine: fault seen to serving again": f"{1e3 * episode['seconds']:.0f} ms",
        "its phases, in ms": phases,
        "bytes lost": f"{moved['lost']:,}",
        "bytes loaded": f"{moved['loaded']:,}",
        "  of them further KV head copies": f"{moved['replica']:,}",
        "bytes copied between devices": f"{moved['copied']:,}",
        "weights by link, while it was busy": "\n".join(link_lines(episode["links"])) or "none moved",
        "KV cache": episode["kv"],
        "requests failed": str(len(failed)),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    broken = _broken_promises(moved, failed)
    for text in broken:
        console.print(f"[red]not kept: {text}[/red]")
    if not broken:
        console.print("[green]every stream finished; exactly what was lost was loaded; survivors moved no byte[/green]")
    return 1 if broken else 0


def _broken_promises(moved: dict[str, int], failed: list[Stream]) -> list[str]:
    broken = [f"a stream failed: {stream.error or 'it did not finish'}" for stream in failed]
    # Where the new cut splits the q heads of a KV head among more devices, each needs that KV head: those
    # copies are loaded beside what was lost, and are counted apart.
    if moved["loaded"] != moved["lost"] + moved["replica"]:
        broken.append(f"{moved['loaded']} bytes loaded, {moved['lost']} lost and {moved['replica']} of new copies")
    if moved["copied"]:
        broken.append(f"{moved['copied']} bytes were copied between devices")
    return broken
