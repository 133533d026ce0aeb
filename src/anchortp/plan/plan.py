"""The moves from one layout to another, as a value that can be printed, compared, and replayed.

A plan is played in stages, one after the other; most have one. Within a stage:
1. All moves run side by side, in any order. They read what was there when the stage began, and they write only
   slots that were free then: nothing is ever overwritten, so a plan that is cut short has destroyed nothing.
2. When all of them have arrived, the stage's drops free their slots.
A unit that changes its slot on the same device is a move too (from that device): it costs no link anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from anchortp.layout import Layout, UnitCatalog

# What moves beside the families of a layout. A plane is the KV cache of one KV head, and lies in that head's slot.
PLANE = "kv_plane"
REPLICATED = "replicated"  # all replicated tensors of the model together: one unit, slot 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FromHost:
    """The unit is read from a store: the checkpoint (or the KV mirror) in host memory or on a disk.

    `place` names it in the topology; "" stands for the one host of a plan made without a topology.
    """

    place: str = ""
    kind: Literal["host"] = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class FromPeer:
    """The unit is copied from another device's arena (or, if it is the same device, from another slot)."""

    device: str
    slot: int
    kind: Literal["peer"] = "peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Units `[unit, unit + num_units)` (all their tensors and layers) into the slots from `slot` on.

    A move carries whole units, or one byte range of a single unit that comes in parts over several routes: then
    `num_units` is 1 and it fills bytes `[first_byte, first_byte + num_bytes)` of the unit. The slots of a peer
    source are consecutive as well. `route`: names of the links it passes, in order; empty without a topology.
    """

    device: str
    family: str
    unit: int
    slot: int
    source: FromHost | FromPeer
    num_bytes: int
    num_units: int = 1
    first_byte: int = 0
    route: tuple[str, ...] = ()
    stage: int = 0

    @property
    def is_relocation(self) -> bool:
        """Within one device: through its own memory alone."""
        return isinstance(self.source, FromPeer) and self.source.device == self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Slots `[slot, slot + num_units)` of a device, which hold the units from `unit` on, are free after `stage`."""

    device: str
    family: str
    unit: int
    slot: int
    num_units: int = 1
    stage: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`moves` and `drops` turn what the devices hold in `before` into `after`. `reasons` say why, in words.

    `lost`: devices of `before` whose memory is gone. Devices of `before` that are neither lost nor in `after`
    still hold their memory, may be sources, and are free afterwards.
    `lost_bytes`: units whose last copy was on a device that is gone. `replica_bytes`: moves that make another
    copy of a unit that is still held, or a second copy of a lost one (KV heads whose group the new cut splits).
    Always `loaded_bytes + copied_bytes == lost_bytes + replica_bytes`; relocations within a device count in none.
    `replayed`: KV heads whose cache plane no living source holds; their sequences replay their tokens.
    `bound_s`: no plan into any balanced layout can be faster (0.0: not known).
    """

    before: Layout
    after: Layout
    moves: tuple[Move, ...]
    lost_bytes: int
    reasons: tuple[str, ...] = ()
    drops: tuple[Drop, ...] = ()
    lost: tuple[str, ...] = ()
    policy: str = ""
    replayed: tuple[int, ...] = ()
    bound_s: float = 0.0

    @property
    def loaded_bytes(self) -> int:
        return sum(m.num_bytes for m in self.moves if isinstance(m.source, FromHost))

    @property
    def copied_bytes(self) -> int:
        """Bytes copied from one device to another."""
        return sum(m.num_bytes for m in self.moves if isinstance(m.source, FromPeer) and not m.is_relocation)

    @property
    def relocated_bytes(self) -> int:
        return sum(m.num_bytes for m in self.moves if m.is_relocation)

    @property
    def replica_bytes(self) -> int:
        return self.loaded_bytes + self.copied_bytes - self.lost_bytes

    @property
    def num_stages(self) -> int:
        return 1 + max((step.stage for step in (*self.moves, *self.drops)), default=0)

    def moves_of(self, device: str) -> tuple[Move, ...]:
        return tuple(move for move in self.moves if move.device == device)

    def bytes_by_device(self) -> dict[str, int]:
        """Bytes that arrive at each device of the new layout, from anywhere but itself."""
        return _sums(self.after.devices, ((m.device, m.num_bytes) for m in self.moves if not m.is_relocation))

    def bytes_by_link(self) -> dict[str, int]:
        """Bytes that pass each link that is used at all."""
        return _sums((), ((link, m.num_bytes) for m in self.moves for link in m.route))


def _sums(keys: Iterable[str], items: Iterable[tuple[str, int]]) -> dict[str, int]:
    total = Counter(dict.fromkeys(keys, 0))
    for key, value in items:
        total[key] += value
    return dict(total)


def moves_between(before: Layout, after: Layout, units: UnitCatalog) -> tuple[Move, ...]:
    """Host loads for every filled slot of `after` that `before` does not already hold in that place."""
    moves = []
    for shard in after.shards:
        held = before[shard.device] if shard.device in before.devices else None
        for family in units.families:
            kept = held[family] if held else ()
            assert shard[family][: len(kept)] == kept, f"{shard.device}: {family} units would move"
            for slot in range(len(kept), len(shard[family])):
                moves.append(
                    Move(
                        device=shard.device,
                        family=family,
                        unit=shard[family][slot],
                        slot=slot,
                        source=FromHost(),
                        num_bytes=units.unit_bytes[family],
                    )
                )
    return tuple(moves)
