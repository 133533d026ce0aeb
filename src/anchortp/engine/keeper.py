"""[controller] What keeps the KV cache through faults and restarts: the host's mirror and the block index.

Both live in the host anchor's memory. The *mirror* has copies of sealed blocks, made by the workers behind the
computation; after a loss, planes that no device holds come back from it. The *index* says which content each block
of the devices has, so that the next engine finds the prefix cache warm.

Only this class knows tickets, slots and mirror ids; the controller tells it what happens, and passes its messages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from anchortp.config import EngineConfig
from anchortp.devices import parse_device
from anchortp.engine import messages as m
from anchortp.engine.blocks import BlockPool
from anchortp.engine.kv_index import NOT_WHOLE, KVIndex
from anchortp.engine.mirror import Mirror
from anchortp.engine.mirror_addresses import HOST, MIRROR_ARENA, MirrorAddresses
from anchortp.engine.plane import StatePlane
from anchortp.engine.scheduler import Scheduler
from anchortp.errors import AnchorTPError, ManifestInvalid
from anchortp.layout import KV, Layout
from anchortp.recovery import events as ev

log = logging.getLogger("anchortp.engine")

INDEX_ARENA = "kv-index"
HOST_ATTEMPTS = 3
MAX_SAVES_PER_STEP = 64  # blocks; a long prompt's are copied over several steps, none of which waits noticeably
# Of the contents that no running sequence holds so many bytes, of all KV heads, are moved while everybody waits, which
# takes some 30 ms; the least recently used beyond that are computed anew when somebody asks for them. By kind of
# device: pages of host memory are made first, at a gigabyte a second, and a GPU's link carries 20.
MAX_CACHED_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


class KVKeeper:
    """`send(device, message)` reaches a worker. Everything here returns at once, but for opening the host anchor."""

    def __init__(
        self,
        config: EngineConfig,
        fingerprint: str,
        plane: StatePlane,
        pool: BlockPool,
        scheduler: Scheduler,
        send: Callable[[str, Any], None],
    ):
        self._config = config
        self._fingerprint = fingerprint
        self._plane = plane
        self._pool = pool
        self._scheduler = scheduler
        self._send = send
        self._mirror = Mirror(config.kv_mirror_slots) if config.kv_mirror_slots else None
        self._mirror_id = ""
        self._index: KVIndex | None = None
        self._tickets: dict[int, tuple[set[str], list[int]]] = {}  # who has yet to answer, and the slots
        self._last_ticket = 0
        self._num_restored = 0
        self._restored: set[bytes] = set()  # contents whose planes the mirror gives back in this recovery
        self._has_moved = False  # planes, in this recovery
        max_bytes = MAX_CACHED_BYTES["cuda" if parse_device(config.devices[0]).kind == "cuda" else "cpu"]
        self._max_cached = max_bytes // (plane.kv.block_bytes * plane.kv.config.num_kv_heads)
        self._epoch = NOT_WHOLE  # for which the cache is what the index says

    # ----------------------------------------------------------------------------------- opening the host anchor

    def open(self) -> None:
        """Connects to the host anchor, starting one if there is none. The index found is of this model and size,
        or made anew. Raises BudgetExceeded: a running host anchor has too little memory."""
        config = self._config
        index_bytes = KVIndex.bytes_needed(config.kv_blocks)
        mirror_bytes = 0
        if self._mirror is not None:
            mirror_bytes = MirrorAddresses(kv=self._plane.kv, num_slots=config.kv_mirror_slots).reserved_bytes
        client = self._plane.open_host(HOST, index_bytes + mirror_bytes, keep=INDEX_ARENA)
        with self._plane.host_arena(HOST, INDEX_ARENA, index_bytes, keep=True) as arena:
            memory = memoryview(arena.map())
        model = bytes.fromhex(self._fingerprint)
        shape = {"num_blocks": config.kv_blocks, "block_size": config.kv_block_size, "model": model}
        try:
            self._index = KVIndex.open(memory, **shape)
        except ManifestInvalid as error:
            log.info("%s", error)
            self._index = KVIndex.format(memory, **shape)
        if self._mirror is not None:
            self._plane.host_arena(HOST, MIRROR_ARENA, mirror_bytes, keep=False).close()
            self._mirror_id = client.welcome.anchor_id

    def attach(self, epochs: set[int]) -> bool:
        """Takes over the blocks of an earlier engine if its index and all manifests are of one epoch."""
        assert self._index is not None
        entries = self._index.entries() if epochs == {self._index.epoch} else []
        self._index.clear()
        self._pool.adopt(entries)
        if entries:
            log.info("the contents of %d KV blocks of an earlier engine are taken over", len(entries))
        return bool(entries)

    def host_gone(self) -> None:
        """The host anchor crashed: a new one, an empty mirror, and the index written again."""
        self._tickets.clear()
        if self._mirror is not None:
            self._mirror.clear()
        if not self._open_again():
            self._mirror = None
            self._close_index()
            return
        assert self._index is not None
        self._index.clear()
        sealed = self._pool.sealed()
        for block_id, block_hash in sealed:
            self._index.put(block_id, block_hash)
        self._index.set_epoch(self._epoch)
        self._pool.offer(block_hash for _, block_hash in sealed)

    def _open_again(self) -> bool:
        """A new host anchor may die while it is being opened: the next one has another chance, but not for ever."""
        for attempt in range(HOST_ATTEMPTS):
            self._close_index()
            try:
                self.open()
                return True
            except AnchorTPError as error:
                log.warning("the host's anchor cannot be opened, attempt %d: %s", attempt + 1, error)
        log.warning("no mirror and no index of KV blocks from now on")
        return False

    def close(self) -> None:
        self._close_index()

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None

    def changed(self, block_id: int, block_hash: bytes | None) -> None:
        """What the pool reports: see `BlockPool.on_change`."""
        if self._index is not None:
            self._index.update(block_id, block_hash)
        if self._mirror is not None and block_hash is not None:
            self._mirror.touch(block_hash)

    # ------------------------------------------------------------------------------------------ while serving

    def save_sealed(self, layout: Layout, epoch: int) -> None:
        """Orders copies of what was sealed since, before the next step can write to any of these blocks.

        One order at a time, so a worker that is behind is not buried in them. A KV head that several devices
        hold is saved by the first.
        """
        if self._mirror is None or self._tickets:
            return
        pairs = self._mirror.start(self._pool.take_sealed(MAX_SAVES_PER_STEP))
        if not pairs:
            return
        self._last_ticket += 1
        waiting: set[str] = set()
        saved: set[int] = set()
        self._tickets[self._last_ticket] = (waiting, [slot for _, slot in pairs])
        for shard in layout.shards:
            heads = [head for head in shard[KV] if head not in saved]
            saved |= set(heads)
            if heads:
                waiting.add(shard.device)
                order = m.SaveBlocks(
                    epoch=epoch, ticket=self._last_ticket, heads=heads, pairs=pairs, mirror_id=self._mirror_id
                )
                self._send(shard.device, order)

    def saved(self, device: str, ticket: int, ok: bool) -> None:
        """A block counts as mirrored when every device that saves heads of it has copied them."""
        if self._mirror is None or ticket not in self._tickets:
            return
        waiting, slots = self._tickets[ticket]
        if not ok:
            del self._tickets[ticket]
            self._mirror.abandon(slots)  # not offered again: the host's end is heard of in its own way
            return
        waiting.discard(device)
        if not waiting:
            del self._tickets[ticket]
            self._mirror.done(slots)

    # --------------------------------------------------------------------------------------- during a recovery

    def fault(self) -> None:
        """The group is gone: copies that were not answered are void, and made again if their blocks last.

        What was restored so far stays restored: nobody writes to the cache until the engine serves again.
        """
        self._tickets.clear()
        if self._mirror is not None:
            self._pool.offer(self._mirror.abandon())
        self._set_epoch(NOT_WHOLE)

    def compact(self, command: ev.Compact, layout: Layout) -> None:
        pairs = self._scheduler.resize(command.num_kv_blocks)
        for device in command.devices:
            self._send(device, m.MoveBlocks(epoch=command.epoch, heads=list(layout[device][KV]), pairs=pairs))

    def restore(self, command: ev.Restore) -> None:
        self._has_moved = True
        peers = [(plane.head, plane.device) for plane in command.planes if plane.device is not None]
        from_mirror = [plane.head for plane in command.planes if plane.device is None]
        pairs = self._mirrored_blocks() if from_mirror else []
        if from_mirror:
            # A later order of the same recovery finds no more than an earlier one: both only lose contents.
            slots = dict(pairs)
            self._restored = {content for block_id, content in self._pool.sealed() if block_id in slots}
        order = m.RestorePlanes(
            epoch=command.epoch,
            kv_heads={shard.device: list(shard[KV]) for shard in command.layout.shards},
            from_peers=peers,
            blocks=self.worth_moving() if peers else [],
            from_mirror=from_mirror,
            pairs=pairs,
            mirror_id=self._mirror_id,
        )
        self._send(command.device, order)

    def worth_moving(self) -> list[int]:
        """The blocks that go along where a KV head goes. While nothing is scheduled a later answer has no block that
        an earlier one had not: what sequences let go of is the most recently used."""
        return self._pool.occupied(self._max_cached)

    def _mirrored_blocks(self) -> list[tuple[int, int]]:
        if self._mirror is None:
            return []
        worth = set(self.worth_moving())
        found = ((block_id, self._mirror.find(content)) for block_id, content in self._pool.sealed())
        return [(block_id, slot) for block_id, slot in found if slot is not None and block_id in worth]

    def resume(self, command: ev.Resume) -> None:
        """The cache is what the recovery left of it; from here on the index is believed again."""
        if command.kv is ev.KVState.lost:
            self._scheduler.on_kv_lost()
        elif command.kv is ev.KVState.mirrored:
            self._num_restored += len(self._restored)
            found = map(self._pool.block_of, self._restored)
            self._scheduler.on_kv_lost(whole={block_id for block_id in found if block_id is not None})
        elif self._has_moved:
            self._pool.keep_only(set(self.worth_moving()))
        self._restored, self._has_moved = set(), False
        self._scheduler.resize(command.num_kv_blocks)
        self._scheduler.on_recovered()
        self._set_epoch(command.epoch)

    def _set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if self._index is not None:
            self._index.set_epoch(epoch)

    # --------------------------------------------------------------------------------------------- reporting

    def counts(self) -> dict[str, int]:
        if self._mirror is None:
            return {"mirror_slots": 0, "blocks_mirrored": 0, "blocks_restored": 0, "mirror_evicted": 0}
        return {
            "mirror_slots": self._mirror.num_slots,
            "blocks_mirrored": self._mirror.num_whole,
            "blocks_restored": self._num_restored,
            "mirror_evicted": self._mirror.num_evicted,
        }
