"""[worker] The hardware under a worker's device: where tensors go, how to wait for it, which groups it can form."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anchortp.arena import MemfdArena, PinnedMapping, VmmDriver, driver_of
from anchortp.comm import GlooGroup, Group, Kept, MixedGroup, NcclGroup, PeerGroup, ShmGroup, ShmRegion, StagedGroup
from anchortp.comm.peer import mark_stream
from anchortp.config import ModelConfig
from anchortp.devices import Device
from anchortp.layout import model_units
from anchortp.model import Capture, CudaGraphs, TorchKernels
from anchortp.model.paged import FlashInfer, Sdpa, open_flashinfer
from anchortp.native import Library


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """`torch_device` is None for the host's own memory, where tensors are by default.

    `open_driver`: of arenas made of chunks, so that this device can read them; None on plain CPU devices. `alone`: held
    during a capture. A thread takes it before it does what waits for the whole device, which would void the capture.
    `kept`: what one group of this worker leaves for the next.
    """

    torch_device: torch.device | None
    open_driver: Callable[[], VmmDriver] | None
    alone: AbstractContextManager[object] = field(default_factory=threading.Lock)
    kept: Kept = field(default_factory=Kept)

    @classmethod
    def of(cls, device: Device) -> Accelerator:
        """In the process that is to compute on it: a GPU becomes torch's current one, its context is made now.

        Raises ConfigError where there is no such GPU, or no driver for it.
        """
        open_driver = driver_of(device) if device.is_chunked else None
        if device.kind != "cuda":
            return cls(torch_device=None, open_driver=open_driver)
        assert open_driver is not None
        open_driver()  # says what is missing better than torch does
        torch_device = torch.device("cuda", device.index)
        torch.cuda.set_device(torch_device)
        torch.cuda.synchronize()
        return cls(torch_device=torch_device, open_driver=open_driver)

    def placing(self) -> AbstractContextManager[object]:
        """New tensors are made on the device."""
        return contextlib.nullcontext() if self.torch_device is None else self.torch_device

    def synchronize(self) -> None:
        """Returns when nothing that this process started on the device still runs.

        A kernel that hangs holds this up, and then the controller, whose patience is bounded, kills the process.
        """
        if self.torch_device is not None:
            torch.cuda.synchronize(self.torch_device)

    def pinned(self, arena: MemfdArena) -> PinnedMapping | None:
        """Host memory as this device can use it; None where the device is the host."""
        return None if self.open_driver is None else PinnedMapping(arena, self.open_driver())

    def capture(self) -> Capture | None:
        """How decode steps become graphs; None where launches cost nothing. A simulated GPU computes all anew."""
        if self.torch_device is not None:
            return CudaGraphs(self.torch_device, self.alone)
        return None if self.open_driver is None else _compute_again

    def paged(self, attention: str, config: ModelConfig, block_size: int) -> FlashInfer | Sdpa | None:
        """The library by which a decoder attends; None for its own matrices."""
        if attention == "torch":
            return None
        if attention == "sdpa":
            return Sdpa(config, block_size)
        assert self.torch_device is not None, "config lets FlashInfer through for GPUs alone"
        return open_flashinfer(config, block_size, self.torch_device)

    def fused(self, config: ModelConfig) -> TorchKernels:
        """Kernels by Triton for a model, loaded when this returns; to compile them takes seconds, once per machine.
        Raises what Triton raises, where there is no C compiler for one."""
        assert self.torch_device is not None, "config lets it through for GPUs alone"
        from anchortp.model.fused import TritonKernels  # imports Triton, which nobody else needs

        kernels = TritonKernels()
        with self.placing():
            kernels.touch(model_units(config))
        return kernels

    def mark(self) -> Callable[[], bool]:
        """As `comm.peer.Mark`."""
        return mark_stream() if self.torch_device is not None else _reached


def _compute_again(work: Callable[[], None]) -> Callable[[], None]:
    return work


def _reached() -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    """What one rank makes its group of. `members`: the devices, in rank order. `store_path`: of a file that no other
    group uses. `slots`: every rank's memory, for groups that sum in it. `library`: kernels of CPUs that take part."""

    region: ShmRegion
    rank: int
    timeout_s: float
    members: tuple[str, ...]
    store_path: str
    slots: list[Tensor] = field(default_factory=list)
    library: Library | None = None

    @property
    def place(self) -> tuple[ShmRegion, int, float]:
        return self.region, self.rank, self.timeout_s


def _shm(f: Formation, accelerator: Accelerator) -> Group:
    host = ShmGroup(*f.place, library=f.library)
    return host if accelerator.torch_device is None else StagedGroup(host)


def _gloo(f: Formation, _: Accelerator) -> Group:
    return GlooGroup(*f.place, store_path=f.store_path)


def _peer(f: Formation, accelerator: Accelerator) -> Group:
    return PeerGroup(*f.place, f.slots, mark=accelerator.mark)


def _nccl(f: Formation, accelerator: Accelerator) -> NcclGroup:
    assert accelerator.torch_device is not None, "config lets nccl through for GPUs alone"
    device = accelerator.torch_device
    return NcclGroup(*f.place, store_path=f.store_path, device=device, members=f.members, kept=accelerator.kept)


def _mixed(f: Formation, accelerator: Accelerator) -> Group:
    large = _nccl(f, accelerator)
    small = PeerGroup(*f.place, f.slots, mark=accelerator.mark, rendezvous=large.rendezvous)
    return MixedGroup(small, large, f.region.slot_bytes)


GROUPS: dict[str, Callable[[Formation, Accelerator], Group]] = {
    "shm": _shm,
    "gloo": _gloo,
    "peer": _peer,
    "nccl": _nccl,
    "mixed": _mixed,
}
