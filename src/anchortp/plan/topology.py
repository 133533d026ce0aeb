"""What is wired to what: devices, host memory, disks and switches, and directed links between them. A value.

A route is a path of links. It may pass switches, host memory (a bounce buffer) and devices (a relay: the bytes
are staged there and sent on); it never passes a disk. Two directions of a cable are two links, each with its own
bandwidth. What several links share (a socket's memory, a PCIe root, a network card) is modelled as a switch with
a link of its own before it, so that "a link" is the only thing that can be busy.

## The presets and where their numbers come from
Bandwidths are nominal times `EFFICIENCY`, one assumption for all: about what pinned, large copies reach.
- PCIe Gen4 x16 32 GB/s, Gen5 x16 64 GB/s a direction (PCI-SIG); NVLink 4 450 GB/s a direction and GPU (NVIDIA
  H100 data sheet: 900 GB/s both ways); AMD MI210 100 GB/s both ways for each of three Infinity Fabric links (AMD
  data sheet: "up to 300 GB/s"), which connect the four GPUs of a bridge all to all.
- Memory of a socket: 8 channels of DDR4-3200, 205 GB/s (EPYC 7003), or of DDR5-4800, 307 GB/s (Xeon 8480C).
  Between sockets: 72 GB/s (EPYC 7003, four xGMI-2 links less overhead), 62 GB/s (three UPI 2.0 links).
- Network: one 400 Gbit/s card a node in `2-nodes-8`, one per GPU in `cluster`. NVMe Gen5: 14 GB/s.
Assumed: the checkpoint is in the page cache, spread evenly over the memory of the sockets of a node, and each
node has its own copy. Latencies (5 us for a copy over PCIe or NVLink, 10 us over the network) hardly matter here.
- `local`: virtual CPU devices that share one memory bus. 20 GB/s a copying thread was measured on a 2-core
  machine; `anchortp topology measure` replaces the figures by those of the machine at hand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Any, Literal

from anchortp.errors import ConfigError

Kind = Literal["device", "host", "disk", "switch"]
KINDS = ("device", "host", "disk", "switch")
EFFICIENCY = 0.85
GB = 1e9

Route = tuple[int, ...]  # indices into Topology.links


class TopologyError(ConfigError):
    """A topology that is malformed, names what does not exist, or does not connect what must be connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A vertex. `memory_bytes`: what a device can hold in weights and KV planes; None if not limited."""

    name: str
    kind: Kind
    node: str = ""
    numa: str = ""
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of one connection."""

    src: str
    dst: str
    bytes_per_s: float
    latency_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.src}>{self.dst}"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """`weights_at`: places where the whole checkpoint can be read. `relays`: bytes may pass one device on their way to
    another. Checked on construction: TopologyError."""

    name: str
    places: tuple[Place, ...]
    links: tuple[Link, ...]
    weights_at: tuple[str, ...]
    relays: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def by_name(self) -> dict[str, Place]:
        return {place.name: place for place in self.places}

    @cached_property
    def link_index(self) -> dict[str, int]:
        return {link.name: index for index, link in enumerate(self.links)}

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(place.name for place in self.places if place.kind == "device")

    def link(self, name: str) -> Link:
        return self.links[self.link_index[name]]

    def without(self, gone: Collection[str]) -> Topology:
        """The topology without some places and links (by name). Raises TopologyError if that cuts a device off."""
        links = tuple(x for x in self.links if x.name not in gone and x.src not in gone and x.dst not in gone)
        places = tuple(place for place in self.places if place.name not in gone)
        weights_at = tuple(name for name in self.weights_at if name not in gone)
        return replace(self, places=places, links=links, weights_at=weights_at)

    def cheapest(
        self, sources: Mapping[str, float], prices: Sequence[float]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Distances from the nearest of `sources` (each with its own cost to begin with) to every place they reach
        under non-negative `prices`, one per link, and the last link of each cheapest route. Passes no disk, and
        without `relays` no device. (Dijkstra; ties go to fewer links.)"""
        far: dict[str, float] = {}
        last: dict[str, int] = {}
        best = dict(sources)
        queue = [(cost, 0, name) for name, cost in best.items()]
        heapify(queue)
        steps_from, onward = self._steps_from, self._steps_onward
        while queue:
            at, hops, name = heappop(queue)
            if name not in far:
                far[name] = at
            elif hops or self.relays:  # where nothing is relayed, a source begins its own routes, however it is reached
                continue
            for index, dst in (onward if hops else steps_from)[name]:
                cost = at + prices[index]
                if dst not in far and cost < best.get(dst, math.inf):
                    best[dst], last[dst] = cost, index
                    heappush(queue, (cost, hops + 1, dst))
        return far, last

    @cached_property
    def _steps_from(self) -> dict[str, tuple[tuple[int, str], ...]]:
        """Per place the links out of it and where they end, but for disks."""
        found: dict[str, list[tuple[int, str]]] = {place.name: [] for place in self.places}
        for index, link in enumerate(self.links):
            if self.by_name[link.dst].kind != "disk":
                found[link.src].append((index, link.dst))
        return {name: tuple(steps) for name, steps in found.items()}

    @cached_property
    def _steps_onward(self) -> dict[str, tuple[tuple[int, str], ...]]:
        """As `_steps_from`, for bytes that come from elsewhere."""
        return self._steps_from if self.relays else self._steps_from | dict.fromkeys(self.devices, ())

    def path(self, last: Mapping[str, int], dst: str) -> Route:
        """The route to `dst` out of what `cheapest` returned."""
        route: list[int] = []
        while dst in last:
            route.append(last[dst])
            dst = self.links[last[dst]].src
            if not self.relays and self.by_name[dst].kind == "device":
                break
        return tuple(reversed(route))

    def route(self, src: str, dst: str) -> Route | None:
        """The route that moves a byte soonest when nothing else moves; None if there is none."""
        far, last = self.quickest((src,))
        return self.path(last, dst) if dst in far else None

    def quickest(self, sources: tuple[str, ...]) -> tuple[dict[str, float], dict[str, int]]:
        """`cheapest` where a link costs its seconds per byte; remembered."""
        if sources not in self._trees:
            self._trees[sources] = self.cheapest(dict.fromkeys(sources, 0.0), self.seconds_per_byte)
        return self._trees[sources]

    @cached_property
    def _trees(self) -> dict[tuple[str, ...], tuple[dict[str, float], dict[str, int]]]:
        return {}

    @cached_property
    def seconds_per_byte(self) -> tuple[float, ...]:
        return tuple(1.0 / link.bytes_per_s for link in self.links)


