"""What an error from a GPU says about the GPU. A pure table; whoever meets the error acts on it.

Source: CUDA Driver API, `CUresult` (the runtime's `cudaError_t` has the same numbers for these). Errors that are
"sticky" end the context, hence the process; what differs is what is lost with it.

| verdict | what it means | what follows |
|---|---|---|
| `lost` | the device, or what its memory holds, cannot be relied on | its units come from elsewhere |
| `crashed` | this process's context is beyond repair, the memory is whole | a spare takes over, no byte is loaded |
| `ours` | no statement about the device: out of memory, a wrong argument, or no GPU error at all | as `crashed` |
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["lost", "crashed", "ours"]

LOST = {
    46: "the device is unavailable",
    214: "uncorrectable ECC error",
    220: "uncorrectable NVLink error",
    226: "contained memory error",
    802: "the system (fabric manager) is not ready",
}

CRASHED = {
    700: "illegal address",
    702: "launch timeout",
    709: "the context is destroyed",
    710: "device-side assert",
    714: "hardware stack error",
    715: "illegal instruction",
    716: "misaligned address",
    717: "invalid address space",
    718: "invalid program counter",
    719: "launch failure",
    999: "unknown error",
}

# A process that has only just come, and cannot even make a context: it is not the process that is broken. (A GPU that
# fell off the bus says "unknown" to whoever used it, and this to whoever comes after.)
LOST_AT_ATTACH = {3: "cannot be initialised", 100: "no device", 101: "no such device", 999: "unknown error"}


def verdict_of(error: BaseException, *, attaching: bool) -> tuple[Verdict, str]:
    """The verdict, and the reason in words. `attaching`: the process was about to become the device's worker."""
    code = _code_of(error)
    if code is None:
        return "ours", ""
    if code in LOST or (attaching and code in LOST_AT_ATTACH):
        return "lost", f"{LOST.get(code) or LOST_AT_ATTACH[code]} (CUDA error {code})"
    if code in CRASHED:
        return "crashed", f"{CRASHED[code]} (CUDA error {code})"
    return "ours", f"CUDA error {code}"


def _code_of(error: BaseException | None) -> int | None:
    """Of the first error, from the newest cause to the oldest, that carries one.

    `error_code`: torch.AcceleratorError's, and `arena.vmm.DriverError`'s.
    """
    while error is not None:
        code = getattr(error, "error_code", None)
        if isinstance(code, int):
            return code
        error = error.__cause__ or error.__context__
    return None
