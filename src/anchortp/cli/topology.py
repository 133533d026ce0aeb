"""`anchortp topology`: show one, or measure this machine and write its `local` topology as YAML."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from anchortp.errors import ConfigError
from anchortp.plan.topology import (
    GB,
    PRESETS,
    Link,
    Place,
    Topology,
    TopologyError,
    cluster,
    local,
    parse_topology,
    preset,
)

REPEATS = 7
BLOCK_BYTES = 8 << 20  # of one read or write: the call itself costs nothing any more
_CLUSTER = re.compile(r"cluster-([1-9]\d{0,3})x([1-9]\d{0,2})")


# ------------------------------------------------------------------------------------------------ by name or file


def load_topology(name: str, num_devices: int | None = None) -> Topology:
    """A preset, `cluster-NxM` (N nodes of M devices) or a YAML file, in this order.

    `num_devices`: how many a `local` topology shall have (its devices are virtual, so it has as many as asked for).
    Raises TopologyError in one line: unknown name, unreadable file, and all that `parse_topology` refuses.
    """
    if name == "local" and num_devices is not None:
        return local(tuple(f"cpu:{i}" for i in range(num_devices)))
    if name in PRESETS:
        return preset(name)
    if match := _CLUSTER.fullmatch(name):
        return cluster(int(match[1]), int(match[2]))
    path = Path(name).expanduser()
    if not path.exists():
        raise TopologyError(
            f"topology {name!r} is neither a file nor known; give a YAML file, cluster-NxM (N nodes of M devices), "
            f"or one of {', '.join(PRESETS)}."
        )
    return _read(path)


def _read(path: Path) -> Topology:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path} cannot be read ({error}); give a YAML file with places and links.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise TopologyError(f"{path} is not YAML ({reason}); `anchortp topology show dgx-h100 --yaml` is.") from None
    try:
        return parse_topology(raw, name=path.stem)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------- as YAML


def as_raw(topology: Topology) -> dict[str, Any]:
    """The mapping that `parse_topology` reads back to an equal topology; two equal directions become `between`."""
    places: dict[str, dict[str, Any]] = {}
    for place in topology.places:
        places[place.name] = entry = {"kind": place.kind}
        entry |= {key: value for key in ("node", "numa") if (value := getattr(place, key))}
        if place.memory_bytes is not None:
            entry["memory_gb"] = _plain(place.memory_bytes / GB)
    return {
        "name": topology.name,
        "places": places,
        "links": list(_raw_links(topology.links)),
        "weights_at": list(topology.weights_at),
    }


def _raw_links(links: tuple[Link, ...]) -> Iterator[dict[str, Any]]:
    position = 0
    while position < len(links):
        link, back = links[position], links[position + 1] if position + 1 < len(links) else None
        paired = back == replace(link, src=link.dst, dst=link.src)
        entry: dict[str, Any] = {"between": [link.src, link.dst]} if paired else {"from": link.src, "to": link.dst}
        entry["gb_per_s"] = _plain(link.bytes_per_s / GB)
        if link.latency_s:
            entry["latency_us"] = _plain(link.latency_s * 1e6)
        yield entry
        position += 2 if paired else 1


def _plain(value: float) -> float | int:
    rounded = round(value, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def as_yaml(topology: Topology, comments: tuple[str, ...] = ()) -> str:
    """One line per place and link, as a person would write it."""
    import yaml

    def flow(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()

    raw = as_raw(topology)
    lines = [f"# {comment}" for comment in comments]
    lines += [flow({"name": raw["name"]})[1:-1], "places:"]
    lines += [f"  {flow({name: place})[1:-1]}" for name, place in raw["places"].items()]
    lines += ["links:", *(f"  - {flow(link)}" for link in raw["links"])]
    lines.append(flow({"weights_at": raw["weights_at"]})[1:-1])
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------- show


def show(name: str, *, yaml_output: bool) -> None:
    """Prints places and links. Raises TopologyError."""
    topology = load_topology(name)
    if yaml_output:
        print(as_yaml(topology), end="")
        return
    from rich.table import Table

    from anchortp.cli.plan_view import console, rate, size

    places = Table("place", "kind", "node", "numa", "memory", "holds the checkpoint", title=f"{topology.name}: places")
    for place in topology.places:
        memory = "" if place.memory_bytes is None else size(place.memory_bytes)
        has_weights = "yes" if place.name in topology.weights_at else ""
        places.add_row(place.name, place.kind, place.node, place.numa, memory, has_weights)
    links = Table("from", "to", title=f"{topology.name}: links")
    for column in ("bandwidth", "latency"):
        links.add_column(column, justify="right")
    for entry, link in zip(*_folded(topology.links), strict=True):
        links.add_row(link.src, entry, rate(link.bytes_per_s), f"{1e6 * link.latency_s:g} µs")
    view = console()
    view.print(places)
    view.print(links)


def _folded(links: tuple[Link, ...]) -> tuple[list[str], list[Link]]:
    """Links out of one place with equal numbers share a line: where they end, and one of them for the numbers."""
    groups: dict[tuple[str, float, float], list[Link]] = {}
    for link in links:
        groups.setdefault((link.src, link.bytes_per_s, link.latency_s), []).append(link)
    return [", ".join(link.dst for link in group) for group in groups.values()], [g[0] for g in groups.values()]


# -------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What this machine reaches, in bytes per second, best of `REPEATS`. A copy of n bytes counts n."""

    copy_one_thread: float
    copy_all_threads: float
    read_one_thread: float  # a file in the page cache, into memory
    read_all_threads: float
    disk: float | None  # the same file after the page cache was told to forget it; None where it would not
    num_threads: int


