"""Streams over plain OpenAI HTTP, with the time of every piece: for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from anchortp.errors import EngineStopped

CLIENT_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


@dataclass(slots=True, kw_only=True)
class Stream:
    """One streaming request and what came of it. Times are CLOCK_MONOTONIC, which all processes share."""

    body: dict[str, Any]
    path: str = "/v1/chat/completions"
    text: str = ""
    times_s: list[float] = field(default_factory=list)  # one per piece of text
    finish_reason: str | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason in ("stop", "length") and not self.error

    def longest_gap_s(self) -> float:
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)

    async def run(self, client: httpx.AsyncClient) -> None:
        """Sends the request and takes in the answer; errors end up in `error`."""
        body = self.body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with client.stream("POST", self.path, json=body) as answer:
                if answer.status_code != 200:
                    self.error = (await answer.aread()).decode(errors="replace")
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = f"{type(error).__name__}: {error}"

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = str(event["error"].get("message"))
            return
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]
            self.num_cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        for choice in event.get("choices", ()):
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            if piece:
                self.text += piece
                self.times_s.append(time.monotonic())
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


def http_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=CLIENT_TIMEOUT_S, limits=limits)


@contextlib.contextmanager
def served(
    runtime_dir: Path, arguments: list[str], *, timeout_s: float, quiet: bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs `anchortp serve` with these arguments on a free port; yields its address and process.

    At the end it gets SIGTERM (and SIGKILL if that is not enough). Raises EngineStopped if it does not start.
    """
    command = [sys.executable, "-m", "anchortp", "serve", *arguments]
    command += ["--port", "0", "--runtime-dir", str(runtime_dir), "--log-file", str(runtime_dir / "serve.log")]
    stderr = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        yield wait_served(runtime_dir, process, timeout_s), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_served(runtime_dir: Path, process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """The server's address, as soon as it accepts requests."""
    deadline_s = time.monotonic() + timeout_s
    announce = runtime_dir / "serve.json"
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise EngineStopped(f"the server ended with status {process.returncode}; see {runtime_dir / 'serve.log'}")
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(announce.read_text(encoding="utf-8"))
            if found["pid"] == process.pid:
                return found["url"]
        time.sleep(0.01)
    raise EngineStopped(f"the server was not ready within {timeout_s} s; see {runtime_dir / 'serve.log'}")


def last_episode(url: str) -> dict[str, Any]:
    """The newest recovery (or the start) as the server tells it, with `began_s` on CLOCK_MONOTONIC."""
    episodes = httpx.get(f"{url}/status", timeout=CLIENT_TIMEOUT_S).json()["episodes"]
    return [episode for episode in episodes if not episode["change_id"]][-1]


def time_to_first_success(streams: list[Stream], fault_s: float, episode: dict[str, Any]) -> float:
    """TFS: from the fault to the first piece that reaches a client after the engine serves again.

    Pieces that were on their way when the fault struck do not count. inf if none came.
    """
    again_s = episode["began_s"] + episode["seconds"]
    return min((t - fault_s for s in streams for t in s.times_s if t >= again_s), default=float("inf"))


def private_tmp(name: str) -> Path:
    """A fresh private folder with a short path (a Unix socket's path has 107 bytes)."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix=f"anchortp-{name}-"))
    os.chmod(folder, 0o700)
    return folder
