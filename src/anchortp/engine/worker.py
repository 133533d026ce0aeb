"""The worker: the process that computes on one device. It maps the device's arenas and owns nothing.

It answers the controller's messages one by one (`engine.messages`); a step is: mark, forward, sample (rank 0).
Whenever the group's abort flag goes up it drops the step and waits for the next epoch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from anchortp.arena import IntervalSet, MemfdArena, PinnedMapping
from anchortp.comm import Group, ShmRegion
from anchortp.config import GROUPS_WITH_SLOTS, ModelConfig
from anchortp.devices import Device, parse_device
from anchortp.engine import messages as m
from anchortp.engine.accelerator import GROUPS, Accelerator, Formation
from anchortp.engine.device_errors import verdict_of
from anchortp.engine.faults import FaultProbe
from anchortp.engine.kv_blocks import KVBlocks, Pair
from anchortp.engine.mirror_addresses import HOST, MIRROR_ARENA, MirrorAddresses
from anchortp.engine.sampler import Sampler
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.errors import (
    AnchorTPError,
    ChannelClosed,
    ChannelTimeout,
    CheckpointError,
    GroupAborted,
    StaleEpoch,
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
    model_units,
    shard_from_dict,
)
from anchortp.model import (
    DecodeGraphs,
    Decoder,
    ForwardBatch,
    KVCache,
    NativeDecoder,
    NativeKernels,
    TorchKernels,
    WeightViews,
    check_weights,
    panels,
)
from anchortp.model.decoder import Gate
from anchortp.model.paged import FlashInfer, Sdpa
from anchortp.native import Library
from anchortp.plan.plan import FromHost, FromPeer, Move
from anchortp.recovery.change import arrangement
from anchortp.state.client import AnchorClient, Arena
from anchortp.state.wire import Channel
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.device import DeviceDestination, MappedSource, StagedSource
from anchortp.transfer.executor import Hooks, Load, Loaded, Progress
from anchortp.transfer.faulty import Fault, FaultySource
from anchortp.transfer.fingerprint import torch_version
from anchortp.transfer.idle import IdleWork, huge_pages
from anchortp.transfer.packed import PackedWeights, open_packed, pack
from anchortp.transfer.queue import Failure
from anchortp.transfer.sources import Destination, HostSource, PeerSource, Source, map_pages
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.tensors import tensor_of
from anchortp.transfer.work import EMBED_POSITION, Geometry, complete
from anchortp.transfer.work import HOST as HOST_SOURCE

WEIGHTS_ARENA, KV_ARENA, SLOTS_ARENA = "weights", "kv", "slots"
IDLE_TIMEOUT_S = 1e6  # an idle worker waits; it dies with the controller (PR_SET_PDEATHSIG)
# The controller notices a missing peer long before, by pidfd or by the step deadline, and raises the abort flag.
GROUP_TIMEOUT_S = 600.0
ANCHOR_TIMEOUT_S = 5.0  # shorter than the controller waits for a worker to leave an epoch
EXPERT_LOAD_EVERY_S = 1.0
SAVE_POLL_S = 0.001  # how often an idle worker looks whether its copies to the mirror are made


def worker_main(sock: socket.socket, order: m.ForkSpare) -> None:
    """[worker] Serves one controller until it says Stop or is gone. `order`: what to be before it is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = Channel(sock, m.ToWorker)
    for index in order.gpus:
        _warm_up_gpu(index, order.fused)
    channel.send(m.SpareReady(pid=os.getpid()))
    with contextlib.suppress(ChannelClosed):
        worker = Worker(channel)
        try:
            worker.serve()
        except Exception as error:
            traceback.print_exc()
            channel.send(m.WorkerFailed(reason=worker.explain(error)))
            raise


def _warm_up_gpu(index: int, fused: ModelConfig | None) -> None:
    """A context, and the first kernels or their libraries, on one of the GPUs that this spare may be sent to."""
    try:
        accelerator = Accelerator.of(Device(kind="cuda", index=index))
        with accelerator.placing():
            _touch_kernels()
        if fused is not None:
            accelerator.fused(fused)
        accelerator.synchronize()
    except Exception:
        # A GPU that is lost must not cost the others their spares. If it is not, its worker finds out as it attaches.
        traceback.print_exc()


