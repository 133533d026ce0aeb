"""What the recovery coordinator hears (events) and says (commands). Values only.

Every command but `Abort`, `Drop`, `Resume` and `Refuse` is answered by an event: see each docstring. Answers
that carry the epoch of a group that is gone are dropped, except for the facts in them (bytes that did arrive).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from anchortp.layout import Layout, Shard
from anchortp.plan import Plan

# ------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFound:
    """A device whose anchor answers. `shard`: what its manifest says is in its arena, None if nothing usable."""

    device: str
    budget_bytes: int
    shard: Shard | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The engine starts (or attaches) on these devices, in rank order, at an epoch above all earlier ones.

    `num_kv_blocks`: of the KV planes that an earlier engine left whole beside the shards; 0 if there are none.
    """

    devices: tuple[DeviceFound, ...]
    epoch: int
    num_kv_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """The process that computed on a device has ended."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHung:
    """A worker missed the step deadline."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorGone:
    """The connection to a device's anchor ended. With the worker alive that is an anchor crash, else a loss."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Answer to `Leave`."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusTaken:
    """Answer to `TakeCensus`: the devices whose anchors answered."""

    epoch: int
    alive: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """Answer to `Adopt`: a new anchor holds the descriptors (`ok`), or they could not be had."""

    device: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """Answer to `Attach`: a process is the device's worker now. (If it dies instead: `WorkerGone`.)"""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Answer to `Reserve`: every destination is committed (`refused` empty), or the first refusal in words."""

    epoch: int
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Answer to `Load`: the units of the command are whole in the device's arena."""

    device: str
    epoch: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """Answer to `Load`: the source could not be read."""

    device: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """Answer to `Compact`, one per device with KV planes."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """Answer to `Restore`: the planes hold what their sources had (`ok`), or they could not be read."""

    device: str
    epoch: int
    ok: bool
    copied_bytes: int = 0
    restored_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """Answer to `Form`, one per member."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed: `Coordinator.deadline_s` is over."""


Event = (
    Start
    | WorkerGone
    | WorkerHung
    | AnchorGone
    | Left
    | CensusTaken
    | Adopted
    | Attached
    | Reserved
    | Loaded
    | LoadFailed
    | Compacted
    | Restored
    | Formed
    | Tick
)

# ----------------------------------------------------------------------------------------------- commands


class KVState(StrEnum):
    """What is left of the KV cache, from best to worst.

    whole: every plane is where it was, or was copied from a device that held it. mirrored: the blocks that were
    whole in the host's mirror are; tokens in others replay. lost: all sequences replay all their tokens.
    """

    whole = "whole"
    mirrored = "mirrored"
    lost = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Raise the abort flag of the group of `epoch`, so that its members leave their collective at once."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Kill the device's worker so that it can never write again. Answered by `WorkerGone`."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Tell a worker that `epoch` has begun: finish or drop what you do, renew your lease, answer `Left`."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeCensus:
    """Ask the anchors which of them still hold their memory. Answered by `CensusTaken`."""

    epoch: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Start a new anchor and let the worker hand it the descriptors. Answered by `Adopted`."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Make a spare process the worker of the device. Answered by `Attached`, or `WorkerGone`."""

    device: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Commit every destination of the plan, and `num_kv_blocks` blocks of KV, before a byte moves.

    `fresh`: devices whose arenas hold nothing usable and are made anew. Answered by `Reserved`.
    """

    epoch: int
    plan: Plan
    num_kv_blocks: int
    fresh: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """Keep the most recently used KV within the first `num_kv_blocks` blocks, before the rest is given back.

    Each of `devices` answers `Compacted` when it has moved its blocks.
    """

    epoch: int
    num_kv_blocks: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSource:
    """Where the planes of one KV head (all layers) come from: a device that holds them, or the host's mirror."""

    head: int
    device: str | None  # None: the mirror, which has the blocks that were sealed and copied in time


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Fill the planes of the KV heads that are new on `device`. `layout` is the one being formed."""

    device: str
    epoch: int
    planes: tuple[PlaneSource, ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Fill the slots that `after` has beyond `before`. Answered by `Loaded`, `LoadFailed` or `WorkerGone`.

    `fresh`: the arena holds nothing yet, so the replicated tensors are loaded too.
    """

    device: str
    epoch: int
    before: Shard
    after: Shard
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Write the manifests and build the group of the epoch. Each member answers `Formed`."""

    epoch: int
    layout: Layout
    num_kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A device is out: close its connections, forget it, and stop its anchor if it still runs."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Serve. `kv`: how much of the cache has all its planes, see `KVState`."""

    epoch: int
    kv: KVState
    num_kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """No layout fits, or the weights cannot be read. Requests end with `reason`; the state is kept."""

    epoch: int
    reason: str


Command = Abort | Fence | Leave | TakeCensus | Adopt | Attach | Reserve | Load | Form | Drop | Resume | Refuse
