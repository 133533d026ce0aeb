"""The cases of the whole evaluation, the most telling first: a budget that runs out leaves the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anchortp.bench.faults import Fault, standard
from anchortp.bench.recovery import Case
from anchortp.bench.systems import System
from anchortp.bench.workload import WorkloadOptions
from anchortp.errors import ConfigError


def parse_changes(text: str) -> tuple[tuple[int, int], ...]:
    """'4-3,8-6' -> ((4, 3), (8, 6)). Raises ConfigError."""
    changes = []
    for pair in text.split(","):
        before, _, after = pair.partition("-")
        if not (before.isdecimal() and after.isdecimal() and 0 < int(after) < int(before)):
            raise ConfigError(f"--changes {pair!r}: write devices before and after a loss, as 4-3.")
        changes.append((int(before), int(after)))
    return tuple(changes)


def cases(
    *,
    models: Mapping[Path, Sequence[System]],
    changes: Sequence[tuple[int, int]],
    shares: Sequence[float],
    workload: WorkloadOptions,
    requests_more: int,
) -> list[Case]:
    """`models`: the systems of each. Per model: losses at the first change with the whole workload; then, with
    `requests_more` requests, a crash and a hang there, and losses at all other changes.

    A system of a fixed degree starts again as it was, whatever is lost: it takes part in the first change alone. So
    does one that is killed whole in crashes and hangs, which are losses to it.
    """
    less = replace(workload, requests=min(requests_more, workload.requests))
    first, *others = changes
    found: list[Case] = []
    for model, systems in models.items():
        elastic = [system for system in systems if system.faults == "anchor"]
        resized = [system for system in systems if system.degrees is None]
        found += _losses(model, systems, first, shares, workload)
        for kind in ("crash", "hang"):
            found += _each(model, elastic, first, standard((shares[0],), kind, _devices(first), 1), less)
        for change in others:
            found += _losses(model, resized, change, shares, less)
    return found


def _losses(
    model: Path, systems: Sequence[System], change: tuple[int, int], shares: Sequence[float], workload: WorkloadOptions
) -> Iterator[Case]:
    for share in shares:
        faults = standard((share,), "lost", _devices(change), change[0] - change[1])
        yield from _each(model, systems, change, faults, workload)


def _each(
    model: Path,
    systems: Sequence[System],
    change: tuple[int, int],
    faults: tuple[Fault, ...],
    workload: WorkloadOptions,
) -> Iterator[Case]:
    for system in systems:
        yield Case(model=model, devices=_devices(change), faults=faults, workload=workload, system=system)


def _devices(change: tuple[int, int]) -> tuple[str, ...]:
    return tuple(f"cpu:{index}" for index in range(change[0]))