def warm_up() -> None:
    """[zygote] Touches what the first step would otherwise pay for: kernels, and torch's lazy tables."""
    panels.warm_up()
    torch_version()
    _touch_kernels()


def _touch_kernels() -> None:
    """On the device that is torch's default now."""
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.ones(8, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype)
            y = torch.nn.functional.silu(torch.nn.functional.linear(x, w)) @ w
            heads = y.view(1, 8, 4, 16).transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            torch.nn.functional.rms_norm(y.float(), (64,)).softmax(-1).argmax(-1).tolist()


@dataclass(slots=True, kw_only=True)
class _Assignment:
    """What stays the same as long as this process is the worker of its device."""

    device: str
    units: ModelUnits
    weights: WeightAddresses
    geometry: Geometry
    kv: KVAddresses
    accelerator: Accelerator
    paged: FlashInfer | Sdpa | None
    kernels: TorchKernels
    stream: Streamer | None
    anchor: AnchorClient
    probe: FaultProbe
    order: m.Assign


@dataclass(frozen=True, slots=True, kw_only=True)
class _MappedMirror:
    """`pinned`: where the device is a GPU; `memory` is then on the device, as far as torch knows."""

    mirror_id: str
    pinned: PinnedMapping | None
    memory: torch.Tensor


