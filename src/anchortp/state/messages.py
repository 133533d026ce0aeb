"""What an anchor is asked, and what it answers. One reply per request, in order.

Every request that changes something, or hands out memory, carries the epoch of the group it belongs to. An
older one than the anchor's is refused with StaleEpoch; a newer one raises the anchor's epoch, as Fence does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from anchortp.errors import (
    AnchorRunning,
    AnchorTPError,
    ArenaUnknown,
    BudgetExceeded,
    ConfigError,
    DeviceFull,
    LeaseHeld,
    ManifestInvalid,
    ProtocolError,
    StaleEpoch,
    StateError,
)

Role = Literal["controller", "worker", "tool"]
FaultKind = Literal["lost", "crash", "hang"]
Ranges = tuple[tuple[int, int], ...]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


# -- requests


class Hello(Message):
    """The first request of every connection. -> Welcome"""

    role: Role


class Fence(Message):
    """Raises the epoch; leases of older epochs are void, though their connections stay. -> Ok"""

    epoch: int


class Lease(Message):
    """This connection's process is the worker of `epoch` on this device, until the connection ends. -> Ok

    The holder may renew it for a newer epoch. LeaseHeld while another process holds one that is not void.
    """

    epoch: int


class CreateArena(Message):
    """A new arena, nothing committed. -> ArenaReply and a descriptor (none where memory comes in chunks).

    StateError if the name is taken.
    """

    name: str
    reserved_bytes: int
    epoch: int


class OpenArena(Message):
    """-> ArenaReply and a descriptor, as CreateArena. ArenaUnknown if there is none."""

    name: str
    epoch: int


class GrowArena(Message):
    """Reserves more, in place. -> ArenaReply. Never shrinks: StateError."""

    name: str
    reserved_bytes: int
    epoch: int


class DropArena(Message):
    """Ends an arena; its memory is given back at once, also under those who still map it. -> Committed

    Chunks that are still mapped elsewhere keep their bytes until the device's next commit uses them again.
    """

    name: str
    epoch: int


class AdoptArena(Message):
    """With one descriptor: an arena that outlived its anchor, to be owned by this one. -> ArenaReply

    `ranges` are counted against the budget as by Commit. Adopting the same memory again is harmless.
    """

    name: str
    reserved_bytes: int
    ranges: Ranges
    epoch: int


class GetChunks(Message):
    """The chunks of an arena with serials above `after`, as many as one message holds. -> ChunksReply, descriptors

    For arenas of devices whose memory comes in chunks (`arena.vmm`); ask again while there are `more`.
    """

    name: str
    after: int
    epoch: int


class AdoptChunks(Message):
    """With a descriptor for each: chunks that outlived their anchor, to be owned by this one. -> ArenaReply

    `chunks`: (offset, serial), serials rising, also from one message to the next. They count against the budget.
    Chunks cannot be told apart by their descriptors, so this is for the device's worker alone: StateError unless
    the process has the lease. To have the rest of what was committed back, empty, Commit follows.
    """

    name: str
    reserved_bytes: int
    chunks: Ranges
    epoch: int


class Commit(Message):
    """Counts the pages that `ranges` touch against the budget, before they are used. -> Committed

    All or nothing: BudgetExceeded changes nothing. Pages that were counted before cost nothing. `allocate`: host memory
    is taken from the system now, not when it is touched.
    """

    name: str
    ranges: Ranges
    epoch: int
    allocate: bool = False


class Decommit(Message):
    """Gives back the pages that lie wholly inside `ranges`. -> Committed"""

    name: str
    ranges: Ranges
    epoch: int


class PutManifest(Message):
    """`manifest`: of `Manifest.to_bytes`, sealed. -> Ok. ManifestInvalid if torn or another device's."""

    manifest: bytes
    epoch: int


class GetManifest(Message):
    """-> ManifestReply"""


class GetStatus(Message):
    """-> AnchorStatus"""


class Inject(Message):
    """Fault injection. crash, hang: the lease holder is killed or stopped, -> Ok. lost: the device dies.

    `lost` has no reply: the lease holder is killed, the memory overwritten, and the connection ends.
    """

    kind: FaultKind


class ReportLost(Message):
    """From the device's worker: its hardware has failed, for `reason`. The anchor ends without touching the memory.

    There is no reply: the connection ends. StateError unless the process has the lease.
    """

    reason: str
    epoch: int


