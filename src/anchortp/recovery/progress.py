"""How far a load is: one value, summed over the devices that load side by side. Pure, the clock passed in.

The controller folds what workers report into it, shows it while anything is awaited (`Coordinator.is_loading`), and
feeds it to the coordinator when a line of the story is due. Of what has arrived the coordinator sums the links itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Links = Mapping[str, tuple[int, float]]  # name -> (bytes, bytes per second while it was busy)

NUM_PARTS = 4  # of a load; the story has a line at each part but the last, whose line says how it went
MAX_LINKS_TOLD = 8  # in a line of the story, the slowest; `Episode.links` has them all


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProgress:
    """One device's load by its last report. `links`: by source. `began_s`, `heard_s`: clock times of the first report
    and the last."""

    num_bytes: int
    total_bytes: int
    links: Links
    began_s: float
    heard_s: float

    @property
    def left_s(self) -> float | None:
        """Seconds for the rest at the pace so far, waits included; None before the first byte."""
        rest_bytes, passed_s = self.total_bytes - self.num_bytes, self.heard_s - self.began_s
        if rest_bytes <= 0:
            return 0.0
        return rest_bytes * passed_s / self.num_bytes if self.num_bytes and passed_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of all devices that load at a time, also those that are through. `num_told`: parts that the story has."""

    devices: Mapping[str, DeviceProgress] = field(default_factory=dict)
    num_told: int = 0

    def heard(self, device: str, num_bytes: int, total_bytes: int, links: Links, now_s: float) -> Progress:
        """`device` has reported."""
        before = self.devices.get(device)
        report = DeviceProgress(
            num_bytes=num_bytes,
            total_bytes=total_bytes,
            links=dict(links),
            began_s=before.began_s if before else now_s,
            heard_s=now_s,
        )
        return replace(self, devices={**self.devices, device: report})

    def without(self, device: str) -> Progress:
        return replace(self, devices={name: d for name, d in self.devices.items() if name != device})

    @property
    def num_bytes(self) -> int:
        return sum(device.num_bytes for device in self.devices.values())

    @property
    def total_bytes(self) -> int:
        return sum(device.total_bytes for device in self.devices.values())

    @property
    def links(self) -> dict[str, tuple[int, float]]:
        """By `source>device`."""
        devices = self.devices.items()
        return {f"{source}>{name}": link for name, device in devices for source, link in device.links.items()}

    @property
    def left_s(self) -> float | None:
        """Devices load side by side, so the last one decides; None as long as one has had nothing yet."""
        lefts = [device.left_s for device in self.devices.values()]
        return None if None in lefts else max((left for left in lefts if left is not None), default=0.0)

    @property
    def _num_parts(self) -> int:
        return NUM_PARTS * self.num_bytes // self.total_bytes if self.total_bytes else 0

    @property
    def is_worth_a_line(self) -> bool:
        """Whether another part is there since the last line: at most `NUM_PARTS - 1` lines, however long it takes."""
        return self.num_told < self._num_parts < NUM_PARTS

    def told(self) -> Progress:
        return replace(self, num_told=self._num_parts)

    def in_words(self) -> str:
        left = "" if self.left_s is None else f", {seconds_in_words(self.left_s)} left"
        share = f"{self.num_bytes / 1e6:.1f} of {self.total_bytes / 1e6:.1f} MB of weights are there{left}"
        return share + _links_in_words(self.links)

    def in_words_at_the_end(self, seconds: float) -> str:
        """`seconds`: from the order until the last byte was there."""
        rate = f", {self.num_bytes / seconds / 1e9:.3g} GB/s" if seconds > 0 else ""
        total = f"all {self.num_bytes / 1e6:.1f} MB of weights came in {seconds_in_words(seconds)}{rate}"
        return total + _links_in_words(self.links)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, for `status`. Nothing loads: zeros."""
        return {
            "loading_bytes": self.num_bytes,
            "loading_total_bytes": self.total_bytes,
            "loading_left_s": self.left_s,
            "loading_links": links_as_dict(self.links),
        }


def added(links: Links, more: Links) -> dict[str, tuple[int, float]]:
    """Two loads together: the bytes over the seconds in which a link was busy in either. A link that carried something
    has a rate above 0."""
    result = dict(links)
    for name, (num_bytes, rate) in more.items():
        before_bytes, before_rate = result.get(name, (0, 0.0))
        if before_bytes and num_bytes:
            busy_s = before_bytes / before_rate + num_bytes / rate
            result[name] = (before_bytes + num_bytes, (before_bytes + num_bytes) / busy_s)
        elif num_bytes:
            result[name] = (num_bytes, rate)
    return result


def links_as_dict(links: Links) -> dict[str, dict[str, float]]:
    return {name: {"bytes": num_bytes, "bytes_per_s": rate} for name, (num_bytes, rate) in links.items()}


def seconds_in_words(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1.0 else f"{seconds:.1f} s"


def _links_in_words(links: Links) -> str:
    """The slowest first: they are what is waited for."""
    slowest = sorted(links.items(), key=lambda item: item[1][1])
    told = [f"{name} {rate / 1e9:.3g} GB/s" for name, (_, rate) in slowest[:MAX_LINKS_TOLD]]
    if len(slowest) > MAX_LINKS_TOLD:
        told.append(f"{len(slowest) - MAX_LINKS_TOLD} faster")
    return f"; {', '.join(told)}" if told else ""
