"""How fast weights move after a loss, against what plain parallel memcpy reaches; policies compared; overlap.

    python -m bench.transfer [--layers 8] [--repeats 5] [--dir ~/.cache/anchortp/bench] [--plot FILE.png]

A model with the layer shapes of Qwen3-8B and random weights is made once. Each device is a process with a memfd
arena; a plan of the policy is carried out by the executor (`anchortp.transfer`), stage by stage, all devices at once,
sums checked. Then the arenas are brought back to where they were. Weights are laid out as the engine does by default,
and kept packed as with `--packed-weights`. All files are read once, so that the page cache has them. Before the clock
starts the files' pages are mapped and the arenas lie in huge pages, as a worker does it when it has nothing better to
do; the kernels copy (a C++ compiler is needed). The clock
stops when the last device has said that it is done; what it unmaps then is in the CPU time alone.

The floor is the same run's, and in turn with the loads: lost bytes over the bytes per second that `--threads` threads
copy from warm memory to warm memory. Destinations are mapped before the clock starts; with `--cold-pages` the load has
to allocate their pages, as a recovery must for which no memory was made ready, and is compared with memcpy into fresh
pages of a memfd as well. Where other work runs on the machine, CPU time says more: that of all devices, over what one
thread needs to copy the bytes.

The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.table import Table
from safetensors.torch import save_file

from anchortp.arena import MemfdArena
from anchortp.config import cache_folder, load_model_config, reads_panels
from anchortp.layout import ModelUnits, Shard, WeightAddresses, empty_shard, initial_layout, model_units
from anchortp.native import build_kernels
from anchortp.plan import POLICIES, FromHost, FromPeer, Move, Plan, Problem, local
from anchortp.plan.plan import REPLICATED
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.executor import Hooks, Load, Loaded
from anchortp.transfer.idle import IdleWork, huge_pages
from anchortp.transfer.packed import PackedWeights, pack
from anchortp.transfer.queue import Failure
from anchortp.transfer.sources import Destination, HostSource, PeerSource
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.tensors import tensor_of
from anchortp.transfer.work import HOST, Geometry, complete
from bench.common import conditions, console, finish, spread
from bench.gpu_sections import QWEN3_8B

CHANGES = {"8 to 7": (8, (3,)), "8 to 6": (8, (6, 7)), "4 to 2": (4, (2, 3))}
COMPARED = ("reload", "greedy", "cmm", "units", "makespan")
OURS = "makespan"
TIMEOUT_S = 600.0


# ------------------------------------------------------------------------------------------------- the model


def make_model(folder: Path, num_layers: int, shape: dict) -> Path:
    """Random weights, a file per layer; made once."""
    raw = shape | {"num_hidden_layers": num_layers}
    config_path = folder / "config.json"
    if config_path.exists() and json.loads(config_path.read_text()) == raw:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        bits = torch.randint(0, 1 << 14, size, generator=generator, dtype=torch.int16)
        return bits.view(torch.bfloat16)

    h, hd, mlp = raw["hidden_size"], raw["head_dim"], raw["intermediate_size"]
    q, kv = raw["num_attention_heads"] * hd, raw["num_key_value_heads"] * hd
    weight_map = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        _evict(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(num_layers):
        p = f"model.layers.{layer}."
        save(
            f"model-{layer}.safetensors",
            {
                p + "self_attn.q_proj.weight": noise(q, h),
                p + "self_attn.k_proj.weight": noise(kv, h),
                p + "self_attn.v_proj.weight": noise(kv, h),
                p + "self_attn.o_proj.weight": noise(h, q),
                p + "mlp.gate_proj.weight": noise(mlp, h),
                p + "mlp.up_proj.weight": noise(mlp, h),
                p + "mlp.down_proj.weight": noise(h, mlp),
                p + "self_attn.q_norm.weight": noise(hd),
                p + "self_attn.k_norm.weight": noise(hd),
                p + "input_layernorm.weight": noise(h),
                p + "post_attention_layernorm.weight": noise(h),
            },
        )
    embed = {"model.embed_tokens.weight": noise(raw["vocab_size"], h), "model.norm.weight": noise(h)}
    save("model-rest.safetensors", embed)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config_path.write_text(json.dumps(raw))
    return folder


def _evict(path: Path) -> None:
    """Out of the page cache: read back from disk it lies in large folios, as a file does that was downloaded."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path, packed: Path | None = None) -> float:
    """Into the page cache, with what earlier runs left of the packed weights. Bytes per second."""
    began_s, num_bytes = time.perf_counter(), 0
    buffer = bytearray(4 << 20)
    kept = [packed] if packed is not None and packed.exists() else []
    for path in (*sorted(folder.glob("*.safetensors")), *kept):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - began_s)


