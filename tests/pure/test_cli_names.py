"""What a model is called, and which devices a runtime folder names."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchortp.cli.serving import default_model_name
from anchortp.cli.status import devices_in
from anchortp.devices import parse_device

SNAPSHOT = "/cache/models--Qwen--Qwen3-0.6B/snapshots/c1899de289a04d12100db370d81485cdf75e47ca"


@pytest.mark.parametrize(
    ("model", "folder", "name"),
    [
        ("Qwen/Qwen3-0.6B", SNAPSHOT, "Qwen/Qwen3-0.6B"),  # a hub name, not the commit that was fetched
        ("gpt2", SNAPSHOT, "gpt2"),
        ("/models/Qwen3-8B", "/models/Qwen3-8B", "Qwen3-8B"),
        ("models/Qwen3-8B/", "models/Qwen3-8B", "Qwen3-8B"),
        ("/models/other/../mine", "/models/other/../mine", "mine"),
        ("smollm2", "/cache/models/smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("smollm2-moe", "/cache/models/smollm2-moe-skewed", "smollm2-moe-skewed"),
        (SNAPSHOT, SNAPSHOT, "c1899de289a04d12100db370d81485cdf75e47ca"),
    ],
)
def test_the_default_name_of_a_model(model: str, folder: str, name: str) -> None:
    assert default_model_name(model, Path(folder)) == name


def test_the_folder_that_one_stands_in_has_a_name_too() -> None:
    assert default_model_name(".", Path(".")) == Path.cwd().name
    assert default_model_name("~/mine", Path("~/mine").expanduser()) == "mine"


def test_the_devices_of_a_runtime_folder_are_those_with_a_socket_in_order(tmp_path: Path) -> None:
    names = ["cpu:2", "cpu:10", "cuda:0/0", "cuda:0/1", "cuda:1", "host", "sim:0/10"]
    for name in reversed(names):
        (tmp_path / f"anchor-{parse_device(name).file_name}.sock").touch()
    for other in ("anchor-cpu-3.log", "anchor-mine.sock", "serve.json"):
        (tmp_path / other).touch()
    assert devices_in(tmp_path) == names
