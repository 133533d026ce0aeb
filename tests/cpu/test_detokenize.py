"""Incremental text against `tokenizer.decode` for every kind of tokenizer; stop strings against an oracle."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.errors import ConfigError, RequestError
from anchortp.server.detokenize import IncrementalDetokenizer, StopStrings
from anchortp.server.tokenizer import load_tokenizer
from tests.cpu.fake_engine import EOS, byte_fallback_bpe, byte_level_bpe, metaspace_unigram, save_tokenizer

KINDS = {"byte_level": byte_level_bpe, "byte_fallback": byte_fallback_bpe, "metaspace": metaspace_unigram}
TEXTS = [
    "Hello world",
    " leading space",
    "two  spaces, \n\n lines\t",
    "emoji 🙂👍🏽👨‍👩‍👧 end",
    "你好，世界！ naïve café Zoë €",
    "🙂",
    "a🙂b你c",
    "<0x41> is not a byte",
]
texts = st.text(
    alphabet=st.one_of(st.sampled_from("ab the.,\n é€你好界🙂👍🏽\u200d\ufffd"), st.characters(codec="utf-8")),
    max_size=30,
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(save_tokenizer(KINDS[request.param](), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    return load_tokenizer(save_tokenizer(byte_fallback_bpe(), tmp_path_factory.mktemp("byte_fallback")))


def pieces(tokenizer, token_ids, *, continues=False, step=1):
    detokenizer = IncrementalDetokenizer(tokenizer, continues=continues)
    deltas = [detokenizer.push(token_ids[i : i + step]) for i in range(0, len(token_ids), step)]
    return [*deltas, detokenizer.finish()]


def num_tokens(tokenizer):
    return tokenizer._inner.get_vocab_size(with_added_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_back_whole_characters_at_a_time(tokenizer, text):
    token_ids = tokenizer.encode(text)
    deltas = pieces(tokenizer, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids)
    assert not any("\ufffd" in delta for delta in deltas)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_deltas_add_up_to_decode_for_any_tokens(tokenizer, data):
    limit = num_tokens(tokenizer) + 5  # ids beyond the tokenizer's: a padded vocabulary
    token_ids = data.draw(st.lists(st.integers(0, limit - 1), max_size=40))
    whole = tokenizer.decode([token_id for token_id in token_ids if token_id < num_tokens(tokenizer)])
    text = "".join(pieces(tokenizer, token_ids, step=data.draw(st.integers(1, 4))))
    if tokenizer._decoder == "byte_level" or "\ufffd" not in whole:
        assert text == whole
    else:
        assert skeleton(tokenizer, token_ids) == text


def skeleton(tokenizer, token_ids):
    """Slow reference for runs of bytes that `decode` gives up as a whole: what is valid in them is kept."""
    names = [tokenizer.token_name(i) for i in token_ids if not tokenizer.is_silent(i)]
    raw = b"".join(
        bytes((int(name[3:5], 16),)) if re.fullmatch("<0x..>", name) else name.replace("▁", " ").encode()
        for name in names
    )
    text = raw.decode(errors="replace")
    return text.removeprefix(" ")


@settings(deadline=None, max_examples=100)
@given(text=texts)
def test_text_with_any_characters(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@settings(deadline=None, max_examples=100)
@given(prompt=texts, answer=texts)
def test_a_continuation_adds_up_with_its_prompt(tokenizer, prompt, answer):
    prompt_ids, answer_ids = tokenizer.encode("a" + prompt), tokenizer.encode(answer)
    text = "".join(pieces(tokenizer, answer_ids, continues=True))
    assert tokenizer.decode(prompt_ids) + text == tokenizer.decode((*prompt_ids, *answer_ids))


def test_a_character_over_several_tokens_comes_with_its_last_byte(byte_fallback):
    token_ids = [byte_fallback._inner.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert pieces(byte_fallback, token_ids) == ["", "", "", "🙂", ""]
    assert pieces(byte_fallback, token_ids[:3]) == ["", "", "", "\ufffd"]


def test_valid_characters_survive_invalid_bytes_after_them(byte_fallback):
    token_ids = [byte_fallback._inner.token_to_id(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xff"]
    assert "".join(pieces(byte_fallback, token_ids)) == "é\ufffd"


def test_leading_space_is_dropped_from_an_answer_and_kept_in_a_continuation(byte_fallback):
    token_ids = byte_fallback.encode("hello world")
    assert "".join(pieces(byte_fallback, token_ids)) == "hello world"
    assert "".join(pieces(byte_fallback, token_ids, continues=True)) == " hello world"


@pytest.mark.parametrize("byte", [0x20, 0x41, 0x0A])
def test_a_byte_token_comes_first(byte_fallback, byte):
    """A space is dropped there even if it is spelled as a byte."""
    token_ids = [byte_fallback._inner.token_to_id(f"<0x{byte:02X}>"), *byte_fallback.encode("the")]
    assert "".join(pieces(byte_fallback, token_ids)) == byte_fallback.decode(token_ids)


def test_special_tokens_have_no_text_but_a_name(tokenizer):
    eos = tokenizer._inner.token_to_id(EOS)
    assert tokenizer.is_silent(eos)
    assert tokenizer.token_bytes(eos) == b""
    assert tokenizer.token_name(eos) == EOS
    assert tokenizer.is_silent(num_tokens(tokenizer)) and tokenizer.token_name(num_tokens(tokenizer)) == ""


def test_added_text_tokens_keep_their_text(byte_level):
    token_ids = byte_level.encode("a <think é> b")
    assert len(token_ids) < 8, "the added token is one token"
    assert "".join(pieces(byte_level, token_ids)) == "a <think é> b" == byte_level.decode(token_ids)


def test_each_token_is_looked_at_once(byte_level, monkeypatch):
    """Linear: a long answer asks for each token's bytes once and never decodes what it has already."""
    token_ids = byte_level.encode("the quick brown fox 🙂 " * 400)
    asked = []
    real = byte_level.token_bytes
    monkeypatch.setattr(byte_level, "token_bytes", lambda i, *, first=False: asked.append(i) or real(i, first=first))
    monkeypatch.setattr(byte_level, "decode", lambda token_ids: pytest.fail("decoded again"))
    pieces(byte_level, token_ids)
    assert asked == list(token_ids)