# ----------------------------------------------------------------------------------------------- the devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """`cold`: give the destinations' pages back first."""

    moves: tuple[Move, ...]
    before: Shard
    after: Shard
    expected: dict[str, str]
    num_movers: int
    fresh: bool = False
    cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle:
    """What an engine's worker does when it has nothing better to do: move what its arena holds into huge pages, and
    fill the file of packed weights from it, to be read from now on."""

    shard: Shard
    huge_pages: bool
    path: Path | None


def _at_once(steps: Iterator[None]) -> None:
    work = IdleWork(steps, pace=1.0)
    work.start()
    work.join()


class Worker:
    """[device process] What an engine's worker does in a load, without an engine around it."""

    def __init__(self, device: str, folder: Path, units: ModelUnits, arenas: dict[str, MemfdArena]):
        torch.set_num_threads(1)
        self.device = device
        self.arenas = arenas
        self.geometry = Geometry(WeightAddresses(units=units))
        self.stream = Streamer(str(build_kernels(cache_folder() / "kernels")))
        self.checkpoint = Checkpoint.open(folder, units, stream=self.stream)
        self.buffer = tensor_of(arenas[device])
        self.destination = Destination(arenas[device], self.buffer)
        self.packed: PackedWeights | None = None

    def serve(self, pipe: Connection) -> None:
        while (order := pipe.recv()) is not None:
            if isinstance(order, Idle):
                self._idle(order)
                pipe.send("idle")
                continue
            moves = self._moves(order)
            self._reserve(order, moves)
            pipe.send("ready")
            assert pipe.recv() == "go"
            pipe.send(self._load(order, pipe))

    def _idle(self, order: Idle) -> None:
        if order.huge_pages:
            _at_once(huge_pages(self.geometry.addresses, order.shard, self.buffer))
        if order.path is None:
            _at_once(self.checkpoint.map_ahead())
        else:
            self.packed = PackedWeights(order.path, self.geometry)
            view = memoryview(self.buffer.numpy())
            _at_once(pack(self.packed, self.geometry, order.shard, lambda a, b: view[a:b], self.stream))

    def _moves(self, order: Order) -> tuple[Move, ...]:
        return complete(self.geometry, self.device, order.before, order.after, order.moves, order.fresh)

    def _reserve(self, order: Order, moves: Sequence[Move]) -> None:
        """Before the clock starts. Cold: their pages are given back, and the load allocates them."""
        if order.cold:
            self.destination = Destination(self.arenas[self.device], self.buffer)
        for chunk in self.geometry.chunks(moves):
            if order.cold:
                self.arenas[self.device].decommit(chunk.start, chunk.stop)
            else:
                self.destination.prepare(chunk.start, chunk.stop)

    def _load(self, order: Order, pipe: Connection) -> float:
        """Sends the result from the load's thread, as an engine's worker does. Returns the CPU time of this process,
        with what follows that: it hardly depends on what else runs here."""
        ended, began_s = threading.Event(), time.process_time()

        def on_end(result: Loaded | Failure) -> None:
            pipe.send(result)
            ended.set()

        load = Load(
            self.geometry,
            self.geometry.chunks(self._moves(order)),
            self.destination,
            Hooks(open_source=self._source, on_end=on_end),
            expected=order.expected,
            num_movers=order.num_movers,
        )
        load.start()
        assert ended.wait(TIMEOUT_S), "the load does not end"
        load.cancel()
        return time.process_time() - began_s

    def _source(self, name: str):
        if name == HOST:
            return HostSource(self.checkpoint, self.packed)
        arena = self.arenas[name]
        return PeerSource(name, arena, is_gone=lambda: False, on_close=lambda: None, stream=self.stream)


