"""The recovery of an engine whose devices share one GPU; a section of `bench.gpu_check`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anchortp.config import resolve_engine_config
from anchortp.engine.api import EngineRequest, SamplingParams, TokenOutput
from anchortp.engine.controller import ElasticEngine
from anchortp.state.client import AnchorClient
from tests.tiny_model import write_model

NUM_DEVICES = 4
NUM_STREAMS = 8
START_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 90.0


class _Streams:
    """Greedy answers to fixed prompts, with the time of every token."""

    def __init__(self, engine: ElasticEngine, name: str, num_tokens: int):
        self.tokens: dict[str, list[int]] = {}
        self.times_s: list[float] = []
        self.errors: list[str] = []
        self._changed = threading.Condition()
        self._open = NUM_STREAMS
        for index in range(NUM_STREAMS):
            prompt = tuple((17 * index + 5 * i * i + 3 * i + 1) % 250 for i in range(32))
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

    @property
    def worst_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False))


def run_engine(scale: Any, runtime_dir: Path) -> dict[str, Any]:
    """TFS, phases and bytes of a lost device and of a crashed worker; whether any answer differs from before."""
    folder = write_model(runtime_dir / "model", **scale.model)
    devices = tuple(scale.device(part) for part in range(NUM_DEVICES))
    config = resolve_engine_config(
        folder,
        runtime_dir=runtime_dir / "run",
        devices=devices,
        device_memory_bytes=4 << 30 if scale.kind == "cuda" else 1 << 28,
        max_model_len=512,
        kv_tokens=8192,
        max_num_seqs=NUM_STREAMS,
        collectives="peer",
        min_step_deadline_s=10.0,  # kernels that a spare meets for the first time take their time to load
    )
    engine = ElasticEngine(config)
    result: dict[str, Any] = {"devices": devices, "weights_bytes": _bytes_of(folder)}
    try:
        engine.start()
        engine.wait_ready(START_TIMEOUT_S)
        quiet = _Streams(engine, "quiet", scale.tokens)
        expected = quiet.wait_end()
        seconds = quiet.times_s[-1] - quiet.times_s[0]
        result["decode_tokens_per_s"] = NUM_STREAMS * (scale.tokens - 1) / seconds
        for kind, device in (("lost", devices[-1]), ("crash", devices[1])):
            result[kind] = _strike(engine, config.runtime_dir, kind, device, scale.tokens, expected)
    finally:
        engine.stop()
    return result


def _strike(
    engine: ElasticEngine, runtime_dir: str, kind: str, device: str, num_tokens: int, expected: list[list[int]]
) -> dict[str, Any]:
    num_episodes = len(engine.status()["episodes"])
    streams = _Streams(engine, kind, num_tokens)
    streams.wait_begun()
    with AnchorClient.connect(runtime_dir, device, role="tool") as tool:
        tool.inject(kind)  # type: ignore[arg-type]
    answers = streams.wait_end()
    episode = _ended_episode(engine, num_episodes)
    return {
        "failed": streams.errors,
        "same_answers": sum(a == b for a, b in zip(answers, expected, strict=True)),
        "num_answers": len(answers),
        "first_token_s": episode.get("first_token_s"),
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
