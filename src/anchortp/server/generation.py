"""One HTTP request in the engine: submitted, followed to its end, taken back if nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from anchortp.engine.api import Engine, EngineRequest, SamplingParams, Sink, TokenOutput
from anchortp.errors import AnchorTPError
from anchortp.server.api_errors import ApiError, from_engine, shutting_down, unavailable
from anchortp.server.choice import Choice, Delta
from anchortp.server.metrics import ServerMetrics
from anchortp.server.tokenizer import Tokenizer

_Arrival = tuple[int, TokenOutput] | ApiError  # (choice, its output)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """`prompts`: each becomes one choice, in order. `continues`: the text goes on from the prompt's."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    params: tuple[SamplingParams, ...]  # one per prompt
    stops: tuple[str, ...]
    continues: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


class InFlight:
    """The generations that are running, so that a server that stops can tell them. Event loop only."""

    def __init__(self) -> None:
        self._running: set[Generation] = set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._running)

    def drain(self) -> None:
        """From now on new generations are refused; the running ones go on."""
        self.draining = True

    def end_all(self, error: ApiError) -> None:
        """Each running generation delivers what has arrived for it, then fails with `error`; no new ones."""
        self.drain()
        for generation in tuple(self._running):
            generation.fail(error)

    def add(self, generation: Generation) -> None:
        if self.draining:
            raise shutting_down()
        self._running.add(generation)

    def remove(self, generation: Generation) -> None:
        self._running.discard(generation)


class Generation:
    """The choices of one HTTP request. Lives on the event loop; the engine's thread only enters `_sink`.

    `idle_timeout_s`: how long the engine may stay silent, recoveries included, before it is given up.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        engine: Engine,
        tokenizer: Tokenizer,
        in_flight: InFlight,
        metrics: ServerMetrics,
        idle_timeout_s: float,
    ):
        assert len(request.prompts) == len(request.params) > 0
        self._request = request
        self._engine = engine
        self._in_flight = in_flight
        self._metrics = metrics
        self._idle_timeout_s = idle_timeout_s
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[_Arrival] = asyncio.Queue()
        self._unread: deque[_Arrival] = deque()
        self._submitted: list[int] = []
        self._closed = False
        self._heard_at_s = time.monotonic()
        self._heard_tokens = False
        self._choices = [
            Choice(index, tokenizer, stops=request.stops, continues=request.continues)
            for index in range(len(request.prompts))
        ]

    @property
    def done(self) -> bool:
        return all(choice.finished for choice in self._choices)

    def usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=sum(map(len, self._request.prompts)),
            num_completion_tokens=sum(choice.num_tokens for choice in self._choices),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in self._choices),
        )

    def start(self) -> None:
        """Queues every prompt. Raises ApiError: refused; `close` then takes back those that were queued."""
        self._in_flight.add(self)
        for index, (prompt, params) in enumerate(zip(self._request.prompts, self._request.params, strict=True)):
            request = EngineRequest(request_id=self._engine_id(index), prompt_token_ids=prompt, params=params)
            try:
                self._engine.submit(request, self._sink(index))
            except AnchorTPError as error:
                raise from_engine(error) from error
            self._submitted.append(index)
            self._metrics.prompt_accepted(len(prompt))

    async def next(self) -> tuple[Delta, ...]:
        """Waits for the next deltas; all that have arrived meanwhile come merged, one per choice at most.

        Raises ApiError: the engine failed, was silent for too long, or the server is stopping. What arrived
        before the error is returned first.
        """
        assert not self.done and not self._closed
        if not self._unread:
            self._unread.append(await self._wait())
        while not self._arrived.empty():
            self._unread.append(self._arrived.get_nowait())
        by_choice = self._read_up_to_error()
        return tuple(self._advance(index, outputs) for index, outputs in by_choice.items())

    def fail(self, error: ApiError) -> None:
        """Ends the generation with `error` once everything that has arrived is delivered."""
        self._arrived.put_nowait(error)

    def close(self) -> None:
        """Takes back from the engine what is not finished. To be called in any case; twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._in_flight.remove(self)
        for index in self._submitted:
            if not self._choices[index].finished:
                self._abort(index)
                self._metrics.choice_ended("abandoned")

    def _engine_id(self, index: int) -> str:
        return f"{self._request.request_id}-{index}"

    def _abort(self, index: int) -> None:
        self._engine.abort(self._engine_id(index))

    def _sink(self, index: int) -> Sink:
        def sink(output: TokenOutput) -> None:
            try:
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, output))
            except RuntimeError:
                # The loop is closed: the server is gone, and so is whoever waited for this.
                assert self._loop.is_closed()

        return sink

    async def _wait(self) -> _Arrival:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                return await self._arrived.get()
        except TimeoutError:
            message = f"The engine made no token for {self._idle_timeout_s:g} s. Send the request again."
            raise ApiError(504, message, code="timeout") from None

    def _read_up_to_error(self) -> dict[int, list[TokenOutput]]:
        """Unread outputs by choice; an error is raised if it comes first, else left for the next call."""
        by_choice: dict[int, list[TokenOutput]] = {}
        while self._unread:
            item = self._unread[0]
            if not isinstance(item, ApiError) and self._choices[item[0]].finished:
                # It met a stop string; this was on its way before the engine knew.
                self._unread.popleft()
                continue
            error = item if isinstance(item, ApiError) else self._error_in(item[1])
            if error is not None:
                if by_choice:
                    break
                raise error
            self._unread.popleft()
            by_choice.setdefault(item[0], []).append(item[1])
        return by_choice

    def _error_in(self, output: TokenOutput) -> ApiError | None:
        if output.finish_reason == "error":
            message = output.error or "The engine failed on this request."
            lost = self._engine.status()["state"] in ("refusing", "stopped")
            return unavailable(message) if lost else ApiError(500, message, code="engine_error")
        if output.finish_reason == "abort":
            return unavailable("The engine gave this request up. Send it again.")
        return None

    def _advance(self, index: int, outputs: Sequence[TokenOutput]) -> Delta:
        choice = self._choices[index]
        before = choice.num_tokens
        delta = choice.advance(outputs)
        self._observe(num_tokens=choice.num_tokens - before)
        if delta.finish_reason is not None:
            self._metrics.choice_ended(delta.finish_reason)
            if outputs[-1].finish_reason is None:
                self._abort(index)
        return delta

    def _observe(self, *, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now_s = time.monotonic()
        self._metrics.tokens_arrived(num_tokens, now_s - self._heard_at_s, first=not self._heard_tokens)
        self._heard_at_s = now_s
        self._heard_tokens = True
