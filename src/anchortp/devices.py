"""What a device's name says. No IO: whether the device is there, its anchor finds out.

| name | device | memory |
|---|---|---|
| `cpu:0` | a virtual device on the host | memfd |
| `cuda:0` | a GPU | the driver's virtual-memory calls |
| `cuda:0/1` | a virtual device on GPU 0, one of several with anchors, budgets and faults of their own | as above |
| `sim:0`, `sim:0/1` | as `cuda`, but the calls are answered from host memory: for tests without a GPU | memfd chunks |
| `host` | the host's own anchor | memfd |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from anchortp.errors import ConfigError

DeviceKind = Literal["cpu", "cuda", "sim", "host"]

# The step in which memory is committed. 2 MiB is what NVIDIA's driver asks for on every GPU so far; `arena.cuda`
# refuses a GPU that wants more. The simulated one is small, so that small models commit many chunks.
PAGE_BYTES: dict[DeviceKind, int] = {"cpu": 4096, "host": 4096, "cuda": 2 << 20, "sim": 64 << 10}

_NAME = re.compile(r"(cpu|cuda|sim):([0-9]+)(?:/([0-9]+))?|host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A failure domain. Devices with the same kind and `index` but another `part` share one piece of hardware."""

    kind: DeviceKind
    index: int = 0
    part: int | None = None

    @property
    def page_bytes(self) -> int:
        return PAGE_BYTES[self.kind]

    @property
    def is_chunked(self) -> bool:
        """Whether its arenas are made of chunks with a descriptor each (else: one descriptor per arena)."""
        return self.kind in ("cuda", "sim")

    @property
    def name(self) -> str:
        """As in the table above."""
        index = "" if self.kind == "host" else f":{self.index}"
        return self.kind + index + ("" if self.part is None else f"/{self.part}")

    @property
    def file_name(self) -> str:
        """As in `anchor-cuda-0-1.sock`; `parse_file_name` is the way back."""
        return self.name.replace(":", "-").replace("/", "-")

    @property
    def order(self) -> tuple[str, int, int]:
        """A sort key: by kind, then by number; a whole device before its parts."""
        return self.kind, self.index, -1 if self.part is None else self.part


def parse_device(name: str) -> Device:
    """Raises ConfigError for what is no device's name."""
    match = _NAME.fullmatch(name)
    if match is None or (match[1] == "cpu" and match[3] is not None):
        raise ConfigError(f"{name!r} is no device; give a name like cpu:0, cuda:1, cuda:0/1 or host")
    if match[1] is None:
        return Device(kind="host")
    return Device(kind=match[1], index=int(match[2]), part=None if match[3] is None else int(match[3]))  # type: ignore[arg-type]


def parse_file_name(file_name: str) -> Device:
    """The device whose `file_name` this is. Raises ConfigError."""
    return parse_device(file_name.replace("-", ":", 1).replace("-", "/", 1))


def check_engine_devices(names: Iterable[str]) -> tuple[Device, ...]:
    """The devices of one engine: each once, all of one kind, a GPU whole or in parts. Raises ConfigError."""
    names = tuple(names)
    devices = tuple(parse_device(name) for name in names)
    if not devices or any(device.kind == "host" for device in devices):
        raise ConfigError(f"devices {', '.join(names) or '(none)'}: name those that compute, as cpu:0,cpu:1 or cuda:0")
    if len(set(devices)) < len(devices):
        raise ConfigError(f"devices {', '.join(names)}: one occurs twice; name each once")
    if len(kinds := {device.kind for device in devices}) > 1:
        raise ConfigError(f"devices {', '.join(names)}: {' and '.join(sorted(kinds))} do not mix; choose one kind")
    whole = {device.index for device in devices if device.part is None}
    shared = whole & {device.index for device in devices if device.part is not None}
    if shared:
        kind, index = devices[0].kind, min(shared)
        raise ConfigError(f"{kind}:{index} is named whole and in parts; name {kind}:{index}, or {kind}:{index}/0, ...")
    return devices
