"""[controller] The state plane as the controller sees it: one anchor per device, its arenas, its manifest."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anchortp.arena import IntervalSet, MemfdArena, round_down, round_up
from anchortp.arena.intervals import Range
from anchortp.config import EngineConfig
from anchortp.errors import (
    AnchorRunning,
    AnchorTPError,
    BudgetExceeded,
    ChannelClosed,
    ChannelTimeout,
    ManifestInvalid,
    StateError,
    WireError,
)
from anchortp.layout import (
    KV,
    KVAddresses,
    Layout,
    ModelUnits,
    Shard,
    WeightAddresses,
    empty_shard,
    shard_from_dict,
)
from anchortp.recovery.events import DeviceFound, Reserve
from anchortp.state.client import AnchorClient
from anchortp.state.launch import anchor_socket, start_anchor
from anchortp.state.manifest import Manifest
from anchortp.state.process import kill, open_pidfd, wait_gone
from anchortp.state.wire import remove_stale

log = logging.getLogger("anchortp.engine")

WEIGHTS_ARENA, KV_ARENA, SLOTS_ARENA = "weights", "kv", "slots"
PING_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 2.0
HOST_SLACK_BYTES = 1 << 20
AHEAD_BYTES = 1 << 20  # committed ahead at a time, or a page if that is more: less than a millisecond


@dataclass(slots=True, eq=False)
class _Committed:
    """What an anchor has committed: for which slots, by family; which pages, by arena; and which of the weights' pages
    were committed ahead of need. `dropped`: those that were given back while the worker may still have been mapping
    them, which takes them again. They are given back once more when it is known to be through. `named`: the slots that
    the manifest says are full."""

    slots: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)
    pages: dict[str, IntervalSet] = field(
        default_factory=lambda: {WEIGHTS_ARENA: IntervalSet(), KV_ARENA: IntervalSet()}
    )
    ahead: IntervalSet = field(default_factory=IntervalSet)
    dropped: IntervalSet = field(default_factory=IntervalSet)


class StatePlane:
    """Connections to the anchors of one engine's devices. All calls are synchronous and bounded in time.

    `watch(fd, callback)` / `unwatch(fd)`: the controller's selector. `on_gone(device)` is called when an
    anchor's connection ends.
    """

    def __init__(
        self,
        config: EngineConfig,
        units: ModelUnits,
        fingerprint: str,
        *,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        on_gone: Callable[[str], None],
    ):
        self._config = config
        self._units = units
        self._fingerprint = fingerprint
        self._watch, self._unwatch, self._on_gone = watch, unwatch, on_gone
        self.weights = WeightAddresses(units=units, page_bytes=config.page_bytes)
        self.kv = KVAddresses(
            config=units.config,
            block_size=config.kv_block_size,
            num_blocks=config.kv_blocks,
            page_bytes=config.page_bytes,
        )
        self._clients: dict[str, AnchorClient] = {}
        self._watched: dict[str, int] = {}  # a client that gave up has closed its descriptor itself
        self._committed: dict[str, _Committed] = {}  # by device
        self._manifests: dict[str, Manifest] = {}  # of an earlier engine, as found by `open`
        self._ours = _Started(Path(config.runtime_dir))
        self._begun: list[int] = []  # anchors started here; one may die before anybody is connected to it
        self._ended: list[int] = []  # anchors whose connection has ended

    # ------------------------------------------------------------------------------------------ finding

    def open(self, device: str) -> DeviceFound:
        """Connects to the device's anchor, starting one if there is none, and reads what it holds."""
        self.ensure_anchor(device)
        client = self._connect(device)
        # What collectives take in device memory is not the planner's to give away.
        budget_bytes = client.welcome.budget_bytes - self._config.peer_slots_bytes
        return DeviceFound(device=device, budget_bytes=budget_bytes, shard=self._held(device, client))

    def newest_epoch(self) -> int:
        return max(client.welcome.epoch for client in self._clients.values())

    def ensure_anchor(self, device: str, budget_bytes: int | None = None) -> None:
        """Starts an anchor unless one runs. Blocks until it listens; may run on any thread.

        `budget_bytes`: of an anchor that has to be started; by default a device's.
        """
        with (
            contextlib.suppress(ChannelClosed),
            AnchorClient.connect(self._config.runtime_dir, device, role="tool", timeout_s=PING_TIMEOUT_S),
        ):
            return  # one that is started only to say so would be left as a zombie
        with contextlib.suppress(AnchorRunning):
            pid = start_anchor(
                device=device,
                budget_bytes=budget_bytes or self._config.device_memory_bytes,
                runtime_dir=self._config.runtime_dir,
            )
            self._begun.append(pid)
            self._ours.add(device, pid)

    def _connect(self, device: str) -> AnchorClient:
        client = AnchorClient.connect(self._config.runtime_dir, device, role="controller", timeout_s=PING_TIMEOUT_S)
        self._clients[device] = client
        self._watched[device] = client.fileno()
        self._watch(client.fileno(), lambda: self._gone(device, client))
        return client

    def reconnect(self, device: str, epoch: int) -> None:
        """To the anchor that took the place of one that crashed."""
        client = self._connect(device)
        try:
            client.fence(epoch)
        except WireError:
            self._give_up(device)
            raise

    def _held(self, device: str, client: AnchorClient) -> Shard | None:
        """What the manifest says is in the arena, if it is this model's, laid out as this engine would."""
        try:
            manifest = client.get_manifest()
        except ManifestInvalid as error:
            log.warning("%s: %s", device, error)
            return None
        if manifest is None:
            return None
        expected = {WEIGHTS_ARENA: self.weights.reserved_bytes}
        same_arena = expected.items() <= manifest.arenas.items()
        if manifest.model != self._fingerprint or set(manifest.shards) != set(self._units.families) or not same_arena:
            log.info("%s holds another model (or other settings); it is loaded anew", device)
            return None
        shard = shard_from_dict(device, manifest.shards)
        if not any(shard.slots):
            return None
        found = {arena.name: IntervalSet(arena.ranges) for arena in client.status().arenas}
        pages = {name: found.get(name, IntervalSet()) for name in (WEIGHTS_ARENA, KV_ARENA)}
        slots = _counts(shard)
        if self._weight_pages(slots) - pages[WEIGHTS_ARENA]:
            log.warning("%s: its manifest names memory that it does not have; it is loaded anew", device)
            return None
        self._manifests[device] = manifest
        self._committed[device] = _Committed(slots=slots, pages=pages, named=slots.copy())
        return shard

    def found_kv(self) -> tuple[int, set[int]]:
        """Of the KV planes that `open` found: how many blocks they have, and the epochs of their manifests.

        (0, ...) unless all agree with each other and with this engine's settings.
        """
        found = list(self._manifests.values())
        epochs = {manifest.epoch for manifest in found}
        blocks = {manifest.num_kv_blocks for manifest in found}
        sizes = {manifest.kv_block_size for manifest in found} | {m.arenas.get(KV_ARENA) for m in found}
        if len(blocks) != 1 or sizes != {self._config.kv_block_size, self.kv.reserved_bytes}:
            return 0, epochs
        return blocks.pop(), epochs

    def _gone(self, device: str, client: AnchorClient) -> None:
        if self._clients.get(device) is client:
            self._close(device)
            self._on_gone(device)

    def _close(self, device: str) -> None:
        client = self._clients.pop(device, None)
        if client is not None:
            self._unwatch(self._watched.pop(device))
            client.close()
            self._ended.append(client.welcome.pid)
        self._reap(timeout_s=0.0)

    def _give_up(self, device: str) -> None:
        """After a WireError. An anchor that is stuck is fenced: it must not stand in a new one's way."""
        client = self._clients.get(device)
        if client is not None:
            with contextlib.suppress(ProcessLookupError):
                pidfd = open_pidfd(client.welcome.pid)
                try:
                    kill(pidfd, signal.SIGKILL)
                    wait_gone(pidfd, STOP_TIMEOUT_S)
                finally:
                    os.close(pidfd)
        self._close(device)

    def _reap(self, timeout_s: float) -> None:
        """Collects anchors that have ended: they are orphans, and this process is their subreaper.

        One that was started by someone else is not our child, and one that still runs is left alone.
        """
        deadline_s = time.monotonic() + timeout_s
        for pid in list(self._ended):
            if _collect(pid, max(0.0, deadline_s - time.monotonic())):
                self._ended.remove(pid)
        for pid in list(self._begun):
            if _collect(pid, 0.0):
                self._begun.remove(pid)

    # --------------------------------------------------------------------------------------- the host's anchor

    def open_host(self, host: str, budget_bytes: int, keep: str) -> AnchorClient:
        """Connects to the host's anchor, starting one with `budget_bytes` (and page rounding) if there is none.

        Of what an earlier engine left there only the arena `keep` stays. If that engine started the anchor, with
        less memory than this one needs, another anchor takes its place.
        """
        self._close(host)  # a connection that broke while it was being opened
        budget_bytes += HOST_SLACK_BYTES
        self.ensure_anchor(host, budget_bytes)
        client = self._connect(host)
        if client.welcome.budget_bytes < budget_bytes and self._ours.includes(host, client.welcome.pid):
            self._shutdown(host)
            self.ensure_anchor(host, budget_bytes)
            client = self._connect(host)
        for arena in client.status().arenas:
            if arena.name != keep:
                client.drop_arena(arena.name, client.welcome.epoch)
        return client

    def host_arena(self, host: str, name: str, num_bytes: int, *, keep: bool) -> MemfdArena:
        """An arena of the host's anchor, all of it committed. `keep`: the one of an earlier engine, if it has this
        size; else a new one. The caller closes it. Raises BudgetExceeded."""
        client = self._clients[host]
        epoch = client.welcome.epoch
        found = {arena.name: arena.reserved_bytes for arena in client.status().arenas}
        if name in found and not (keep and found[name] == round_up(num_bytes)):
            client.drop_arena(name, epoch)
            del found[name]
        if name in found:
            return client.open_arena(name, epoch)
        arena = client.create_arena(name, num_bytes, epoch)
        try:
            client.commit(name, [(0, num_bytes)], epoch)
        except BudgetExceeded:
            arena.close()
            client.drop_arena(name, epoch)
            raise
        return arena

    # ------------------------------------------------------------------------------------------- census

    def census(self, devices: tuple[str, ...], epoch: int) -> tuple[str, ...]:
        """Raises the epoch on every anchor, which voids all older leases; returns those that answered."""
        alive = []
        for device in devices:
            client = self._clients.get(device)
            if client is None:
                continue
            try:
                client.fence(epoch)
                alive.append(device)
            except WireError as error:
                log.info("%s: its anchor does not answer: %s", device, error)
                self._give_up(device)
        return tuple(alive)

    def drop(self, device: str) -> None:
        """Forgets a device, and stops its anchor if that still answers: a device that is out holds no memory."""
        if device in self._clients:
            self._shutdown(device)
        else:
            self.stop_started(device)

    def _shutdown(self, device: str) -> None:
        try:
            self._clients[device].shutdown()
        except ChannelTimeout:
            self._give_up(device)
        except AnchorTPError as error:
            log.info("%s: its anchor has ended: %s", device, error)
        self._close(device)

    def stop_started(self, device: str) -> None:
        """Ends the device's anchor if an engine (not a person) started it, whether it is connected or not."""
        if device not in self._clients:
            try:
                self._connect(device)
            except AnchorTPError:
                remove_stale(anchor_socket(self._config.runtime_dir, device))
                return  # there is none
        if self._ours.includes(device, self._clients[device].welcome.pid):
            self._shutdown(device)
        else:
            self._close(device)

    # ---------------------------------------------------------------------------------------- reserving

    def reserve(self, command: Reserve) -> str | None:
        """Commits every slot of the staged layout before a byte moves. Returns "" or the refusal, in words.

        What it no longer needs is given back first, except in the background: a load that was cancelled may still
        write there. None: an anchor went away meanwhile; `on_gone` was called, which starts the recovery again.
        """
        for shard in command.staged.shards:
            try:
                self._reserve(shard, command)
            except BudgetExceeded as error:
                return str(error)
            except WireError as error:
                self._went_away(shard.device, error)
                return None
        return ""

    def settle(self, layout: Layout, num_kv_blocks: int, epoch: int) -> bool:
        """Gives back the memory of slots that `layout` does not use, and commits `num_kv_blocks` blocks of KV in the
        others. False: an anchor went away meanwhile, as in `reserve`. Raises BudgetExceeded."""
        for shard in layout.shards:
            try:
                self._resize(shard.device, _counts(shard), num_kv_blocks, epoch)
            except WireError as error:
                self._went_away(shard.device, error)
                return False
        return True

    def commit_ahead(self, slots: Mapping[str, Counter[str]], epoch: int) -> Iterator[dict[str, list[Range]]]:
        """Commits the weights' slots that devices are likely to need next, and takes their memory from the system: on a
        host that and its mapping take ten times as long as the copy into it. A little at each `next`, which says where
        in the arena of which device it was: the worker may map it.

        Only budget that nobody uses is taken. Where there is no more, the device goes without, and whatever needs it
        has it back. An anchor that went away, or is stuck, is reported as by `reserve`.
        """
        work = {device: self._ahead_of(device, counts, epoch) for device, counts in slots.items()}
        while work:
            done = {}
            for device, pieces in list(work.items()):
                try:
                    done[device] = next(pieces)
                except StopIteration:
                    del work[device]
                except (BudgetExceeded, StateError) as error:
                    log.info("%s: no memory is made ready for a loss: %s", device, error)
                    del work[device]
                except WireError as error:
                    del work[device]
                    self._went_away(device, error)
            if done:
                yield done

    def ready_bytes(self, device: str) -> int:
        """What `commit_ahead` has made ready on a device."""
        return self._committed[device].ahead.total if device in self._committed else 0

    def _ahead_of(self, device: str, slots: Counter[str], epoch: int) -> Iterator[list[Range]]:
        client, held = self._client(device), self._committed[device]
        wanted = self._weight_pages(slots)
        if useless := (held.ahead | held.dropped) - wanted:
            client.decommit(WEIGHTS_ARENA, list(useless), epoch)
            held.pages[WEIGHTS_ARENA] -= useless
            held.ahead -= useless
        held.dropped = IntervalSet()
        # Also what is committed already: a worker that came since has not mapped it.
        for piece in _pieces(wanted - self._weight_pages(held.slots), max(AHEAD_BYTES, self._config.page_bytes)):
            client.commit_now(WEIGHTS_ARENA, piece, epoch)
            held.ahead |= IntervalSet(piece)
            held.pages[WEIGHTS_ARENA] |= IntervalSet(piece)
            yield piece

    def _went_away(self, device: str, error: WireError) -> None:
        log.info("%s: its anchor went away while memory was reserved: %s", device, error)
        self._give_up(device)
        self._on_gone(device)

    def _client(self, device: str) -> AnchorClient:
        if device not in self._clients:
            raise ChannelClosed(f"{device} has no anchor")
        return self._clients[device]

    def _reserve(self, shard: Shard, command: Reserve) -> None:
        device, client = shard.device, self._client(shard.device)
        if device in command.fresh:
            self._recreate(client, command.epoch)
        if self._config.peer_slots_bytes:
            self._reserve_slots(client, self._config.peer_slots_bytes, command.epoch)
        slots = _counts(shard)
        if command.background:
            slots |= self._committed[device].slots
        self._resize(device, slots, command.num_kv_blocks, command.epoch)

    def _resize(self, device: str, slots: Counter[str], num_kv_blocks: int, epoch: int) -> None:
        """From the pages that are committed to those which `slots` and `num_kv_blocks` touch, and, if there is budget
        for them too, those that were committed ahead.

        A page belongs to two slots where these do not end on its edge, and is given back with the last of them.
        """
        client, held = self._client(device), self._committed[device]
        if held.named - slots:  # an engine that begins in between must not take empty memory for weights
            self._name(client, empty_shard(device), 0, epoch)
        want = self._pages_of(slots, num_kv_blocks)
        held.ahead -= want[WEIGHTS_ARENA]
        self._give_back(client, held, want, epoch)
        try:
            self._commit_missing(client, held, want, epoch)
        except BudgetExceeded:
            held.dropped |= held.ahead
            held.ahead = IntervalSet()
            self._give_back(client, held, want, epoch)
            self._commit_missing(client, held, want, epoch)
        held.slots = slots

    def _give_back(self, client: AnchorClient, held: _Committed, want: dict[str, IntervalSet], epoch: int) -> None:
        for name, wanted in want.items():
            unused = held.pages[name] - wanted
            if name == WEIGHTS_ARENA:
                unused = (unused | held.dropped) - (wanted | held.ahead)
            if unused:
                client.decommit(name, list(unused), epoch)
                held.pages[name] -= unused

    def _commit_missing(self, client: AnchorClient, held: _Committed, want: dict[str, IntervalSet], epoch: int) -> None:
        for name, wanted in want.items():
            missing = wanted - held.pages[name]
            if missing:
                client.commit(name, list(missing), epoch)
                held.pages[name] |= missing

    def _pages_of(self, slots: Counter[str], num_kv_blocks: int) -> dict[str, IntervalSet]:
        """By arena: the pages that a device with `slots` uses."""
        kv = self._touched(self.kv.slot_ranges(0, slots[KV], 0, num_kv_blocks))
        return {WEIGHTS_ARENA: self._weight_pages(slots), KV_ARENA: kv}

    def _weight_pages(self, slots: Counter[str]) -> IntervalSet:
        ranges = [self.weights.replicated_range]
        for family in self._units.families:
            ranges += self.weights.slot_ranges(family, 0, slots[family])
        return self._touched(ranges)

    def _touched(self, ranges: list[Range]) -> IntervalSet:
        page = self._config.page_bytes
        return IntervalSet((round_down(start, page), round_up(stop, page)) for start, stop in ranges)

    def _reserve_slots(self, client: AnchorClient, num_bytes: int, epoch: int) -> None:
        """The device's part of the memory in which a `PeerGroup` sums; nothing of it is kept from epoch to epoch."""
        found = {arena.name: arena.reserved_bytes for arena in client.status().arenas}
        if found.get(SLOTS_ARENA, num_bytes) != num_bytes:
            client.drop_arena(SLOTS_ARENA, epoch)
        if found.get(SLOTS_ARENA) != num_bytes:
            client.create_arena(SLOTS_ARENA, num_bytes, epoch).close()
        client.commit(SLOTS_ARENA, [(0, num_bytes)], epoch)

    def _recreate(self, client: AnchorClient, epoch: int) -> None:
        """New, empty arenas in place of whatever is there."""
        wanted = {WEIGHTS_ARENA: self.weights.reserved_bytes, KV_ARENA: self.kv.reserved_bytes}
        for arena in client.status().arenas:
            client.drop_arena(arena.name, epoch)
        for name, reserved_bytes in wanted.items():
            client.create_arena(name, reserved_bytes, epoch).close()
        self._committed[client.welcome.device] = _Committed()
        # From now until it is loaded the device holds nothing that anyone may attach to.
        self.put_manifest(empty_shard(client.welcome.device), 0, epoch)

    def drop_kv(self, device: str, epoch: int) -> None:
        """Attaching to the weights of an earlier engine, whose KV cache cannot be used: an empty one is made."""
        client = self._clients[device]
        if any(arena.name == KV_ARENA for arena in client.status().arenas):
            client.drop_arena(KV_ARENA, epoch)
        client.create_arena(KV_ARENA, self.kv.reserved_bytes, epoch).close()
        self._committed[device].pages[KV_ARENA] = IntervalSet()

    def put_manifests(self, layout: Layout, num_kv_blocks: int, epoch: int) -> None:
        """Says in every anchor what its arenas hold now. An anchor that has just died is skipped."""
        for shard in layout.shards:
            self.put_manifest(shard, num_kv_blocks, epoch)

    def put_manifest(self, shard: Shard, num_kv_blocks: int, epoch: int) -> None:
        """The same for one device."""
        client = self._clients.get(shard.device)
        if client is None:
            return
        try:
            self._name(client, shard, num_kv_blocks, epoch)
        except ChannelTimeout:
            self._give_up(shard.device)
            self._on_gone(shard.device)
        except ChannelClosed:
            pass  # its end is read as an event

    def _name(self, client: AnchorClient, shard: Shard, num_kv_blocks: int, epoch: int) -> None:
        manifest = Manifest(
            device=shard.device,
            model=self._fingerprint,
            dtype=self._units.config.dtype,
            epoch=epoch,
            shards={family: shard[family] for family in self._units.families},
            arenas={WEIGHTS_ARENA: self.weights.reserved_bytes, KV_ARENA: self.kv.reserved_bytes},
            num_kv_blocks=num_kv_blocks,
            kv_block_size=self._config.kv_block_size,
        )
        client.put_manifest(manifest.seal(), epoch)
        if shard.device in self._committed:
            self._committed[shard.device].named = _counts(shard)

    def committed_ranges(self, device: str) -> dict[str, list[tuple[int, int]]]:
        """What is committed in each arena of a device: for the anchor that adopts them. Empty: nothing yet."""
        pages = self._committed[device].pages if device in self._committed else {}
        ranges = {name: list(pages) for name, pages in pages.items() if pages}
        if ranges and self._config.peer_slots_bytes:
            ranges[SLOTS_ARENA] = [(0, self._config.peer_slots_bytes)]
        return ranges

    # ------------------------------------------------------------------------------------------- ending

    def close(self, *, stop_anchors: bool) -> None:
        """Ends the connections. `stop_anchors`: also the anchors that an engine (not a person) started."""
        if stop_anchors:
            for device in dict.fromkeys([*self._config.devices, *self._clients]):  # the host's anchor too
                self.stop_started(device)
        self._reap(STOP_TIMEOUT_S)
        for device in list(self._clients):
            self._close(device)


