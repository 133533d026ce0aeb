"""A streaming client of the OpenAI completions API that costs little, so that on a small machine the system under
test has the cores and not the client: plain asyncio, one connection a request, some 20 µs a piece of text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

CONNECT_TIMEOUT_S = 10.0
LINE_LIMIT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go."""

    host: str
    port: int
    model: str


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One request sent once, and what came of it. Times are CLOCK_MONOTONIC.

    `counts[i]` tokens arrived at `times_s[i]`. Where the server tells token ids the counts are exact; else each
    piece of text counts as one token. `num_said` is the server's own count, 0 if it did not come to that.
    """

    sent_s: float
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    text: str = ""
    exact: bool = False  # the server told token ids
    num_said: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    ended_s: float | None = None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason in ("stop", "length") and not self.error

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class ServerError(Exception):
    """What a server answered instead of tokens, or that it went away; ends up in `Attempt.error`."""


async def send(target: Target, body: dict[str, Any], attempt: Attempt, *, idle_timeout_s: float) -> None:
    """Streams one completion into `attempt`; whatever goes wrong is told in `attempt.error`.

    `idle_timeout_s`: how long the server may stay silent.
    """
    message = body | {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(idle_timeout_s) as silence:
            async for event in _events(target, "/v1/completions", message):
                silence.reschedule(asyncio.get_running_loop().time() + idle_timeout_s)
                _take(event, attempt)
        if attempt.finish_reason is None:
            raise ServerError("the stream ended before the answer did")
    except TimeoutError:
        attempt.error = f"silent for {idle_timeout_s:g} s"
    except (OSError, EOFError, ValueError, ServerError) as error:
        attempt.error = f"{type(error).__name__}: {error}"
    finally:
        attempt.ended_s = time.monotonic()


async def get(target: Target, path: str, *, timeout_s: float) -> Any:
    """The JSON document at `path`. Raises ServerError, OSError, TimeoutError, ValueError (no JSON)."""
    async with asyncio.timeout(timeout_s), _exchange(target, "GET", path, b"") as chunks:
        return msgspec.json.decode(b"".join([chunk async for chunk in chunks]))


def _take(event: dict[str, Any], attempt: Attempt) -> None:
    if error := event.get("error"):
        raise ServerError(str(error.get("message", error) if isinstance(error, dict) else error))
    if usage := event.get("usage"):
        attempt.num_said = usage["completion_tokens"]
        attempt.num_prompt_tokens = usage["prompt_tokens"]
        attempt.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices", ()):
        token_ids, text = choice.get("token_ids"), choice.get("text")
        attempt.exact |= token_ids is not None
        count = bool(text) if token_ids is None else len(token_ids)
        if count:
            attempt.times_s.append(time.monotonic())
            attempt.counts.append(int(count))
        attempt.text += text or ""
        attempt.finish_reason = choice.get("finish_reason") or attempt.finish_reason


async def _events(target: Target, path: str, message: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events up to `[DONE]`."""
    rest = b""
    async with _exchange(target, "POST", path, msgspec.json.encode(message)) as chunks:
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    yield msgspec.json.decode(line[6:])


@contextlib.asynccontextmanager
async def _exchange(target: Target, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
    """Sends a request; yields the body of the answer, piece by piece. Raises ServerError for all but 200."""
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(target.host, target.port, limit=LINE_LIMIT_BYTES)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: {target.host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status, headers = await _read_head(reader)
        chunks = _chunked(reader) if headers.get("transfer-encoding") == "chunked" else _until_end(reader)
        if status != 200:
            said = b"".join([chunk async for chunk in chunks]).decode(errors="replace")
            raise ServerError(f"HTTP {status}: {said[:500]}")
        yield chunks
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, status = head[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise ServerError(f"no HTTP: {head[0][:100]!r}")
    pairs = (line.partition(":") for line in head[1:] if line)
    return int(status[:3]), {name.strip().lower(): value.strip().lower() for name, _, value in pairs}


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while chunk := await reader.read(1 << 16):
        yield chunk
