"""The worker: the process that computes on one device. It maps the device's arenas and owns nothing.

It answers the controller's messages one by one (`engine.messages`); a step is: mark, forward, sample (rank 0).
Whenever the group's abort flag goes up it drops the step and waits for the next epoch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from anchortp.arena import MemfdArena
from anchortp.comm import GlooGroup, Group, ShmGroup, ShmRegion
from anchortp.config import load_model_config
from anchortp.engine import messages as m
from anchortp.engine.faults import FaultProbe
from anchortp.engine.kv_blocks import KVBlocks
from anchortp.engine.mirror_addresses import HOST, MIRROR_ARENA
from anchortp.engine.sampler import Sampler
from anchortp.errors import (
    AnchorTPError,
    ChannelClosed,
    CheckpointError,
    GroupAborted,
    StateError,
    WireError,
)
from anchortp.layout import (
    FAMILIES,
    KV,
    KVAddresses,
    Layout,
    ModelUnits,
    WeightAddresses,
    model_units,
    shard_from_dict,
)
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews, check_weights, packed
from anchortp.state.client import AnchorClient
from anchortp.state.wire import Channel
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_replicated, load_units

WEIGHTS_ARENA, KV_ARENA = "weights", "kv"
IDLE_TIMEOUT_S = 1e6  # an idle worker waits; it dies with the controller (PR_SET_PDEATHSIG)
# The controller notices a missing peer long before, by pidfd or by the step deadline, and raises the abort flag.
GROUP_TIMEOUT_S = 600.0
ANCHOR_TIMEOUT_S = 5.0  # shorter than the controller waits for a worker to leave an epoch
PROGRESS_EVERY_S = 0.05


def worker_main(sock: socket.socket) -> None:
    """[worker] Serves one controller until it says Stop or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = Channel(sock, m.ToWorker)
    channel.send(m.SpareReady(pid=os.getpid()))
    with contextlib.suppress(ChannelClosed):
        try:
            Worker(channel).serve()
        except Exception as error:
            traceback.print_exc()
            channel.send(m.WorkerFailed(reason=f"{type(error).__name__}: {error}"))
            raise


def warm_up() -> None:
    """[zygote] Touches what the first step would otherwise pay for: kernels, and torch's lazy tables."""
    packed.warm_up()
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
    kv: KVAddresses
    anchor: AnchorClient
    probe: FaultProbe
    order: m.Assign


