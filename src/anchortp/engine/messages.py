"""What the controller and its workers say to each other. Tagged frozen structs over a `state.wire.Channel`.

A worker keeps no state between steps but its mappings: every step says all that it needs, so a spare process
can take over in the middle of a stream. What carries an epoch that is over is dropped by whoever receives it.
"""

from __future__ import annotations

import msgspec

from anchortp.config import ModelConfig
from anchortp.engine.api import SampledToken
from anchortp.engine.faults import Strike
from anchortp.engine.scheduler import Batch


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# ------------------------------------------------------------------------------------ controller -> worker


class Assign(_Message):
    """Become the worker of `device`: connect to its anchor and take the lease. -> WorkerAttached

    `fingerprint`: of the weights that the arenas are to hold (`transfer.fingerprint`). What `model_folder` has on disk
    may be another model by now: `model` is what the engine started with, and a checkpoint of another fingerprint is
    refused when it is opened.

    `packed_folder`: where weights are kept as arenas hold them (`transfer.packed`); "": nowhere. `graphs`:
    capture decode steps, on GPUs. `attention`: as in `EngineConfig`. `kernels`: the library of our own, "": torch's, or
    `triton`'s.
    """

    device: str
    epoch: int
    runtime_dir: str
    model_folder: str
    model: ModelConfig
    fingerprint: str
    max_model_len: int
    max_batch_tokens: int
    kv_block_size: int
    kv_blocks: int
    num_threads: int
    collectives: str
    packed_folder: str = ""
    graphs: bool = True
    attention: str = "torch"
    kernels: str = ""
    triton: bool = False
    strikes: tuple[Strike, ...] = ()


class LeaveEpoch(_Message):
    """`epoch` begins: drop what belongs to an older one and renew the lease. -> EpochLeft"""

    epoch: int


class LoadPiece(msgspec.Struct, frozen=True, kw_only=True):
    """Where some bytes come from: a `plan.Move` to this device.

    Whole units `[unit, unit + num_units)`, into the slots from `slot` on; or (`num_units` 1) bytes `[first_byte,
    first_byte + num_bytes)` of one unit. A unit's bytes are its tensors in the order of `ModelUnits.tensors`, in
    each its layers. `family` may be `plan.plan.REPLICATED`: one unit, slot 0. `source`: "" is the host's
    checkpoint, else the device whose arena has the units in the slots from `source_slot` on (it may be this
    device). `link` names the queue to wait in and is reported with what it reached; "" stands for the source.
    """

    family: str
    unit: int
    slot: int
    num_bytes: int
    num_units: int = 1
    first_byte: int = 0
    source: str = ""
    source_slot: int = 0
    link: str = ""


class LoadUnits(_Message):
    """Bring weights into the arena, in the background. -> LoadProgress..., then LoadDone or LoadRefused

    Filled are the slots in which `after` (family -> units) has another unit than `before`, with `fresh` the
    replicated tensors too, and whatever `pieces` write beside that. Bytes that no piece brings come from the host.
    The slots must be committed. Other messages are served meanwhile; a step waits for each layer's bytes.

    `sums`: what units (`transfer.checksum.sum_key`) must add up to, where that is known. `pace`: 1.0 is as fast as
    possible; less is the share of the time in which bytes may move, in small bites, while steps are computed.
    It cancels an older load (as LeaveEpoch does), which is then not answered. `ticket` comes back in answers.
    `kv_blocks`: blocks that planes of the new KV heads will be given later; their pages are made ready on the way.
    """

    epoch: int
    before: dict[str, list[int]]
    after: dict[str, list[int]]
    fresh: bool
    pieces: list[LoadPiece] = []
    sums: dict[str, str] = {}
    pace: float = 1.0
    ticket: int = 0
    kv_blocks: list[int] = []


class CancelLoad(_Message):
    """Stop the load of this ticket, if it is the one that runs. Not answered."""

    ticket: int


class ArrangeUnits(_Message):
    """Move units of the arena from their slots in `before` to those in `after` (family -> units), KV heads with
    `blocks` of their planes. -> UnitsArranged"""

    epoch: int
    before: dict[str, list[int]]
    after: dict[str, list[int]]
    blocks: list[int]


class MoveBlocks(_Message):
    """Copy KV blocks within the arena, all planes of `heads` (in slot order): (from, to). -> BlocksMoved"""

    epoch: int
    heads: list[int]
    pairs: list[tuple[int, int]]


class RestorePlanes(_Message):
    """Fill the planes of KV heads that are new here. -> PlanesRestored

    `kv_heads`: per device its KV heads in slot order, this one's included. `from_peers`: (head, device), of which
    `blocks` are copied. `from_mirror`: heads of which `pairs` (block, mirror slot) are.
    """

    epoch: int
    kv_heads: dict[str, list[int]]
    from_peers: list[tuple[int, str]]
    blocks: list[int]
    from_mirror: list[int]
    pairs: list[tuple[int, int]]
    mirror_id: str


class SaveBlocks(_Message):
    """Copy the planes of `heads` of sealed blocks into the host's mirror: (block, mirror slot). -> BlocksSaved

    `mirror_id` names the host anchor whose arena the slots belong to; it changes when that anchor does.
    """

    epoch: int
    ticket: int
    heads: list[int]
    pairs: list[tuple[int, int]]
    mirror_id: str