class Worker:
    def __init__(self, channel: Channel):
        self._channel = channel
        self._epoch = -1
        self._assignment: _Assignment | None = None
        self._anchor: AnchorClient | None = None  # of the assignment, or of one that is about to be
        self._arenas: dict[str, tuple[Arena, torch.Tensor]] = {}
        self._checkpoint: Checkpoint | None = None
        self._load: Load | None = None
        self._load_ticket: int | None = None
        self._packed: PackedWeights | None = None
        self._idle_work: IdleWork | None = None
        self._idling = threading.Lock()  # a load's end and a group's begin may both start it
        self._rates: dict[str, float] = {}  # bytes per second of links, by the last load that used them
        self._sending = threading.Lock()  # a load's threads speak too
        self._ending = threading.Lock()  # of the one that ends this process
        self._region: ShmRegion | None = None
        self._group: Group | None = None
        self._decoder: Decoder | None = None
        self._graphs: DecodeGraphs | None = None  # of the decoder, where there are any
        self._shard = empty_shard("")  # of this device in the present group
        self._mapped_mirror: _MappedMirror | None = None
        self._saves: deque[tuple[int, Callable[[], bool]]] = deque()  # ticket, and whether its copies are made
        self._refreshed: set[str] = set()  # arenas that show all that was committed by the last reservation
        self._sampler = Sampler()
        self._next_expert_load_s = 0.0

    def serve(self) -> None:
        handlers: dict[type, Callable[..., None]] = {
            m.Assign: self._attach,
            m.LeaveEpoch: self._leave,
            m.LoadUnits: self._start_load,
            m.CancelLoad: self._cancel_load,
            m.ArrangeUnits: self._arrange,
            m.FormGroup: self._form,
            m.ShareExperts: self._share,
            m.MapPages: self._map_pages,
            m.RunStep: self._run_step,
            m.MoveBlocks: self._move_blocks,
            m.RestorePlanes: self._restore_planes,
            m.SaveBlocks: self._save_blocks,
            m.HandOver: self._hand_over,
        }
        while True:
            self._answer_saves()
            try:
                received = self._channel.recv(timeout_s=SAVE_POLL_S if self._saves else IDLE_TIMEOUT_S)
            except ChannelTimeout:
                continue
            message = received.message
            if isinstance(message, m.Stop):
                return
            if isinstance(message, _AFTER_RESERVING):
                self._refreshed.clear()
            with contextlib.suppress(_Superseded):
                if isinstance(message, m.FormGroup):
                    self._form(message, *received.fds)
                else:
                    handlers[type(message)](message)

    def explain(self, error: Exception) -> str:
        """The last words of this process. If the error says that the device is lost, its anchor is told."""
        verdict, reason = verdict_of(error, attaching=self._assignment is None)
        if verdict == "lost" and self._anchor is not None:
            with contextlib.suppress(AnchorTPError):
                self._anchor.report_lost(reason, self._epoch)
        return f"{type(error).__name__}: {error}" + (f" [{verdict}: {reason}]" if reason else "")

    # ------------------------------------------------------------------------------------------ becoming

    def _attach(self, order: m.Assign) -> None:
        torch.set_num_threads(order.num_threads)
        config = order.model
        units = model_units(config)
        device = parse_device(order.device)
        anchor = self._anchor = _connect_anchor(order)
        anchor.lease(order.epoch)
        self._epoch = order.epoch
        probe = FaultProbe(order.strikes, order.runtime_dir, lambda kind: _inject(order, kind))
        addresses = WeightAddresses(units=units, page_bytes=device.page_bytes)
        accelerator = Accelerator.of(device)
        paged = accelerator.paged(order.attention, config, order.kv_block_size)
        self._assignment = _Assignment(
            device=order.device,
            units=units,
            weights=addresses,
            geometry=Geometry(addresses),
            kv=KVAddresses(
                config=config,
                block_size=order.kv_block_size,
                num_blocks=order.kv_blocks,
                page_bytes=device.page_bytes,
            ),
            accelerator=accelerator,
            paged=paged,
            kernels=_kernels(order, config, accelerator),
            stream=Streamer(order.kernels) if order.kernels else None,
            anchor=anchor,
            probe=probe,
            order=order,
        )
        if order.packed_folder:
            self._packed = open_packed(Path(order.packed_folder, order.fingerprint), self._assignment.geometry)
        probe.at("attach")
        self._send(m.WorkerAttached(device=order.device, epoch=order.epoch))

    def _leave(self, order: m.LeaveEpoch) -> None:
        a = self._assigned()
        a.probe.at("leave")
        self._stop_load()
        self._epoch = order.epoch
        self._dissolve()
        a.accelerator.synchronize()  # from EpochLeft on, nothing of this worker's touches any memory
        self._answer_saves()
        # Without an anchor (it crashed, or is stuck) there is no lease to renew: HandOver follows.
        with contextlib.suppress(WireError):
            a.anchor.lease(order.epoch)
        self._send(m.EpochLeft(epoch=order.epoch))

    def _hand_over(self, order: m.HandOver) -> None:
        """The device's new anchor takes over the memory that this process kept alive."""
        a = self._assigned()
        a.anchor.close()
        missing = [name for name in order.ranges if name not in self._arenas]
        if missing:  # the memory that nobody had mapped went with its anchor
            reason = f"{', '.join(missing)} not mapped by the worker yet"
            self._send(m.HandedOver(ok=False, reason=reason))
            return
        try:
            a.anchor = self._anchor = _connect_anchor(a.order)
            a.anchor.lease(order.epoch)
            for name, (arena, _) in self._arenas.items():
                a.anchor.adopt_arena(arena, order.ranges.get(name, ()), order.epoch)
        except AnchorTPError as error:
            self._send(m.HandedOver(ok=False, reason=str(error)))
            return
        self._send(m.HandedOver(ok=True))

    # ------------------------------------------------------------------------------------------- loading

    def _start_load(self, order: m.LoadUnits) -> None:
        """The load runs on threads of its own from here on."""
        if order.epoch != self._epoch:
            return
        self._stop_load()
        if order.fresh:
            self._forget_arenas()
        a = self._assigned()
        before, after = shard_from_dict(a.device, order.before), shard_from_dict(a.device, order.after)
        moves = complete(a.geometry, a.device, before, after, [_move(a.device, p) for p in order.pieces], order.fresh)
        chunks = a.geometry.chunks(moves)
        buffer = self._mapped(WEIGHTS_ARENA)
        pages_ahead = self._pages_ahead(before, after, order.kv_blocks, len(chunks))

        def before_chunk() -> None:
            a.probe.at("load")
            pages_ahead()

        hooks = Hooks(
            open_source=self._source,
            on_progress=lambda progress: self._send_progress(order, progress),
            on_end=lambda result: self._load_ended(order, result),
            before_chunk=before_chunk,
            on_error=self._load_met,
        )
        self._load = Load(
            a.geometry,
            chunks,
            _destination(self._arenas[WEIGHTS_ARENA][0], buffer),
            hooks,
            expected=order.sums,
            pace=order.pace,
            rates=self._rates,
        )
        self._load_ticket = order.ticket
        self._load.start()

    def _pages_ahead(self, before: Shard, after: Shard, blocks: Sequence[int], num_steps: int) -> Callable[[], None]:
        """Makes pages ready for the KV planes that come at the switch, a few at each call: there the kernel would take
        longer for them than the copy takes."""
        first, last = len(before[KV]), len(after[KV])
        if first == last or not (blocks and num_steps):
            return lambda: None
        buffer, arena = self._mapped(KV_ARENA), self._arenas[KV_ARENA][0]
        if not isinstance(arena, MemfdArena):
            return lambda: None  # what is committed there has its pages
        runs = IntervalSet((block, block + 1) for block in blocks)
        ranges = [r for start, stop in runs for r in self._assigned().kv.slot_ranges(first, last, start, stop)]
        return Destination(arena, buffer).prepare_by_and_by(ranges, num_steps)

    def _send_progress(self, order: m.LoadUnits, progress: Progress) -> None:
        """[a thread of the load] A controller that is gone or does not read is the main thread's to notice."""
        message = m.LoadProgress(
            epoch=order.epoch,
            ticket=order.ticket,
            num_bytes=progress.num_bytes,
            total_bytes=progress.total_bytes,
            links=progress.links,
        )
        with contextlib.suppress(WireError):
            self._send(message)

    def _load_met(self, error: Exception) -> None:
        """[a thread of the load] If the error speaks of the device, this process ends as it does after one in a step:
        the controller replaces it, or does without the device. Elsewhere the units cannot be loaded for this one."""
        if verdict_of(error, attaching=False)[0] == "ours":
            return
        traceback.print_exception(error)
        with self._ending:  # the load's other threads meet it too
            try:
                with contextlib.suppress(WireError):
                    self._send(m.WorkerFailed(reason=self.explain(error)))
            finally:
                os._exit(1)

    def _load_ended(self, order: m.LoadUnits, result: Loaded | Failure) -> None:
        """[a thread of the load]"""
        if isinstance(result, Failure):
            refused = m.LoadRefused(epoch=order.epoch, ticket=order.ticket, reason=result.reason, device=result.device)
            self._send(refused)
            return
        self._rates |= {link: rate for link, (_, rate) in result.links.items()}
        done = m.LoadDone(
            epoch=order.epoch,
            ticket=order.ticket,
            num_bytes=result.num_bytes,
            peer_bytes=result.peer_bytes,
            seconds=result.seconds,
            sums=result.sums,
            links=result.links,
            rerouted=list(result.rerouted),
        )
        self._send(done)
        self._start_idle_work()

    def _cancel_load(self, order: m.CancelLoad) -> None:
        if order.ticket == self._load_ticket:
            self._stop_load()

    def _stop_load(self) -> None:
        """The arena is neither written nor read any more but by this thread. Raises StateError if that cannot be
        promised."""
        if self._load is not None:
            self._load.cancel()
        self._load, self._load_ticket = None, None
        if self._idle_work is not None:
            self._idle_work.stop()
        self._idle_work = None

    def _start_idle_work(self) -> None:
        """Once the group's weights are whole."""
        with self._idling:
            if self._idle_work is not None or self._group is None or (self._load and not self._load.is_whole):
                return
            self._idle_work = IdleWork(self._idle_steps(*self._arenas[WEIGHTS_ARENA]))
            self._idle_work.start()

    def _idle_steps(self, arena: Arena, buffer: torch.Tensor) -> Iterator[None]:
        a = self._assigned()
        if isinstance(arena, MemfdArena):
            yield from huge_pages(a.weights, self._shard, buffer)
        if self._packed is not None:
            yield from pack(self._packed, a.geometry, self._shard, _destination(arena, buffer).view, a.stream)
            return
        with contextlib.suppress(CheckpointError):  # it was replaced, say: the next load tells, if there is one
            yield from self._opened_checkpoint().map_ahead()

    def _source(self, name: str) -> Source:
        """[a thread of the load] The host's checkpoint, or the weights arena of a device."""
        a = self._assigned()
        if name == HOST_SOURCE:
            source: Source = HostSource(self._opened_checkpoint(), self._packed)
            if a.accelerator.open_driver is not None:
                source = StagedSource(source)
        elif name == a.device:
            arena, buffer = self._arenas[WEIGHTS_ARENA]
            source = _arena_source(name, arena, buffer, a.stream, is_gone=lambda: False, on_close=lambda: None)
        else:
            source = self._peer(name)
        strike = a.probe.on_source(name)
        if strike is None:
            return source
        fault = Fault(kind=strike.kind, at_byte=strike.at_byte, times=strike.times)
        return FaultySource(source, fault, on_fire=lambda: a.probe.record(strike))

    def _opened_checkpoint(self) -> Checkpoint:
        """[a thread of the load, or the idle work: never both]"""
        a = self._assigned()
        if self._checkpoint is None:
            check_weights(a.units)
            self._checkpoint = Checkpoint.open(a.order.model_folder, a.units, a.order.fingerprint, a.stream)
        return self._checkpoint

    def _peer(self, device: str) -> Source:
        a = self._assigned()
        # The connection is kept: it ends when the anchor does, and then its memory is not to be believed.
        client = AnchorClient.connect(
            a.order.runtime_dir,
            device,
            role="tool",
            timeout_s=ANCHOR_TIMEOUT_S,
            open_driver=a.accelerator.open_driver,
        )
        held: list[Arena] = []

        def close() -> None:
            # The mapping goes here, if it is one: nobody has its tensor any more. That waits for the device.
            with a.accelerator.alone:
                while held:
                    held.pop().close()
            client.close()

        try:
            arena = client.open_arena(WEIGHTS_ARENA, self._epoch)
            held.append(arena)
            client.refresh(arena, self._epoch)
            buffer = None if isinstance(arena, MemfdArena) else tensor_of(arena)
            return _arena_source(device, arena, buffer, a.stream, is_gone=client.is_gone, on_close=close)
        except BaseException:
            close()
            raise

    def _arrange(self, order: m.ArrangeUnits) -> None:
        """Closes the slots of units that were given up. Nobody computes meanwhile; no copy overwrites a source."""
        if order.epoch != self._epoch:
            return
        a = self._assigned()
        a.probe.at("arrange")
        before, after = shard_from_dict(a.device, order.before), shard_from_dict(a.device, order.after)
        steps = arrangement(before, after)
        weights = self._mapped(WEIGHTS_ARENA)
        for family, source, target in steps:
            for (start, stop), (to, _) in zip(
                a.weights.slot_ranges(family, source, source + 1),
                a.weights.slot_ranges(family, target, target + 1),
                strict=True,
            ):
                weights[to : to + stop - start] = weights[start:stop]
        moved = [after[KV][target] for family, _, target in steps if family == KV]
        if moved and order.blocks:
            self._blocks(after[KV]).copy_from(self._mapped(KV_ARENA), before[KV], order.blocks, moved)
        a.accelerator.synchronize()
        self._send(m.UnitsArranged(epoch=order.epoch))

    # ------------------------------------------------------------------------------------- the cache's blocks

    def _move_blocks(self, order: m.MoveBlocks) -> None:
        if order.epoch == self._epoch:
            self._blocks(order.heads).move(order.pairs)
            self._assigned().accelerator.synchronize()
            self._send(m.BlocksMoved(epoch=order.epoch))

    def _restore_planes(self, order: m.RestorePlanes) -> None:
        """Fills planes that are new here. Nobody computes meanwhile, so no source changes under the copy."""
        if order.epoch != self._epoch:
            return
        a = self._assigned()
        a.probe.at("restore")
        blocks = self._blocks(order.kv_heads[a.device])
        copied = restored = 0
        try:
            for head, device in order.from_peers:
                peer = self._opened(device, KV_ARENA)
                copied += blocks.copy_from(peer, tuple(order.kv_heads[device]), order.blocks, [head])
            if order.from_mirror and order.pairs:
                mirror = self._mirror(order.mirror_id, order.pairs)
                restored = blocks.restore(mirror, order.pairs, order.from_mirror)
            a.accelerator.synchronize()
        except (StateError, WireError) as error:
            self._send(m.PlanesRestored(epoch=order.epoch, ok=False, reason=str(error)))
            return
        done = m.PlanesRestored(epoch=order.epoch, ok=True, copied_bytes=copied, restored_bytes=restored)
        self._send(done)

    def _save_blocks(self, order: m.SaveBlocks) -> None:
        """Runs between two steps: the next one overwrites nothing that is not copied yet."""
        if order.epoch != self._epoch:
            return
        a = self._assigned()
        a.probe.at("save")
        try:
            mirror = self._mirror(order.mirror_id, order.pairs)
            self._blocks(self._shard[KV]).save(mirror, order.pairs, order.heads)
        except (StateError, WireError):
            self._send(m.BlocksSaved(ticket=order.ticket, ok=False))
            return
        self._saves.append((order.ticket, a.accelerator.mark()))
        self._answer_saves()

    def _answer_saves(self) -> None:
        """Says which saves are done. On a GPU they are copies in its queue, which nobody here waits for: what comes
        after them in the queue cannot overwrite what they read."""
        while self._saves and self._saves[0][1]():
            self._send(m.BlocksSaved(ticket=self._saves.popleft()[0], ok=True))

    def _blocks(self, heads: Sequence[int]) -> KVBlocks:
        return KVBlocks(self._mapped(KV_ARENA), self._assigned().kv, tuple(heads))

    def _mirror(self, mirror_id: str, pairs: Sequence[Pair]) -> torch.Tensor:
        """The host's mirror, of which the slots of `pairs` may be used. Raises StateError if the host anchor is another
        one by now."""
        if self._mapped_mirror is None or self._mapped_mirror.mirror_id != mirror_id:
            self._mapped_mirror = None
            self._mapped_mirror = self._map_mirror(mirror_id)
        if (pinned := self._mapped_mirror.pinned) is not None:
            slots = MirrorAddresses.of(self._assigned().kv, pinned.reserved_bytes)
            pinned.pin(slots.slot_range(slot) for _, slot in pairs)
        return self._mapped_mirror.memory

    def _map_mirror(self, mirror_id: str) -> _MappedMirror:
        with self._open(HOST, MIRROR_ARENA, mirror_id) as arena:
            assert isinstance(arena, MemfdArena), "the host's memory is no device's"
            pinned = self._assigned().accelerator.pinned(arena)
            return _MappedMirror(mirror_id=mirror_id, pinned=pinned, memory=tensor_of(pinned or arena))

    def _opened(self, device: str, name: str) -> torch.Tensor:
        """An arena of another anchor as it is now, mapped for this worker's device."""
        with self._open(device, name) as arena:
            return tensor_of(arena)

    @contextlib.contextmanager
    def _open(self, device: str, name: str, anchor_id: str | None = None) -> Iterator[Arena]:
        a = self._assigned()
        with AnchorClient.connect(
            a.order.runtime_dir,
            device,
            role="tool",
            timeout_s=ANCHOR_TIMEOUT_S,
            open_driver=a.accelerator.open_driver,
        ) as client:
            if anchor_id is not None and client.welcome.anchor_id != anchor_id:
                raise StateError(f"the anchor of {device} was replaced; what it held is gone")
            with client.open_arena(name, self._epoch) as arena:
                client.refresh(arena, self._epoch)
                yield arena

    # ------------------------------------------------------------------------------------------- serving

    def _form(self, order: m.FormGroup, region_fd: int) -> None:
        a = self._assigned()
        try:
            if order.epoch != self._epoch:
                return
            a.probe.at("form")
            self._dissolve()
            layout = Layout(shards=tuple(shard_from_dict(device, s) for device, s in order.shards))
            rank = layout.rank(a.device)
            self._region = ShmRegion.attach(region_fd, epoch=order.epoch)
        finally:
            os.close(region_fd)
        try:
            self._group = self._make_group(rank, layout.devices)
        except GroupAborted:
            return
        shard = layout[a.device]
        self._shard = shard
        weights = WeightViews(self._mapped(WEIGHTS_ARENA), a.weights, shard)
        kv_cache = KVCache(self._mapped(KV_ARENA), a.kv, shard)
        with a.accelerator.placing():
            if self._decoder is None:
                views = (weights, kv_cache)
                parts = (a.units, layout, rank, *views, a.order.max_model_len, a.paged)
                make = NativeDecoder if isinstance(a.kernels, NativeKernels) else Decoder
                self._decoder = make(*parts, kernels=a.kernels)
                capture = a.accelerator.capture() if a.order.graphs else None
                self._graphs = DecodeGraphs(self._decoder, capture) if capture else None
            else:
                self._decoder.rebind(layout, rank, weights, kv_cache)
            if self._decoder.moe is not None and order.parts is not None:
                self._decoder.moe.share(order.parts)
        self._send(m.GroupFormed(epoch=order.epoch))
        self._start_idle_work()

    def _share(self, order: m.ShareExperts) -> None:
        if order.epoch == self._epoch and self._decoder is not None and self._decoder.moe is not None:
            with self._assigned().accelerator.placing():
                self._decoder.moe.share(order.parts)

    def _map_pages(self, order: m.MapPages) -> None:
        """A load that follows a loss then only has to copy."""
        if order.epoch != self._epoch:
            return
        buffer = self._mapped(WEIGHTS_ARENA)
        if isinstance(self._arenas[WEIGHTS_ARENA][0], MemfdArena):
            for start, stop in order.ranges:
                map_pages(buffer, start, stop)

    def _make_group(self, rank: int, devices: Sequence[str]) -> Group:
        a = self._assigned()
        assert self._region is not None
        store_path = Path(a.order.runtime_dir, f"{a.order.collectives}-{self._epoch}")
        formation = Formation(
            region=self._region,
            rank=rank,
            timeout_s=GROUP_TIMEOUT_S,
            members=tuple(devices),
            store_path=str(store_path),
            slots=self._all_slots(devices) if a.order.collectives in GROUPS_WITH_SLOTS else [],
            library=a.kernels.library if isinstance(a.kernels, NativeKernels) else None,
        )
        group = GROUPS[a.order.collectives](formation, a.accelerator)
        return _ProbedGroup(group, a.probe) if a.probe else group

    def _all_slots(self, devices: Sequence[str]) -> list[torch.Tensor]:
        """The memory in which a `PeerGroup` sums, of every rank's device; the own one stays attached, for HandOver."""
        own = self._assigned().device
        try:
            return [self._mapped(SLOTS_ARENA) if d == own else self._opened(d, SLOTS_ARENA) for d in devices]
        except (StateError, WireError) as error:
            raise _Superseded from error

    def _run_step(self, order: m.RunStep) -> None:
        """The forward pass, and on rank 0 the sampler. A group that dissolves meanwhile ends it silently."""
        if order.epoch != self._epoch or self._group is None:
            return
        a, batch = self._assigned(), order.batch
        assert self._decoder is not None and self._region is not None
        self._region.mark(self._group.rank, batch.step)
        a.probe.at("prefill" if any(len(seq.token_ids) > 1 for seq in batch.seqs) else "decode")
        try:
            gate = self._gate()
            with torch.inference_mode():
                logits = self._forward(batch.seqs, gate)
        except GroupAborted:
            return
        if logits is not None:
            sampling = [seq for seq in batch.seqs if seq.sample]
            tokens = self._sampler.sample(logits, sampling)
            sampled = {seq.request_id: token for seq, token in zip(sampling, tokens, strict=True)}
            load = self._expert_load(self._decoder)
            self._send(m.StepDone(epoch=order.epoch, step=batch.step, sampled=sampled, expert_load=load))
        a.probe.at("between")
        if gate is None and self._graphs is not None:  # a millisecond: nothing that a stream or a recovery would notice
            with torch.inference_mode(), a.accelerator.placing():
                self._graphs.capture_next()

    def _forward(self, seqs: Sequence[ScheduledSeq], gate: Gate | None) -> torch.Tensor | None:
        a = self._assigned()
        assert self._decoder is not None and self._group is not None
        if gate is None and self._graphs is not None and self._graphs.takes(seqs):
            forward = ForwardBatch.build(seqs, a.order.kv_block_size)
            with a.accelerator.placing():
                return self._graphs.forward(forward, self._group)
        with a.accelerator.placing():
            return self._decoder.forward(ForwardBatch.build(seqs, a.order.kv_block_size), self._group, gate)

    def _gate(self) -> Gate | None:
        """Makes a step wait for the weights that it needs and that are still on their way; None if none are."""
        load, region, geometry = self._load, self._region, self._assigned().geometry
        if load is None or load.is_whole or not load.writes_to(self._shard):
            return None
        assert region is not None
        load.wait(EMBED_POSITION, region.check, region.epoch)
        return lambda layer: load.wait(geometry.position_of_layer(layer), region.check, region.epoch)

    def _expert_load(self, decoder: Decoder) -> bytes:
        """What StepDone carries: at most every `EXPERT_LOAD_EVERY_S`, else nothing."""
        now_s = time.monotonic()
        if decoder.moe is None or now_s < self._next_expert_load_s:
            return b""
        self._next_expert_load_s = now_s + EXPERT_LOAD_EVERY_S
        return decoder.moe.take_load()

    # ------------------------------------------------------------------------------------------- helpers

    def _send(self, message: msgspec.Struct) -> None:
        with self._sending:
            self._channel.send(message)

    def _assigned(self) -> _Assignment:
        assert self._assignment is not None, "the controller sent work before Assign"
        return self._assignment

    def _mapped(self, name: str) -> torch.Tensor:
        """The arena's memory as one-dimensional uint8; mapped at first use."""
        anchor = self._assigned().anchor
        if name not in self._arenas:
            arena = anchor.open_arena(name, self._epoch)
            self._arenas[name] = (arena, tensor_of(arena))
        arena, memory = self._arenas[name]
        if name not in self._refreshed:
            try:
                anchor.refresh(arena, self._epoch)
            except (StaleEpoch, WireError) as error:
                raise _Superseded from error
            self._refreshed.add(name)
        return memory

    def _forget_arenas(self) -> None:
        """The anchor has made new ones, as it does in every attempt to fill a device that holds nothing yet: what is
        mapped here is not the device's memory any more, and what is written there would go with this process."""
        if self._graphs is not None:
            self._graphs.close()
        self._decoder = self._graphs = None
        for arena, _ in self._arenas.values():
            arena.close()
        self._arenas.clear()
        self._refreshed.clear()

    def _dissolve(self) -> None:
        """Lets go of the old group."""
        if self._group is not None:
            self._group.close()
        if self._region is not None:
            self._region.close()
        self._group = self._region = None


