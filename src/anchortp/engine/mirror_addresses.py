"""Where every byte of the KV mirror lies in its arena in host memory. Pure arithmetic; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from anchortp.errors import ConfigError
from anchortp.layout import KVAddresses
from anchortp.layout.addresses import ALIGN_BYTES, Range

HOST = "host"  # the device whose anchor has the mirror
MIRROR_ARENA = "kv-mirror"


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorAddresses:
    """Byte offsets in the mirror: `num_slots` slots, each room for one block of *all* KV heads.

    A slot is `[num_kv_heads][num_layers][2 (keys, values)][block_size, head_dim]`, whoever computes the heads:
    the copy of a head is one run of bytes at the same place for every layout, so each device writes its own
    heads and any device can read them. Slots follow one another without gaps.
    """

    kv: KVAddresses
    num_slots: int

    @classmethod
    def within(cls, kv: KVAddresses, budget_bytes: int) -> MirrorAddresses:
        """As many slots as `budget_bytes` of whole pages hold.

        Raises ConfigError when that is none.
        """
        slot_bytes = cls(kv=kv, num_slots=0).slot_bytes
        num_slots = budget_bytes // ALIGN_BYTES * ALIGN_BYTES // slot_bytes
        if num_slots < 1:
            least_bytes = -(-slot_bytes // ALIGN_BYTES) * ALIGN_BYTES
            raise ConfigError(
                f"a KV mirror of {budget_bytes} bytes holds no block of {kv.block_size} tokens; give it at least "
                f"{least_bytes} bytes, or turn it off with --kv-mirror off."
            )
        return cls(kv=kv, num_slots=num_slots)

    @classmethod
    def of(cls, kv: KVAddresses, reserved_bytes: int) -> MirrorAddresses:
        """Of an arena of that size."""
        return cls(kv=kv, num_slots=reserved_bytes // cls(kv=kv, num_slots=0).slot_bytes)

    @property
    def head_bytes(self) -> int:
        """One block of one KV head."""
        return self.kv.block_bytes

    @property
    def slot_bytes(self) -> int:
        return self.kv.config.num_kv_heads * self.kv.block_bytes

    @property
    def reserved_bytes(self) -> int:
        """The whole mirror in whole pages: what its arena reserves, and commits when every slot is in use."""
        return -(-self.num_slots * self.slot_bytes // ALIGN_BYTES) * ALIGN_BYTES

    def slot_range(self, slot: int) -> Range:
        assert 0 <= slot < self.num_slots, (slot, self.num_slots)
        return (slot * self.slot_bytes, (slot + 1) * self.slot_bytes)

    def head_range(self, slot: int, head: int) -> Range:
        """The bytes of one head in one slot."""
        assert 0 <= head < self.kv.config.num_kv_heads, (head, self.kv.config.num_kv_heads)
        start = self.slot_range(slot)[0] + head * self.head_bytes
        return (start, start + self.head_bytes)
