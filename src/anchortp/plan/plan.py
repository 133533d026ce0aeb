"""The moves from one layout to another, as a value that can be printed, compared, and replayed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from anchortp.layout import FAMILIES, Layout, ModelUnits


@dataclass(frozen=True, slots=True, kw_only=True)
class FromHost:
    """The unit is read from the host: the checkpoint, through the page cache."""

    kind: Literal["host"] = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class FromPeer:
    """The unit is copied from another device's arena."""

    device: str
    slot: int
    kind: Literal["peer"] = "peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One unit (all its tensors, all layers; `num_bytes` in all) into one slot of one device."""

    device: str
    family: str
    unit: int
    slot: int
    source: FromHost | FromPeer
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`moves` turn what the devices of `after` hold in `before` into `after`. `reasons` say why, in words.

    `lost_bytes`: units whose last copy was on a device that is gone. `replica_bytes`: moves that make another
    copy of a unit that is still held, or a second copy of a lost one (KV heads whose group the new cut splits).
    Always `loaded_bytes + copied_bytes == lost_bytes + replica_bytes`.
    """

    before: Layout
    after: Layout
    moves: tuple[Move, ...]
    lost_bytes: int
    reasons: tuple[str, ...] = ()

    @property
    def loaded_bytes(self) -> int:
        return sum(m.num_bytes for m in self.moves if isinstance(m.source, FromHost))

    @property
    def copied_bytes(self) -> int:
        return sum(m.num_bytes for m in self.moves if isinstance(m.source, FromPeer))

    @property
    def replica_bytes(self) -> int:
        return self.loaded_bytes + self.copied_bytes - self.lost_bytes

    def moves_of(self, device: str) -> tuple[Move, ...]:
        return tuple(move for move in self.moves if move.device == device)

    def bytes_by_device(self) -> dict[str, int]:
        """Bytes that arrive at each device of the new layout, from anywhere."""
        arriving = Counter({device: 0 for device in self.after.devices})
        for move in self.moves:
            arriving[move.device] += move.num_bytes
        return dict(arriving)


def moves_between(before: Layout, after: Layout, units: ModelUnits) -> tuple[Move, ...]:
    """Host loads for every filled slot of `after` that `before` does not already hold in that place."""
    moves = []
    for shard in after.shards:
        held = before[shard.device] if shard.device in before.devices else None
        for family in FAMILIES:
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
