"""One answer in the making: engine outputs in, text to send out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from anchortp.engine.api import SampledToken, TokenOutput
from anchortp.server.detokenize import IncrementalDetokenizer, StopStrings
from anchortp.server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedToken:
    """A token and where its text begins, in characters from the start of the answer."""

    token: SampledToken
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a choice has to tell since the last one. After a `finish_reason` nothing follows."""

    index: int
    text: str
    tokens: tuple[PlacedToken, ...]  # those whose text has begun to be sent
    finish_reason: Literal["stop", "length"] | None = None


class Choice:
    """The text of one request, its stop strings and its counts.

    `index`: its place in the HTTP answer; `num_tokens`: tokens received up to the end, with or without text.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, *, stops: tuple[str, ...], continues: bool):
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues=continues)
        self._stops = StopStrings(stops)
        self._num_decoded = 0  # characters, sent or held back
        self._num_sent = 0
        self._unsent: deque[PlacedToken] = deque()

    def advance(self, outputs: Sequence[TokenOutput]) -> Delta:
        """Takes outputs that are no errors, in order, as one delta.

        After a stop string the engine may still have more to say, which must not be passed in.
        """
        assert outputs and not self.finished
        self.num_cached_tokens = max(self.num_cached_tokens, *(output.num_cached_tokens for output in outputs))
        texts = []
        for token, silent in _tokens(outputs):
            text, stopped = self._push(token, silent=silent)
            texts.append(text)
            if stopped:
                return self._delta("".join(texts), "stop")
        reason = outputs[-1].finish_reason
        if reason is None:
            return self._delta("".join(texts), None)
        assert reason in ("stop", "length"), reason
        text, stopped = self._flush()
        return self._delta("".join((*texts, text)), "stop" if stopped else reason, cut=stopped)

    def _push(self, token: SampledToken, *, silent: bool) -> tuple[str, bool]:
        """`silent`: the token that made the engine stop (EOS, a stop token) counts, but has no text."""
        self.num_tokens += 1
        if silent:
            return "", False
        self._unsent.append(PlacedToken(token=token, offset=self._num_decoded))
        return self._pass_on(self._detokenizer.push((token.token_id,)))

    def _flush(self) -> tuple[str, bool]:
        text, stopped = self._pass_on(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._stops.finish(), False)

    def _pass_on(self, text: str) -> tuple[str, bool]:
        self._num_decoded += len(text)
        return self._stops.push(text)

    def _delta(self, text: str, reason: Literal["stop", "length"] | None, *, cut: bool = True) -> Delta:
        """`cut`: text is missing at the end, held back or behind a stop string, and its tokens with it."""
        self.finished = reason is not None
        self._num_sent += len(text)
        tokens = []
        while self._unsent and (not cut or self._unsent[0].offset < self._num_sent):
            tokens.append(self._unsent.popleft())
        return Delta(index=self.index, text=text, tokens=tuple(tokens), finish_reason=reason)


def _tokens(outputs: Sequence[TokenOutput]) -> Iterator[tuple[SampledToken, bool]]:
    """Each token, and whether it made the engine stop: it is the last of an output that says "stop"."""
    for output in outputs:
        assert output.finish_reason is None or output is outputs[-1], "output after a finish reason"
        for i, token in enumerate(output.tokens):
            yield token, output.finish_reason == "stop" and i == len(output.tokens) - 1