class Worker:
    def __init__(self, channel: Channel):
        self._channel = channel
        self._epoch = -1
        self._assignment: _Assignment | None = None
        self._arenas: dict[str, tuple[MemfdArena, torch.Tensor]] = {}
        self._checkpoint: Checkpoint | None = None
        self._region: ShmRegion | None = None
        self._group: Group | None = None
        self._decoder: Decoder | None = None
        self._kv_heads: tuple[int, ...] = ()
        self._mapped_mirror: tuple[str, torch.Tensor] | None = None
        self._sampler = Sampler()

    def serve(self) -> None:
        handlers: dict[type, Callable[..., None]] = {
            m.Assign: self._attach,
            m.LeaveEpoch: self._leave,
            m.LoadUnits: self._load,
            m.FormGroup: self._form,
            m.RunStep: self._run_step,
            m.MoveBlocks: self._move_blocks,
            m.RestorePlanes: self._restore_planes,
            m.SaveBlocks: self._save_blocks,
            m.HandOver: self._hand_over,
        }
        while True:
            received = self._channel.recv(timeout_s=IDLE_TIMEOUT_S)
            message = received.message
            if isinstance(message, m.Stop):
                return
            if isinstance(message, m.FormGroup):
                self._form(message, *received.fds)
            else:
                handlers[type(message)](message)

    # ------------------------------------------------------------------------------------------ becoming

    def _attach(self, order: m.Assign) -> None:
        torch.set_num_threads(order.num_threads)
        # One Hugging Face folder, two dtypes: the order says which one the arenas hold.
        config = replace(load_model_config(order.model_folder, order.dtype), packed_weights=order.packed_weights)
        units = model_units(config)
        anchor = _connect_anchor(order)
        anchor.lease(order.epoch)
        self._epoch = order.epoch
        probe = FaultProbe(order.strikes, order.runtime_dir, lambda kind: _inject(order, kind))
        self._assignment = _Assignment(
            device=order.device,
            units=units,
            weights=WeightAddresses(units=units),
            kv=KVAddresses(config=config, block_size=order.kv_block_size, num_blocks=order.kv_blocks),
            anchor=anchor,
            probe=probe,
            order=order,
        )
        probe.at("attach")
        self._channel.send(m.WorkerAttached(device=order.device, epoch=order.epoch))

    def _leave(self, order: m.LeaveEpoch) -> None:
        a = self._assigned()
        a.probe.at("leave")
        self._epoch = order.epoch
        self._dissolve()
        # Without an anchor (it crashed, or is stuck) there is no lease to renew: HandOver follows.
        with contextlib.suppress(WireError):
            a.anchor.lease(order.epoch)
        self._channel.send(m.EpochLeft(epoch=order.epoch))

    def _hand_over(self, order: m.HandOver) -> None:
        """The device's new anchor takes over the memory that this process kept alive."""
        a = self._assigned()
        a.anchor.close()
        missing = [name for name in order.ranges if name not in self._arenas]
        if missing:  # the memory that nobody had mapped went with its anchor
            reason = f"{', '.join(missing)} not mapped by the worker yet"
            self._channel.send(m.HandedOver(ok=False, reason=reason))
            return
        try:
            a.anchor = _connect_anchor(a.order)
            a.anchor.lease(order.epoch)
            for name, (arena, _) in self._arenas.items():
                a.anchor.adopt_arena(arena, order.ranges.get(name, ()), order.epoch)
        except AnchorTPError as error:
            self._channel.send(m.HandedOver(ok=False, reason=str(error)))
            return
        self._channel.send(m.HandedOver(ok=True))

    # ------------------------------------------------------------------------------------------- loading

    def _load(self, order: m.LoadUnits) -> None:
        if order.epoch != self._epoch:
            return
        a, began_s = self._assigned(), time.monotonic()
        before = shard_from_dict(a.device, order.before)
        after = shard_from_dict(a.device, order.after)
        items = [
            (family, after[family][slot], slot)
            for family in FAMILIES
            for slot in range(len(before[family]), len(after[family]))
        ]
        total = sum(a.units.unit_bytes[family] for family, _, _ in items)
        progress = _Progress(self._channel, order.epoch, total + order.fresh * a.units.replicated_bytes)
        try:
            if self._checkpoint is None:
                check_weights(a.units)
                self._checkpoint = Checkpoint.open(Path(a.order.model_folder), a.units)
            buffer = self._mapped(WEIGHTS_ARENA)
            num_bytes = 0
            if order.fresh:
                num_bytes += load_replicated(self._checkpoint, buffer, a.weights)
            num_bytes += load_units(
                self._checkpoint,
                buffer,
                a.weights,
                items,
                on_progress=progress.add,
                check=lambda: a.probe.at("load"),
            )
        except CheckpointError as error:
            self._channel.send(m.LoadRefused(epoch=order.epoch, reason=str(error)))
            return
        seconds = time.monotonic() - began_s
        self._channel.send(m.LoadDone(epoch=order.epoch, num_bytes=num_bytes, seconds=seconds))

    # ------------------------------------------------------------------------------------- the cache's blocks

    def _move_blocks(self, order: m.MoveBlocks) -> None:
        if order.epoch == self._epoch:
            self._blocks(order.heads).move(order.pairs)
            self._channel.send(m.BlocksMoved(epoch=order.epoch))

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
                with self._opened(device, KV_ARENA) as arena:
                    peer = torch.frombuffer(arena.map(), dtype=torch.uint8)
                copied += blocks.copy_from(peer, tuple(order.kv_heads[device]), order.blocks, [head])
            if order.from_mirror and order.pairs:
                mirror = self._mirror(order.mirror_id)
                restored = blocks.restore(mirror, order.pairs, order.from_mirror)
        except (StateError, WireError) as error:
            self._channel.send(m.PlanesRestored(epoch=order.epoch, ok=False, reason=str(error)))
            return
        done = m.PlanesRestored(epoch=order.epoch, ok=True, copied_bytes=copied, restored_bytes=restored)
        self._channel.send(done)

    def _save_blocks(self, order: m.SaveBlocks) -> None:
        """Runs between two steps: what the next one overwrites has been copied by then."""
        if order.epoch != self._epoch:
            return
        a = self._assigned()
        a.probe.at("save")
        try:
            self._blocks(self._kv_heads).save(self._mirror(order.mirror_id), order.pairs, order.heads)
        except (StateError, WireError):
            self._channel.send(m.BlocksSaved(ticket=order.ticket, ok=False))
            return
        self._channel.send(m.BlocksSaved(ticket=order.ticket, ok=True))

    def _blocks(self, heads: Sequence[int]) -> KVBlocks:
        return KVBlocks(self._mapped(KV_ARENA), self._assigned().kv, tuple(heads))

    def _mirror(self, mirror_id: str) -> torch.Tensor:
        """The host's mirror, all of it. Raises StateError if the host anchor is another one by now."""
        if self._mapped_mirror is None or self._mapped_mirror[0] != mirror_id:
            self._mapped_mirror = None
            with self._opened(HOST, MIRROR_ARENA, mirror_id) as arena:
                self._mapped_mirror = (mirror_id, torch.frombuffer(arena.map(), dtype=torch.uint8))
        return self._mapped_mirror[1]

    def _opened(self, device: str, name: str, anchor_id: str | None = None) -> MemfdArena:
        """An arena of another anchor; a mapping of it outlives the arena object."""
        order = self._assigned().order
        with AnchorClient.connect(order.runtime_dir, device, role="tool", timeout_s=ANCHOR_TIMEOUT_S) as client:
            if anchor_id is not None and client.welcome.anchor_id != anchor_id:
                raise StateError(f"the anchor of {device} was replaced; what it held is gone")
            return client.open_arena(name, self._epoch)

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
            self._group = self._make_group(rank)
        except GroupAborted:
            return
        shard = layout[a.device]
        self._kv_heads = shard[KV]
        weights = WeightViews(self._mapped(WEIGHTS_ARENA), a.weights, shard)
        kv_cache = KVCache(self._mapped(KV_ARENA), a.kv, shard)
        if self._decoder is None:
            self._decoder = Decoder(a.units, layout, rank, weights, kv_cache, a.order.max_model_len)
        else:
            self._decoder.rebind(layout, rank, weights, kv_cache)
        self._channel.send(m.GroupFormed(epoch=order.epoch))

    def _make_group(self, rank: int) -> Group:
        a = self._assigned()
        assert self._region is not None
        if a.order.collectives == "gloo":
            store = Path(a.order.runtime_dir, f"gloo-{self._epoch}")
            group: Group = GlooGroup(self._region, rank, GROUP_TIMEOUT_S, store_path=str(store))
        else:
            group = ShmGroup(self._region, rank, GROUP_TIMEOUT_S)
        return _ProbedGroup(group, a.probe) if a.probe else group

    def _run_step(self, order: m.RunStep) -> None:
        """The forward pass, and on rank 0 the sampler. A group that dissolves meanwhile ends it silently."""
        if order.epoch != self._epoch or self._group is None:
            return
        a, batch = self._assigned(), order.batch
        assert self._decoder is not None and self._region is not None
        self._region.mark(self._group.rank, batch.step)
        a.probe.at("prefill" if any(len(seq.token_ids) > 1 for seq in batch.seqs) else "decode")
        try:
            with torch.inference_mode():
                forward = ForwardBatch.build(batch.seqs, a.order.kv_block_size)
                logits = self._decoder.forward(forward, self._group)
        except GroupAborted:
            return
        if logits is not None:
            sampling = [seq for seq in batch.seqs if seq.sample]
            tokens = self._sampler.sample(logits, sampling)
            sampled = {seq.request_id: token for seq, token in zip(sampling, tokens, strict=True)}
            self._channel.send(m.StepDone(epoch=order.epoch, step=batch.step, sampled=sampled))
        a.probe.at("between")

    # ------------------------------------------------------------------------------------------- helpers

    def _assigned(self) -> _Assignment:
        assert self._assignment is not None, "the controller sent work before Assign"
        return self._assignment

    def _mapped(self, name: str) -> torch.Tensor:
        """The arena's memory as one-dimensional uint8; mapped at first use."""
        if name not in self._arenas:
            arena = self._assigned().anchor.open_arena(name, self._epoch)
            self._arenas[name] = (arena, torch.frombuffer(arena.map(), dtype=torch.uint8))
        return self._arenas[name][1]

    def _dissolve(self) -> None:
        """Lets go of the old group."""
        if self._group is not None:
            self._group.close()
        if self._region is not None:
            self._region.close()
        self._group = self._region = None


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


class _Progress:
    """Tells the controller how far a load is, at most every `PROGRESS_EVERY_S`."""

    def __init__(self, channel: Channel, epoch: int, total_bytes: int):
        self._channel, self._epoch, self._total = channel, epoch, total_bytes
        self._num_bytes, self._next_s = 0, 0.0

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + PROGRESS_EVERY_S
            self._channel.send(m.LoadProgress(epoch=self._epoch, num_bytes=self._num_bytes, total_bytes=self._total))


def _connect_anchor(order: m.Assign) -> AnchorClient:
    return AnchorClient.connect(order.runtime_dir, order.device, role="worker", timeout_s=ANCHOR_TIMEOUT_S)


def _inject(order: m.Assign, kind: str) -> None:
    """Asks the device's own anchor for the fault; with `lost` the connection just ends."""
    with (
        contextlib.suppress(AnchorTPError),
        AnchorClient.connect(order.runtime_dir, order.device, role="tool") as tool,
    ):
        tool.inject(kind)