def _kernels(order: m.Assign, config: ModelConfig, accelerator: Accelerator) -> TorchKernels:
    if order.kernels:
        return NativeKernels(Library(order.kernels, config.dtype))
    return accelerator.fused(config) if order.triton else TorchKernels()


def _destination(arena: Arena, buffer: torch.Tensor) -> Destination | DeviceDestination:
    return Destination(arena, buffer) if isinstance(arena, MemfdArena) else DeviceDestination(buffer)


def _arena_source(
    device: str,
    arena: Arena,
    buffer: torch.Tensor | None,
    stream: Streamer | None,
    *,
    is_gone: Callable[[], bool],
    on_close: Callable[[], None],
) -> Source:
    """A memfd is mapped a little at a time, if at all; chunks are read through their mapping."""
    if isinstance(arena, MemfdArena):
        return PeerSource(device, arena, is_gone=is_gone, on_close=on_close, stream=stream)
    assert buffer is not None
    return MappedSource(device, buffer, is_gone=is_gone, on_close=on_close)


class _Superseded(Exception):
    """What an order needs went with its epoch, or with an anchor: the controller knows, and the next one comes."""


_AFTER_RESERVING = (
    m.LoadUnits,
    m.ArrangeUnits,
    m.RestorePlanes,
    m.FormGroup,
)  # memory may have been committed, or given back


