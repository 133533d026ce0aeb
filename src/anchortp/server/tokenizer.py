"""Text to token ids, and token ids to the bytes they stand for.

Bytes are the unit of the way back: a token may be part of a character, but always is a whole number of
bytes, so an answer is the concatenation of its tokens' bytes and can be decoded as it grows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers

from anchortp.errors import ConfigError, RequestError
from anchortp.server import chat_template
from anchortp.server.chat_template import ChatTemplate

Decoder = Literal["byte_level", "pieces"]

# What tokenizer_config.json calls special tokens, and chat templates too.
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAMPLE = "Hello, world! Zoë's naïve café costs 5 €.\n\tÜber 你好世界 🙂👍🏽 a  b"


class Tokenizer(Protocol):
    """What the server asks of a tokenizer. Every method may be called from any thread."""

    has_chat_template: bool

    def encode(self, text: str) -> tuple[int, ...]:
        """With the special tokens that the model expects around a plain text (often a BOS)."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A conversation, up to where the assistant speaks. Raises RequestError: the template refuses."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """All at once, special tokens left out. The oracle; the server itself decodes piece by piece."""
        ...

    def is_silent(self, token_id: int) -> bool:
        """Whether the token never has text: it is special, or an id that pads the vocabulary."""
        ...

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """UTF-8 of the token's text, possibly in the middle of a character; b"" if it is silent.

        `first`: no text comes before it, so that a leading space that stands for "a word begins" is left out.
        """
        ...

    def token_name(self, token_id: int) -> str:
        """How the vocabulary spells it, for tokens without text; "" if the vocabulary does not know it."""
        ...


def load_tokenizer(model_path: str) -> Tokenizer:
    """Reads the tokenizer and chat template of a Hugging Face folder; never from the network.

    Raises ConfigError: no tokenizer there, or one whose text is not the sum of its tokens.
    """
    folder = Path(model_path)
    try:
        inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = _read_config(folder)
    except Exception as error:  # tokenizers raises nothing more precise
        raise ConfigError(
            f"{model_path}: no tokenizer can be loaded ({error}). Give a model folder that has tokenizer.json; "
            f"transformers makes one from tokenizer.model: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from error
    inner.no_truncation()
    inner.no_padding()
    names = {name: _token_text(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    source = chat_template.find_source(folder, config)
    template = chat_template.ChatTemplate(source, names) if source else None
    tokenizer = HuggingFaceTokenizer(inner, special=names.values(), template=template)
    _check_pieces_add_up(tokenizer, model_path)
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and beneath it special_tokens_map.json, which older folders have; {} without them."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= json.loads((folder / name).read_text(encoding="utf-8"))
    return config


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` (what a tokenizer.json holds) as a `Tokenizer`. `special`: names of silent tokens
    beside those that it calls special itself.

    Three ways from token to bytes: byte-level BPE spells each byte as a printable character; byte-fallback
    tokens are called <0xNN>; any other token's text is what it adds after an ordinary token, the anchor.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, special: Iterable[str] = (), template: ChatTemplate | None):
        self._inner = inner
        self._template = template
        named = {inner.token_to_id(name) for name in special} - {None}
        self._special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special} | named
        self._num_tokens = inner.get_vocab_size(with_added_tokens=True)
        self._decoder = _decoder_kind(inner)
        self._anchor = _anchor(inner, self._special, self._num_tokens)
        self._anchor_chars = len(self.decode((self._anchor,)))
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self.has_chat_template = template is not None

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        if self._template is None:
            raise RequestError("This model has no chat template. Use /v1/completions with a prompt of your own.")
        # The template writes the special tokens itself.
        return tuple(self._inner.encode(self._template.render(messages), add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._inner.decode(list(token_ids), skip_special_tokens=True)

    def is_silent(self, token_id: int) -> bool:
        return token_id in self._special or not 0 <= token_id < self._num_tokens

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        if self.is_silent(token_id):
            return b""
        key = (token_id, first)
        found = self._bytes.get(key)
        if found is None:
            found = self._bytes[key] = self._find_bytes(token_id, first)
        return found

    def token_name(self, token_id: int) -> str:
        if not 0 <= token_id < self._num_tokens:
            return ""
        return self._inner.id_to_token(token_id) or ""

    def _find_bytes(self, token_id: int, first: bool) -> bytes:
        name = self.token_name(token_id)
        if self._decoder == "byte_level":
            return _byte_level_bytes(name)
        byte = _BYTE_TOKEN.fullmatch(name)
        # An ASCII byte is a character of its own, and the first one may be a space to be left out.
        if byte and (int(byte[1], 16) >= 0x80 or not first):
            return bytes((int(byte[1], 16),))
        if first:
            return self.decode((token_id,)).encode()
        return self.decode((self._anchor, token_id))[self._anchor_chars :].encode()


def _decoder_kind(inner: tokenizers.Tokenizer) -> Decoder:
    if inner.decoder is None:
        return "pieces"
    state = json.loads(inner.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return "byte_level" if [step["type"] for step in steps] == ["ByteLevel"] else "pieces"


def _anchor(inner: tokenizers.Tokenizer, special: set[int], num_tokens: int) -> int:
    """A token with plain text of its own, after which any other token reads as it does in mid-sentence."""
    for token_id in range(num_tokens):
        if token_id in special or _BYTE_TOKEN.fullmatch(inner.id_to_token(token_id) or ""):
            continue
        text = inner.decode([token_id])
        if text.isascii() and text.isalpha():
            return token_id
    raise ConfigError("The tokenizer has no token that is a plain word. Is it the tokenizer of this model?")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest is moved above U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_bytes(name: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in name)
    except KeyError:
        return name.encode()  # a token that was added as plain text


def _check_pieces_add_up(tokenizer: HuggingFaceTokenizer, model_path: str) -> None:
    from anchortp.server.detokenize import IncrementalDetokenizer

    token_ids = tokenizer.encode(_SAMPLE)
    pieces = IncrementalDetokenizer(tokenizer)
    text = "".join(pieces.push((token_id,)) for token_id in token_ids) + pieces.finish()
    if text != tokenizer.decode(token_ids):
        raise ConfigError(
            f"{model_path}: this tokenizer's text is not the sum of its tokens ({text!r} instead of "
            f"{tokenizer.decode(token_ids)!r}), so answers cannot be streamed. Use a byte-level or "
            f"SentencePiece tokenizer."
        )
