"""The chat template of a model folder: Jinja in a sandbox, with what templates expect to find there.

The environment is that of transformers (`utils/chat_template_utils.py`), whose import would take longer than all
else the server does before it serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anchortp.errors import RequestError

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """`special_tokens`: what the template may call them -> the tokens, as `bos_token`: "<s>"."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]):
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to where the assistant speaks. Raises RequestError: the template refuses it."""
        try:
            return self._template.render(
                **self._special_tokens,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}. Change their roles or order."
            ) from error


def find_source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template's text: a file of its own, or in tokenizer_config.json, there alone or among named ones."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; it matters in training only."""

    tags = {"generation"}  # noqa: RUF012  # jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