class FormGroup(_Message):
    """With the descriptor of the group's region. `shards`: (device, family -> units) in rank order. -> GroupFormed

    `parts`: which part of the tokens this rank computes of experts that others hold too; see `ShareExperts`.
    """

    epoch: int
    shards: list[tuple[str, dict[str, list[int]]]]
    parts: dict[int, tuple[float, float]] | None = None


class ShareExperts(_Message):
    """From the next step on: of these expert units the rank computes just a part of the tokens (`layout.part_of`).

    It is sent to all ranks between the same two steps, so no token is computed twice or not at all.
    """

    epoch: int
    parts: dict[int, tuple[float, float]]


class MapPages(_Message):
    """These ranges of the weights' arena, which were committed ahead of need, are mapped now and not when they are
    written; in host memory only. Not answered."""

    epoch: int
    ranges: list[tuple[int, int]]


class RunStep(_Message):
    """Compute a batch. Rank 0 answers StepDone."""

    epoch: int
    batch: Batch


class HandOver(_Message):
    """The device has a new anchor: give it the descriptors of your arenas and take its lease. -> HandedOver

    `ranges`: what is committed, per arena name, in bytes.
    """

    epoch: int
    ranges: dict[str, list[tuple[int, int]]]


class Stop(_Message):
    """Exit."""


ToWorker = (
    Assign
    | LeaveEpoch
    | MoveBlocks
    | LoadUnits
    | CancelLoad
    | ArrangeUnits
    | RestorePlanes
    | FormGroup
    | ShareExperts
    | MapPages
    | RunStep
    | SaveBlocks
    | HandOver
    | Stop
)


# ------------------------------------------------------------------------------------ worker -> controller


class SpareReady(_Message):
    """The first message of a process that was forked as a spare."""

    pid: int


class WorkerAttached(_Message):
    device: str
    epoch: int


class EpochLeft(_Message):
    epoch: int


class LoadProgress(_Message):
    """`num_bytes` of `total_bytes` of the present load have arrived. `links`: name -> (bytes, bytes per second)."""

    epoch: int
    ticket: int
    num_bytes: int
    total_bytes: int
    links: dict[str, tuple[int, float]] = {}


class LoadDone(_Message):
    """Every byte is there and, where the sum was known, checked. `num_bytes`: all that moved, `peer_bytes` of it
    from other devices' arenas. `sums`: of the units that came whole. `links`: name -> (bytes, bytes per second
    while it was busy). `rerouted`: in words, what did not come from the source it was planned from, and why."""

    epoch: int
    ticket: int
    num_bytes: int
    seconds: float
    peer_bytes: int = 0
    sums: dict[str, str] = {}
    links: dict[str, tuple[int, float]] = {}
    rerouted: list[str] = []


class LoadRefused(_Message):
    """A source cannot be read, and no other has the bytes; the slots are not to be believed. `reason` says what to
    do. `device`: the peer that failed, "" if it was the host."""

    epoch: int
    ticket: int
    reason: str
    device: str = ""


class UnitsArranged(_Message):
    epoch: int


class BlocksMoved(_Message):
    epoch: int


class PlanesRestored(_Message):
    """`ok` is false when a source could not be read, for `reason`; the planes are then not to be believed."""

    epoch: int
    ok: bool
    copied_bytes: int = 0
    restored_bytes: int = 0
    reason: str = ""


class BlocksSaved(_Message):
    """`ok` is false when the mirror could not be reached."""

    ticket: int
    ok: bool


class GroupFormed(_Message):
    epoch: int


class StepDone(_Message):
    """From rank 0. `sampled`: by request id.

    `expert_load`, of a mixture of experts and not in every step: int32 `[layers, experts]` in this machine's byte
    order, the tokens that each expert has had since the last report of this epoch.
    """

    epoch: int
    step: int
    sampled: dict[str, SampledToken]
    expert_load: bytes = b""


class HandedOver(_Message):
    ok: bool
    reason: str = ""


class WorkerFailed(_Message):
    """The last words of a worker that meets an error it does not understand; it exits."""

    reason: str


FromWorker = (
    SpareReady
    | WorkerAttached
    | EpochLeft
    | LoadProgress
    | LoadDone
    | LoadRefused
    | UnitsArranged
    | BlocksMoved
    | PlanesRestored
    | BlocksSaved
    | GroupFormed
    | StepDone
    | HandedOver
    | WorkerFailed
)


# ----------------------------------------------------------------------------------- controller <-> zygote


class ForkSpare(_Message):
    """With one end of a socket pair, and the `fd` of a `DeathNotice`: fork a process that serves the one and holds the
    other. Answered on that socket (SpareReady).

    `gpus`: on which it makes its contexts before it answers, so that becoming a worker does not wait for that. `fused`:
    the model for which it compiles and loads Triton's kernels there; None: it has others.
    """

    gpus: tuple[int, ...] = ()
    fused: ModelConfig | None = None


class ZygoteReady(_Message):
    pid: int


ToZygote = ForkSpare | Stop
FromZygote = ZygoteReady | WorkerFailed
