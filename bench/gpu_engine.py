"""Engines whose devices share one GPU, for two sections of `bench.gpu_check`: does it recover, and how fast is it?"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from anchortp.config import ModelConfig, load_model_config, resolve_engine_config
from anchortp.devices import parse_device
from anchortp.engine.accelerator import Accelerator
from anchortp.engine.api import EngineRequest, SamplingParams, TokenOutput
from anchortp.engine.controller import ElasticEngine
from anchortp.layout import model_units
from anchortp.state.client import AnchorClient
from bench.gpu_ranks import timed
from tests.tiny_model import write_model, write_repetitive_model

NUM_DEVICES = 4
NUM_STREAMS = 8
PROMPT_TOKENS = 32
START_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 90.0
PACK_TIMEOUT_S, PACK_QUIET_S = 40.0, 2.0


class _Streams:
    """Greedy answers to fixed prompts, with the time of every token."""

    def __init__(self, engine: ElasticEngine, name: str, num_tokens: int, num_streams: int = NUM_STREAMS):
        self.tokens: dict[str, list[int]] = {}
        self.times_s: list[float] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._open = num_streams
        for index in range(num_streams):
            prompt = tuple((17 * index + 5 * i * i + 3 * i + 1) % 250 for i in range(PROMPT_TOKENS))
            request = EngineRequest(
                request_id=f"{name}{index}",
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
            )
            self.tokens[request.request_id] = []
            engine.submit(request, self._take)

    def _take(self, output: TokenOutput) -> None:
        with self._changed:
            self.tokens[output.request_id] += [token.token_id for token in output.tokens]
            self.times_s.append(time.monotonic())
            if output.finish_reason is not None:
                self._open -= 1
                self.errors += [output.error] if output.error else []
            self._changed.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(ready, STREAM_TIMEOUT_S):
                raise TimeoutError(f"streams stand at {[len(tokens) for tokens in self.tokens.values()]} tokens")

    def wait_begun(self) -> None:
        self.wait(lambda: all(len(tokens) >= 8 for tokens in self.tokens.values()))

    def wait_end(self) -> list[list[int]]:
        self.wait(lambda: self._open == 0)
        return list(self.tokens.values())

    def first_after(self, fault_s: float, episode: dict[str, Any]) -> float:
        """TFS: from the fault to the first token after the engine serves again."""
        again_s = episode["began_s"] + episode["seconds"]
        return min((at - fault_s for at in self.times_s if at >= again_s), default=math.inf)

    @property
    def tokens_per_s(self) -> float:
        """While all of them decode: from the last first token to the end."""
        num_first = len(self.tokens)
        return (len(self.times_s) - num_first) / (self.times_s[-1] - self.times_s[num_first - 1])

    @property
    def worst_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


@contextlib.contextmanager
def _running(scale: Any, folder: Path, runtime_dir: Path, num_devices: int, **options: Any) -> Iterator[ElasticEngine]:
    """An engine that serves `folder`; its anchors end with it."""
    config = resolve_engine_config(
        folder,
        runtime_dir=runtime_dir,
        devices=tuple(scale.device(part) for part in range(num_devices)),
        max_model_len=512,
        kv_tokens=8192,
        max_num_seqs=NUM_STREAMS,
        collectives="peer",
        min_step_deadline_s=10.0,  # kernels that a spare meets for the first time take their time to load
        **options,
    )
    engine = ElasticEngine(config)
    try:
        engine.start()
        engine.wait_ready(START_TIMEOUT_S)
        yield engine
    finally:
        engine.stop()


def run_engine(scale: Any, runtime_dir: Path) -> dict[str, Any]:
    """Whether it recovers from a lost device and a crashed worker, and whether any answer differs from before."""
    folder = write_model(runtime_dir / "model", **scale.model)
    memory_bytes = 4 << 30 if scale.kind == "cuda" else 1 << 28
    with _running(scale, folder, runtime_dir / "run", NUM_DEVICES, device_memory_bytes=memory_bytes) as engine:
        return {"weights_bytes": _bytes_of(folder)} | _faults(engine, scale.tokens)


def _faults(engine: ElasticEngine, num_tokens: int) -> dict[str, Any]:
    devices = engine.config.devices
    quiet = _Streams(engine, "quiet", num_tokens)
    expected = quiet.wait_end()
    result: dict[str, Any] = {"devices": devices, "decode_tokens_per_s": quiet.tokens_per_s}
    for kind, device in (("lost", devices[-1]), ("crash", devices[1])):
        result[kind] = _strike(engine, engine.config.runtime_dir, kind, device, num_tokens, expected)
    return result


# ------------------------------------------------------------------------------- the numbers, at a model's full size


def run_numbers(scale: Any, runtime_dir: Path) -> dict[str, Any]:
    """A dense model of full size: decode against the memory's bandwidth at width 1; at width 4 a lost device against
    the link's bandwidth and against a restart, and a crashed worker. The same code, in one run."""
    folder = runtime_dir / "model"
    began_s = time.perf_counter()
    write_repetitive_model(folder, **scale.large_model)
    result: dict[str, Any] = {"write_s": time.perf_counter() - began_s, "weights_bytes": _bytes_of(folder)}
    ceilings = result["ceilings"] = _in_a_process("ceilings", scale.kind, str(scale.arena_bytes))
    options: dict[str, Any] = {"device_memory_bytes": scale.large_memory_bytes}
    with _running(scale, folder, runtime_dir / "one", 1, **options) as engine:
        result["width 1"] = _decode(engine, scale.large_tokens, ceilings)
    with _running(scale, folder, runtime_dir / "plain", 1, **options, cuda_graphs=False) as engine:
        result["width 1 without graphs"] = _decode(engine, scale.large_tokens, ceilings)
    why = _in_a_process("why_not_triton", scale.kind, str(folder))["why"]
    if why:
        result["width 1 with triton"] = {"not_measured": why}
    else:
        with _running(scale, folder, runtime_dir / "triton", 1, **options, kernels="triton") as engine:
            result["width 1 with triton"] = _decode(engine, scale.large_tokens, ceilings)
    options["packed_folder"] = str(runtime_dir / "packed")
    with _running(scale, folder, runtime_dir / "four", NUM_DEVICES, **options) as engine:
        result["packed_bytes"] = _wait_packed(runtime_dir / "packed")
        result["width 4"] = _faults(engine, scale.large_tokens)
    _compare(result["width 4"]["lost"], ceilings)
    result["restart at width 3"] = restart = _restart(scale, folder, runtime_dir / "three", options)
    result["restart_over_lost_ratio"] = restart["tfs_s"] / result["width 4"]["lost"]["tfs_s"]
    return result


