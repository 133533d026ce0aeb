"""A small checkpoint, arenas in this process, and the slow obvious way to fill them."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from pathlib import Path

import torch

from anchortp.arena import MemfdArena
from anchortp.config import load_model_config
from anchortp.layout import Shard, WeightAddresses, empty_shard, model_units
from anchortp.plan.plan import FromPeer, Move
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.executor import Hooks, Load, Loaded
from anchortp.transfer.faulty import Fault, FaultySource
from anchortp.transfer.loader import load_replicated, load_units
from anchortp.transfer.queue import Failure
from anchortp.transfer.sources import Destination, HostSource, PeerSource
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import HOST, Geometry, complete

END_TIMEOUT_S = 60.0


class Bench:
    """A checkpoint and the arenas of devices; closes what it opened. `stream`: how peers are read, and
    weights rearranged."""

    def __init__(self, folder: Path, *, panels: bool = False, stream: Streamer | None = None):
        self.stream = stream
        self.units = model_units(replace(load_model_config(folder), panels=panels))
        self.addresses = WeightAddresses(units=self.units)
        self.geometry = Geometry(self.addresses)
        self.checkpoint = Checkpoint.open(folder, self.units, stream=stream)
        self.arenas: dict[str, MemfdArena] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.gone: set[str] = set()
        self.sources: dict[str, FaultySource] = {}
        self.num_closed = 0
        self.struck = threading.Event()  # a fault has fired

    def arena(self, device: str) -> torch.Tensor:
        """The device's memory; 0xFF where nothing was loaded."""
        if device not in self.arenas:
            self.arenas[device] = MemfdArena.create(device, self.addresses.reserved_bytes)
            self.buffers[device] = torch.frombuffer(self.arenas[device].map(), dtype=torch.uint8)
            self.buffers[device].fill_(0xFF)
        return self.buffers[device]

    def fill(self, device: str, shard: Shard, *, fresh: bool = True) -> torch.Tensor:
        """Loads a shard with the plain loader: the reference."""
        buffer = self.arena(device)
        if fresh:
            load_replicated(self.checkpoint, buffer, self.addresses)
        items = [(f, unit, slot) for f in self.units.num_units for slot, unit in enumerate(shard[f])]
        load_units(self.checkpoint, buffer, self.addresses, items)
        return buffer

    def load(
        self,
        device: str,
        after: Shard,
        *,
        before: Shard | None = None,
        moves: list[Move] | None = None,
        fresh: bool = True,
        faults: dict[str, Fault] | None = None,
        hooks: dict | None = None,
        **options,
    ) -> tuple[Load, queue.SimpleQueue]:
        """A load, not begun, and where its result comes out."""
        results: queue.SimpleQueue = queue.SimpleQueue()
        before = before or empty_shard(device)
        work = complete(self.geometry, device, before, after, moves or [], fresh)
        buffer = self.arena(device)

        def open_source(name: str):
            inner = HostSource(self.checkpoint) if name == HOST else self._peer(name)
            if faults and name in faults:
                inner = FaultySource(inner, faults[name], on_fire=self.struck.set)
            self.sources[name] = inner
            return inner

        load = Load(
            self.geometry,
            self.geometry.chunks(work),
            Destination(self.arenas[device], buffer),
            Hooks(open_source=open_source, on_end=results.put, **(hooks or {})),
            **options,
        )
        return load, results

    def run(self, device: str, after: Shard, **options) -> Loaded | Failure:
        """Carries out a load to its end."""
        load, results = self.load(device, after, **options)
        load.start()
        result = results.get(timeout=END_TIMEOUT_S)
        load.cancel()
        load._queue.validate()
        assert not [t for t in threading.enumerate() if t.name.startswith("load")], "a thread was left behind"
        return result

    def _peer(self, device: str) -> PeerSource:
        def close():
            self.num_closed += 1

        arena = self.arenas[device]
        return PeerSource(device, arena, is_gone=lambda: device in self.gone, on_close=close, stream=self.stream)

    def close(self) -> None:
        self.buffers.clear()
        for arena in self.arenas.values():
            arena.close()


def moves_from(bench: Bench, device: str, after: Shard, peers: dict[str, Shard]) -> list[Move]:
    """Every unit of `after` that a peer has, copied from there, one move each."""
    moves = []
    for family in bench.units.num_units:
        for slot, unit in enumerate(after[family]):
            for peer, shard in peers.items():
                if unit in shard[family]:
                    source = FromPeer(device=peer, slot=shard[family].index(unit))
                    size = bench.units.unit_bytes[family]
                    moves.append(
                        Move(device=device, family=family, unit=unit, slot=slot, source=source, num_bytes=size)
                    )
                    break
    return moves
