"""Which devices and collectives go together, as resolved before an engine starts."""

from __future__ import annotations

import json

import pytest

from anchortp import config as config_module
from anchortp.config import resolve_engine_config
from anchortp.errors import ConfigError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def separate(monkeypatch):
    """Pairs of GPUs of which the driver says that the first cannot use the memory of the second."""
    pairs: set[tuple[int, int]] = set()
    monkeypatch.setattr(config_module, "_reaches", lambda gpu, other: (gpu, other) not in pairs)
    return pairs


@pytest.fixture
def resolve(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return lambda *devices, **options: resolve_engine_config(tmp_path, runtime_dir="/", devices=devices, **options)


AUTO = {
    ("cpu:0", "cpu:1"): ("shm", 4096),
    ("sim:0/0", "sim:0/1"): ("shm", 64 << 10),
    ("cuda:0",): ("nccl", 2 * MIB),
    ("cuda:0", "cuda:1"): ("mixed", 2 * MIB),
    ("cuda:0/0", "cuda:0/1", "cuda:1/0"): ("peer", 2 * MIB),
}


@pytest.mark.parametrize("devices", AUTO)
def test_collectives_and_pages_follow_the_devices(resolve, devices):
    config = resolve(*devices, device_memory_bytes=MIB)
    assert (config.collectives, config.page_bytes) == AUTO[devices]
    assert config.gpus == {"nccl": (0,), "mixed": (0, 1), "peer": (0, 1), "shm": ()}[config.collectives]


def test_small_messages_go_by_mapped_memory_where_every_gpu_can_use_every_others(resolve, separate, monkeypatch):
    devices, options = ("cuda:0", "cuda:1", "cuda:3"), {"device_memory_bytes": MIB, "max_batch_tokens": 1 << 14}
    mixed = resolve(*devices, **options)
    assert (mixed.collectives, mixed.slot_bytes, mixed.peer_slots_bytes) == ("mixed", 256 << 10, 2 * MIB)
    assert resolve(*devices, **options, collectives="nccl").peer_slots_bytes == 0
    separate.add((3, 0))
    assert resolve(*devices, **options).collectives == "nccl"
    for collectives in ("mixed", "peer"):
        with pytest.raises(ConfigError, match="GPU 3 cannot use the memory of GPU 0; choose auto, or one of shm, nccl"):
            resolve(*devices, **options, collectives=collectives)

    def no_driver(gpu, other):
        raise ConfigError("there is none")

    monkeypatch.setattr(config_module, "_reaches", no_driver)
    assert resolve(*devices, **options).collectives == "nccl"


def test_slots_of_collectives_are_whole_pages_for_two_tensors(resolve):
    config = resolve("cuda:0/0", device_memory_bytes=MIB, max_batch_tokens=1 << 14)
    assert config.slot_bytes == (1 << 14) * 64 * 4 == 4 * MIB
    assert config.peer_slots_bytes == 10 * MIB  # two of 4 MiB, and what rounding them up may take
    assert resolve("cuda:0/0", device_memory_bytes=MIB, collectives="shm").peer_slots_bytes == 0


REFUSED = {
    "NCCL wants a GPU per rank; choose auto, or one of shm, peer": (("cuda:0/0", "cuda:0/1"), "nccl"),
    "'mixed': NCCL wants a GPU per rank": (("cuda:0/0", "cuda:0/1"), "mixed"),
    "cpu devices have not that kind; choose auto, or one of shm, gloo": (("cpu:0",), "peer"),
    "cuda devices have not that kind; choose auto, or one of shm, peer, nccl, mixed": (("cuda:0",), "gloo"),
    "do not mix": (("cuda:0", "cpu:0"), "auto"),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_does_not_go_together_is_refused(resolve, complaint):
    devices, collectives = REFUSED[complaint]
    with pytest.raises(ConfigError, match=complaint):
        resolve(*devices, device_memory_bytes=MIB, collectives=collectives)


def test_the_budget_of_a_gpu_has_to_be_said(resolve):
    with pytest.raises(ConfigError, match="--device-memory"):
        resolve("cuda:0")


def test_kernels_by_triton_are_for_gpus_that_have_it(resolve, monkeypatch):
    installed = {"triton"}
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: name in installed or None)
    assert not resolve("cuda:0", device_memory_bytes=MIB).triton, "not by themselves: nobody has run them on a GPU"
    config = resolve("cuda:0", device_memory_bytes=MIB, kernels="triton")
    assert config.triton and config.kernels == ""
    for device in ("cpu:0", "sim:0"):
        with pytest.raises(ConfigError, match=f"'triton' are for cuda devices, and these are of kind {device[:3]}"):
            resolve(device, kernels="triton")
    installed.clear()
    with pytest.raises(ConfigError, match="package triton is not installed; choose 'torch'"):
        resolve("cuda:0", device_memory_bytes=MIB, kernels="triton")