class Shutdown(Message):
    """A clean stop: the anchor lets go of all memory, answers Ok, and ends."""


Request = (
    Hello
    | Fence
    | Lease
    | CreateArena
    | OpenArena
    | GrowArena
    | DropArena
    | AdoptArena
    | GetChunks
    | AdoptChunks
    | Commit
    | Decommit
    | PutManifest
    | GetManifest
    | GetStatus
    | Inject
    | ReportLost
    | Shutdown
)


# -- replies


class Ok(Message):
    pass


class Welcome(Message):
    """`anchor_id` is new for every anchor process: a changed one says that the former has died."""

    device: str
    anchor_id: str
    pid: int
    budget_bytes: int
    epoch: int


class ArenaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`ranges` and their sum `accounted_bytes` are what was committed by request, `committed_bytes` what the
    kernel has really given."""

    name: str
    reserved_bytes: int
    accounted_bytes: int
    committed_bytes: int
    ranges: Ranges


class ArenaReply(Message):
    arena: ArenaInfo


class ChunksReply(Message):
    """`chunks`: (offset, serial) per descriptor, serials rising. `ranges`: all that is committed, as in ArenaInfo."""

    chunks: Ranges
    ranges: Ranges
    more: bool


class Committed(Message):
    """The account of the whole device after the request."""

    committed_bytes: int


class ManifestReply(Message):
    manifest: bytes | None


class LeaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Void if `epoch` is older than the anchor's."""

    pid: int
    epoch: int


class AnchorStatus(Message):
    device: str
    anchor_id: str
    pid: int
    epoch: int
    budget_bytes: int
    committed_bytes: int
    arenas: tuple[ArenaInfo, ...]
    lease: LeaseInfo | None
    uptime_s: float


class Failure(Message):
    """An error, on its way to the process that asked. See `failure_of` and `error_of`."""

    code: str
    message: str
    details: dict[str, int | str] = {}


Reply = Ok | Welcome | ArenaReply | ChunksReply | Committed | ManifestReply | AnchorStatus | Failure


class Ready(Message):
    """What a started anchor writes to its starter, as a line of JSON, once it listens (or else a Failure)."""

    pid: int


# -- errors over the wire: code, class, how to make it again

_Rebuild = Callable[[str, dict[str, int | str]], AnchorTPError]


def _plain(error_type: type[AnchorTPError]) -> _Rebuild:
    return lambda message, _: error_type(message)


_ERRORS: dict[str, tuple[type[AnchorTPError], _Rebuild]] = {
    "budget_exceeded": (BudgetExceeded, lambda _, details: BudgetExceeded(**details)),
    "device_full": (DeviceFull, lambda _, details: DeviceFull(**details)),
    "stale_epoch": (StaleEpoch, lambda message, details: StaleEpoch(message, **details)),
    "lease_held": (LeaseHeld, _plain(LeaseHeld)),
    "arena_unknown": (ArenaUnknown, _plain(ArenaUnknown)),
    "anchor_running": (AnchorRunning, _plain(AnchorRunning)),
    "manifest_invalid": (ManifestInvalid, _plain(ManifestInvalid)),
    "state": (StateError, _plain(StateError)),
    "protocol": (ProtocolError, _plain(ProtocolError)),
    "config": (ConfigError, _plain(ConfigError)),
    "internal": (AnchorTPError, _plain(AnchorTPError)),
}


def failure_of(error: AnchorTPError) -> Failure:
    """The message that carries an error: its own code, or that of the nearest base class that has one."""
    code_of = {error_type: code for code, (error_type, _) in _ERRORS.items()}
    kind = next(base for base in type(error).__mro__ if base in code_of)
    details = {key: value for key, value in vars(error).items() if isinstance(value, int | str)}
    return Failure(code=code_of[kind], message=str(error), details=details)


def error_of(failure: Failure) -> AnchorTPError:
    """The inverse of `failure_of`; ProtocolError for a code or details that no anchor of ours sends."""
    _, rebuild = _ERRORS.get(failure.code, (None, None))
    try:
        if rebuild is not None:
            return rebuild(failure.message, failure.details)
    except TypeError:
        pass
    return ProtocolError(
        f"unknown failure {failure.code!r} ({failure.message}); run the same version of anchortp at both ends"
    )
