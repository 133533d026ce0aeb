"""Request bodies as pydantic models: what is not served is refused, nothing is ignored.

Every optional field may be null, which means "not given", as in OpenAI's API. Types are strict: no string is
taken for a number, no bool for an int.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from anchortp.engine.api import DeviceChange, SamplingParams
from anchortp.server.api_errors import from_validation

MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024  # bounds what a held-back stop string can cost per token
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
INT64 = 2**63

Prompt = str | tuple[int, ...]


def _refuse(error_type: str, message: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError(error_type, message, context or None)  # type: ignore[arg-type]


def _only(*allowed: Any) -> AfterValidator:
    """Accepts a field of OpenAI's API only at the values that ask for nothing we do not do."""
    served = ", ".join(str(value) for value in allowed)

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise _refuse("unsupported_value", "only {served} is served; leave the parameter out", served=served)
        return value

    return AfterValidator(check)


def _stops(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise _refuse("stop_type", "expected a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise _refuse("too_many", "at most {most} stop strings are allowed", most=MAX_STOPS)
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _refuse("bad_length", "each stop string must have 1 to {most} characters", most=MAX_STOP_CHARS)
    return tuple(dict.fromkeys(stops))


def _is_token_ids(value: Any) -> bool:
    # `type is int`, since bool is an int too.
    return isinstance(value, list) and bool(value) and all(type(token_id) is int for token_id in value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if _is_token_ids(value):
        return (tuple(value),)
    if not isinstance(value, list):
        raise _refuse("prompt_type", "expected a string, a list of strings, token ids, or a list of token ids")
    if not 0 < len(value) <= MAX_PROMPTS:
        raise _refuse("bad_length", "give 1 to {most} prompts", most=MAX_PROMPTS)
    if all(isinstance(prompt, str) for prompt in value):
        return tuple(value)
    if all(_is_token_ids(prompt) for prompt in value):
        return tuple(tuple(prompt) for prompt in value)
    raise _refuse("prompt_type", "a list of prompts holds strings only, or non-empty lists of token ids only")


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _refuse("content_type", "expected a string or a non-empty list of text parts")
    return "".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise _refuse("unsupported_value", "parts of type {kind} are not served, only text is", kind=repr(kind))
    if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise _refuse("content_type", 'a part of a message is {"type": "text", "text": "..."}')
    return part["text"]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class ResponseFormat(_Body):
    type: Annotated[str, _only("text")]


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _only(False)] = None


class Message(_Body):
    role: Annotated[str, _only("system", "developer", "user", "assistant")]
    content: Annotated[Any, AfterValidator(_content)]
    name: str | None = None
    # What clients send back when they append our own answer to the conversation.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any] | None, _only([])] = None
    annotations: Annotated[list[Any] | None, _only([])] = None

    def for_template(self) -> dict[str, str]:
        """As chat templates want it: `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        named = {"name": self.name} if self.name is not None else {}
        return {"role": role, "content": self.content, **named}


TokenId = Annotated[int, Field(ge=0, lt=INT64)]


class GenerateBody(_Body):
    """What both endpoints share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-INT64, lt=INT64)] = None
    stop: Annotated[Any, AfterValidator(_stops)] = ()

    # Extensions of ours, under the names other engines use.
    top_k: Annotated[int | None, Field(ge=-1, lt=INT64)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=MAX_STOP_TOKEN_IDS)] = None
    return_token_ids: bool | None = None

    # Part of OpenAI's API, served at these values only.
    n: Annotated[int | None, _only(1)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _only({})] = None

    # About the caller or the caller's bill; they ask nothing of the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Annotated[str | None, _only("auto", "default")] = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerateBody:
        if self.stream_options is not None and not self.stream:
            raise _refuse("conflict", "'stream_options' needs 'stream': true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    @abstractmethod
    def max_tokens_wanted(self) -> int | None: ...

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """As in `SamplingParams.logprobs`."""

    def sampling(self, *, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            logprobs=self.num_logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(GenerateBody):
    prompt: Annotated[Any, AfterValidator(_prompts)]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    best_of: Annotated[int | None, _only(1)] = None
    echo: Annotated[bool | None, _only(False)] = None
    suffix: Annotated[str | None, _only("")] = None

    @property
    def max_tokens_wanted(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class DevicesBody(_Body):
    """Devices that shall join or leave, and relative speeds of those that stay."""

    add: list[str] = []
    remove: list[str] = []
    speeds: dict[str, Annotated[float, Field(gt=0)]] | None = None
    memory_bytes: Annotated[int | None, Field(gt=0)] = None

    def change(self) -> DeviceChange:
        return DeviceChange(
            add=tuple(self.add),
            remove=tuple(self.remove),
            speeds=None if self.speeds is None else tuple(self.speeds.items()),
            memory_bytes=self.memory_bytes,
        )


class ChatBody(GenerateBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None
    tools: Annotated[list[Any] | None, _only([])] = None
    functions: Annotated[list[Any] | None, _only([])] = None
    tool_choice: Annotated[str | None, _only("none", "auto")] = None
    function_call: Annotated[str | None, _only("none", "auto")] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _refuse("conflict", "'top_logprobs' needs 'logprobs': true")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise _refuse("conflict", "'max_tokens' and 'max_completion_tokens' differ; give one of them")
        return self

    @property
    def max_tokens_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


BodyT = TypeVar("BodyT", bound=GenerateBody)


def parse(body_type: type[BodyT], raw: bytes) -> BodyT:
    """Raises ApiError (400) for the first thing that is wrong."""
    try:
        return body_type.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error) from None
