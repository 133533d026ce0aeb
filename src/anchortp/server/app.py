"""The routes. Handlers read top to bottom: check, submit, answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from anchortp.engine.api import Engine
from anchortp.errors import AnchorTPError, ConfigError
from anchortp.server.api_errors import ApiError, from_engine, invalid
from anchortp.server.choice import Delta
from anchortp.server.formats import DONE, ChatFormat, CompletionFormat, Envelope, Format, event, to_json
from anchortp.server.generation import Generation, GenerationRequest, InFlight
from anchortp.server.metrics import ServerMetrics
from anchortp.server.schema import ChatBody, CompletionBody, DevicesBody, GenerateBody, Prompt, parse
from anchortp.server.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# In these states requests are taken; during a recovery they wait and are then answered.
TAKES_REQUESTS = frozenset({"serving", "recovering"})

MAX_BODY_BYTES = 16 << 20
CLIENT_GONE = 499  # never sent: nobody is left to read it

T = TypeVar("T")


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    api_key: str | None = None,
    idle_timeout_s: float = 600.0,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The OpenAI API over `engine`.

    `api_key`: asked of everyone but /health and /metrics. `idle_timeout_s`: how long the engine may make no
    token for a request, recoveries included, before it is given up (504). `app.state.in_flight` is for
    `serve_http`.
    """
    app = FastAPI(title="AnchorTP", docs_url=None, redoc_url=None, openapi_url=None)
    service = _Service(
        engine=engine,
        tokenizer=tokenizer,
        model_name=model_name,
        created_s=int(time.time()),
        metrics=ServerMetrics(engine),
        in_flight=InFlight(),
        idle_timeout_s=idle_timeout_s,
        max_body_bytes=max_body_bytes,
    )
    app.state.in_flight = service.in_flight
    app.include_router(_open_routes(service))
    app.include_router(_guarded_routes(service), dependencies=[Depends(_key_check(api_key))])
    _answer_errors(app, service.metrics)
    return app