# ---------------------------------------------------------------- loading


def test_chat_template_is_the_models_own(byte_level):
    token_ids = byte_level.encode_chat([{"role": "user", "content": "hello"}])
    names = byte_level._inner.decode(list(token_ids), skip_special_tokens=False)
    assert names == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_refuses_is_the_requests_fault(byte_level):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(RequestError, match="system must come first"):
        byte_level.encode_chat(messages)


def test_a_model_without_a_template_says_what_to_use(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="/v1/completions"):
        tokenizer.encode_chat([{"role": "user", "content": "a"}])


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_whose_tokens_do_not_add_up_is_refused(tmp_path):
    from tokenizers import decoders

    broken = byte_fallback_bpe()
    broken.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip("b", 0, 1)])
    with pytest.raises(ConfigError, match="not the sum of its tokens"):
        load_tokenizer(save_tokenizer(broken, tmp_path))


# ---------------------------------------------------------------- stop strings


def stop_reference(text, stops):
    """The shortest prefix that ends with a stop string, without the longest of those; None without one."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


def run_stops(stops, parts):
    stopper = StopStrings(tuple(stops))
    sent = []
    for part in parts:
        text, stopped = stopper.push(part)
        sent.append(text)
        if stopped:
            return sent, True
    return [*sent, stopper.finish()], False


@settings(deadline=None, max_examples=400)
@given(
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    parts=st.lists(st.text("ab\n", max_size=6), max_size=10),
)
def test_stop_strings_do_not_depend_on_the_pieces(stops, parts):
    text = "".join(parts)
    sent, stopped = run_stops(stops, parts)
    expected = stop_reference(text, stops)
    assert stopped == (expected is not None)
    assert "".join(sent) == (text if expected is None else expected)


@settings(deadline=None, max_examples=200)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    parts=st.lists(st.text("abc", min_size=1, max_size=3), max_size=8),
)
def test_no_more_is_held_back_than_could_become_a_stop_string(stops, parts):
    stopper = StopStrings(tuple(stops))
    text = sent = ""
    for part in parts:
        text += part
        delta, stopped = stopper.push(part)
        sent += delta
        if stopped:
            return
        held = text[len(sent) :]
        longest = max(
            (n for n in range(len(text) + 1) for stop in stops if len(stop) > n and text.endswith(stop[:n])),
            default=0,
        )
        assert len(held) == longest


def test_stop_string_over_tokens_is_never_seen():
    assert run_stops(["STOP"], ["go S", "TO", "P on"]) == (["go ", "", ""], True)
    assert run_stops(["STOP"], ["go S", "TO", "WER"]) == (["go ", "", "STOWER", ""], False)
    assert run_stops([], ["a", "b"]) == (["a", "b", ""], False)
