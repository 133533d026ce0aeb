"""The benchmarks' client against servers that behave, and that do not."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from anchortp.bench.client import Attempt, ServerError, Target, get, send

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(**choice):
    return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"


def usage(completion, prompt=3):
    told = {"completion_tokens": completion, "prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": 2}}
    return b"data: " + json.dumps({"choices": [], "usage": told}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = event(text="a", token_ids=[7]) + event(text="bc", token_ids=[8, 9]) + event(text="", finish_reason="length")
ANSWER += usage(3) + DONE


def chunked(body, size):
    """In chunks that cut lines, and events, anywhere."""
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def ask(reply, *, idle_timeout_s=30.0, silent=False):
    """What the client makes of a server that answers every request with these bytes; the request too."""
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"Content-Length")))
        asked.append(json.loads(await reader.readexactly(length)))
        writer.write(reply)
        await writer.drain()
        if silent:
            await reader.read()
        writer.close()

    async def play():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            target = Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1], model="m")
            attempt = Attempt(sent_s=time.monotonic())
            await send(target, {"prompt": [1, 2, 3]}, attempt, idle_timeout_s=idle_timeout_s)
            return attempt

    attempt = asyncio.run(play())
    assert attempt.ended_s >= attempt.sent_s
    return attempt, asked[0]


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_an_answer_in_chunks_of_any_size(size):
    attempt, asked = ask(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(ANSWER, size))
    assert attempt.finished and attempt.exact and attempt.text == "abc"
    assert (attempt.counts, attempt.num_tokens, attempt.num_said) == ([1, 2], 3, 3)
    assert (attempt.num_prompt_tokens, attempt.num_cached_tokens) == (3, 2)
    assert attempt.times_s == sorted(attempt.times_s) and attempt.sent_s <= attempt.times_s[0]
    assert asked["stream"] and asked["model"] == "m" and asked["stream_options"] == {"include_usage": True}


def test_an_answer_that_ends_with_the_connection_and_tells_no_token_ids():
    body = event(text="a") + event(text="") + event(text="b", finish_reason="length") + usage(2) + DONE
    attempt, _ = ask(OK + b"\r\n" + body)
    assert attempt.finished and not attempt.exact and attempt.counts == [1, 1]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (OK + b"\r\n" + event(text="a"), "ended before the answer"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(event(text="a"), 9)[:-9], "IncompleteReadError"),
        (OK + b"\r\n" + event(text="a") + b'data: {"error": {"message": "out of luck"}}\n\n', "out of luck"),
        (b"HTTP/1.1 429 No\r\nContent-Length: 4\r\n\r\nbusy", "HTTP 429: busy"),
        (OK + b"\r\ndata: {nonsense\n\n", "DecodeError"),
        (b"nonsense\r\n\r\n", "no HTTP"),
        (b"", "IncompleteReadError"),
    ],
)
def test_what_goes_wrong_is_told(reply, why):
    attempt, _ = ask(reply)
    assert why in attempt.error and not attempt.finished


def test_a_server_that_falls_silent():
    attempt, _ = ask(OK + b"\r\n" + event(text="a"), idle_timeout_s=0.05, silent=True)
    assert attempt.error == "silent for 0.05 s" and attempt.counts == [1]


def test_nobody_listens():
    target = Target(host="127.0.0.1", port=1, model="m")
    attempt = Attempt(sent_s=time.monotonic())
    asyncio.run(send(target, {}, attempt, idle_timeout_s=5))
    assert attempt.error.startswith("ConnectionRefusedError")
    with pytest.raises(OSError):
        asyncio.run(get(target, "/v1/models", timeout_s=5))


def test_a_document_and_one_that_is_not_there():
    async def serve(reader, writer):
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        status = b"200 OK" if path == b"/yes" else b"404 Not Found"
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n" + b'{"a": 1}')
        writer.close()

    async def play():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            target = Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1], model="m")
            assert await get(target, "/yes", timeout_s=30) == {"a": 1}
            with pytest.raises(ServerError, match="HTTP 404"):
                await get(target, "/no", timeout_s=30)

    asyncio.run(play())