@dataclass(frozen=True, slots=True, kw_only=True)
class _Service:
    engine: Engine
    tokenizer: Tokenizer
    model_name: str
    created_s: int
    metrics: ServerMetrics
    in_flight: InFlight
    idle_timeout_s: float
    max_body_bytes: int

    def model_card(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": self.created_s, "owned_by": "anchortp"}

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"The model '{name}' does not exist. This server has '{self.model_name}'."
            raise ApiError(404, message, code="model_not_found", param="model")

    def generation(self, request: GenerationRequest) -> Generation:
        return Generation(
            request,
            engine=self.engine,
            tokenizer=self.tokenizer,
            in_flight=self.in_flight,
            metrics=self.metrics,
            idle_timeout_s=self.idle_timeout_s,
        )


# ---------------------------------------------------------------- routes


def _open_routes(service: _Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        status = service.engine.status()
        state = "stopping" if service.in_flight.draining else status["state"]
        ready = state in TAKES_REQUESTS
        return _json({"state": state, "epoch": status["epoch"]}, status=200 if ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _guarded_routes(service: _Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [service.model_card()]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(service.model_card())

    @router.get("/status")
    async def status() -> Response:
        return _json(service.engine.status())

    @router.get("/faults")
    async def faults() -> Response:
        """Recent faults with their timeline and reasons, as the engine's status has them."""
        return _json({"object": "list", "data": service.engine.status().get("faults", [])})

    @router.get("/devices")
    async def devices() -> Response:
        """What each device of the group holds, and the changes of the group so far."""
        status = service.engine.status()
        return _json({"object": "list", "data": status.get("devices", {}), "changes": status.get("changes", [])})

    @router.post("/devices")
    async def change_devices(request: Request) -> Response:
        """Begins a change of the group; `GET /devices` tells how it goes."""
        body = parse(DevicesBody, await _read_body(request, service.max_body_bytes))
        try:
            change_id = service.engine.change_devices(body.change())
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        return _json({"object": "device_change", "change_id": change_id}, status=202)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse(CompletionBody, await _read_body(request, service.max_body_bytes))
        service.check_model(body.model)
        prompts = await asyncio.to_thread(_encode_prompts, service, body.prompt)
        return await _answer(service, request, body, prompts, _COMPLETION)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatBody, await _read_body(request, service.max_body_bytes))
        service.check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        prompt = await asyncio.to_thread(service.tokenizer.encode_chat, messages)
        return await _answer(service, request, body, (prompt,), _CHAT)

    return router


def _key_check(api_key: str | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Headers come as Latin-1; as bytes, a key may have any characters.
        if scheme.lower() != "bearer" or not compare_digest(given.strip().encode("latin-1"), api_key.encode()):
            raise ApiError(
                401,
                "Wrong or missing API key. Send the header 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _answer_errors(app: FastAPI, metrics: ServerMetrics) -> None:
    def answer(error: ApiError) -> Response:
        metrics.error_answered(error.status)
        if error.status == 500:
            log.error("answered 500: %s", error, exc_info=error.__cause__)
        return _json(error.body(), status=error.status, headers=error.headers)

    @app.exception_handler(AnchorTPError)
    async def ours(request: Request, error: AnchorTPError) -> Response:
        return answer(from_engine(error))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return answer(ApiError(error.status_code, message, headers=dict(error.headers or {})))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # Starlette raises it again afterwards, so that it is logged with its traceback.
        return answer(_internal_error())


def _internal_error() -> ApiError:
    return ApiError(500, "The server has a bug; its log has the details.", code="internal_error")


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status_code=status, headers=headers, media_type="application/json")


# ---------------------------------------------------------------- requests


async def _read_body(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise ApiError(413, f"The body is larger than {max_bytes} bytes. Send less.", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _encode_prompts(service: _Service, prompts: tuple[Prompt, ...]) -> tuple[tuple[int, ...], ...]:
    encode = service.tokenizer.encode
    return tuple(encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)


def _check_prompt(prompt: tuple[int, ...], vocab_size: int) -> None:
    if not prompt:
        raise invalid("The prompt is empty. Give at least one token.", param="prompt")
    _check_token_ids(prompt, vocab_size, "prompt")


def _check_token_ids(token_ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise invalid(f"Token id {token_id} is not in [0, {vocab_size}).", param=param)


def _max_tokens(num_prompt_tokens: int, wanted: int | None, max_model_len: int) -> int:
    """How many tokens the answer may have. Raises ApiError: prompt and answer do not fit the context."""
    room = max_model_len - num_prompt_tokens
    if room < 1 or (wanted or 0) > room:
        more = "" if wanted is None else f" and 'max_tokens' asks for {wanted} more"
        raise invalid(
            f"This model's context is {max_model_len} tokens, prompt and answer together. The prompt has "
            f"{num_prompt_tokens}{more}. Shorten the prompt or ask for fewer tokens.",
            param="max_tokens" if room >= 1 else "prompt",
            code="context_length_exceeded",
        )
    return wanted or room


@dataclass(frozen=True, slots=True, kw_only=True)
class _Endpoint:
    id_prefix: str
    format_type: type[ChatFormat] | type[CompletionFormat]
    continues: bool  # whether the text goes on from the prompt, rather than starting anew


_COMPLETION = _Endpoint(id_prefix="cmpl", format_type=CompletionFormat, continues=True)
_CHAT = _Endpoint(id_prefix="chatcmpl", format_type=ChatFormat, continues=False)


async def _answer(
    service: _Service,
    request: Request,
    body: GenerateBody,
    prompts: tuple[tuple[int, ...], ...],
    endpoint: _Endpoint,
) -> Response:
    engine = service.engine
    for prompt in prompts:
        _check_prompt(prompt, engine.vocab_size)
    _check_token_ids(tuple(body.stop_token_ids or ()), engine.vocab_size, "stop_token_ids")
    limits = [_max_tokens(len(prompt), body.max_tokens_wanted, engine.max_model_len) for prompt in prompts]
    request_id = f"{endpoint.id_prefix}-{uuid.uuid4().hex}"
    generation = service.generation(
        GenerationRequest(
            request_id=request_id,
            prompts=prompts,
            params=tuple(body.sampling(max_tokens=limit) for limit in limits),
            stops=body.stop,
            continues=endpoint.continues,
        )
    )
    envelope = Envelope(
        request_id=request_id,
        model=service.model_name,
        created_s=int(time.time()),
        include_usage=body.include_usage,
    )
    told = endpoint.format_type(
        tokenizer=service.tokenizer,
        envelope=envelope,
        num_logprobs=body.num_logprobs,
        token_ids=bool(body.return_token_ids),
    )
    return await _run(request, generation, told, num_choices=len(prompts), stream=bool(body.stream))


async def _run(request: Request, generation: Generation, told: Format, *, num_choices: int, stream: bool) -> Response:
    """Waits for the first delta even if streaming: what fails before it gets an HTTP status of its own."""
    keep = False
    try:
        generation.start()
        wanted = generation.next() if stream else _all_deltas(generation)
        deltas = await _unless_gone(request.receive, wanted)
        if not stream:
            return _json(told.whole(deltas, generation.usage()))
        keep = True
        return _EventStream(generation, _events(generation, told, deltas, num_choices))
    except _ClientGone:
        return Response(status_code=CLIENT_GONE)
    finally:
        if not keep:
            generation.close()


async def _all_deltas(generation: Generation) -> tuple[Delta, ...]:
    deltas: list[Delta] = []
    while not generation.done:
        deltas += await generation.next()
    return tuple(deltas)


async def _events(
    generation: Generation, told: Format, first: tuple[Delta, ...], num_choices: int
) -> AsyncGenerator[bytes, None]:
    """The stream, an error in it as its last event. [DONE] is for streams that ended well."""
    try:
        yield b"".join(map(event, told.opening(num_choices)))
        deltas = first
        while True:
            yield b"".join(event(chunk) for delta in deltas for chunk in told.chunks(delta))
            if generation.done:
                break
            deltas = await generation.next()
        yield b"".join(map(event, told.closing(generation.usage()))) + DONE
    except ApiError as error:
        yield event(error.body())
    except Exception:
        log.exception("a stream ended by a bug")
        yield event(_internal_error().body())


# ---------------------------------------------------------------- clients that go away


class _ClientGone(Exception):
    """The connection is closed: no one waits for this answer any more."""


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises _ClientGone, with `work` cancelled, as soon as the client hangs up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise _ClientGone
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events. Owns the generation: however the stream ends, it is closed at once.

    Starlette's own StreamingResponse notices under some servers only when it next sends that a client has
    gone; a request that waits, in the queue or for a recovery, would keep its blocks until then.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncGenerator[bytes, None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(_ClientGone):
                await _unless_gone(receive, self._send_all(send))
        finally:
            self._generation.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for payload in events:
                if payload:
                    await send({"type": "http.response.body", "body": payload, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
