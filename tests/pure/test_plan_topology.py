"""Topologies: parsing with clear errors, presets, routes."""

from __future__ import annotations

import copy
import pickle

import pytest

from anchortp.errors import ConfigError
from anchortp.plan import PRESETS, Link, Place, Topology, TopologyError, local, parse_topology, preset
from anchortp.plan.topology import cluster, uniform

BOX = {
    "name": "box",
    "places": {
        "host:0": {"kind": "host"},
        "disk:0": {"kind": "disk"},
        "gpu:0": {"kind": "device", "numa": "0", "memory_gb": 64},
        "gpu:1": {"kind": "device"},
        "gpu:2": {"kind": "device"},
    },
    "links": [
        {"from": "disk:0", "to": "host:0", "gb_per_s": 14},
        {"between": ["host:0", "gpu:0"], "gb_per_s": 25, "latency_us": 5},
        {"mesh": ["gpu:0", "gpu:1", "gpu:2"], "gb_per_s": 50},
    ],
    "weights_at": ["host:0"],
}


def test_a_parsed_topology_is_a_value():
    box = parse_topology(BOX)
    assert box == parse_topology(copy.deepcopy(BOX)) == pickle.loads(pickle.dumps(box))
    assert box.devices == ("gpu:0", "gpu:1", "gpu:2")
    assert box.by_name["gpu:0"].memory_bytes == 64 * 10**9 and box.by_name["gpu:1"].memory_bytes is None
    assert box.link("host:0>gpu:0") == Link(src="host:0", dst="gpu:0", bytes_per_s=25e9, latency_s=5e-6)
    assert len(box.links) == 1 + 2 + 6


def changed(path: list, value: object) -> dict:
    raw = copy.deepcopy(BOX)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "a topology is a mapping"),
        (changed(["colour"], "red"), "unknown colour"),
        (changed(["places"], ["gpu:0"]), "places must be a mapping"),
        (changed(["places", "gpu:0"], {"kind": "gpu"}), "place 'gpu:0': kind is 'gpu'"),
        (changed(["places", "gpu:0"], {"kind": "device", "memory": 3}), "place 'gpu:0': unknown memory"),
        (changed(["places", "gpu:0", "memory_gb"], -1), "memory_gb is -1; it must be a number above 0"),
        (changed(["links"], {}), "links must be a list"),
        (changed(["links", 1, "gb_per_s"], 0), "link 2: gb_per_s is 0"),
        (changed(["links", 1, "gb_per_s"], float("nan")), "link 2: gb_per_s is nan"),
        (changed(["links", 1, "gb_per_s"], "fast"), "link 2: gb_per_s is 'fast'"),
        (changed(["links", 1, "gb_per_s"], True), "link 2: gb_per_s is True"),
        (changed(["links", 1, "latency_us"], -2), "link 2: latency_us is -2"),
        (changed(["links", 1, "between"], ["host:0", "gpu:9"]), "'gpu:9' is not a place; known are host:0"),
        (changed(["links", 1, "between"], ["host:0"]), "between names 1 place"),
        (changed(["links", 1, "between"], ["gpu:0", "gpu:0"]), "begins where it ends"),
        (changed(["links", 1, "to"], "gpu:0"), "link 2: give either from and to"),
        (changed(["links", 1], {"mesh": ["gpu:0", "gpu:1"], "gb_per_s": 1}), "listed twice"),
        (changed(["weights_at"], []), "weights_at is empty"),
        (changed(["weights_at"], ["gpu:0"]), "'gpu:0', a device"),
        (changed(["weights_at"], ["host:7"]), "'host:7', which is not a place"),
        (changed(["links", 2, "mesh"], ["gpu:0", "gpu:1"]), "gpu:2 cannot be reached from host:0"),
    ],
)
def test_bad_input_is_refused_in_words(raw, message):
    with pytest.raises(TopologyError, match=message.replace("(", r"\(")) as refused:
        parse_topology(raw)
    assert isinstance(refused.value, ConfigError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_reach_every_device_and_say_what_they_are(name):
    topology = preset(name)
    assert topology.name == name
    for device in topology.devices:
        assert topology.route(topology.weights_at[0], device)
    with pytest.raises(TopologyError, match="is unknown; give a file, or one of mi210-2x4"):
        preset(name + "x")


def names(topology: Topology, src: str, dst: str) -> list[str]:
    route = topology.route(src, dst)
    assert route is not None
    return [topology.links[link].name for link in route]


def test_routes_go_through_switches_and_hosts_but_never_a_disk():
    assert names(preset("dgx-h100"), "gpu:0", "gpu:7") == ["gpu:0>nvswitch", "nvswitch>gpu:7"]
    assert names(preset("pcie-4"), "gpu:0", "gpu:1") == ["gpu:0>host", "host>gpu:1"]
    assert names(preset("mi210-2x4"), "gpu:0", "gpu:3") == ["gpu:0>gpu:3"]
    assert not {"nvswitch>gpu:1"} & set(names(preset("2-nodes-8"), "gpu:0", "gpu:7"))
    places = [Place(name="host", kind="host"), Place(name="disk", kind="disk")]
    places += [Place(name=name, kind="device") for name in ("a", "b")]
    ends = [("host", "a"), ("host", "b"), ("a", "disk"), ("disk", "b")]
    links = tuple(Link(src=src, dst=dst, bytes_per_s=1e9) for src, dst in ends)
    odd = Topology(name="odd", places=tuple(places), links=links, weights_at=("host",))
    assert odd.route("a", "b") is None, "not through the disk"
    assert names(odd, "disk", "b") == ["disk>b"]


def test_what_is_lost_is_gone_from_the_topology():
    left = parse_topology(BOX).without({"gpu:2", "gpu:1>gpu:0"})
    assert left.devices == ("gpu:0", "gpu:1")
    assert [link.name for link in left.links if "gpu:1" in (link.src, link.dst)] == ["gpu:0>gpu:1"]


def test_a_device_that_only_a_lost_one_reached_is_named():
    with pytest.raises(TopologyError, match="gpu:1, gpu:2 cannot be reached from host:0"):
        parse_topology(BOX).without({"gpu:0"})


def test_local_and_uniform_take_any_devices():
    devices = ("cpu:0", "cpu:1", "cpu:5")
    assert local(devices, copy_bytes_per_s=1e9, bus_bytes_per_s=2e9).devices == devices
    assert uniform(devices).devices == devices
    assert len(cluster(3, 2).devices) == 6