# ------------------------------------------------------------------------------------------------- checking


def _check(topology: Topology) -> None:
    names = [place.name for place in topology.places]
    for name in names:
        if names.count(name) > 1:
            raise TopologyError(f"place {name!r} is listed twice; give each place one entry.")
    for link in topology.links:
        _check_link(link, names)
    seen: set[str] = set()
    for link in topology.links:
        if link.name in seen:
            raise TopologyError(f"link {link.name} is listed twice; give one with the sum of the bandwidths.")
        seen.add(link.name)
    _check_stores(topology)
    _check_connected(topology)


def _check_link(link: Link, names: Collection[str]) -> None:
    for end in (link.src, link.dst):
        if end not in names:
            raise TopologyError(f"link {link.name}: {end!r} is not a place; known are {', '.join(names)}.")
    if link.src == link.dst:
        raise TopologyError(f"link {link.name} begins where it ends; remove it.")
    if not (link.bytes_per_s > 0 and math.isfinite(link.bytes_per_s)):
        raise TopologyError(f"link {link.name}: bandwidth is {link.bytes_per_s} bytes/s; it must be above 0.")
    if not (link.latency_s >= 0 and math.isfinite(link.latency_s)):
        raise TopologyError(f"link {link.name}: latency is {link.latency_s} s; it must be 0 or more.")


