"""What happened and why, in an order that can be read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from anchortp.recovery.progress import links_as_dict


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One decision. `at_s` is the clock that was passed in."""

    at_s: float
    epoch: int
    phase: str
    text: str


@dataclass(slots=True, kw_only=True)
class Episode:
    """From a fault (or the start) until the engine serves again or refuses; further faults extend it.

    Bytes: `lost` the last copies that vanished, `replica` further copies that the new cut needs, `loaded` what of
    the weights really came from the host, `copied` between devices. What was still under way when the next fault
    came counts in the episode in which it arrives: sums over episodes are exact. `kv_copied`, `kv_restored`: KV
    planes that came from another device, and from the host's mirror. `kv`: what was left of the cache (`KVState`).
    `links`: what came over each, `source>device`: bytes, and bytes per second while it was busy.
    `whole_s`: when the last byte of weights was there, which may be after the engine served again. `change_id`: of a
    planned change, 0 for faults and the start.
    """

    began_s: float
    cause: str
    first_epoch: int
    devices_lost: list[str] = field(default_factory=list)
    workers_replaced: list[str] = field(default_factory=list)
    lost_bytes: int = 0
    replica_bytes: int = 0
    replicated_bytes: int = 0
    loaded_bytes: int = 0
    copied_bytes: int = 0
    links: dict[str, tuple[int, float]] = field(default_factory=dict)
    kv: str = "whole"
    kv_copied_bytes: int = 0
    kv_restored_bytes: int = 0
    phases: list[tuple[str, float]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    ended_s: float | None = None
    whole_s: float | None = None
    outcome: str = ""
    change_id: int = 0

    def phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase, in the order of first entry."""
        seconds: dict[str, float] = {}
        ends = [*(start for _, start in self.phases[1:]), self.ended_s]
        for (phase, start), end in zip(self.phases, ends, strict=False):  # a change that is refused has no phase
            if end is not None:
                seconds[phase] = seconds.get(phase, 0.0) + end - start
        return seconds

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; times are seconds after the episode began."""
        return {
            "cause": self.cause,
            "epoch": self.first_epoch,
            "began_s": self.began_s,
            "seconds": None if self.ended_s is None else self.ended_s - self.began_s,
            "whole_after_s": None if self.whole_s is None else self.whole_s - self.began_s,
            "change_id": self.change_id,
            "outcome": self.outcome,
            "devices_lost": self.devices_lost,
            "workers_replaced": self.workers_replaced,
            "bytes": {
                "lost": self.lost_bytes,
                "replica": self.replica_bytes,
                "replicated": self.replicated_bytes,
                "loaded": self.loaded_bytes,
                "copied": self.copied_bytes,
                "kv_copied": self.kv_copied_bytes,
                "kv_restored": self.kv_restored_bytes,
            },
            "links": links_as_dict(self.links),
            "kv": self.kv,
            "phases": self.phase_seconds(),
            "timeline": [
                {"at_s": line.at_s - self.began_s, "epoch": line.epoch, "phase": line.phase, "text": line.text}
                for line in self.lines
            ],
        }
