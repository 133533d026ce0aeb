"""What the controller and its workers say to each other. Tagged frozen structs over a `state.wire.Channel`.

A worker keeps no state between steps but its mappings: every step says all that it needs, so a spare process
can take over in the middle of a stream. What carries an epoch that is over is dropped by whoever receives it.
"""

from __future__ import annotations

import msgspec

from anchortp.engine.api import SampledToken
from anchortp.engine.faults import Strike
from anchortp.engine.scheduler import Batch


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# ------------------------------------------------------------------------------------ controller -> worker


class Assign(_Message):
    """Become the worker of `device`: connect to its anchor and take the lease. -> WorkerAttached"""

    device: str
    epoch: int
    runtime_dir: str
    model_folder: str
    dtype: str
    packed_weights: bool
    max_model_len: int
    max_batch_tokens: int
    kv_block_size: int
    kv_blocks: int
    num_threads: int
    collectives: str
    strikes: tuple[Strike, ...] = ()


class LeaveEpoch(_Message):
    """`epoch` begins: drop what belongs to an older one and renew the lease. -> EpochLeft"""

    epoch: int


class LoadUnits(_Message):
    """Fill the slots that `after` has beyond `before` (family -> units). -> LoadProgress..., LoadDone"""

    epoch: int
    before: dict[str, list[int]]
    after: dict[str, list[int]]
    fresh: bool


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
    """With the descriptor of the group's region. `shards`: (device, family -> units) in rank order. -> GroupFormed"""

    epoch: int
    shards: list[tuple[str, dict[str, list[int]]]]


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
    Assign | LeaveEpoch | MoveBlocks | LoadUnits | RestorePlanes | FormGroup | RunStep | SaveBlocks | HandOver | Stop
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
    """`num_bytes` of `total_bytes` of the present load have arrived."""

    epoch: int
    num_bytes: int
    total_bytes: int


class LoadDone(_Message):
    epoch: int
    num_bytes: int
    seconds: float


class LoadRefused(_Message):
    """The checkpoint cannot be read; `reason` says what to do."""

    epoch: int
    reason: str


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
    """From rank 0. `sampled`: by request id."""

    epoch: int
    step: int
    sampled: dict[str, SampledToken]


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
    """With one end of a socket pair: fork a process that serves it. Answered on that socket (SpareReady)."""


class ZygoteReady(_Message):
    pid: int


ToZygote = ForkSpare | Stop
FromZygote = ZygoteReady | WorkerFailed
