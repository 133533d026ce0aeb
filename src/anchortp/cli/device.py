"""`anchortp device`: change the group of a running engine, and see what it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from anchortp.cli.progress import is_loading, link_lines, loading_view
from anchortp.errors import AnchorTPError, ConfigError

app = typer.Typer(help="Add devices to a running engine, take them away, weigh them.", no_args_is_help=True)

TIMEOUT_S = 10.0
POLL_S = 0.1

RuntimeDir = Annotated[
    Path | None, typer.Option(help="Runtime folder of the engine. Default: ANCHORTP_RUNTIME_DIR, else one per user.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="ANCHORTP_API_KEY")]
Wait = Annotated[bool, typer.Option(help="Wait until the change is made, or turned down.")]


class ChangeRefused(AnchorTPError):
    """The engine goes on as it was; the message says why."""


@app.command()
def add(
    devices: Annotated[list[str], typer.Argument(help="Devices that are not in the group, as cpu:4.")],
    device_memory: Annotated[
        str | None, typer.Option(help="Memory budget of each, as 4G. Default: as the others.")
    ] = None,
    wait: Wait = True,
    runtime_dir: RuntimeDir = None,
    api_key: ApiKey = None,
) -> None:
    """Let DEVICES join. They are filled from their peers and the host while the engine serves."""
    from anchortp.cli.serving import parse_bytes

    _change({"add": devices, "memory_bytes": parse_bytes(device_memory)}, wait, runtime_dir, api_key)


@app.command()
def remove(
    devices: Annotated[list[str], typer.Argument(help="Members of the group, as cpu:1.")],
    wait: Wait = True,
    runtime_dir: RuntimeDir = None,
    api_key: ApiKey = None,
) -> None:
    """Let DEVICES leave. What only they hold moves to the others first; no request notices."""
    _change({"remove": devices}, wait, runtime_dir, api_key)


@app.command()
def speed(
    speeds: Annotated[list[str], typer.Argument(help="Relative speeds, as cpu:0=2.0; others count 1.0.")],
    wait: Wait = True,
    runtime_dir: RuntimeDir = None,
    api_key: ApiKey = None,
) -> None:
    """Give devices shares of the work by their speed."""
    from anchortp.cli.serving import parse_speeds

    _change({"speeds": dict(parse_speeds(speeds))}, wait, runtime_dir, api_key)


@app.command("list")
def show(runtime_dir: RuntimeDir = None, api_key: ApiKey = None) -> None:
    """Show the devices of the group and what they hold."""
    with _client(runtime_dir, api_key) as client:
        Console().print(_table(_answer(client.get("/devices"))["data"]))


def _change(body: dict[str, Any], wait: bool, runtime_dir: Path | None, api_key: str | None) -> None:
    console = Console()
    with _client(runtime_dir, api_key) as client:
        change_id = _answer(client.post("/devices", json=body))["change_id"]
        if not wait:
            console.print(f"change {change_id} has begun")
            return
        episode = _follow(client, change_id, console)
        if not episode["outcome"].startswith(("serving", "done")):
            raise ChangeRefused(episode["outcome"])
        moved, phases = episode["bytes"], episode["phases"]
        behind = sum(seconds for name, seconds in phases.items() if name in _BEHIND)
        sources = f"{moved['copied'] / 1e6:.1f} MB from peers and {moved['loaded'] / 1e6:.1f} MB from the host"
        switch_ms = 1e3 * (episode["seconds"] - behind)
        console.print(
            f"{episode['cause']}: {sources} in {behind:.2f} s behind the steps, then {switch_ms:.0f} ms to switch"
        )
        for line in link_lines(episode["links"]):
            console.print(f"  {line}")
        console.print(_table(_answer(client.get("/devices"))["data"]))


_BEHIND = ("attaching", "reserving", "loading", "ready")


def _follow(client: httpx.Client, change_id: int, console: Console) -> dict[str, Any]:
    """Until the change has come to an end, with a bar, or without a terminal the lines of its story as they come. The
    server ends what takes too long, so this ends too."""
    num_told = 0
    waiting = Spinner("dots", "the engine serves on")
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            status = _answer(client.get("/status"))
            tries = [e for e in status["changes"] if e["change_id"] == change_id]
            if console.is_terminal:
                live.update(loading_view(status) if is_loading(status) else waiting, refresh=True)
            else:
                lines = [line for attempt in tries for line in attempt["timeline"]]
                for line in lines[num_told:]:
                    console.print(f"+{line['at_s']:.2f} s  {line['text']}", soft_wrap=True)
                num_told = len(lines)
            outcome = tries[-1]["outcome"] if tries else ""
            if outcome and not outcome.startswith(("interrupted", "first ")):
                return tries[-1]
            time.sleep(POLL_S)


def _client(runtime_dir: Path | None, api_key: str | None) -> httpx.Client:
    from anchortp.cli.serving import serving_url
    from anchortp.config import default_runtime_dir

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with serving_url(runtime_dir or default_runtime_dir()) as url:
        return httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=headers)


def _answer(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code == 401:
        raise ConfigError("the server asks for a key; give it with --api-key.")
    found = answer.json()
    if answer.status_code >= 400:
        raise ConfigError(found["error"]["message"])
    return found


def _table(devices: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="devices")
    units = sorted({key for found in devices.values() for key in found if key.endswith("_units")})
    columns = ["device", "speed", "weights", "budget", *(key.removesuffix("_units") for key in units)]
    for column in columns:
        table.add_column(column, justify="left" if column == "device" else "right")
    for name, found in devices.items():
        sizes = (f"{found[key] / 1e6:.1f} MB" for key in ("weight_bytes", "budget_bytes"))
        table.add_row(name, f"{found['speed']:g}", *sizes, *(str(found[key]) for key in units))
    return table
