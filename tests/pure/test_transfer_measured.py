"""Measured speeds move the planner's topology, and only the links they say something about."""

from __future__ import annotations

import pytest

from anchortp.plan import Link, Place, Topology
from anchortp.transfer.measured import fold

MB = 1 << 20


def topology() -> Topology:
    places = [Place(name=name, kind=kind) for name, kind in (("host", "host"), ("s", "switch"), ("a", "device"))]
    links = (Link(src="host", dst="s", bytes_per_s=40e9), Link(src="s", dst="a", bytes_per_s=20e9))
    return Topology(name="t", places=tuple(places), links=links, weights_at=("host",))


def speeds(t: Topology) -> dict[str, float]:
    return {link.name: link.bytes_per_s for link in t.links}


def test_the_narrowest_link_of_a_route_takes_the_measurement():
    t = fold(topology(), {"host>s s>a": (100 * MB, 10e9)}, weight=0.5)
    assert speeds(t) == {"host>s": 40e9, "s>a": 15e9}


def test_repeated_measurements_converge_and_the_order_of_links_stays():
    t = topology()
    for _ in range(40):
        t = fold(t, {"host>s s>a": (100 * MB, 5e9)})
    assert speeds(t)["s>a"] == pytest.approx(5e9, rel=1e-4)
    assert [link.name for link in t.links] == ["host>s", "s>a"]


def test_a_link_is_at_least_as_fast_as_what_passed_it():
    t = topology()
    for _ in range(40):
        t = fold(t, {"host>s s>a": (100 * MB, 90e9)})
    assert speeds(t)["host>s"] == 90e9 and speeds(t)["s>a"] > 40e9


@pytest.mark.parametrize("links", [{}, {"host": (100 * MB, 1e9)}, {"s>a": (1000, 1e3)}, {"s>a": (100 * MB, 0.0)}])
def test_what_says_nothing_changes_nothing(links):
    assert fold(topology(), links) == topology()
