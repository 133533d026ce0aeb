"""The tokenizer and chat templates against transformers, which the server does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.errors import RequestError
from anchortp.server.chat_template import TEMPLATE_FILE
from anchortp.server.tokenizer import load_tokenizer
from tests.cpu.fake_engine import byte_fallback_bpe, byte_level_bpe, metaspace_unigram, save_tokenizer

KINDS = {"byte_level": byte_level_bpe, "byte_fallback": byte_fallback_bpe, "metaspace": metaspace_unigram}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "<b>hi</b> & 'you' 🙂\n"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "whitespace": "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "special tokens": "{{ eos_token }}{{ unk_token }}{{ bos_token }}{% if add_generation_prompt %}>{% endif %}",
    "what is not given": "{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y')[:2] }}",
}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = save_tokenizer(KINDS[request.param](), tmp_path_factory.mktemp(request.param))
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40) | st.sampled_from(["a<|im_start|>b", "<unk> x", "<think é>", "  hello   world "]))
def test_encode_and_decode_are_those_of_transformers(both, text: str) -> None:
    ours, theirs = both
    token_ids = ours.encode(text)
    assert list(token_ids) == theirs.encode(text)
    assert ours.decode(token_ids) == theirs.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_special_tokens_are_those_of_transformers(both) -> None:
    ours, theirs = both
    silent = {i for i in range(len(theirs)) if ours.is_silent(i)}
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special} | set(theirs.all_special_ids)
    assert silent == special and ours.is_silent(len(theirs))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("stored", ["file", "config", "named"])
def test_templates_render_as_in_transformers(name: str, stored: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = TEMPLATES[name]
    folder = save_tokenizer(byte_level_bpe(), tmp_path, chat_template=None)
    if stored == "file":
        (tmp_path / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    else:
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text())
        named = [{"name": "other", "template": "no"}, {"name": "default", "template": template}]
        path.write_text(json.dumps(config | {"chat_template": template if stored == "config" else named}))
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text
    assert list(load_tokenizer(folder).encode_chat(MESSAGES)) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"],
)
def test_what_a_template_may_not_do(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path, chat_template=template))
    with pytest.raises(RequestError, match="refuses these messages"):
        tokenizer.encode_chat(MESSAGES)


def test_truncation_and_padding_of_the_file_are_not_ours(tmp_path: Path) -> None:
    inner = byte_level_bpe()
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    tokenizer = load_tokenizer(save_tokenizer(inner, tmp_path))
    assert 4 < len(tokenizer.encode("the quick brown fox")) < 64


def test_the_server_starts_without_heavy_libraries(tmp_path: Path) -> None:
    folder = save_tokenizer(byte_level_bpe(), tmp_path)
    program = (
        "import sys; from anchortp.server.tokenizer import load_tokenizer; import anchortp.engine.controller\n"
        "import anchortp.server.app, anchortp.server.run, anchortp.cli.serving\n"
        f"load_tokenizer({folder!r}).encode_chat([{{'role': 'user', 'content': 'hi'}}])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
