"""What loads measured goes back into the topology that the next plan is made for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from anchortp.plan.topology import Topology

WEIGHT = 0.3  # of a new measurement against all before it
MIN_BYTES = 8 << 20  # less than this says more about the start of a copy than about a link


def fold(topology: Topology, links: Mapping[str, tuple[int, float]], weight: float = WEIGHT) -> Topology:
    """The topology with the bandwidths that a load reached (`LoadDone.links`: bytes, bytes per second while busy).

    A load names what it waited on as the planner's routes do: the names of links, one after the other. What a route
    reached is what its narrowest link gives, so that link takes the new figure, as an exponentially weighted mean;
    a wider one is only raised, to what has evidently passed it. Names that are not of this topology are ignored.
    """
    speeds = {link.name: link.bytes_per_s for link in topology.links}
    for route, (num_bytes, bytes_per_s) in links.items():
        names = route.split(" ")
        if num_bytes < MIN_BYTES or bytes_per_s <= 0.0 or not all(name in speeds for name in names):
            continue
        narrowest = min(names, key=lambda name: speeds[name])
        speeds[narrowest] += weight * (bytes_per_s - speeds[narrowest])
        for name in names:
            if name != narrowest:
                speeds[name] = max(speeds[name], bytes_per_s)
    changed = tuple(replace(link, bytes_per_s=speeds[link.name]) for link in topology.links)
    return replace(topology, links=changed)
