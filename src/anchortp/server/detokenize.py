"""Token ids to text as they arrive, in linear time; stop strings across tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from anchortp.server.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of a growing list of tokens.

    A character is given out when its last byte has arrived, never in parts. The deltas add up to
    `tokenizer.decode` of all tokens. One exception, on purpose: where byte-fallback tokens spell invalid
    UTF-8, `decode` turns the whole run of them into U+FFFD, valid characters included; here the valid ones
    are kept, as they may have been sent already.

    `continues`: the tokens go on from a prompt, so a leading space is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not continues

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes, token_ids)))

    def finish(self) -> str:
        """What is left of a character that was never completed: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        if self._tokenizer.is_silent(token_id):
            return b""
        first, self._first = self._first, False
        return self._tokenizer.token_bytes(token_id, first=first)


class StopStrings:
    """Lets text through up to the first stop string.

    The first stop string to be complete wins, the longest if several are complete at once; so the result
    does not depend on how the text was cut into pieces. Text that may still turn out to be the start of one
    is held back: at most the length of the longest, less one.
    """

    def __init__(self, stops: tuple[str, ...]):
        assert all(stops), "an empty stop string would stop everything"
        self._stops = stops
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be sent now, whether a stop string was met). After a match nothing may be pushed."""
        text = self._held + text
        start = self._match(text)
        if start is not None:
            self._held = ""
            return text[:start], True
        safe = self._safe_chars(text)
        self._held = text[safe:]
        return text[:safe], False

    def finish(self) -> str:
        """The text held back: it has not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str) -> int | None:
        # Held text contains no whole stop string, so a first occurrence here is the first of all.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _safe_chars(self, text: str) -> int:
        """Where the longest suffix begins that is the start of a stop string."""
        safe = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - self._max_held))
            while 0 <= start < safe:
                if stop.startswith(text[start:]):
                    safe = start
                    break
                start = text.find(stop[0], start + 1)
        return safe