def _decode(engine: ElasticEngine, num_tokens: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Steady decoding of one stream, then of several; the second round has every kernel and graph ready."""
    rates = {}
    for num_streams in (1, NUM_STREAMS):
        for attempt in ("warm", "timed"):
            streams = _Streams(engine, f"{attempt}-{num_streams}-", num_tokens, num_streams)
            streams.wait_end()
        rates[num_streams] = streams.tokens_per_s
    step_bytes = decode_bytes(engine.config.model, PROMPT_TOKENS + num_tokens // 2)
    return {
        "decode_1_tokens_per_s": rates[1],
        f"decode_{NUM_STREAMS}_tokens_per_s": rates[NUM_STREAMS],
        "decode_step_bytes": step_bytes,
        "roofline_1_tokens_per_s": ceilings["device_memory_bytes_per_s"] / step_bytes,
        "roofline_1_share": rates[1] * step_bytes / ceilings["device_memory_bytes_per_s"],
    }


def decode_bytes(model: ModelConfig, num_keys: int) -> int:
    """What one decode step of one sequence has to read: its keys and values, and every weight, but of an embedding that
    is not the lm_head one row."""
    skipped = () if model.tie_embeddings else ("model.embed_tokens.weight",)
    stored = model_units(model).stored_tensors()
    weights = sum(math.prod(shape) for name, shape in stored if name not in skipped)
    keys_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim * num_keys
    return (weights + keys_values) * model.dtype_bytes


def _compare(lost: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Adds what a copy of the lost bytes alone would take, and how far from that the recovery was."""
    bytes_, phases = lost["bytes"], lost["phases"]
    floor_s = bytes_["lost"] / ceilings["host_to_device_bytes_per_s"]
    before_s = sum(phases.get(phase, 0.0) for phase in ("detected", "leaving", "census", "reserving"))
    lost["floor_s"] = floor_s
    lost["moved_over_lost_ratio"] = (bytes_["loaded"] + bytes_["copied"]) / bytes_["lost"]
    # Copies begin when the room for them is reserved; the first layers compute while the last are on their way.
    lost["moving_s"] = lost["whole_after_s"] - before_s
    lost["moving_over_floor_ratio"] = lost["moving_s"] / floor_s
    lost["tfs_over_floor_ratio"] = lost["tfs_s"] / floor_s


def _restart(scale: Any, folder: Path, runtime_dir: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a restart of the same engine takes, on the devices that a loss leaves: from nothing but warm files to the
    first token of a client that asks again at once. To end the old engine, and to import in the new one's main
    process, is not counted."""
    began_s = time.monotonic()
    with _running(scale, folder, runtime_dir, NUM_DEVICES - 1, **options) as engine:
        ready_s = time.monotonic() - began_s
        streams = _Streams(engine, "restart", 8)
        streams.wait_end()
        return {"ready_s": ready_s, "tfs_s": streams.times_s[0] - began_s}


def _wait_packed(folder: Path) -> int:
    """Until the workers have filled the file that saves them strided reads; how large it is. Bounded: a file that
    is not full only makes the recovery slower."""
    deadline_s, seen = time.monotonic() + PACK_TIMEOUT_S, -1
    while time.monotonic() < deadline_s:
        size = sum(path.stat().st_blocks * 512 for path in folder.glob("*"))
        if size == seen:
            break
        seen = size
        time.sleep(PACK_QUIET_S)
    return seen


def _in_a_process(function: str, *arguments: str) -> dict[str, Any]:
    """One of this module's functions, where it may make a context: this process must stay free of one."""
    call = f"import sys, json; from bench.gpu_engine import {function}; print(json.dumps({function}(*sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"{function} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ceilings(kind: str, num_bytes: str) -> dict[str, float]:
    """[a process of its own] The link from pinned host memory, and the device's memory, read and written in place."""
    accelerator = Accelerator.of(parse_device(f"{kind}:0"))
    on_gpu = accelerator.torch_device is not None
    host = torch.ones(int(num_bytes), dtype=torch.uint8, pin_memory=on_gpu)
    device = torch.zeros(int(num_bytes), dtype=torch.uint8, device=accelerator.torch_device)
    words = device.view(torch.int64)
    seconds = {}
    for name, work in {"link": lambda: device.copy_(host, non_blocking=True), "memory": lambda: words.add_(1)}.items():
        seconds[name] = timed(accelerator, 7, work)
    return {
        "host_to_device_bytes_per_s": int(num_bytes) / seconds["link"],
        "device_memory_bytes_per_s": 2 * int(num_bytes) / seconds["memory"],
    }


def why_not_triton(kind: str, folder: str) -> dict[str, str]:
    """[a process of its own] What keeps Triton's kernels from being used here; "" if nothing does."""
    if kind != "cuda":
        return {"why": f"devices of kind {kind} have not these kernels"}
    try:
        Accelerator.of(parse_device(f"{kind}:0")).fused(load_model_config(folder))
    except Exception as error:  # no package, no C compiler, or what else Triton finds missing
        return {"why": f"{type(error).__name__}: {error}"}
    return {"why": ""}


def _strike(
    engine: ElasticEngine, runtime_dir: str, kind: str, device: str, num_tokens: int, expected: list[list[int]]
) -> dict[str, Any]:
    num_episodes = len(engine.status()["episodes"])
    streams = _Streams(engine, kind, num_tokens)
    streams.wait_begun()
    fault_s = time.monotonic()
    with AnchorClient.connect(runtime_dir, device, role="tool") as tool:
        tool.inject(kind)  # type: ignore[arg-type]
    answers = streams.wait_end()
    episode = _ended_episode(engine, num_episodes)
    return {
        "failed": streams.errors,
        "same_answers": sum(a == b for a, b in zip(answers, expected, strict=True)),
        "num_answers": len(answers),
        "tfs_s": streams.first_after(fault_s, episode),
        "first_token_s": episode.get("first_token_s"),
        "whole_after_s": episode["whole_after_s"],
        "worst_gap_s": streams.worst_gap_s,
        "phases": episode["phases"],
        "bytes": episode["bytes"],
        "outcome": episode["outcome"],
    }


def _ended_episode(engine: ElasticEngine, num_before: int) -> dict[str, Any]:
    """The recovery from the fault; the streams may have ended before it struck."""
    deadline_s = time.monotonic() + STREAM_TIMEOUT_S
    while time.monotonic() < deadline_s:
        status = engine.status()
        if status["state"] == "serving" and len(status["episodes"]) > num_before:
            return status["episodes"][num_before]
        time.sleep(0.01)
    raise TimeoutError(f"the engine has not recovered: {engine.status()}")


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