class _ProbedGroup:
    """A group that passes the fault point `collective` before each of its collectives."""

    def __init__(self, group: Group, probe: FaultProbe):
        self._group, self._probe = group, probe
        self.epoch, self.rank, self.size = group.epoch, group.rank, group.size
        self.close = group.close

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._probe.at("collective")
        return self._group.all_reduce(x)

    def gather(self, x: torch.Tensor, cols, root: int = 0):
        self._probe.at("collective")
        return self._group.gather(x, cols, root)

    def barrier(self) -> None:
        self._probe.at("collective")
        self._group.barrier()


def _move(device: str, piece: m.LoadPiece) -> Move:
    source = FromPeer(device=piece.source, slot=piece.source_slot) if piece.source else FromHost()
    return Move(
        device=device,
        family=piece.family,
        unit=piece.unit,
        slot=piece.slot,
        source=source,
        num_bytes=piece.num_bytes,
        num_units=piece.num_units,
        first_byte=piece.first_byte,
        route=(piece.link,) if piece.link else (),
    )


def _connect_anchor(order: m.Assign) -> AnchorClient:
    return AnchorClient.connect(order.runtime_dir, order.device, role="worker", timeout_s=ANCHOR_TIMEOUT_S)


def _inject(order: m.Assign, kind: str) -> None:
    """Asks the device's own anchor for the fault; with `lost` the connection just ends."""
    with (
        contextlib.suppress(AnchorTPError),
        AnchorClient.connect(order.runtime_dir, order.device, role="tool") as tool,
    ):
        tool.inject(kind)