def _check_stores(topology: Topology) -> None:
    if not topology.devices:
        raise TopologyError("the topology has no device; add a place of kind 'device'.")
    if not topology.weights_at:
        raise TopologyError("weights_at is empty; name the host or disk that holds the checkpoint.")
    for name in topology.weights_at:
        if name not in topology.by_name:
            raise TopologyError(f"weights_at names {name!r}, which is not a place.")
        if topology.by_name[name].kind not in ("host", "disk"):
            raise TopologyError(f"weights_at names {name!r}, a {topology.by_name[name].kind}; use a host or disk.")


def _check_connected(topology: Topology) -> None:
    far, _ = topology.quickest(topology.weights_at)
    cut_off = [name for name in topology.devices if name not in far]
    if cut_off:
        raise TopologyError(
            f"{', '.join(cut_off)} cannot be reached from {', '.join(topology.weights_at)}; add a link to each."
        )


# -------------------------------------------------------------------------------------------------- parsing


def parse_topology(raw: Mapping[str, Any], name: str = "custom") -> Topology:
    """A topology from parsed YAML or JSON. Raises TopologyError, which says what is wrong and where.

    ```yaml
    name: box                                   # optional
    places:
      host:0: {kind: host}
      disk:0: {kind: disk}
      gpu:0:  {kind: device, numa: "0", node: a, memory_gb: 64}
      gpu:1:  {kind: device}
    links:                                      # gb_per_s is one direction's
      - {from: disk:0, to: host:0, gb_per_s: 14}
      - {between: [host:0, gpu:0], gb_per_s: 25, latency_us: 5}     # both directions
      - {mesh: [gpu:0, gpu:1], gb_per_s: 50}                        # both directions, all pairs
    weights_at: [host:0]
    ```
    """
    if not isinstance(raw, Mapping):
        raise TopologyError(f"a topology is a mapping with places, links and weights_at, not {raw!r}.")
    _only(raw, {"name", "places", "links", "weights_at"}, "the topology")
    places_raw = _typed(raw.get("places"), Mapping, "places must be a mapping from name to {kind: ...}")
    links_raw = _typed(raw.get("links"), list, "links must be a list")
    weights_raw = _typed(raw.get("weights_at"), list, "weights_at must be a list of place names")
    places = tuple(_parse_place(str(key), value) for key, value in places_raw.items())
    links = tuple(link for number, entry in enumerate(links_raw, 1) for link in _parse_links(entry, number))
    weights_at = tuple(str(place) for place in weights_raw)
    return Topology(name=str(raw.get("name", name)), places=places, links=links, weights_at=weights_at)


def _parse_place(name: str, raw: Any) -> Place:
    raw = _typed(raw, Mapping, f"place {name!r} must be a mapping like {{kind: device}}")
    _only(raw, {"kind", "node", "numa", "memory_gb"}, f"place {name!r}")
    if raw.get("kind") not in KINDS:
        raise TopologyError(f"place {name!r}: kind is {raw.get('kind')!r}; choose one of {', '.join(KINDS)}.")
    memory = raw.get("memory_gb")
    memory_bytes = None if memory is None else int(_number(memory, f"place {name!r}: memory_gb", above=0.0) * GB)
    node, numa = str(raw.get("node", "")), str(raw.get("numa", ""))
    return Place(name=name, kind=raw["kind"], node=node, numa=numa, memory_bytes=memory_bytes)


def _parse_links(raw: Any, number: int) -> list[Link]:
    where = f"link {number}"
    raw = _typed(raw, Mapping, f"{where} must be a mapping like {{between: [a, b], gb_per_s: 25}}")
    _only(raw, {"from", "to", "between", "mesh", "gb_per_s", "latency_us"}, where)
    speed = _number(raw.get("gb_per_s"), f"{where}: gb_per_s", above=0.0) * GB
    latency_s = _number(raw.get("latency_us", 0.0), f"{where}: latency_us") / 1e6
    return [Link(src=a, dst=b, bytes_per_s=speed, latency_s=latency_s) for a, b in _ends(raw, where)]


