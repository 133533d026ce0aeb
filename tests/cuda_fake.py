"""`cuda.bindings.driver` as a test needs it: the package's own types, its calls answered by `SimVmm`.

Each call is held to the package's signature (from its docstring) and to the types that it would insist on. Which calls
came before there was a context is recorded.
"""

from __future__ import annotations

import re
from typing import Any

from anchortp.arena.sim import SimVmm
from anchortp.arena.vmm import OutOfPhysicalMemory

GRANULE = 2 << 20


class FakeCuda:
    def __init__(
        self, real: Any, *, num_devices: int = 2, granularity: int = GRANULE, capacity_bytes: int | None = None
    ):
        self._real = real
        self._sim = SimVmm(granule_bytes=GRANULE, capacity_bytes=capacity_bytes)
        self._num_devices = num_devices
        self._granularity = granularity
        self.failing: dict[str, int] = {}  # call -> the code that it fails with
        self.without_context: list[str] = []
        self.separate: set[tuple[int, int]] = set()  # GPUs of which the first cannot use the memory of the second
        self.current: object = None
        self.device_offset = 0  # of host memory, as the device sees it

    @property
    def host_memory(self) -> dict[int, int]:
        """What is registered: address -> size."""
        return self._sim.pinned

    def __getattr__(self, name: str) -> Any:
        """A type of the package, or a call that is checked, then answered by `_cu...` here."""
        real = getattr(self._real, name)
        if not re.fullmatch(r"cu[A-Z]\w+", name):
            return real
        answer = getattr(self, f"_{name}")
        signature = real.__doc__.splitlines()[0]
        num_args = len(re.findall(r"[^\[\],|]+(?:\[[^\]]*\])?[^,]*", signature[signature.index("(") + 1 : -1].strip()))

        def call(*args: Any) -> tuple:
            assert len(args) == num_args or not args, (signature, args)
            if self.current is None:
                self.without_context.append(name)
            if name in self.failing:
                return (self._real.CUresult(self.failing[name]), *[None] * bool(answer.__annotations__.get("return")))
            try:
                result = answer(*args)
            except OutOfPhysicalMemory:
                return (self._real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
            return (self._real.CUresult.CUDA_SUCCESS,) + (() if result is None else (result,))

        return call

    def _cuInit(self, flags):
        assert flags == 0

    def _cuDeviceGetCount(self):
        return self._num_devices

    def _cuDeviceGet(self, ordinal):
        return self._real.CUdevice(ordinal)

    def _cuDeviceCanAccessPeer(self, device, peer) -> int:
        assert isinstance(device, self._real.CUdevice) and isinstance(peer, self._real.CUdevice)
        return int((int(device), int(peer)) not in self.separate)

    def _cuDeviceGetPCIBusId(self, length, device) -> bytes:
        assert length >= 13 and isinstance(device, self._real.CUdevice)
        return f"0000:{int(device):02x}:00.0".encode() + b"\0"

    def _cuDevicePrimaryCtxRetain(self, device):
        assert isinstance(device, self._real.CUdevice)
        return ("context", int(device))

    def _cuCtxSetCurrent(self, context):
        self.current = context

    def _cuCtxSynchronize(self):
        assert self.current is not None

    def _cuMemGetAllocationGranularity(self, properties, option):
        self._check_properties(properties)
        assert option == self._real.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return self._granularity

    def _cuMemCreate(self, size, properties, flags):
        self._check_properties(properties)
        assert (size, flags) == (GRANULE, 0)
        return self._real.CUmemGenericAllocationHandle(self._sim.create())

    def _cuMemRelease(self, handle):
        self._sim.release(self._handle(handle))

    def _cuMemExportToShareableHandle(self, handle, kind, flags):
        self._check_kind(kind)
        return self._sim.export(self._handle(handle))

    def _cuMemImportFromShareableHandle(self, fd, kind):
        self._check_kind(kind)
        return self._real.CUmemGenericAllocationHandle(self._sim.import_(fd))

    def _cuMemAddressReserve(self, size, alignment, address, flags):
        assert size % GRANULE == 0 and (alignment, address, flags) == (GRANULE, 0, 0)
        return self._real.CUdeviceptr(self._sim.reserve(size))

    def _cuMemAddressFree(self, address, size):
        self._sim.free(address, size)

    def _cuMemMap(self, address, size, offset, handle, flags):
        assert (size, offset, flags) == (GRANULE, 0, 0)
        self._sim.map(address, self._handle(handle))

    def _cuMemUnmap(self, address, size):
        assert size == GRANULE
        self._sim.unmap(address)

    def _cuMemSetAccess(self, address, size, access, count):
        assert len(access) == count == 1 and isinstance(access[0], self._real.CUmemAccessDesc)
        assert access[0].flags == self._real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._sim.allow(address, size)

    def _cuMemHostRegister(self, address, size, flags):
        assert flags == 3, "usable in every context, and by kernels"
        self._sim.pin(address, size)

    def _cuMemHostGetDevicePointer(self, address, flags):
        assert flags == 0 and address in self._sim.pinned
        return self._real.CUdeviceptr(address + self.device_offset)

    def _cuMemHostUnregister(self, address):
        assert self.current is not None
        self._sim.unpin(address)

    def _cuMemsetD8(self, address, byte, size):
        self._sim.fill(address, size, byte)

    def _handle(self, handle) -> int:
        assert isinstance(handle, self._real.CUmemGenericAllocationHandle)
        return int(handle)

    def _check_kind(self, kind) -> None:
        assert kind == self._real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _check_properties(self, properties) -> None:
        assert isinstance(properties, self._real.CUmemAllocationProp)
        assert properties.type == self._real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        assert properties.location.type == self._real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._check_kind(properties.requestedHandleTypes)
