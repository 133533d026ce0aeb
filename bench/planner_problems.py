"""Random planning problems: models, topologies, layouts and changes of all kinds, from a seed."""

from __future__ import annotations

import random
from itertools import combinations

from anchortp.layout import ATTENTION, EXPERT, FAMILIES, KV, Layout, Shard, initial_layout
from anchortp.plan import Link, Place, Problem, Shape, Topology, TopologyError

GB = 1e9
KINDS = ("shrink", "shrink", "shrink", "leave", "grow", "replace", "speeds", "irregular")


def random_problem(
    rng: random.Random, *, fine: bool = False, kind: str | None = None, copies: bool | None = None
) -> Problem:
    """`fine`: units are small beside what a device receives, so that whole units cost nothing. `kind`: of change.
    `copies`: some experts are held by several devices (None: now and then)."""
    kind = kind or rng.choice(KINDS)
    while True:
        shape = random_shape(rng, fine=fine)
        topology = random_topology(rng, rng.randint(2, min(8, shape.num_q_heads)))
        try:
            return _change(rng, shape, topology, kind, rng.random() < 0.4 if copies is None else copies)
        except TopologyError:  # those that are left are cut off from the weights: try another
            continue


def random_shape(rng: random.Random, *, fine: bool = False) -> Shape:
    group = rng.choice([1, 2, 4, 8])
    kv_heads = rng.choice([32, 64] if fine else [2, 4, 8])
    moe = rng.random() < 0.5
    return Shape(
        name="random",
        num_layers=rng.choice([8, 16, 24]),
        hidden_size=rng.choice([1024, 2048, 4096]),
        num_q_heads=kv_heads * (1 if fine else group),
        num_kv_heads=kv_heads,
        head_dim=16 if fine else 128,
        vocab_size=rng.choice([32768, 151936]),
        mlp_width=0 if moe else rng.choice([64 * 256, 64 * 384]),
        num_experts=rng.choice([32, 64]) if moe else 0,
        expert_width=rng.choice([256, 512]) if moe else 0,
    )


def random_topology(rng: random.Random, num_devices: int) -> Topology:
    """Devices in one to three groups. Each group has a root to the host; inside a group there may be direct links or
    a switch; now and then a device has no way to the host but through others, or a link is far slower than most."""
    names = [f"gpu:{i}" for i in range(num_devices)]
    places = [Place(name="host", kind="host"), *(Place(name=name, kind="device") for name in names)]
    links: list[Link] = []
    num_groups = rng.randint(1, min(3, num_devices))
    groups = [names[g::num_groups] for g in range(num_groups)]
    pcie = rng.choice([12, 25, 50])
    for number, group in enumerate(groups):
        root = f"root:{number}"
        places.append(Place(name=root, kind="switch"))
        links += _both("host", root, pcie * rng.choice([1, 2, 4, 8]))
        inside = _inside(rng, number, group)
        places += [Place(name=name, kind="switch") for name in {x.src for x in inside} - set(group)]
        links += inside
        for i, name in enumerate(group):
            if not inside or i == 0 or rng.random() < 0.9:
                links += _both(root, name, pcie * rng.choice([1, 1, 1, 1, 0.5, 0.25]))
    for a, b in combinations(range(num_groups), 2):
        if rng.random() < 0.5:
            links += _both(f"root:{a}", f"root:{b}", pcie * rng.choice([1, 2]))
    weights_at = ["host"]
    if rng.random() < 0.2:
        places.append(Place(name="disk", kind="disk"))
        links.append(Link(src="disk", dst="host", bytes_per_s=rng.choice([5, 14, 50]) * GB))
        weights_at = ["disk"]
    return Topology(name="random", places=tuple(places), links=tuple(links), weights_at=tuple(weights_at))


def _inside(rng: random.Random, number: int, group: list[str]) -> list[Link]:
    form = rng.choice(["none", "mesh", "switch"]) if len(group) > 1 else "none"
    speed = rng.choice([10, 50, 400])
    if form == "mesh":
        return [link for a, b in combinations(group, 2) for link in _both(a, b, speed)]
    if form == "switch":
        return [link for name in group for link in _both(f"switch:{number}", name, speed)]
    return []


def _both(a: str, b: str, gb_per_s: float) -> list[Link]:
    return [Link(src=x, dst=y, bytes_per_s=gb_per_s * GB) for x, y in ((a, b), (b, a))]


def _change(rng: random.Random, shape: Shape, topology: Topology, kind: str, copies: bool) -> Problem:
    names = list(topology.devices)
    speeds = {name: rng.choice([1.0, 1.0, 0.5, 0.8]) for name in names} if rng.random() < 0.2 else None
    planes = rng.choice([0, 0, shape.plane_bytes(2000)])
    more = {
        "topology": topology,
        "units": shape,
        "speeds": speeds,
        "plane_bytes": planes,
        "planes_at": ("host",) if planes and rng.random() < 0.5 else (),
    }
    some = rng.sample(names, rng.randint(1, len(names) - 1))
    rest = tuple(name for name in names if name not in some)
    everyone = tuple(names)
    match kind:
        case "leave":
            return Problem(before=_before(rng, shape, everyone, speeds, copies), devices=rest, **more)
        case "grow":
            return Problem(before=_before(rng, shape, rest, speeds, copies), devices=everyone, **more)
        case "replace":
            gone = rng.choice(rest)
            old = tuple(name for name in names if name not in some[:1])
            new = tuple(name for name in names if name != gone)
            lost = (gone,) if rng.random() < 0.5 else ()
            return Problem(before=_before(rng, shape, old, speeds, copies), devices=new, lost=lost, **more)
        case "speeds":
            other = {name: rng.choice([1.0, 0.7, 0.5]) for name in names}
            return Problem(before=initial_layout(shape, everyone, other), devices=everyone, **more)
        case "irregular":
            before = _scattered(rng, shape, everyone)
            return Problem(before=before, devices=rest, lost=tuple(some), **more)
    before = _before(rng, shape, everyone, speeds, copies)
    return Problem(before=before, devices=rest, lost=tuple(name for name in names if name in some), **more)


def _before(
    rng: random.Random, shape: Shape, names: tuple[str, ...], speeds: dict[str, float] | None, copies: bool
) -> Layout:
    """A balanced layout, with copies of some experts if asked for."""
    layout = initial_layout(shape, names, speeds)
    if shape.num_experts and copies and len(names) > 1:
        shards = []
        for shard in layout.shards:
            spare = sorted(set(range(shape.num_units[EXPERT])) - set(shard[EXPERT]))
            shards.append(shard.appended(EXPERT, rng.sample(spare, min(len(spare), shape.num_layers))))
        layout = Layout(shards=tuple(shards))
    return layout


def _scattered(rng: random.Random, shape: Shape, names: tuple[str, ...]) -> Layout:
    """Any unit anywhere, as no planner would leave it; q heads with the KV heads they need."""
    held: dict[str, dict[str, list[int]]] = {name: {f: [] for f in (*FAMILIES, EXPERT)} for name in names}
    for family in (*FAMILIES, EXPERT):
        for unit in range(shape.num_units[family]) if family != KV else ():
            held[rng.choice(names)][family].append(unit)
    shards = []
    for name in names:
        held[name][KV] = sorted({shape.kv_head_of(q) for q in held[name][ATTENTION]})
        rng.shuffle(held[name][ATTENTION])
        shard = Shard(device=name, slots=tuple(tuple(held[name][f]) for f in FAMILIES))
        shards.append(shard.appended(EXPERT, held[name][EXPERT]))
    return Layout(shards=tuple(shards))
