"""What the recovery coordinator hears (events) and says (commands). Values only.

Every command but `Abort`, `CancelLoad`, `Record`, `Drop`, `Resume` and `Refuse` is answered by an event: see each
docstring. Answers that carry the epoch of a group that is gone are dropped, except for the facts in them (bytes that
did arrive).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from anchortp.layout import Layout, Shard
from anchortp.plan import Move, Plan
from anchortp.recovery.progress import Progress

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
class Change:
    """The operator (or the balancer) wants another layout, while the engine serves.

    `add`: devices whose anchors answer; they hold nothing that is used. `remove`: members that shall leave.
    `speeds`: the new relative speeds, None to keep the present ones. `plan`: the layout and moves wanted, None to
    have them planned. `why` begins the story; `change_id` finds it. `attempt`: how often a fault has interrupted it.
    `problem`: it cannot be, for a reason that was found on the way here.
    """

    why: str
    change_id: int
    add: tuple[DeviceFound, ...] = ()
    remove: tuple[str, ...] = ()
    speeds: tuple[tuple[str, float], ...] | None = None
    plan: Plan | None = None
    attempt: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """No step is in flight: a change whose bytes have all arrived may take over now (`Coordinator.wants_switch`)."""


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
    """Answer to `Reserve`: every destination is committed (`refused` empty), or the first refusal in words. And of
    `Form`, where a device has less memory than its budget says."""

    epoch: int
    ticket: int
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Answer to `Load`: the units of the command are whole in the device's arena. `peer_bytes` of `num_bytes` came
    from other devices; `rerouted` says in words what did not come from where it was planned to come from. `links`:
    (source, bytes, bytes per second while it was busy), as measured."""

    device: str
    ticket: int
    num_bytes: int
    peer_bytes: int = 0
    rerouted: tuple[str, ...] = ()
    links: tuple[tuple[str, int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A part of what is loaded now has arrived (`Progress.is_worth_a_line`). For the story: it decides nothing."""

    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """Answer to `Load`: a source could not be read, the device `source` or (if empty) the host."""

    device: str
    ticket: int
    reason: str
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """Answer to `Arrange`: the device's slots are dense again."""

    device: str
    epoch: int


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
    | Change
    | Switch
    | WorkerGone
    | WorkerHung
    | AnchorGone
    | Left
    | CensusTaken
    | Adopted
    | Attached
    | Reserved
    | Loaded
    | Progressed
    | LoadFailed
    | Arranged
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
    """Kill the device's worker so that it can never write again. Answered by `WorkerGone`; if that does not come in
    time the device is lost, and `Drop` follows."""

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
    """Commit every slot that `staged` has beyond what is there, and `num_kv_blocks` blocks of KV, before a byte moves.

    `fresh`: devices whose arenas hold nothing usable and are made anew. `background`: while the engine serves, when
    nothing may be given back. Answered by `Reserved`.
    """

    epoch: int
    ticket: int
    staged: Layout
    num_kv_blocks: int
    fresh: tuple[str, ...]
    background: bool = False


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
    """Fill the planes of the KV heads that are new on `device`. `layout` says in which slots heads are now, on every
    device that is a source or the target."""

    device: str
    epoch: int
    planes: tuple[PlaneSource, ...]
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Fill the slots that `after` has beyond `before`, from where `moves` say. Answered by `Loaded`, `LoadFailed` or
    `WorkerGone`; not at all once the device was told to `Leave`, or to load something else.

    `fresh`: the arena holds nothing yet, so the replicated tensors are loaded too. `background`: the engine serves
    meanwhile, and its steps come first.
    """

    device: str
    epoch: int
    ticket: int
    before: Shard
    after: Shard
    fresh: bool
    moves: tuple[Move, ...]
    background: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrange:
    """Move units from the slots of `before` to those of `after`, which has no more units than `before`: the device
    gives up the others. Its manifest is void until `Record`. Answered by `Arranged` or `WorkerGone`."""

    device: str
    epoch: int
    before: Shard
    after: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Give back memory that `layout` does not use and build the group of the epoch. Each member answers `Formed`."""

    epoch: int
    ticket: int
    layout: Layout
    num_kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All of `layout` is in the arenas: say so in their manifests. Not urgent: what an older manifest says is true as
    well, since slots in use never move. (Where they do, by `Arrange`, or are given back, their manifest was voided.)"""

    epoch: int
    layout: Layout
    num_kv_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelLoad:
    """Stop loading: the change that wanted it is off. Not answered."""

    device: str
    ticket: int


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


Command = (
    Abort
    | Fence
    | Leave
    | TakeCensus
    | Adopt
    | Attach
    | Compact
    | Reserve
    | Load
    | CancelLoad
    | Restore
    | Arrange
    | Form
    | Record
    | Drop
    | Resume
    | Refuse
)
