"""When a fault strikes during a load, and how: scripts, and the hand that strikes."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from anchortp.bench.load import Load
from anchortp.bench.supervisor import Supervisor
from anchortp.errors import AnchorTPError, ConfigError, EngineStopped
from anchortp.state.client import AnchorClient

FaultKind = Literal["lost", "crash", "hang"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kind` happens to `devices` all at once, `after_s` after the share `at` of the requests has been sent."""

    at: float
    devices: tuple[str, ...]
    kind: FaultKind = "lost"
    after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that has happened at `fault_s` (CLOCK_MONOTONIC)."""

    fault: Fault
    fault_s: float


def standard(shares: tuple[float, ...], kind: FaultKind, devices: tuple[str, ...], lose: int) -> tuple[Fault, ...]:
    """`lose` devices at each share, further ones each time, from the middle of the group on. Raises ConfigError."""
    if len(shares) * lose >= len(devices):
        raise ConfigError(f"{len(shares)} fault(s) of {lose} device(s) leave none of {len(devices)}; lose fewer.")
    order = devices[len(devices) // 2 :] + devices[: len(devices) // 2]
    return tuple(
        Fault(at=share, kind=kind, devices=order[i * lose : (i + 1) * lose]) for i, share in enumerate(sorted(shares))
    )


def read_script(path: Path, devices: tuple[str, ...]) -> tuple[Fault, ...]:
    """A JSON list such as `[{"at": 0.25, "devices": ["cpu:2"], "kind": "lost", "after_s": 1.5}]`.

    Raises ConfigError."""
    try:
        faults = msgspec.json.decode(path.read_bytes(), type=tuple[Fault, ...])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--fault-script {path}: {error}") from None
    for fault in faults:
        if unknown := sorted(set(fault.devices) - set(devices)):
            raise ConfigError(f"--fault-script {path}: {unknown} are none of the devices {', '.join(devices)}.")
        if not 0 <= fault.at <= 1 or not fault.devices:
            raise ConfigError(f"--fault-script {path}: `at` is a share from 0 to 1, and `devices` names some.")
    return tuple(sorted(faults, key=lambda fault: fault.at))


async def strike_all(faults: tuple[Fault, ...], load: Load, supervisor: Supervisor, struck: list[Struck]) -> None:
    """Each fault at its time; what has happened is added to `struck`. Raises EngineStopped if one cannot be."""
    for fault in faults:
        await load.wait_sent(max(1, math.ceil(fault.at * load.num_requests)))
        await asyncio.sleep(fault.after_s)
        fault_s = await asyncio.to_thread(_strike, fault, supervisor)
        struck.append(Struck(fault=fault, fault_s=fault_s))


def _strike(fault: Fault, supervisor: Supervisor) -> float:
    """The moment of the fault. Connections are made before it, so that it is exact."""
    if supervisor.system.faults != "anchor":
        return supervisor.strike(fault.devices, gone=fault.kind == "lost")
    clients = []
    try:
        for device in fault.devices:
            clients.append(AnchorClient.connect(supervisor.runtime_dir, device, role="tool"))
        with ThreadPoolExecutor(len(clients), thread_name_prefix="anchortp-fault") as hands:
            fault_s = time.monotonic()
            for done in [hands.submit(client.inject, fault.kind) for client in clients]:
                done.result()
        return fault_s
    except AnchorTPError as error:
        raise EngineStopped(f"{fault.kind} of {', '.join(fault.devices)} could not be injected: {error}") from None
    finally:
        for client in clients:
            client.close()