class Machine:
    """Devices as processes. Owns their arenas; knows what each slot holds."""

    def __init__(self, folder: Path, num_devices: int, num_movers: int, panels: bool):
        self.folder = folder
        self.units = model_units(replace(load_model_config(folder), panels=panels))
        self.num_movers = num_movers
        self.addresses = WeightAddresses(units=self.units)
        self.devices = tuple(f"cpu:{i}" for i in range(num_devices))
        self.arenas = {d: MemfdArena.create(d, self.addresses.reserved_bytes) for d in self.devices}
        self.before = initial_layout(self.units, self.devices)
        self.sums: dict[str, str] = {}
        context = multiprocessing.get_context("fork")
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for device in self.devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=self._run, args=(device, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes[device] = ours
            self._processes.append(process)
        orders = {d: self._order((), empty_shard(d), self.before[d], fresh=True) for d in self.devices}
        for device, result in self._carry_out(orders)[2].items():
            assert isinstance(result, Loaded), f"{device}: {result}"
            self.sums |= result.sums

    def idle(self, path: Path | None, huge_pages: bool) -> float:
        """Seconds that it takes to get ready for the next load, all devices at once."""
        began_s = time.perf_counter()
        for device in self.devices:
            self._pipes[device].send(Idle(path=path, shard=self.before[device], huge_pages=huge_pages))
        for device in self.devices:
            assert self._answer(device) == "idle"
        return time.perf_counter() - began_s

    def _run(self, device: str, pipe: Connection) -> None:
        Worker(device, self.folder, self.units, self.arenas).serve(pipe)

    def _order(self, moves, before: Shard, after: Shard, *, fresh: bool = False, cold: bool = False, movers: int = 0):
        return Order(
            moves=tuple(moves),
            before=before,
            after=after,
            expected=self.sums,
            num_movers=movers or self.num_movers,
            fresh=fresh,
            cold=cold,
        )

    def _carry_out(self, orders: dict[str, Order]) -> tuple[float, float, dict[str, Loaded]]:
        """Seconds from the word to the last device's end, and CPU seconds of all of them."""
        for device, order in orders.items():
            self._pipes[device].send(order)
        for device in orders:
            assert self._answer(device) == "ready"
        began_s = time.perf_counter()
        for device in orders:
            self._pipes[device].send("go")
        results = {device: self._answer(device) for device in orders}
        took_s = time.perf_counter() - began_s
        for device, result in results.items():
            assert isinstance(result, Loaded) and not result.rerouted, f"{device}: {result}"
        return took_s, sum(self._answer(device) for device in orders), results

    def _answer(self, device: str):
        assert self._pipes[device].poll(TIMEOUT_S), f"{device} does not answer"
        return self._pipes[device].recv()

    def carry_out(self, plan: Plan, *, cold: bool = False) -> tuple[float, float]:
        """Seconds and CPU seconds for all stages of a plan; then the arenas are as they were."""
        took_s = cpu_s = 0.0
        written: set[tuple[str, str, int]] = set()
        for stage in range(plan.num_stages):
            orders = {}
            for device in plan.after.devices:
                moves = [m for m in plan.moves_of(device) if m.stage == stage and m.family != "kv_plane"]
                if moves:
                    held = empty_shard(device)
                    orders[device] = self._order(moves, held, held, cold=cold)
                    written |= {(device, m.family, m.slot + i) for m in moves for i in range(m.num_units)}
            if orders:
                seconds, cpu_seconds, _ = self._carry_out(orders)
                took_s, cpu_s = took_s + seconds, cpu_s + cpu_seconds
        self._restore(written)
        return took_s, cpu_s

    def _restore(self, written: set[tuple[str, str, int]]) -> None:
        """Loads again what lay in slots of the old layout that were written to."""
        orders = {}
        for device in {device for device, _, _ in written}:
            moves = []
            for _, family, slot in sorted(key for key in written if key[0] == device):
                if family != REPLICATED and slot < len(self.before[device][family]):
                    moves.append(
                        Move(
                            device=device,
                            family=family,
                            unit=self.before[device][family][slot],
                            slot=slot,
                            source=FromHost(),
                            num_bytes=self.units.unit_bytes[family],
                        )
                    )
            if moves:
                orders[device] = self._order(moves, empty_shard(device), empty_shard(device))
        if orders:
            self._carry_out(orders)

    def overlap(self, share: float = 0.5) -> dict[str, float]:
        """One device takes units from the host and others from a peer: apart, a thread each, and together."""
        device, peer = self.devices[0], self.devices[1]
        held = self.before[peer]["mlp"]
        slot = len(self.before[device]["mlp"])
        num_host = int(len(held) * share)
        size = self.units.unit_bytes["mlp"]

        def move(source, first: int, count: int) -> Move:
            return Move(
                device=device,
                family="mlp",
                unit=held[first],
                slot=slot + first,
                source=source,
                num_bytes=count * size,
                num_units=count,
            )

        host = move(FromHost(), 0, num_host)
        copy = move(FromPeer(device=peer, slot=num_host), num_host, len(held) - num_host)
        none = empty_shard(device)

        def seconds(moves, movers: int) -> float:
            return self._carry_out({device: self._order(moves, none, none, movers=movers)})[0]

        return {
            "host_s": seconds([host], 1),
            "peer_s": seconds([copy], 1),
            "both_s": seconds([host, copy], 2),
            "num_bytes": host.num_bytes + copy.num_bytes,
        }

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(TIMEOUT_S)
        for arena in self.arenas.values():
            arena.close()


# ---------------------------------------------------------------------------------------------- measurements


class Memcpy:
    """What threads copy per second, from warm memory to warm memory."""

    def __init__(self, num_bytes: int = 1 << 30):
        self._source = torch.ones(num_bytes, dtype=torch.uint8)
        self._target = torch.zeros(num_bytes, dtype=torch.uint8)

    def bytes_per_cpu_s(self) -> float:
        began_s = time.thread_time()
        self._target.copy_(self._source)
        return self._source.numel() / (time.thread_time() - began_s)

    def fresh_bytes_per_s(self, num_threads: int) -> float:
        """Into pages of a memfd that nobody has touched."""
        with MemfdArena.create("floor", self._source.numel()) as arena:
            return self.bytes_per_s(num_threads, tensor_of(arena))

    def bytes_per_s(self, num_threads: int, target: torch.Tensor | None = None) -> float:
        target = self._target if target is None else target
        size = self._source.numel() // num_threads
        parts = [slice(i * size, (i + 1) * size) for i in range(num_threads)]
        copies = [threading.Thread(target=target[p].copy_, args=(self._source[p],)) for p in parts]
        began_s = time.perf_counter()
        for thread in copies:
            thread.start()
        for thread in copies:
            thread.join()
        return size * num_threads / (time.perf_counter() - began_s)


def plans(machine: Machine, lost: Sequence[int]) -> dict[str, Plan]:
    gone = tuple(machine.devices[i] for i in lost)
    problem = Problem(
        units=machine.units,
        before=machine.before,
        devices=tuple(d for d in machine.devices if d not in gone),
        topology=local(machine.devices),
        lost=gone,
    )
    return {name: POLICIES[name](problem) for name in COMPARED}


def measure(machine: Machine, lost: Sequence[int], args: argparse.Namespace, memcpy: Memcpy) -> list[dict]:
    """A row per policy. Rounds go over all policies and the floor, so that they meet the same neighbours."""
    compared = plans(machine, lost)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    speeds: list[float] = []
    fresh_speeds: list[float] = []
    cpu_speeds: list[float] = []
    for _ in range(args.repeats):
        for name, plan in compared.items():
            speeds.append(memcpy.bytes_per_s(args.threads))
            if name == OURS:
                fresh_speeds.append(memcpy.fresh_bytes_per_s(args.threads))
            cpu_speeds.append(memcpy.bytes_per_cpu_s())
            times[name].append(machine.carry_out(plan, cold=args.cold_pages))
    floor_speed = statistics.median(speeds)
    lost_bytes = compared[OURS].lost_bytes
    rows = []
    for name, plan in compared.items():
        median_s = statistics.median(seconds for seconds, _ in times[name])
        cpu_s = statistics.median(cpu_s for _, cpu_s in times[name])
        rows.append(
            {
                "policy": name,
                "lost_bytes": lost_bytes,
                "loaded_bytes": plan.loaded_bytes,
                "copied_bytes": plan.copied_bytes,
                "relocated_bytes": plan.relocated_bytes,
                "stages": plan.num_stages,
                "seconds": spread([seconds for seconds, _ in times[name]]),
                "floor_s": lost_bytes / floor_speed,
                "ratio": median_s / (lost_bytes / floor_speed),
                "cpu_s": cpu_s,
                "cpu_ratio": cpu_s / (lost_bytes / statistics.median(cpu_speeds)),
                "bytes_per_s": (plan.loaded_bytes + plan.copied_bytes) / median_s,
                "memcpy_bytes_per_s": floor_speed,
                "fresh_ratio": median_s / (lost_bytes / statistics.median(fresh_speeds)),
                "fresh_memcpy_bytes_per_s": statistics.median(fresh_speeds),
            }
        )
    return rows


def measure_overlap(machine: Machine, repeats: int, memcpy: Memcpy, num_threads: int) -> dict:
    """Host and peer together, against the better founded of two bounds: the slower of the two alone, and what the
    memory bus lets through."""
    runs = [machine.overlap() | {"memcpy": memcpy.bytes_per_s(num_threads)} for _ in range(repeats)]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    links_s = max(medians["host_s"], medians["peer_s"])
    bus_s = medians["num_bytes"] / medians["memcpy"]
    return medians | {
        "bound_links_s": links_s,
        "bound_bus_s": bus_s,
        "share_of_bound": max(links_s, bus_s) / medians["both_s"],
    }


def measure_checksum(num_bytes: int = 1 << 20, repeats: int = 200) -> dict:
    """Bytes per second of the sum over a segment that is in the cache."""
    from anchortp.transfer.checksum import digest

    view = memoryview(bytearray(os.urandom(num_bytes)))
    began_s = time.perf_counter()
    for _ in range(repeats):
        digest(view)
    return {"hot_bytes_per_s": num_bytes * repeats / (time.perf_counter() - began_s)}


def measure_host(machine: Machine, memcpy: Memcpy, repeats: int) -> dict:
    """One thread: rows and columns of the checkpoint, in the page cache, into warm memory."""
    stream = Streamer(str(build_kernels(cache_folder() / "kernels")))
    checkpoint = Checkpoint.open(machine.folder, machine.units, stream=stream)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speeds: dict[str, list[float]] = {"memcpy": []}
    for tensor in machine.units.tensors:
        fitting = max(1, (4 << 20) // machine.units.block_bytes(tensor))
        units = min(fitting, machine.units.num_units[tensor.family])
        out = torch.empty(units * tensor.rows, machine.units.config.hidden_size, dtype=torch.bfloat16)
        for number in range(repeats + 2):
            begin = number * units % (machine.units.num_units[tensor.family] - units + 1)
            layer = number % machine.units.num_copies(tensor)
            began_s = time.perf_counter()
            checkpoint.read(tensor, layer, begin, units, out)
            took_s = time.perf_counter() - began_s
            if number >= 2:
                speeds.setdefault(tensor.key, []).append(out.nbytes / took_s)
            speeds["memcpy"].append(memcpy.bytes_per_s(1)) if number == 0 else None
    torch.set_num_threads(threads)
    return {key: statistics.median(values) for key, values in speeds.items()}


# --------------------------------------------------------------------------------------------------- report


def show(results: dict) -> None:
    out = console()
    for change, rows in results["changes"].items():
        table = Table(title=f"{change}: {rows[0]['lost_bytes'] / 1e9:.2f} GB lost, floor {rows[0]['floor_s']:.3f} s")
        for column in (
            "policy",
            "read GB",
            "copied GB",
            "moved inside GB",
            "stages",
            "seconds",
            "over floor",
            "over memcpy into fresh pages",
            "CPU over memcpy's",
        ):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for row in rows:
            table.add_row(
                row["policy"],
                f"{row['loaded_bytes'] / 1e9:.2f}",
                f"{row['copied_bytes'] / 1e9:.2f}",
                f"{row['relocated_bytes'] / 1e9:.2f}",
                str(row["stages"]),
                f"{row['seconds']['median']:.3f}",
                f"{row['ratio']:.2f}",
                f"{row['fresh_ratio']:.2f}",
                f"{row['cpu_ratio']:.2f}",
            )
        out.print(table)


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results["changes"]), figsize=(4.2 * len(results["changes"]), 3.4))
    for axis, (change, rows) in zip(axes, results["changes"].items(), strict=True):
        names = [row["policy"] for row in rows]
        medians = [row["seconds"]["median"] for row in rows]
        below = [m - row["seconds"]["min"] for m, row in zip(medians, rows, strict=True)]
        above = [row["seconds"]["max"] - m for m, row in zip(medians, rows, strict=True)]
        axis.bar(names, medians, yerr=[below, above], color="#4878a8", ecolor="#333333", capsize=3)
        axis.axhline(rows[0]["floor_s"], color="#b04030", linestyle="--", label="floor: lost bytes over memcpy")
        axis.set_title(change)
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel("seconds to move")
    axes[0].legend(fontsize=7)
    figure.suptitle("Time to move weights after a loss, by policy, with the same executor")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("~/.cache/anchortp/bench").expanduser())
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--movers", type=int, default=1, help="threads of one device's load that move")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the floor's memcpy")
    parser.add_argument("--cold-pages", action="store_true", help="allocate the destinations' pages in the load")
    parser.add_argument("--unpacked", action="store_true", help="read everything from the checkpoint itself")
    parser.add_argument("--small-pages", action="store_true", help="leave all arenas in pages of 4 KiB")
    parser.add_argument("--weights", choices=("auto", "plain"), default="auto", help="as of `anchortp serve`")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes: does the benchmark run?")
    args = parser.parse_args(argv)
    shape = QWEN3_8B | {"tie_word_embeddings": True, "eos_token_id": 151645}
    if args.tiny:
        shape = shape | {"hidden_size": 256, "head_dim": 16, "intermediate_size": 512, "vocab_size": 2048}
    name = f"qwen3-8b-shapes-{args.layers}" + ("-tiny" if args.tiny else "")
    folder = make_model(args.dir / name, args.layers, shape)
    panels = args.weights == "auto" and reads_panels()
    packed = None if args.unpacked else folder / f"packed-{'panels' if panels else 'plain'}"
    read_all(folder, packed)
    memcpy = Memcpy(32 << 20 if args.tiny else 512 << 20)
    results: dict = {"bench": "transfer", "conditions": conditions(), "args": vars(args) | {"dir": "", "plot": ""}}
    results["changes"] = {}
    for num_devices in dict.fromkeys(n for n, _ in CHANGES.values()):
        machine = Machine(folder, num_devices, args.movers, panels)
        try:
            results.setdefault("idle_s", []).append(machine.idle(packed, not args.small_pages))
            for change, (size, lost) in CHANGES.items():
                if size == num_devices:
                    results["changes"][change] = measure(machine, lost, args, memcpy)
            if num_devices == 4:
                results["overlap"] = measure_overlap(machine, 4 * args.repeats, memcpy, args.threads)
                results["host_bytes_per_s"] = measure_host(machine, memcpy, args.repeats)
        finally:
            machine.close()
    results["checksum"] = measure_checksum()
    results["model_bytes"] = model_units(load_model_config(folder)).total_bytes
    show(results)
    if args.plot:
        plot(results, args.plot)
    finish(results)


if __name__ == "__main__":
    main()
