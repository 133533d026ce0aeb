"""Names of devices."""

from __future__ import annotations

import pytest

from anchortp.devices import Device, check_engine_devices, parse_device, parse_file_name
from anchortp.errors import ConfigError

NAMES = {
    "cpu:3": (Device(kind="cpu", index=3), "cpu-3"),
    "cuda:0": (Device(kind="cuda", index=0), "cuda-0"),
    "cuda:10/2": (Device(kind="cuda", index=10, part=2), "cuda-10-2"),
    "sim:2": (Device(kind="sim", index=2), "sim-2"),
    "sim:1/0": (Device(kind="sim", index=1, part=0), "sim-1-0"),
    "host": (Device(kind="host"), "host"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_what_the_device_is(name: str) -> None:
    device, file_name = NAMES[name]
    assert parse_device(name) == device and device.file_name == file_name
    assert device.is_chunked == (device.kind in ("cuda", "sim"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_leads_back_to_the_device(name: str) -> None:
    device, file_name = NAMES[name]
    assert device.name == name
    assert parse_file_name(file_name) == device


@pytest.mark.parametrize("file_name", ["", "cpu", "cpu-", "cpu-0-1", "cuda-0-1-2", "cuda-0-", "host-0", "cpu-x"])
def test_a_file_of_no_device_is_refused(file_name: str) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        parse_file_name(file_name)


def test_devices_are_in_the_order_of_their_numbers() -> None:
    names = ["cpu:2", "cpu:10", "cuda:0", "cuda:0/2", "cuda:0/10", "cuda:1/0", "host"]
    assert [device.name for device in sorted(map(parse_device, names[::-1]), key=lambda d: d.order)] == names


@pytest.mark.parametrize(
    "name", ["", "cpu", "cpu:", "cpu:0/1", "gpu:0", "cuda:0/", "cuda:-1", "cuda:0/1/2", "../x", "host:0"]
)
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        parse_device(name)


@pytest.mark.parametrize("names", [["cpu:0", "cpu:2"], ["cuda:0", "cuda:1"], ["cuda:0/0", "cuda:0/1", "cuda:1"]])
def test_devices_of_an_engine(names: list[str]) -> None:
    assert check_engine_devices(names) == tuple(map(parse_device, names))


WRONG = {
    "do not mix": ["cpu:0", "cuda:0"],
    "occurs twice": ["cuda:1", "cuda:01"],
    "named whole and in parts": ["cuda:0", "cuda:0/1"],
    "those that compute": ["host"],
    r"\(none\)": [],
}


@pytest.mark.parametrize("complaint", WRONG)
def test_devices_that_do_not_go_together(complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_engine_devices(WRONG[complaint])
