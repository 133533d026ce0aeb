"""What ends a GPU while no process asks anything of it: NVML's XID events [anchor].

A worker learns that its GPU is lost from the call that fails, and one that has nothing to do makes none. So the anchor
of a GPU listens: it owns the memory, so it is the one to say that this memory is not to be believed any more, and its
end is how it says so.

Which XIDs: those of NVIDIA's catalog for Ampere and newer whose immediate action is RESET_GPU or RESTART_BM, and 48,
which needs a reset as well. Left out on purpose:

| XID | why |
|---|---|
| 13, 31, 43, 45 ... | RESTART_APP: of one process, whose calls fail (`engine.device_errors`) |
| 63, 92 | a row is remapped at the next reset, many single bits were corrected: nothing is lost |
| 74, 136, 144 to 150, 155 | of links: when a GPU dies its neighbours report them, and their own memory is whole |
| 94 | contained: whoever read the bad bytes is told by its own call, all others go on |
| 154 | says again what another one has said |

Source: docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the Xid Catalog"; NVML API, "Event Handling
Methods". NVML's functions come with cuda-bindings (`cuda.bindings.nvml`, seen in 13.5). What NVML does not report is
found by the next call, as without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from anchortp.errors import ConfigError

FATAL_XIDS = {
    46: "it stopped processing",
    48: "uncorrectable ECC error",
    62: "its power controller halted",
    64: "bad memory could not be remapped",
    79: "it has fallen off the bus",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "its system processor does not answer",
    120: "error of its system processor",
    140: "uncorrected ECC error",
    143: "initialisation error",
    156: "a part of it is retired",
    158: "fatal timeout",
}

WAIT_MS = 1000  # for an event, after which it is waited for again


class XidWatch:
    """Waits for what ends one GPU. `nvml`: the module `cuda.bindings.nvml`, or what stands in for it in a test."""

    def __init__(self, nvml: Any, pci_bus_id: str):
        """Raises ConfigError where NVML cannot tell of this GPU's XIDs."""
        self._nvml = nvml
        self._wanted = int(nvml.EventType.XID_CRITICAL_ERROR)
        try:
            nvml.init_v2()
            device = nvml.device_get_handle_by_pci_bus_id_v2(pci_bus_id)
            self._events = nvml.event_set_create()
            nvml.device_register_events(device, self._wanted, self._events)
        except (nvml.NvmlError, RuntimeError) as error:  # RuntimeError: there is no such library
            raise ConfigError(f"NVML tells nothing of the GPU at {pci_bus_id}: {error}") from error

    def wait(self) -> str:
        """Why the GPU is lost, when it is. Raises ConfigError when NVML will not tell any more."""
        while True:
            try:
                event = self._nvml.event_set_wait_v2(self._events, WAIT_MS)
            except self._nvml.NvmlTimeoutError:
                continue
            except self._nvml.GpuIsLostError:
                return "NVML: it is lost"
            except self._nvml.NvmlError as error:
                raise ConfigError(f"NVML tells no more of the GPU: {error}") from error
            xid = int(event.event_data)
            if int(event.event_type) & self._wanted and xid in FATAL_XIDS:
                return f"{FATAL_XIDS[xid]} (XID {xid})"


def open_watch(pci_bus_id: str) -> XidWatch:
    """Raises ConfigError where there is no NVML."""
    try:
        from cuda.bindings import nvml
    except ImportError as error:
        raise ConfigError(f"this cuda-bindings has no NVML ({error}); 13.5 has") from error
    return XidWatch(nvml, pci_bus_id)


def watch_aside(watch: XidWatch, on_lost: Callable[[str], None], on_end: Callable[[str], None]) -> None:
    """Waits on a thread of its own, which calls `on_lost` with the reason, or `on_end` when there is nothing more to
    wait for."""

    def run() -> None:
        try:
            on_lost(watch.wait())
        except ConfigError as error:
            on_end(str(error))

    threading.Thread(target=run, name="xids", daemon=True).start()
