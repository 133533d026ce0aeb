"""Why a plan of sets is as it is, in the words that the command line and the recovery's story print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from anchortp.errors import in_words
from anchortp.layout import KV
from anchortp.plan.assemble import Piece
from anchortp.plan.plan import PLANE
from anchortp.plan.problem import Problem

Kept = Mapping[str, Mapping[str, Sequence[int]]]


def reasons(problem: Problem, kept: Kept, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """What is lost and who receives it; what moves although it is not lost; what is copied, forwarded or relayed, and
    why; what had no way of its own."""
    lines = [
        *_lost(problem, pieces),
        *_moved(problem, kept),
        *_copies(problem, pieces),
        *_relays(problem, pieces),
        *_no_way(problem),
    ]
    return tuple(lines) or ("every lost unit has a living holder: nothing to move",)


def _lost(problem: Problem, pieces: Sequence[Piece]) -> Iterator[str]:
    lost = {family: set(units) for family, units in problem.missing.items() if units}
    got: Counter[tuple[str, str]] = Counter()
    for piece in pieces:  # each is lost as a whole or not at all
        if piece.first_byte == 0 and piece.unit in lost.get(piece.family, ()):
            got[piece.family, piece.device] += piece.count
    for family, units in lost.items():
        devices = (device for device in problem.devices if got[family, device])
        spread = ", ".join(f"{device} +{got[family, device]}" for device in devices)
        yield f"{family}: {len(units)} unit(s) had no other holder, read from a store: {spread}"


def _moved(problem: Problem, kept: Kept) -> Iterator[str]:
    for family in problem.families:
        if family == KV:
            continue
        gone = {d: len(u) - len(kept[family].get(d, ())) for d, u in problem.slots[family].items()}
        given = ", ".join(f"{device} -{count}" for device, count in gone.items() if count)
        if given:
            yield f"{family}: given up for balance: {given}"


def _copies(problem: Problem, pieces: Sequence[Piece]) -> Iterator[str]:
    """KV heads that the new cut needs on more devices, and what devices copy from each other."""
    new = Counter(piece.unit for piece in pieces if piece.family == KV and piece.first_byte == 0)
    lost = set(problem.missing.get(KV, ()))
    further = sum(new.values()) - len(lost & set(new))
    if further:
        yield f"kv: {further} further copy(ies) of KV heads, because the new cut splits their q heads"
    for family, what in ((KV, "KV heads"), (PLANE, "KV planes")):
        forwarded = Counter(
            piece.source
            for piece in pieces
            if piece.family == family
            and problem.topology.by_name[piece.source].kind == "device"
            and piece.source not in problem.holders(family, piece.unit)
        )
        if forwarded:
            yield f"{what} that several devices need are forwarded by {', '.join(sorted(forwarded))} as they arrive"


def _relays(problem: Problem, pieces: Sequence[Piece]) -> Iterator[str]:
    """Bytes that pass a device on their way to another: because its links have room, or there is no other way."""
    network, passed = problem.network, Counter[tuple[str, str]]()
    for piece in pieces:
        for link in piece.route[:-1]:
            over = network.links[link].dst
            if network.by_name[over].kind == "device":
                passed[over, piece.device] += piece.num_bytes
    for (over, device), num_bytes in sorted(passed.items()):
        direct = _has_direct(problem, device)
        why = f"the links of {device} alone would take longer" if direct else f"{device} has no way of its own"
        yield f"{in_words(num_bytes)} for {device} pass through {over}: {why}"


def _has_direct(problem: Problem, device: str) -> bool:
    network = problem.network
    _, last = network.quickest(problem.stores)
    return all(network.by_name[network.links[x].dst].kind != "device" for x in network.path(last, device)[:-1])


def _no_way(problem: Problem) -> Iterator[str]:
    """Holders that cannot be copied from."""
    for source in problem.alive:
        cut_off = [d for d in problem.devices if d != source and problem.network.route(source, d) is None]
        if cut_off:
            yield f"no route leads from {source} to {', '.join(cut_off)}: what those need is taken from elsewhere"
