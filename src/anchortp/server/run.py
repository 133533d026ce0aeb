"""uvicorn, with a socket of ours, signals that do not kill, and an end that every client is told of."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from anchortp.errors import ConfigError
from anchortp.server.api_errors import shutting_down
from anchortp.server.generation import InFlight

BACKLOG = 2048
CLOSE_S = 5.0  # for clients to read their last event, before they are cut off


def serve_http(
    app: FastAPI,
    host: str,
    port: int,
    *,
    on_ready: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    grace_s: float = 30.0,
    log_level: str = "warning",
) -> signal.Signals | None:
    """Serves `app` (of `create_app`) until SIGTERM, SIGINT or `should_stop()`; returns the signal, if any.

    `port` 0 takes a free one. `on_ready(port)` is called once, when connections are accepted. `should_stop`
    is asked about ten times a second. Signals are taken in the main thread only and given back at the end.

    Stopping: no new connection or request; streams that run have `grace_s` to finish, then they get an error
    event (requests that do not stream: 503) and are closed, and taken back from the engine. A second
    signal ends the grace. Clients that do not even read their last event are cut off `CLOSE_S` later.

    Raises ConfigError: the address cannot be used.
    """
    sock = _listen(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,  # logging belongs to the process, not to us
        log_level=log_level,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=math.ceil(grace_s + CLOSE_S),
    )
    server = _Server(config, app.state.in_flight, on_ready=on_ready, should_stop=should_stop, grace_s=grace_s)
    try:
        server.run(sockets=[sock])
    finally:
        sock.close()
    return server.signal


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        in_flight: InFlight,
        *,
        on_ready: Callable[[int], None] | None,
        should_stop: Callable[[], bool] | None,
        grace_s: float,
    ):
        super().__init__(config)
        self.signal: signal.Signals | None = None
        self._in_flight = in_flight
        self._on_ready = on_ready
        self._should_stop = should_stop
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready:
            assert sockets
            self._on_ready(sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        stop = await super().on_tick(counter)
        return stop or (self._should_stop is not None and self._should_stop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._in_flight.drain()
        telling = asyncio.get_running_loop().call_later(self._grace_s, self._in_flight.end_all, shutting_down())
        try:
            await super().shutdown(sockets)
        finally:
            telling.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but signals are not raised again afterwards: the caller has an engine to stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        taken = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._on_signal) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._in_flight.end_all, shutting_down())
        self.should_exit = True
        self.signal = self.signal or signal.Signals(number)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise ConfigError(f"Cannot serve on port {port}: choose one from 1 to 65535 (0 takes a free one).")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" means IPv4 too
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(f"Cannot serve on {host}:{port}: {_advice(error)}") from error


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use. Stop the other server, or choose another port (0 takes a free one)."
    if error.errno in (errno.EACCES, errno.EPERM):
        return "that port needs more rights. Choose one above 1023."
    return f"{error}. Choose an address of this machine (127.0.0.1: only for itself; 0.0.0.0: for all)."
