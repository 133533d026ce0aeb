"""What links have really carried, folded into the topology that the next plan is made with. A value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anchortp.plan.topology import Topology, local

HOST = "host"
MIN_BYTES = 1 << 20  # of less, what was measured is mostly the beginning and the end of a transfer
NEWEST = 0.5  # weight of the newest measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes per second from (a device or `HOST`) to (a device), moving averages that forget quickly."""

    measured: Mapping[tuple[str, str], float]

    def fold(self, device: str, links: Mapping[str, tuple[int, float]]) -> Rates:
        """The rates after `device` loaded: per source the bytes, and bytes per second while it was busy."""
        rates = dict(self.measured)
        for source, (num_bytes, rate) in links.items():
            if num_bytes >= MIN_BYTES and rate > 0:
                before = rates.get((source, device), rate)
                rates[source, device] = before + NEWEST * (rate - before)
        return replace(self, measured=rates)

    def topology(self, devices: Sequence[str]) -> Topology:
        """One machine's memory, as `local` has it, with what was measured: a device takes in bytes, and gives them
        out, at the best rate that it was seen to. (A device that is slow is told from its peers so; a slow link
        between two that are fast with others is not.)"""
        topology = local(devices)
        into = {d: max((r for (_, to), r in self.measured.items() if to == d), default=None) for d in devices}
        out = {d: max((r for (source, _), r in self.measured.items() if source == d), default=None) for d in devices}
        links = []
        for link in topology.links:
            rate = into.get(link.dst) or out.get(link.src)
            links.append(replace(link, bytes_per_s=rate) if rate else link)
        return replace(topology, links=tuple(links))
