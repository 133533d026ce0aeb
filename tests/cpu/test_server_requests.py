"""What is not served is refused, with OpenAI's error body: 400, 404, 413; never 422, never ignored."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from anchortp.server.api_errors import ApiError
from anchortp.server.app import create_app
from anchortp.server.schema import MAX_PROMPTS, MAX_STOP_CHARS, ChatBody, CompletionBody, parse
from anchortp.server.tokenizer import load_tokenizer
from tests.cpu.fake_engine import DEADLINE_S, FakeEngine, byte_level_bpe, outputs, save_tokenizer, serving

MODEL = "tiny"
MAX_MODEL_LEN = 40
VOCAB_SIZE = 1000
MAX_BODY_BYTES = 1 << 16
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def client(tokenizer):
    engine = FakeEngine(
        lambda request: outputs(request, [5] * request.params.max_tokens),
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
    )
    app = create_app(engine, tokenizer, model_name=MODEL, max_body_bytes=MAX_BODY_BYTES)
    try:
        with serving(app) as server, httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
            yield client
    finally:
        engine.close()


def refused(response, *, code, param=None, status=400, says=""):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["code"], error["param"]) == (code, param), error
    assert says in error["message"], error
    return True


def ask(client, path, fields):
    """Posts a good body with `fields` on top; a field that is `...` is left out."""
    base = {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    body = {"model": MODEL, "max_tokens": 2, **base, **fields}
    return client.post(path, json={name: value for name, value in body.items() if value is not ...})


BOTH = {
    "temperature": [
        (-0.1, "invalid_value"),
        (2.1, "invalid_value"),
        ("1", "invalid_type"),
        (True, "invalid_type"),
    ],
    "top_p": [(0, "invalid_value"), (1.1, "invalid_value"), ([], "invalid_type")],
    "top_k": [(-2, "invalid_value"), (1.5, "invalid_type"), (2**63, "invalid_value")],
    "min_p": [(-0.1, "invalid_value"), (1.5, "invalid_value")],
    "seed": [
        (2**63, "invalid_value"),
        (-(2**63) - 1, "invalid_value"),
        (1.0, "invalid_type"),
        (True, "invalid_type"),
    ],
    "max_tokens": [
        (0, "invalid_value"),
        (-1, "invalid_value"),
        ("5", "invalid_type"),
        (True, "invalid_type"),
    ],
    "stop": [
        (5, "invalid_type"),
        ([5], "invalid_type"),
        ("", "invalid_value"),
        (["a", ""], "invalid_value"),
        (["a"] * 17, "invalid_value"),
        ("a" * (MAX_STOP_CHARS + 1), "invalid_value"),
        ({"a": 1}, "invalid_type"),
    ],
    "stop_token_ids": [([VOCAB_SIZE], "invalid_value"), ("a", "invalid_type"), ([1] * 65, "invalid_value")],
    "ignore_eos": [("yes", "invalid_type"), (1, "invalid_type")],
    "stream": [("true", "invalid_type"), (1, "invalid_type")],
    "n": [(2, "unsupported_value"), (0, "unsupported_value"), (True, "invalid_type")],
    "presence_penalty": [(0.5, "unsupported_value"), ("0", "invalid_type")],
    "frequency_penalty": [(-1, "unsupported_value")],
    "logit_bias": [({"50256": -100}, "unsupported_value"), ([], "invalid_type")],
    "service_tier": [("priority", "unsupported_value")],
    "user": [(5, "invalid_type")],
    "model": [(..., "missing_required_parameter"), (None, "invalid_type"), (5, "invalid_type")],
    "temprature": [(1, "unknown_parameter"), (None, "unknown_parameter")],
    "stream_options": [("usage", "invalid_type")],
}
CHAT_ONLY = {
    "messages": [
        (..., "missing_required_parameter"),
        ([], "invalid_value"),
        ("hi", "invalid_type"),
        (None, "invalid_type"),
    ],
    "max_completion_tokens": [(0, "invalid_value")],
    "logprobs": [(1, "invalid_type")],
    "top_logprobs": [(21, "invalid_value"), (-1, "invalid_value")],
    "tools": [([{"type": "function", "function": {"name": "f"}}], "unsupported_value")],
    "functions": [([{"name": "f"}], "unsupported_value")],
    "tool_choice": [("required", "unsupported_value"), ({"type": "function"}, "invalid_type")],
    "function_call": [({"name": "f"}, "invalid_type")],
    "modalities": [(["text", "audio"], "unsupported_value")],
    "audio": [({"voice": "x"}, "unknown_parameter")],
    "prompt": [("hi", "unknown_parameter")],
    "echo": [(False, "unknown_parameter")],
    "reasoning_effort": [("high", "unknown_parameter")],
}
COMPLETIONS_ONLY = {
    "prompt": [
        (..., "missing_required_parameter"),
        (None, "invalid_type"),
        (5, "invalid_type"),
        ({"text": "hi"}, "invalid_type"),
        ("", "invalid_value"),
        ([], "invalid_value"),
        ([[]], "invalid_type"),
        (["a", ""], "invalid_value"),
        (["a", [1]], "invalid_type"),
        ([1, "a"], "invalid_type"),
        ([1, True], "invalid_type"),
        ([1.0], "invalid_type"),
        ([VOCAB_SIZE], "invalid_value"),
        ([-1], "invalid_value"),
        ([[1], [VOCAB_SIZE]], "invalid_value"),
        ([2**70], "invalid_value"),
        (["a"] * (MAX_PROMPTS + 1), "invalid_value"),
    ],
    "logprobs": [(21, "invalid_value"), (-1, "invalid_value"), (True, "invalid_type")],
    "echo": [(True, "unsupported_value")],
    "best_of": [(2, "unsupported_value")],
    "suffix": [("end", "unsupported_value")],
    "messages": [([USER], "unknown_parameter")],
    "max_completion_tokens": [(5, "unknown_parameter")],
}


def cases():
    for path, tables in ((COMPLETIONS, (BOTH, COMPLETIONS_ONLY)), (CHAT, (BOTH, CHAT_ONLY))):
        for table in tables:
            for field, values in table.items():
                yield pytest.param(path, field, values, id=f"{path.rsplit('/', 2)[1]}-{field}")


@pytest.mark.parametrize(("path", "field", "values"), cases())
def test_wrong_fields_are_named(client, path, field, values):
    for value, code in values:
        assert refused(ask(client, path, {field: value}), code=code, param=field)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_edges_of_each_range_are_served(client, path):
    for fields in (
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"top_p": 1e-6},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 1},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"max_tokens": 1},
        {"stop": ["a"] * 16},
        {"stop": "b" * MAX_STOP_CHARS},
        {"stop_token_ids": [0, VOCAB_SIZE - 1]},
    ):
        response = ask(client, path, fields)
        assert response.status_code == 200, (fields, response.text)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("raw", [b"", b"{", b"not json", b"\xff", b'{"a": "\\ud800"}', b"[" * 10_000])
def test_bodies_that_are_not_json(client, path, raw):
    assert refused(client.post(path, content=raw), code="invalid_json")


@pytest.mark.parametrize("raw", [b"[]", b"1", b"null", b'"a"'])
def test_bodies_that_are_no_object(client, raw):
    assert refused(client.post(CHAT, content=raw), code="invalid_type")


def test_numbers_json_does_not_have(client):
    raw = b'{"model": "tiny", "prompt": "a", "temperature": NaN}'
    assert refused(client.post(COMPLETIONS, content=raw), code="invalid_value", param="temperature")


def test_a_body_needs_no_content_type(client):
    raw = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1}).encode()
    assert client.post(COMPLETIONS, content=raw).status_code == 200


def test_a_body_that_is_too_large(client):
    response = ask(client, COMPLETIONS, {"prompt": "a" * MAX_BODY_BYTES})
    assert refused(response, status=413, code="body_too_large", says=str(MAX_BODY_BYTES))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_unknown_model(client, path):
    response = ask(client, path, {"model": "gpt-9"})
    assert refused(response, status=404, code="model_not_found", param="model", says="'gpt-9'")


def test_fields_that_contradict_each_other(client):
    assert refused(ask(client, CHAT, {"top_logprobs": 2}), code="invalid_value", says="'logprobs': true")
    options = {"stream_options": {"include_usage": True}}
    assert refused(ask(client, CHAT, options), code="invalid_value", says="'stream': true")
    both = {"max_tokens": 3, "max_completion_tokens": 4}
    assert refused(ask(client, CHAT, both), code="invalid_value", says="differ")
    assert ask(client, CHAT, {"max_tokens": 3, "max_completion_tokens": 3}).status_code == 200


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "a"}, None, None),
        ({"role": "robot", "content": "hi"}, "unsupported_value", "messages.0.role"),
        ({"role": "user"}, "missing_required_parameter", "messages.0.content"),
        ({"content": "hi"}, "missing_required_parameter", "messages.0.role"),
        ({"role": "user", "content": None}, "invalid_type", "messages.0.content"),
        ({"role": "user", "content": 5}, "invalid_type", "messages.0.content"),
        ({"role": "user", "content": []}, "invalid_type", "messages.0.content"),
        ({"role": "user", "content": ["hi"]}, "invalid_type", "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "invalid_type", "messages.0.content"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "invalid_type", "messages.0.content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "detail": "low"}]},
            "invalid_type",
            "messages.0.content",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            "unsupported_value",
            "messages.0.content",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{}]},
            "unsupported_value",
            "messages.0.tool_calls",
        ),
        ({"role": "user", "content": "a", "mood": "good"}, "unknown_parameter", "messages.0.mood"),
        ("hi", "invalid_type", "messages.0"),
    ],
)
def test_messages_that_are_not_served(client, message, code, param):
    response = ask(client, CHAT, {"messages": [message]})
    if code is None:
        assert response.status_code == 400
    else:
        assert refused(response, code=code, param=param)


def test_response_format(client):
    schema = {"type": "json_object"}
    assert refused(
        ask(client, CHAT, {"response_format": schema}), code="unsupported_value", param="response_format.type"
    )


def test_what_the_template_refuses(client):
    messages = [USER, {"role": "system", "content": "late"}]
    assert refused(ask(client, CHAT, {"messages": messages}), code="invalid_value", says="system must come first")


def test_chat_without_a_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path, chat_template=None))
    engine = FakeEngine(lambda request: outputs(request, [5]))
    try:
        app = create_app(engine, tokenizer, model_name=MODEL)
        with serving(app) as server, httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
            assert refused(ask(client, CHAT, {}), code="invalid_value", says="/v1/completions")
            assert ask(client, COMPLETIONS, {}).status_code == 200
    finally:
        engine.close()


# ---------------------------------------------------------------- lengths


def test_the_context_is_filled_to_the_last_token(client):
    prompt = [1] * (MAX_MODEL_LEN - 1)
    answer = ask(client, COMPLETIONS, {"prompt": prompt, "max_tokens": ...}).json()
    assert answer["usage"]["completion_tokens"] == 1
    answer = ask(client, COMPLETIONS, {"prompt": [1], "max_tokens": None}).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert ask(client, COMPLETIONS, {"prompt": [1], "max_tokens": MAX_MODEL_LEN - 1}).status_code == 200


def test_a_prompt_that_is_too_long_says_the_numbers(client):
    for max_tokens in (..., 1):
        response = ask(client, COMPLETIONS, {"prompt": [1] * MAX_MODEL_LEN, "max_tokens": max_tokens})
        assert refused(response, code="context_length_exceeded", param="prompt", says=f"{MAX_MODEL_LEN} tokens")
    long = [{"role": "user", "content": "hello " * 50}]
    assert refused(ask(client, CHAT, {"messages": long}), code="context_length_exceeded", param="prompt")


def test_an_answer_that_does_not_fit_says_the_numbers(client):
    response = ask(client, COMPLETIONS, {"prompt": [1] * 10, "max_tokens": MAX_MODEL_LEN - 9})
    assert refused(
        response,
        code="context_length_exceeded",
        param="max_tokens",
        says=f"asks for {MAX_MODEL_LEN - 9} more",
    )


def test_one_prompt_of_many_that_is_too_long_refuses_all(client):
    response = ask(client, COMPLETIONS, {"prompt": [[1], [1] * MAX_MODEL_LEN]})
    assert refused(response, code="context_length_exceeded", param="prompt")


def test_the_official_client_raises_its_own_errors(client):
    with openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="none", max_retries=0) as official:
        with pytest.raises(openai.BadRequestError) as caught:
            official.chat.completions.create(model=MODEL, messages=[USER], n=3)
        assert caught.value.param == "n" and caught.value.code == "unsupported_value"
        with pytest.raises(openai.NotFoundError):
            official.completions.create(model="other", prompt="a")


# ---------------------------------------------------------------- any body at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(body_type=st.sampled_from([CompletionBody, ChatBody]), data=st.data())
def test_any_field_at_any_value_is_parsed_or_refused(body_type, data):
    """Never another error than ApiError 400, and a parsed body always makes sampling parameters."""
    names = st.sampled_from(sorted(body_type.model_fields))
    fields = data.draw(st.dictionaries(names, json_values, max_size=4))
    base = {"model": "m", "prompt": "a"} if body_type is CompletionBody else {"model": "m", "messages": [USER]}
    try:
        body = parse(body_type, json.dumps({**base, **fields}).encode())
    except ApiError as error:
        assert error.status == 400 and error.message and error.code
        return
    params = body.sampling(max_tokens=3)
    assert 0 <= params.temperature <= 2 and 0 < params.top_p <= 1 and params.top_k >= 0
    assert all(isinstance(stop, str) and stop for stop in body.stop)


def test_parsed_bodies_do_not_change():
    body = parse(CompletionBody, b'{"model": "m", "prompt": "a"}')
    with pytest.raises(ValidationError):
        body.model = "other"
