"""How a load is played: turns in order, retries of what failed, none of what is refused."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace

from anchortp.bench.client import Target
from anchortp.bench.load import Load
from anchortp.bench.workload import Session, Turn

THINK_S = 0.5
ANSWER = b'data: {"choices": [{"text": "a", "token_ids": [1], "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
OK = b"HTTP/1.1 200 OK\r\n\r\n"


def session(arrival_s, *prompts):
    return Session(arrival_s=arrival_s, turns=tuple(Turn(prompt=(p,), max_tokens=1) for p in prompts))


def play(sessions, reply, *, during=None):
    """Plays against a server that answers `reply(n-th request, its prompt)`; the load, and the prompts as asked."""
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"Content-Length")))
        (prompt,) = json.loads(await reader.readexactly(length))["prompt"]
        asked.append(prompt)
        writer.write(reply(len(asked), prompt))
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            target = Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1], model="m")
            system = SimpleNamespace(target=target, up=asyncio.Event())
            system.up.set()
            load = Load(sessions, system, THINK_S)
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                group.create_task(load.play())
                if during is not None:
                    group.create_task(during(load, system))
            return load

    return asyncio.run(run()), asked


def test_turns_of_a_session_follow_the_answers():
    load, asked = play([session(0, 10, 11, 12)], lambda *_: OK + ANSWER)
    assert asked == [10, 11, 12] and load.num_finished == load.num_requests == load.num_tokens == 3
    for before, after in itertools.pairwise(load.sent):
        assert after.attempts[0].sent_s >= before.attempts[-1].ended_s + THINK_S


def test_sessions_do_not_wait_for_each_other():
    """The second is due while the first still thinks."""
    load, asked = play([session(0, 10, 11), session(0.01, 20)], lambda *_: OK + ANSWER)
    assert asked == [10, 20, 11] and load.num_finished == 3


def test_what_fails_is_sent_again_and_what_is_refused_is_not():
    def reply(n, prompt):
        if prompt == 1:
            return b"HTTP/1.1 400 Bad Request\r\n\r\nno"
        return b"HTTP/1.1 429 Full\r\n\r\nlater" if n == 1 else OK if n == 2 else OK + ANSWER

    load, asked = play([session(0, 5), session(0.02, 1)], reply)
    retried, refused = load.sent
    assert asked.count(5) + asked.count(1) == len(asked) and asked.count(1) == 1 and refused.attempts[0].error
    assert retried.finished and not refused.finished and len(refused.attempts) == 1
    assert len(retried.attempts) >= 2 and all(not attempt.finished for attempt in retried.attempts[:-1])


def test_clients_wait_until_a_system_is_back():
    async def down_for_a_while(load, system):
        await load.wait_sent(1)
        system.up.clear()
        await load.wait_sent(3)
        assert load.num_finished == 0
        system.up.set()

    counter = itertools.count()
    load, asked = play(
        [session(0, 1), session(0.05, 2), session(0.1, 3)],
        lambda *_: OK if next(counter) < 3 else OK + ANSWER,
        during=down_for_a_while,
    )
    assert len(asked) == 6 and load.num_finished == 3 and all(len(sent.attempts) == 2 for sent in load.sent)