def measure(output: Path | None, *, num_devices: int, size_bytes: int = 256 << 20, folder: Path | None = None) -> None:
    """Prints the `local` topology of this machine as YAML, or writes it to `output`. Takes some seconds, and
    `size_bytes` of free disk space in `folder` (by default where temporary files go) until it returns.

    Raises ConfigError for a folder or file that cannot be written.
    """
    found = measure_machine(size_bytes, folder or Path(tempfile.gettempdir()))
    text = as_yaml(measured_topology(found, num_devices), comments(found, size_bytes))
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}); give another --output.") from None
    print(f"wrote {output}; use it with `anchortp plan MODEL --topology {output}`", file=sys.stderr)


def measure_machine(size_bytes: int, folder: Path) -> Measured:
    num_threads = len(os.sched_getaffinity(0))
    copy_one, copy_all = (_copy_rate(size_bytes, threads) for threads in (1, num_threads))
    with _scratch_file(folder, size_bytes) as path:
        disk = _disk_rate(path, size_bytes)
        read_one, read_all = (_read_rate(path, size_bytes, threads) for threads in (1, num_threads))
    return Measured(
        copy_one_thread=copy_one,
        copy_all_threads=max(copy_one, copy_all),
        read_one_thread=read_one,
        read_all_threads=max(read_one, read_all),
        disk=disk,
        num_threads=num_threads,
    )


def measured_topology(found: Measured, num_devices: int) -> Topology:
    """`local` with the figures of this machine: a device copies as fast as one thread does, all devices together
    as fast as all threads, and reads from the host's memory are as fast as reads out of the page cache."""
    plain = local(
        tuple(f"cpu:{i}" for i in range(num_devices)),
        copy_bytes_per_s=_tidy(found.copy_one_thread),
        bus_bytes_per_s=_tidy(found.copy_all_threads),
        host_bytes_per_s=_tidy(found.read_all_threads),
    )
    if found.disk is None:
        return plain
    disk, link = Place(name="disk", kind="disk"), Link(src="disk", dst="host", bytes_per_s=_tidy(found.disk))
    return replace(plain, places=(*plain.places, disk), links=(*plain.links, link))


