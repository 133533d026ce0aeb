"""NVIDIA's virtual-memory calls, through `cuda-bindings` (the extra `cuda`). Imported where a GPU is used.

Source: CUDA Driver API, "Virtual Memory Management" and "Primary Context Management". What this relies on beyond
the documentation's words, and `make gpu-check` therefore checks: `cuMemCreate` and `cuMemExportToShareableHandle` need
`cuInit` but no context (NVIDIA's own GPU memory service for Dynamo works that way), and a descriptor keeps the memory
alive after the process that made it is gone.

Checked against cuda-bindings 13.0 and 13.5, which name and shape the calls alike.
"""

from __future__ import annotations

import functools
from typing import Any

from anchortp.arena import dlpack
from anchortp.arena.vmm import DriverError, OutOfPhysicalMemory
from anchortp.devices import PAGE_BYTES
from anchortp.errors import ConfigError, StateError


@functools.cache
def open_cuda(index: int) -> CudaVmm:
    """The driver of GPU `index` as this process sees it (CUDA_VISIBLE_DEVICES).

    Raises ConfigError where there is no cuda-bindings, no NVIDIA driver, no such GPU, or one that cannot do it.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise ConfigError(
            f"cuda:{index} needs the package cuda-bindings; install it (pip install 'anchortp[cuda]'), or use "
            f"CPU devices (cpu:0, ...)."
        ) from None
    return CudaVmm(driver, index)


class CudaVmm:
    """`VmmDriver` for one GPU. `driver`: the module `cuda.bindings.driver`, or what stands in for it in a test."""

    def __init__(self, driver: Any, index: int):
        self._driver = driver
        self._index = index
        self._context: Any = None
        self.granule_bytes = PAGE_BYTES["cuda"]
        self.dlpack_device = (dlpack.CUDA, index)
        self._device = self._find(index)
        kinds = driver.CUmemAllocationHandleType
        self._handle_type = kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._location = driver.CUmemLocation()
        self._location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = index
        self._properties = self._chunk_properties()
        self._check_granule()

    # -- without a context

    def create(self) -> int:
        return int(self._call("cuMemCreate", self.granule_bytes, self._properties, 0))

    def export(self, handle: int) -> int:
        return int(self._call("cuMemExportToShareableHandle", self._handle(handle), self._handle_type, 0))

    def import_(self, fd: int) -> int:
        return int(self._call("cuMemImportFromShareableHandle", fd, self._handle_type))

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", self._handle(handle))

    def reaches(self, index: int) -> bool:
        """Whether this GPU can use the memory of another."""
        return bool(self._call("cuDeviceCanAccessPeer", self._device, self._call("cuDeviceGet", index)))

    def pci_bus_id(self) -> str:
        """As NVML knows it, which counts GPUs otherwise."""
        return self._call("cuDeviceGetPCIBusId", 13, self._device).rstrip(b"\0").decode()

    # -- with the GPU's primary context, the one that torch uses

    def reserve(self, num_bytes: int) -> int:
        return int(self._call_in_context("cuMemAddressReserve", num_bytes, self.granule_bytes, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        self._call_in_context("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, handle: int) -> None:
        self._call_in_context("cuMemMap", address, self.granule_bytes, 0, self._handle(handle), 0)

    def unmap(self, address: int) -> None:
        self._call_in_context("cuMemUnmap", address, self.granule_bytes)

    def allow(self, address: int, num_bytes: int) -> None:
        access = self._driver.CUmemAccessDesc()
        access.location = self._location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call_in_context("cuMemSetAccess", address, num_bytes, [access], 1)

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        self._call_in_context("cuMemsetD8", address, byte, num_bytes)
        self.synchronize()

    def pin(self, address: int, num_bytes: int) -> None:
        flags = self._driver.CU_MEMHOSTREGISTER_PORTABLE | self._driver.CU_MEMHOSTREGISTER_DEVICEMAP
        try:
            self._call_in_context("cuMemHostRegister", address, num_bytes, flags)
        except OutOfPhysicalMemory:
            raise StateError(
                f"the host has no memory left that GPU {self._index} may use; make the mirror smaller "
                f"(--kv-mirror-memory)"
            ) from None
        seen = int(self._call_in_context("cuMemHostGetDevicePointer", address, 0))
        if seen != address:
            self.unpin(address)
            raise StateError(
                f"GPU {self._index} sees host memory at other addresses than the host; turn the mirror off "
                f"(--kv-mirror off)"
            )

    def unpin(self, address: int) -> None:
        self._call_in_context("cuMemHostUnregister", address)

    def synchronize(self) -> None:
        self._call_in_context("cuCtxSynchronize")

    # -- inside

    def _find(self, index: int) -> Any:
        try:
            self._call("cuInit", 0)
            num_devices = self._call("cuDeviceGetCount")
        except (StateError, RuntimeError) as error:  # RuntimeError: cuda-bindings found no libcuda
            raise ConfigError(
                f"cuda:{index}: there is no NVIDIA GPU that this process can use ({error}). Check nvidia-smi and "
                f"CUDA_VISIBLE_DEVICES, or use CPU devices (cpu:0, ...)."
            ) from error
        if index >= num_devices:
            raise ConfigError(f"cuda:{index} is not there: this process sees {num_devices} GPU(s), from cuda:0 on")
        return self._call("cuDeviceGet", index)

    def _chunk_properties(self) -> Any:
        properties = self._driver.CUmemAllocationProp()
        properties.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = self._location
        properties.requestedHandleTypes = self._handle_type
        return properties

    def _check_granule(self) -> None:
        """Also the first call that fails where virtual memory management is not supported."""
        minimum = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        try:
            granularity = int(self._call("cuMemGetAllocationGranularity", self._properties, minimum))
        except StateError as error:
            raise ConfigError(
                f"cuda:{self._index} cannot share its memory by descriptors ({error}); use a GPU and a driver with "
                f"virtual memory management"
            ) from error
        if self.granule_bytes % granularity:
            raise ConfigError(
                f"cuda:{self._index} commits memory in steps of {granularity} bytes, and this version in steps of "
                f"{self.granule_bytes}; report it"
            )

    def _handle(self, handle: int) -> Any:
        return self._driver.CUmemGenericAllocationHandle(handle)

    def _call_in_context(self, name: str, *args: Any) -> Any:
        if self._context is None:
            self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        # torch, or another of these, may have made another GPU's context current in this thread.
        self._call("cuCtxSetCurrent", self._context)
        return self._call(name, *args)

    def _call(self, name: str, *args: Any) -> Any:
        """The call's one result, if it has one."""
        status, *results = getattr(self._driver, name)(*args)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise OutOfPhysicalMemory(f"{name}: GPU {self._index} has no memory left; free some")
            code = self._driver.CUresult(status)
            raise DriverError(
                f"{name} on GPU {self._index} failed with {code.name} ({int(code)}); see docs/cuda.md",
                error_code=int(code),
            )
        return results[0] if results else None
