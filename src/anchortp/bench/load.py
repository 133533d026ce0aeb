"""Plays a workload against a system that may fail, as patient clients would: a request that fails is sent again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from anchortp.bench.client import Attempt, send
from anchortp.bench.supervisor import Supervisor
from anchortp.bench.workload import Session, Turn

IDLE_TIMEOUT_S = 900.0  # a system that is silent for so long has failed the request; waiting in its queue is silence
PATIENCE_S = 1800.0  # a client gives a request up after so long
BACKOFF_S = 0.25  # after an error of a system that still answers


@dataclass(slots=True, kw_only=True)
class Sent:
    """One request, with all attempts at it. `due_s`: when it was to be sent (CLOCK_MONOTONIC)."""

    due_s: float
    max_tokens: int
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.attempts) and self.attempts[-1].finished

    def news_s(self) -> list[float]:
        """When a token came that the client did not have yet: a retry begins with those that it has."""
        times, had = [], 0
        for attempt in self.attempts:
            got = 0
            for at_s, count in zip(attempt.times_s, attempt.counts, strict=True):
                got += count
                if got > had:
                    times.append(at_s)
                    had = got
        return times


class Load:
    """A run of one workload. `sent` grows in the order of sending; `changed` wakes whoever waits for progress."""

    def __init__(self, sessions: Sequence[Session], supervisor: Supervisor, think_s: float):
        self.sent: list[Sent] = []
        self.num_requests = sum(len(session.turns) for session in sessions)
        self.num_finished = 0
        self.num_tokens = 0
        self.began_s = 0.0
        self._sessions = sessions
        self._supervisor = supervisor
        self._think_s = think_s
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def play(self) -> None:
        """Returns when every request has finished or was given up. Cancelled, it leaves what it has in `sent`."""
        self.began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for session in self._sessions:
                group.create_task(self._client(session))

    async def wait_sent(self, count: int) -> None:
        """Until so many requests have been sent."""
        if len(self.sent) < count:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((count, future))
            await future

    async def _client(self, session: Session) -> None:
        due_s = self.began_s + session.arrival_s
        for turn in session.turns:
            await asyncio.sleep(due_s - time.monotonic())
            await self._request(turn, due_s)
            due_s = time.monotonic() + self._think_s

    async def _request(self, turn: Turn, due_s: float) -> None:
        sent = Sent(due_s=due_s, max_tokens=turn.max_tokens)
        self.sent.append(sent)
        self._wake()
        body = {"prompt": turn.prompt, "max_tokens": turn.max_tokens, "temperature": 0.0, "ignore_eos": True}
        while time.monotonic() < due_s + PATIENCE_S:
            attempt = Attempt(sent_s=time.monotonic())
            sent.attempts.append(attempt)
            await send(
                self._supervisor.target, body | {"return_token_ids": True}, attempt, idle_timeout_s=IDLE_TIMEOUT_S
            )
            if attempt.finished:
                self.num_finished += 1
                self.num_tokens += attempt.num_tokens
                return
            if attempt.error.startswith("ServerError: HTTP 4") and "HTTP 429" not in attempt.error:
                return  # it will be refused again
            await self._until_worth_it(due_s + PATIENCE_S)

    async def _until_worth_it(self, deadline_s: float) -> None:
        """One prober for all clients sees when a system is back: hundreds of them asking would slow its start."""
        if self._supervisor.up.is_set():
            await asyncio.sleep(BACKOFF_S)
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await self._supervisor.up.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        due = [future for count, future in self._waiting if count <= len(self.sent) and not future.done()]
        self._waiting = [(count, future) for count, future in self._waiting if count > len(self.sent)]
        for future in due:
            future.set_result(None)
