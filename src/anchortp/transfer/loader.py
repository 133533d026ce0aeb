"""Fills a weights arena with units from a checkpoint. Runs in the worker whose arena it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anchortp.layout import EVERY_FAMILY, EXPERT, UnitTensor, WeightAddresses
from anchortp.transfer.checkpoint import Checkpoint

Item = tuple[str, int, int]  # family, unit, slot
Progress = Callable[[int], None]  # is told the bytes of each copy once it is done
Check = Callable[[], None]  # is called before each copy; may raise to end the load


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Units consecutive in the checkpoint that go to consecutive slots: one move of bytes per copy of a tensor."""

    first_unit: int
    first_slot: int
    num_units: int


def load_units(
    checkpoint: Checkpoint,
    buffer: Tensor,
    addresses: WeightAddresses,
    items: Iterable[Item],
    *,
    on_progress: Progress | None = None,
    check: Check | None = None,
) -> int:
    """Loads each unit into its slot, tensors in the order in which the model computes with them.

    `buffer`: 1-D uint8, the whole weights arena; the slots' pages must be committed. Returns the bytes written
    (padding included), as `ModelUnits.unit_bytes` counts them. Whatever `check` raises passes through, and
    leaves the slots half written.
    """
    runs = coalesce(items)
    num_bytes = 0
    for tensor, copy in compute_order(addresses):
        for run in runs[tensor.family]:
            if check is not None:
                check()
            start = addresses.block(tensor, copy, run.first_slot)[0]
            stop = addresses.block(tensor, copy, run.first_slot + run.num_units - 1)[1]
            out = _typed(buffer, addresses, start, stop).view(-1, addresses.units.config.hidden_size)
            checkpoint.read(tensor, copy, run.first_unit, run.num_units, out)
            num_bytes += stop - start
            if on_progress is not None:
                on_progress(stop - start)
    return num_bytes


def load_replicated(
    checkpoint: Checkpoint,
    buffer: Tensor,
    addresses: WeightAddresses,
    *,
    on_progress: Progress | None = None,
    check: Check | None = None,
) -> int:
    """Loads all replicated tensors (norms); otherwise as `load_units`."""
    num_bytes = 0
    for tensor in addresses.units.replicated:
        size = addresses.replicated_bytes(tensor)
        for layer in range(addresses.units.num_copies(tensor)):
            if check is not None:
                check()
            start = addresses.offset(tensor.key, layer)
            out = _typed(buffer, addresses, start, start + size).view(tensor.shape)
            checkpoint.read_replicated(tensor, layer, out)
            num_bytes += size
            if on_progress is not None:
                on_progress(size)
    return num_bytes


def coalesce(items: Iterable[Item]) -> dict[str, tuple[Run, ...]]:
    """Per family the fewest runs that are consecutive in both unit and slot. Experts go one by one: they are large,
    and each has checkpoint tensors of its own."""
    by_slot: dict[str, list[tuple[int, int]]] = {family: [] for family in EVERY_FAMILY}
    for family, unit, slot in items:
        by_slot[family].append((slot, unit))
    return {family: tuple(_runs(sorted(pairs), joined=family != EXPERT)) for family, pairs in by_slot.items()}


def _runs(pairs: list[tuple[int, int]], *, joined: bool) -> Iterator[Run]:
    begin = 0
    for end in range(1, len(pairs) + 1):
        length = end - begin
        slot, unit = pairs[begin]
        if not joined or end == len(pairs) or pairs[end] != (slot + length, unit + length):
            yield Run(first_unit=unit, first_slot=slot, num_units=length)
            begin = end


def compute_order(addresses: WeightAddresses) -> Iterator[tuple[UnitTensor, int]]:
    """(tensor, copy) as a forward pass meets them: the embedding, then layer by layer, experts, lm_head last."""
    units = addresses.units
    once = [tensor for tensor in units.tensors if not tensor.per_layer]
    layered = [tensor for tensor in units.tensors if tensor.per_layer]
    yield from ((tensor, 0) for tensor in once if tensor.key == "embed")
    for layer in range(units.config.num_layers):
        yield from ((tensor, copy) for tensor in layered for copy in units.copies_in_layer(tensor, layer))
    yield from ((tensor, 0) for tensor in once if tensor.key != "embed")


def _typed(buffer: Tensor, addresses: WeightAddresses, start: int, stop: int) -> Tensor:
    return buffer[start:stop].view(getattr(torch, addresses.units.config.dtype))