def _collect(pid: int, timeout_s: float) -> bool:
    """Waits for the end of a process, and of its entry if it is our child. False: it still runs."""
    try:
        pidfd = open_pidfd(pid)
    except ProcessLookupError:
        return True
    try:
        gone = wait_gone(pidfd, timeout_s)
        if gone:
            os.waitpid(pid, os.WNOHANG)
        return gone
    except ChildProcessError:
        return True
    finally:
        os.close(pidfd)


def _pieces(pages: IntervalSet, num_bytes: int) -> Iterator[list[Range]]:
    """All of `pages`, in order, in pieces of at most `num_bytes`, a multiple of a page."""
    piece, room = [], num_bytes
    for start, stop in pages:
        while start < stop:
            edge = min(stop, start + room)
            piece.append((start, edge))
            room -= edge - start
            start = edge
            if room == 0:
                yield piece
                piece, room = [], num_bytes
    if piece:
        yield piece


def _counts(shard: Shard) -> Counter[str]:
    return Counter({family: len(units) for family, units in shard.as_dict().items()})


class _Started:
    """Which anchors were started by an engine: on disk, because that engine may have been killed since."""

    def __init__(self, runtime_dir: Path):
        self._path = runtime_dir / "started-anchors.json"
        self._lock = threading.Lock()  # several anchors may be started at the same time

    def _read(self) -> dict[str, int]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def add(self, device: str, pid: int) -> None:
        with self._lock:
            started = self._read() | {device: pid}
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(started), encoding="utf-8")
            partial.replace(self._path)

    def includes(self, device: str, pid: int) -> bool:
        return self._read().get(device) == pid
