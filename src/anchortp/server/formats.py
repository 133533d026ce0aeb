"""OpenAI's answers: whole, as server-sent events, and their log-probabilities.

A format is made once per HTTP request. Everything is plain JSON values until `to_json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from anchortp.engine.api import SampledToken
from anchortp.server.choice import Delta, PlacedToken
from anchortp.server.generation import Usage
from anchortp.server.tokenizer import Tokenizer

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no -inf


def to_json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def event(value: Json) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


class Format(Protocol):
    """How one endpoint tells deltas."""

    def opening(self, num_choices: int) -> list[Json]:
        """Chunks before the first token."""
        ...

    def chunks(self, delta: Delta) -> list[Json]:
        """Chunks of a stream for one delta; none if it has nothing to tell."""
        ...

    def closing(self, usage: Usage) -> list[Json]:
        """Chunks after the last token: the usage, if it was asked for."""
        ...

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        """The answer of a request that does not stream."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """The fields around `choices`.

    `include_usage`: every chunk of a stream has a `usage`, null but in one more chunk at the end.
    """

    request_id: str
    model: str
    created_s: int  # since 1970
    include_usage: bool

    def chunk(self, kind: str, choices: list[Json]) -> Json:
        body = {**self._common(kind), "choices": choices}
        return {**body, "usage": None} if self.include_usage else body

    def closing(self, kind: str, usage: Usage) -> list[Json]:
        return [{**self.chunk(kind, []), "usage": usage_json(usage)}] if self.include_usage else []

    def whole(self, kind: str, choices: list[Json], usage: Usage) -> Json:
        return {**self._common(kind), "choices": choices, "usage": usage_json(usage)}

    def _common(self, kind: str) -> Json:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """/v1/chat/completions. `num_logprobs`: as in `SamplingParams.logprobs`; `token_ids`: choices tell them too."""

    tokenizer: Tokenizer
    envelope: Envelope
    num_logprobs: int | None
    token_ids: bool = False

    def opening(self, num_choices: int) -> list[Json]:
        said = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, said) for index in range(num_choices)]

    def chunks(self, delta: Delta) -> list[Json]:
        chunks = []
        if delta.text or delta.tokens:
            chunks.append(self._chunk(delta.index, {"content": delta.text}, delta.tokens))
        if delta.finish_reason:
            chunks.append(self._chunk(delta.index, {}, finish_reason=delta.finish_reason))
        return chunks

    def closing(self, usage: Usage) -> list[Json]:
        return self.envelope.closing("chat.completion.chunk", usage)

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        choices = []
        for index, text, tokens, finish_reason in _gather(deltas):
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self._logprobs(tokens),
                    "finish_reason": finish_reason,
                    **_ids(tokens if self.token_ids else None),
                }
            )
        return self.envelope.whole("chat.completion", choices, usage)

    def _chunk(
        self, index: int, delta: Json, tokens: Sequence[PlacedToken] | None = None, finish_reason: str | None = None
    ) -> Json:
        logprobs = None if tokens is None else self._logprobs(tokens)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self.envelope.chunk("chat.completion.chunk", [choice | _ids(tokens if self.token_ids else None)])

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> Json | None:
        if self.num_logprobs is None:
            return None
        return {"content": [self._token(placed.token) for placed in tokens], "refusal": None}

    def _token(self, token: SampledToken) -> Json:
        top = [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs[: self.num_logprobs]]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        spelled = spelled_bytes(self.tokenizer, token_id)
        return {"token": token_label(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionFormat:
    """/v1/completions. `num_logprobs`: as in `SamplingParams.logprobs`; `token_ids`: choices tell them too."""

    tokenizer: Tokenizer
    envelope: Envelope
    num_logprobs: int | None
    token_ids: bool = False

    def opening(self, num_choices: int) -> list[Json]:
        return []

    def chunks(self, delta: Delta) -> list[Json]:
        chunks = []
        if delta.text or delta.tokens:
            chunks.append(self._choice(delta.index, delta.text, delta.tokens, None))
        if delta.finish_reason:
            chunks.append(self._choice(delta.index, "", None, delta.finish_reason))
        return [self.envelope.chunk("text_completion", [choice]) for choice in chunks]

    def closing(self, usage: Usage) -> list[Json]:
        return self.envelope.closing("text_completion", usage)

    def whole(self, deltas: Iterable[Delta], usage: Usage) -> Json:
        choices = [
            self._choice(index, text, tokens, finish_reason) for index, text, tokens, finish_reason in _gather(deltas)
        ]
        return self.envelope.whole("text_completion", choices, usage)

    def _choice(self, index: int, text: str, tokens: Sequence[PlacedToken] | None, finish_reason: str | None) -> Json:
        logprobs = None if tokens is None else self._logprobs(tokens)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return choice | _ids(tokens if self.token_ids else None)

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> Json | None:
        if self.num_logprobs is None:
            return None
        return {
            "tokens": [self._label(placed.token.token_id) for placed in tokens],
            "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
            "top_logprobs": [self._top(placed.token) for placed in tokens],
            "text_offset": [placed.offset for placed in tokens],
        }

    def _top(self, token: SampledToken) -> dict[str, float]:
        """The likeliest tokens and, in any case, the chosen one; of two with one label the likelier."""
        top: dict[str, float] = {}
        likeliest = token.top_logprobs[: self.num_logprobs]
        for token_id, logprob in (*likeliest, (token.token_id, token.logprob)):
            top.setdefault(self._label(token_id), _finite(logprob))
        return top

    def _label(self, token_id: int) -> str:
        return token_label(spelled_bytes(self.tokenizer, token_id))


def _ids(tokens: Sequence[PlacedToken] | None) -> Json:
    return {} if tokens is None else {"token_ids": [placed.token.token_id for placed in tokens]}


def spelled_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The token's text, or its name if it has none."""
    return tokenizer.token_bytes(token_id) or tokenizer.token_name(token_id).encode()


def token_label(spelled: bytes) -> str:
    """Text where the bytes are text, else the bytes, spelled as OpenAI does."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float | None) -> float:
    assert logprob is not None and not math.isnan(logprob), "the engine was asked for log-probabilities"
    return max(logprob, LEAST_LOGPROB)


def _gather(deltas: Iterable[Delta]) -> list[tuple[int, str, list[PlacedToken], str | None]]:
    """(index, text, tokens, finish reason) per choice, in order."""
    by_choice: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.index, []).append(delta)
    return [
        (
            index,
            "".join(delta.text for delta in parts),
            [placed for delta in parts for placed in delta.tokens],
            parts[-1].finish_reason,
        )
        for index, parts in sorted(by_choice.items())
    ]