def _ends(raw: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    forms = [form for form in ("from", "between", "mesh") if form in raw]
    if len(forms) != 1 or ("to" in raw) != (forms == ["from"]):
        raise TopologyError(f"{where}: give either from and to, or between: [a, b], or mesh: [a, b, ...].")
    if forms == ["from"]:
        return [(str(raw["from"]), str(raw["to"]))]
    names = [str(n) for n in _typed(raw[forms[0]], list, f"{where}: {forms[0]} must be a list of place names")]
    if len(names) < 2 or (forms == ["between"] and len(names) != 2):
        raise TopologyError(f"{where}: {forms[0]} names {len(names)} place(s): {names}.")
    return [pair for a, b in combinations(names, 2) for pair in ((a, b), (b, a))]


def _typed(value: Any, kind: type, message: str) -> Any:
    if not isinstance(value, kind):
        raise TopologyError(f"{message}, not {value!r}.")
    return value


def _only(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    extra = sorted(str(key) for key in set(raw) - known)
    if extra:
        raise TopologyError(f"{where}: unknown {', '.join(extra)}; known are {', '.join(sorted(known))}.")


def _number(value: Any, where: str, above: float | None = None) -> float:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (above is not None and number <= above):
        least = "0 or more" if above is None else f"above {above:g}"
        raise TopologyError(f"{where} is {value!r}; it must be a number {least}.")
    return number


# -------------------------------------------------------------------------------------------------- presets

PCIE4, PCIE5, NVLINK4, XGMI = (EFFICIENCY * x * GB for x in (32, 64, 450, 50))
DDR4, DDR5, XGMI2_SOCKETS, UPI = (EFFICIENCY * x * GB for x in (205, 307, 72, 62))
NETWORK, NVME5 = (EFFICIENCY * x * GB for x in (50, 14))


def _both(a: str, b: str, bytes_per_s: float, latency_s: float = 5e-6) -> tuple[Link, Link]:
    return (
        Link(src=a, dst=b, bytes_per_s=bytes_per_s, latency_s=latency_s),
        Link(src=b, dst=a, bytes_per_s=bytes_per_s, latency_s=latency_s),
    )


def mi210_2x4() -> Topology:
    """The paper's machine: 8 x MI210 64 GB in two groups of four; XGMI inside a group, PCIe across."""
    places = [Place(name="host", kind="host"), Place(name="disk", kind="disk")]
    links = [*_both("root:0", "root:1", XGMI2_SOCKETS, 1e-6)]
    links.append(Link(src="disk", dst="host", bytes_per_s=NVME5))
    for group in range(2):
        members = [f"gpu:{group * 4 + i}" for i in range(4)]
        places.append(Place(name=f"root:{group}", kind="switch", numa=str(group)))
        places += [Place(name=m, kind="device", numa=str(group), memory_bytes=int(64 * GB)) for m in members]
        links += _both("host", f"root:{group}", DDR4, 1e-6)
        for member in members:
            links += _both(f"root:{group}", member, PCIE4)
        for a, b in combinations(members, 2):
            links += _both(a, b, XGMI)
    return Topology(name="mi210-2x4", places=tuple(places), links=tuple(links), weights_at=("host",))


def dgx_h100() -> Topology:
    """8 x H100 80 GB behind NVSwitch, a PCIe Gen5 x16 link each to one of two sockets."""
    places = [Place(name="host", kind="host"), Place(name="disk", kind="disk")]
    places += [Place(name="nvswitch", kind="switch")]
    links = [*_both("root:0", "root:1", UPI, 1e-6), Link(src="disk", dst="host", bytes_per_s=4 * NVME5)]
    for socket in range(2):
        places.append(Place(name=f"root:{socket}", kind="switch", numa=str(socket)))
        links += _both("host", f"root:{socket}", DDR5, 1e-6)
    for gpu in range(8):
        name, socket = f"gpu:{gpu}", gpu // 4
        places.append(Place(name=name, kind="device", numa=str(socket), memory_bytes=int(80 * GB)))
        links += [*_both(f"root:{socket}", name, PCIE5), *_both("nvswitch", name, NVLINK4)]
    return Topology(name="dgx-h100", places=tuple(places), links=tuple(links), weights_at=("host",))


def pcie_4() -> Topology:
    """Four devices on PCIe Gen4 x16 and nothing else: a copy between devices bounces through host memory."""
    names = [f"gpu:{i}" for i in range(4)]
    places = [Place(name="host", kind="host")]
    places += [Place(name=name, kind="device", memory_bytes=int(24 * GB)) for name in names]
    links = [link for name in names for link in _both("host", name, PCIE4)]
    return Topology(name="pcie-4", places=tuple(places), links=tuple(links), weights_at=("host",))


def two_nodes_8() -> Topology:
    """Two nodes of four H100 behind NVSwitch; one 400 Gbit/s card a node; a copy of the checkpoint in each."""
    return cluster(2, 4, network_bytes_per_s=NETWORK, name="2-nodes-8")


def cluster(
    num_nodes: int, per_node: int, *, network_bytes_per_s: float | None = None, name: str | None = None
) -> Topology:
    """`num_nodes` H100 nodes on one network switch, `network_bytes_per_s` a node (400 Gbit/s per GPU by default).

    Devices are `gpu:0` and so on, node by node; each node's host memory holds the checkpoint.
    """
    places = [Place(name="network", kind="switch")]
    links: list[Link] = []
    for n in range(num_nodes):
        host, switch, node = f"host:{n}", f"nvswitch:{n}", f"node{n}"
        places += [Place(name=host, kind="host", node=node), Place(name=switch, kind="switch", node=node)]
        links += _both(host, "network", network_bytes_per_s or per_node * NETWORK, 10e-6)
        for i in range(per_node):
            gpu = f"gpu:{n * per_node + i}"
            places.append(Place(name=gpu, kind="device", node=node, memory_bytes=int(80 * GB)))
            links += [*_both(host, gpu, PCIE5), *_both(switch, gpu, NVLINK4)]
    return Topology(
        name=name or f"cluster-{num_nodes}x{per_node}",
        places=tuple(places),
        links=tuple(links),
        weights_at=tuple(f"host:{n}" for n in range(num_nodes)),
    )


def local(
    devices: Sequence[str] = ("cpu:0", "cpu:1", "cpu:2", "cpu:3"),
    *,
    copy_bytes_per_s: float = 20 * GB,
    bus_bytes_per_s: float = 40 * GB,
    host_bytes_per_s: float | None = None,
) -> Topology:
    """Virtual CPU devices of one machine: each copies at `copy_bytes_per_s`, all share one memory bus. All together
    read the checkpoint at `host_bytes_per_s`: by default as fast as the bus allows."""
    places = [
        Place(name="host", kind="host"),
        Place(name="in", kind="switch"),
        Place(name="bus", kind="switch"),
    ]
    places += [Place(name=device, kind="device") for device in devices]
    links = [Link(src="in", dst="bus", bytes_per_s=bus_bytes_per_s)]
    links.append(Link(src="host", dst="in", bytes_per_s=host_bytes_per_s or bus_bytes_per_s))
    for device in devices:
        links.append(Link(src=device, dst="in", bytes_per_s=copy_bytes_per_s))
        links.append(Link(src="bus", dst=device, bytes_per_s=copy_bytes_per_s))
    return Topology(name="local", places=tuple(places), links=tuple(links), weights_at=("host",))


def uniform(devices: Sequence[str], bytes_per_s: float = GB) -> Topology:
    """A link of equal speed from the host to every device and between any two devices: nothing to choose."""
    places = [Place(name="host", kind="host"), *(Place(name=device, kind="device") for device in devices)]
    links = [Link(src="host", dst=device, bytes_per_s=bytes_per_s) for device in devices]
    for a, b in combinations(devices, 2):
        links += _both(a, b, bytes_per_s, 0.0)
    return Topology(name="uniform", places=tuple(places), links=tuple(links), weights_at=("host",))


PRESETS = {
    "mi210-2x4": mi210_2x4,
    "dgx-h100": dgx_h100,
    "pcie-4": pcie_4,
    "2-nodes-8": two_nodes_8,
    "local": local,
}


def preset(name: str) -> Topology:
    if name not in PRESETS:
        raise TopologyError(f"topology {name!r} is unknown; give a file, or one of {', '.join(PRESETS)}.")
    return PRESETS[name]()