def comments(found: Measured, size_bytes: int) -> tuple[str, ...]:
    disk = "not measured (the file system does not forget what it cached)" if found.disk is None else _rate(found.disk)
    return (
        f"Measured by `anchortp topology measure`: best of {REPEATS}, {size_bytes >> 20} MiB each.",
        f"copy: {_rate(found.copy_one_thread)} on one thread, {_rate(found.copy_all_threads)} on {found.num_threads}",
        f"file in the page cache: {_rate(found.read_one_thread)} on one thread, "
        f"{_rate(found.read_all_threads)} on {found.num_threads}; from disk: {disk}",
    )


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / GB:.2f} GB/s"


def _tidy(bytes_per_s: float) -> float:
    """To 10 MB/s: more digits would claim more than a measurement knows."""
    return max(1, round(bytes_per_s / 1e7)) * 1e7


def _best(work: Callable[[int], None], size_bytes: int, num_threads: int) -> float:
    """Bytes per second of `work(0) ... work(num_threads - 1)` side by side, best of a few."""
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads, thread_name_prefix="anchortp-measure") as pool:
        for _ in range(REPEATS):
            began_s = time.perf_counter()
            for done in [pool.submit(work, i) for i in range(num_threads)]:
                done.result()
            best_s = min(best_s, time.perf_counter() - began_s)
    return size_bytes / best_s


def _copy_rate(size_bytes: int, num_threads: int) -> float:
    """numpy releases the interpreter's lock while it copies, so that threads really run side by side."""
    import numpy as np

    source = np.ones(size_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    cuts = _cuts(size_bytes, num_threads)
    return _best(lambda i: np.copyto(target[slice(*cuts[i])], source[slice(*cuts[i])]), size_bytes, num_threads)


def _read_rate(path: Path, size_bytes: int, num_threads: int) -> float:
    """Into a target of full size, as a load does: a small buffer would stay in the processor's cache."""
    cuts = _cuts(size_bytes, num_threads)
    targets = [memoryview(bytearray(stop - start)) for start, stop in cuts]
    with path.open("rb", buffering=0) as file:
        return _best(lambda i: _read_range(file.fileno(), targets[i], *cuts[i]), size_bytes, num_threads)


def _disk_rate(path: Path, size_bytes: int) -> float | None:
    """One cold read, front to back; None if the system keeps the file in memory whatever it is told (tmpfs)."""
    if _file_system(path) == "tmpfs":
        return None
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        target = memoryview(bytearray(size_bytes))
        began_s = time.perf_counter()
        _read_range(file.fileno(), target, 0, size_bytes)
        return size_bytes / (time.perf_counter() - began_s)


def _file_system(path: Path) -> str:
    """Of the mount that holds `path`, after /proc/self/mounts; "" if that cannot be told."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, point, found, *_ = line.split()
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def _read_range(descriptor: int, target: memoryview, start: int, stop: int) -> None:
    done = 0
    while start + done < stop:
        count = os.preadv(descriptor, [target[done : done + BLOCK_BYTES]], start + done)
        if count == 0:
            raise ConfigError("the file that is measured became shorter; is the disk full?")
        done += count


def _cuts(size_bytes: int, num_threads: int) -> list[tuple[int, int]]:
    edges = [size_bytes * i // num_threads for i in range(num_threads + 1)]
    return list(pairwise(edges))


@contextlib.contextmanager
def _scratch_file(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file of random bytes (a disk that compresses must not shine), gone afterwards."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="anchortp-measure-") as file:
            for start in range(0, size_bytes, BLOCK_BYTES):
                file.write(os.urandom(min(BLOCK_BYTES, size_bytes - start)))
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise ConfigError(
            f"{folder}: a file of {size_bytes} bytes could not be written or read ({error.strerror}); "
            f"give another --folder or a smaller --size."
        ) from None
