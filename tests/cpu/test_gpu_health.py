"""What NVML's events say about a GPU, and what an anchor makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchortp.errors import ConfigError
from anchortp.state.anchor import EXIT_LOST
from anchortp.state.gpu_health import FATAL_XIDS, WAIT_MS, XidWatch

XID = 8  # EventType.XID_CRITICAL_ERROR
BUS = "0000:01:00.0"


class FakeNvml:
    """Answers `event_set_wait_v2` from a list: what it returns or raises."""

    class NvmlError(Exception):
        pass

    class NvmlTimeoutError(NvmlError):
        pass

    class GpuIsLostError(NvmlError):
        pass

    EventType = SimpleNamespace(XID_CRITICAL_ERROR=XID)

    def __init__(self, *answers):
        self.answers = list(answers)
        self.refuses = ""
        self.registered = None

    def init_v2(self):
        if self.refuses == "init_v2":
            raise RuntimeError("there is no libnvidia-ml")

    def device_get_handle_by_pci_bus_id_v2(self, bus):
        assert bus == BUS
        return 7

    def event_set_create(self):
        return 70

    def device_register_events(self, device, types, events):
        if self.refuses == "device_register_events":
            raise self.NvmlError("not supported")
        self.registered = (device, types, events)

    def event_set_wait_v2(self, events, timeout_ms):
        assert (events, timeout_ms) == (70, WAIT_MS) and self.registered == (7, XID, 70)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def event(xid: int, event_type: int = XID) -> SimpleNamespace:
    return SimpleNamespace(event_type=event_type, event_data=xid)


def test_the_names_are_nvmls():
    nvml = pytest.importorskip("cuda.bindings.nvml", reason="this cuda-bindings has no NVML")
    names = [name for name in vars(FakeNvml) if not name.startswith("__")]
    assert len(names) == 9 and all(hasattr(nvml, name) for name in names)
    assert nvml.EventType.XID_CRITICAL_ERROR == XID
    assert issubclass(nvml.NvmlTimeoutError, nvml.NvmlError) and issubclass(nvml.GpuIsLostError, nvml.NvmlError)
    assert {"event_type", "event_data"} <= set(dir(nvml.EventData))


@pytest.mark.parametrize("xid", FATAL_XIDS)
def test_what_needs_a_reset_of_the_gpu_ends_it(xid: int):
    nvml = FakeNvml(FakeNvml.NvmlTimeoutError(), event(31), event(xid))
    assert XidWatch(nvml, BUS).wait() == f"{FATAL_XIDS[xid]} (XID {xid})"


def test_what_ends_a_process_or_a_link_or_nothing_does_not():
    others = [event(xid) for xid in (13, 31, 43, 45, 63, 74, 92, 94, 136, 145, 154, 155, 0)]
    nvml = FakeNvml(*others, event(79, event_type=4), event(79))
    assert XidWatch(nvml, BUS).wait().endswith("(XID 79)") and not nvml.answers


def test_a_gpu_of_which_nvml_itself_says_that_it_is_lost():
    assert XidWatch(FakeNvml(FakeNvml.GpuIsLostError()), BUS).wait() == "NVML: it is lost"


@pytest.mark.parametrize("call", ["init_v2", "device_register_events", "event_set_wait_v2"])
def test_an_nvml_that_tells_nothing_is_no_reason_to_lose_a_gpu(call: str):
    nvml = FakeNvml(FakeNvml.NvmlError("uninitialized"))
    nvml.refuses = call
    with pytest.raises(ConfigError, match=r"NVML tells (nothing|no more) of the GPU"):
        XidWatch(nvml, BUS).wait()


ANCHOR = """
import sys
from types import SimpleNamespace
from anchortp.arena.sim import SimVmm
from anchortp.errors import ConfigError
from anchortp.state import anchor

class Watch:
    def wait(self):
        reason = sys.stdin.readline().strip()
        if not reason:
            raise ConfigError("NVML tells no more")
        return reason

anchor.driver_of = lambda device: lambda: SimVmm(granule_bytes=2 << 20)
anchor.open_cuda = lambda index: SimpleNamespace(pci_bus_id=lambda: "a bus")
anchor.open_watch = lambda bus: Watch()
anchor.run_anchor(device="cuda:0", budget_bytes=1 << 30, runtime_dir=sys.argv[1], ready_fd=1)
"""

WORKER = """
import sys
from anchortp.state.client import AnchorClient
client = AnchorClient.connect(sys.argv[1], "cuda:0", "worker", 20)
client.lease(1)
print("leased", flush=True)
sys.stdin.read()
"""


def start(program: str, runtime_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", program, str(runtime_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_an_idle_gpu_that_is_lost_takes_its_worker_and_its_anchor(tmp_path: Path):
    """The worker first: else it would hand the memory over to another anchor."""
    with start(ANCHOR, tmp_path) as anchor:
        assert '"pid"' in anchor.stdout.readline()
        with start(WORKER, tmp_path) as worker:
            assert worker.stdout.readline() == "leased\n"
            anchor.stdin.write("it has fallen off the bus (XID 79)\n")
            anchor.stdin.flush()
            assert anchor.wait(20.0) == EXIT_LOST
            assert worker.wait(20.0) == -signal.SIGKILL
        assert "lost: it has fallen off the bus (XID 79)" in anchor.stderr.read()


def test_an_anchor_whose_watch_ends_serves_on_and_says_so(tmp_path: Path):
    with start(ANCHOR, tmp_path) as anchor:
        assert '"pid"' in anchor.stdout.readline()
        anchor.stdin.write("\n")
        anchor.stdin.flush()
        while "NVML tells no more" not in anchor.stderr.readline():
            assert anchor.poll() is None
        with start(WORKER, tmp_path) as worker:
            assert worker.stdout.readline() == "leased\n"
            worker.kill()
        anchor.send_signal(signal.SIGTERM)
        assert anchor.wait(20.0) == 0
