"""The OpenAI API end to end: the official client, a real uvicorn, a fake engine behind it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvloop

from anchortp.engine.api import TokenOutput
from anchortp.errors import AnchorTPError, ConfigError, EngineFull
from anchortp.server.app import create_app
from anchortp.server.run import serve_http
from anchortp.server.tokenizer import load_tokenizer
from tests.cpu.fake_engine import (
    DEADLINE_S,
    FakeEngine,
    byte_fallback_bpe,
    byte_level_bpe,
    failing,
    outputs,
    save_tokenizer,
    serving,
    stopped,
)

MODEL = "org/tiny"
ANSWER = "hello world 🙂 café, 你好 end"
CHAT = [{"role": "user", "content": "say hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(byte_level_bpe(), tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module", autouse=True)
def quick_garbage():
    """What the imports made is not looked at again by every collection of `no_leaks`, nor does it count the pipe that
    libuv keeps for signals, one per process."""
    uvloop.new_event_loop().close()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_leaks():
    """Every test gives back its threads and descriptors."""
    gc.collect()
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    left = [t for t in threading.enumerate() if t not in threads and t.is_alive()]
    assert not left, f"threads left: {left}"
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors), "descriptors left"


class Stack:
    """An engine, its server, and clients for it."""

    def __init__(self, engine, server, tokenizer, api_key):
        self.engine = engine
        self.server = server
        self.tokenizer = tokenizer
        self._key = api_key
        # No certificates are needed, and reading them would take longer than most tests here.
        self.http = httpx.Client(base_url=server.url, timeout=DEADLINE_S, verify=False)
        self.openai = self.new_openai(openai.OpenAI, openai.DefaultHttpxClient)

    def new_openai(self, kind, http_kind):
        return kind(
            base_url=f"{self.server.url}/v1",
            api_key=self._key or "none",
            max_retries=0,
            timeout=DEADLINE_S,
            http_client=http_kind(verify=False),
        )

    def chat(self, **fields):
        return self.openai.chat.completions.create(model=MODEL, **{"messages": CHAT, **fields})

    def complete(self, **fields):
        return self.openai.completions.create(model=MODEL, **{"prompt": "say", **fields})

    def post(self, path, **fields):
        return self.http.post(path, json={"model": MODEL, **fields})


@pytest.fixture
def start(tokenizer):
    """Starts stacks: `with start(reply) as stack`. The default engine answers ANSWER, then its EOS."""

    @contextmanager
    def starting(reply=None, *, grace_s=DEADLINE_S, api_key=None, tokenizer=tokenizer, **engine_options):
        idle_timeout_s = engine_options.pop("idle_timeout_s", DEADLINE_S)
        max_body_bytes = engine_options.pop("max_body_bytes", 1 << 20)
        engine = FakeEngine(reply or saying(tokenizer, ANSWER), **engine_options)
        app = create_app(
            engine,
            tokenizer,
            model_name=MODEL,
            api_key=api_key,
            idle_timeout_s=idle_timeout_s,
            max_body_bytes=max_body_bytes,
        )
        try:
            with serving(app, grace_s=grace_s) as server:
                stack = Stack(engine, server, tokenizer, api_key)
                with stack.http, stack.openai:
                    yield stack
        finally:
            engine.close()
        assert len(app.state.in_flight) == 0

    return starting


def eos_id(tokenizer):
    return tokenizer.encode("<|im_end|>")[0]


def saying(tokenizer, text, **options):
    """Replies `text` and EOS, or as much of it as `max_tokens` allows."""

    def reply(request):
        token_ids = (*tokenizer.encode(text), eos_id(tokenizer))
        whole = len(token_ids) <= request.params.max_tokens
        return outputs(request, token_ids, finish_reason="stop" if whole else "length", **options)

    return reply


def events(response):
    """The `data:` payloads of a whole SSE answer."""
    parts = response.text.split("\n\n")
    assert parts[-1] == "" and all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ") for part in parts[:-1]]


# ---------------------------------------------------------------- answers


def test_chat(start, tokenizer):
    with start(saying(tokenizer, ANSWER, num_cached_tokens=4)) as stack:
        answer = stack.chat()
        [request] = stack.engine.submitted
    num_answer = len(tokenizer.encode(ANSWER)) + 1
    assert request.prompt_token_ids == tokenizer.encode_chat(CHAT)
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == num_answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + num_answer
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_chat_stream_is_openais_event_by_event(start):
    with start() as stack:
        response = stack.post(
            "/v1/chat/completions", messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response)
    assert done == "[DONE]"
    first, *content, last, usage = map(json.loads, chunks)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in content) == ANSWER
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *content])
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in [first, *content, last])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [first, *content, last, usage]}) == 1


def test_stream_without_usage_has_no_usage(start):
    with start() as stack:
        chunks = list(stack.chat(stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stream_goes_out_token_by_token(start):
    """Each step is told as it is made: the engine makes the next only when the client has the one before."""
    with start(num_steps=1) as stack:
        text = ""
        for chunk in stack.chat(stream=True):
            delta = chunk.choices[0].delta.content if chunk.choices else None
            text += delta or ""
            stack.engine.allow(1)
    assert text == ANSWER


def test_completion_streaming_and_not(start):
    with start() as stack:
        whole = stack.complete()
        stream = list(stack.complete(stream=True, stream_options={"include_usage": True}))
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    assert whole.choices[0].text == ANSWER and whole.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in stream[:-1]) == ANSWER
    assert stream[-2].choices[0].finish_reason == "stop"
    assert stream[-1].usage == whole.usage


def test_prompts_in_every_form_are_choices_in_order(start, tokenizer):
    def echo(request):
        return outputs(request, request.prompt_token_ids)

    ids = [list(tokenizer.encode(text)) for text in ("hello", "world", "café")]
    with start(echo) as stack:
        for prompt, expected in (
            ("hello", ["hello"]),
            (["hello", "world", "café"], ["hello", "world", "café"]),
            (ids[1], ["world"]),
            (ids, ["hello", "world", "café"]),
        ):
            answer = stack.complete(prompt=prompt)
            assert [choice.text for choice in answer.choices] == expected
            assert [choice.index for choice in answer.choices] == list(range(len(expected)))
            assert answer.usage.prompt_tokens == answer.usage.completion_tokens
            texts = dict.fromkeys(range(len(expected)), "")
            for chunk in stack.complete(prompt=prompt, stream=True):
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert list(texts.values()) == expected


def test_leading_space_of_sentencepiece(start, tmp_path):
    """An answer starts clean in a chat; a completion goes on from its prompt, space included."""
    tokenizer = load_tokenizer(save_tokenizer(byte_fallback_bpe(), tmp_path))
    with start(saying(tokenizer, "world"), tokenizer=tokenizer) as stack:
        assert stack.chat().choices[0].message.content == "world"
        assert stack.complete(prompt="hello").choices[0].text == " world"


def test_content_in_parts_and_developer_role(start, tokenizer):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "again", "name": "zoe"},
    ]
    plain = [
        {"role": "system", "content": "be kind"},
        *CHAT,
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "again"},
    ]
    with start() as stack:
        stack.chat(messages=messages)
        [request] = stack.engine.submitted
    assert request.prompt_token_ids == tokenizer.encode_chat(plain)


def test_sampling_fields_reach_the_engine(start):
    with start() as stack:
        stack.complete(
            temperature=0.5,
            top_p=0.9,
            seed=-3,
            max_tokens=5,
            logprobs=3,
            extra_body={"top_k": 7, "min_p": 0.1, "ignore_eos": True, "stop_token_ids": [3, 4]},
        )
        stack.chat(extra_body={"top_k": -1}, max_completion_tokens=6)
        stack.chat(temperature=0, logprobs=True)
        one, two, three = (request.params for request in stack.engine.submitted)
        assert two.max_tokens == 6 and two.top_k == 0 and two.logprobs is None and two.temperature == 1.0
        assert three.temperature == 0.0 and three.logprobs == 0
        num_prompt = len(stack.engine.submitted[2].prompt_token_ids)
        assert three.max_tokens == stack.engine.max_model_len - num_prompt
    assert (one.temperature, one.top_p, one.seed, one.max_tokens, one.logprobs) == (0.5, 0.9, -3, 5, 3)
    assert (one.top_k, one.min_p, one.ignore_eos, one.stop_token_ids) == (7, 0.1, True, (3, 4))


def test_harmless_fields_and_nulls_are_accepted(start):
    with start() as stack:
        response = stack.post(
            "/v1/chat/completions",
            messages=CHAT,
            user="zoe",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            n=1,
            presence_penalty=0.0,
            frequency_penalty=0,
            logit_bias={},
            response_format={"type": "text"},
            tools=[],
            tool_choice="none",
            temperature=None,
            stop=None,
            stream=None,
            seed=None,
        )
        assert response.status_code == 200, response.text
        assert stack.post("/v1/completions", prompt="a", best_of=1, echo=False, suffix=None).status_code == 200


def test_length(start, tokenizer):
    with start() as stack:
        answer = stack.complete(max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].text == tokenizer.decode(tokenizer.encode(ANSWER)[:2])


def test_a_character_that_length_cuts_is_replaced_once(start, tokenizer):
    thumb = tokenizer.encode("👍")
    assert len(thumb) > 2
    with start(lambda request: outputs(request, thumb)) as stack:
        assert stack.complete(max_tokens=2).choices[0].text == "\ufffd"


def test_stop_token_counts_but_has_no_text(start, tokenizer):
    token_ids = tokenizer.encode("hello world")
    with start(lambda request: outputs(request, token_ids, finish_reason="stop")) as stack:
        answer = stack.complete(extra_body={"stop_token_ids": [token_ids[-1]]}, logprobs=0)
    assert answer.choices[0].text == tokenizer.decode(token_ids[:-1])
    assert answer.usage.completion_tokens == len(token_ids)
    assert len(answer.choices[0].logprobs.tokens) == len(token_ids) - 1


def test_an_engine_that_stops_without_a_token_loses_no_text(start, tokenizer):
    def reply(request):
        *head, last = outputs(request, tokenizer.encode("hello world"))
        end = TokenOutput(request_id=request.request_id, tokens=(), finish_reason="stop")
        return [*head, TokenOutput(request_id=request.request_id, tokens=last.tokens), end]

    with start(reply) as stack:
        assert stack.complete().choices[0].text == "hello world"


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("per_step", [1, 3, 100])
def test_stop_string_over_tokens(start, tokenizer, stream, per_step):
    """The text ends before the stop string, and an engine that would go on is told to stop."""
    text = "hello world says: the END of it" + " and on" * 20
    assert not any("END" in tokenizer.decode([i]) for i in tokenizer.encode(text))
    with start(saying(tokenizer, text, per_step=per_step)) as stack:
        answer = stack.complete(stop=["never", "END"], stream=stream, max_tokens=200)
        if stream:
            chunks = list(answer)
            assert "".join(chunk.choices[0].text for chunk in chunks) == "hello world says: the "
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert answer.choices[0].text == "hello world says: the "
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens < len(tokenizer.encode(text))
        stack.engine.wait_for(lambda: stack.engine._scripts == {})


def test_stop_string_aborts_in_the_engine(start, tokenizer):
    num_steps = len(tokenizer.encode("hello END"))
    with start(saying(tokenizer, "hello END and on and on"), num_steps=num_steps) as stack:
        assert stack.complete(stop="END").choices[0].text == "hello "
        assert stack.engine.aborted == [stack.engine.submitted[0].request_id]


def test_text_held_back_comes_at_the_end(start, tokenizer):
    with start(saying(tokenizer, "hello EN")) as stack:
        chunks = list(stack.complete(stop="END", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello EN"


def test_stop_string_of_one_choice_leaves_the_others(start, tokenizer):
    def reply(request):
        return outputs(request, tokenizer.encode("a STOP b" if len(request.prompt_token_ids) == 1 else "a b c"))

    with start(reply) as stack:
        answer = stack.complete(prompt=[[1], [1, 2]], stop="STOP")
    assert [choice.text for choice in answer.choices] == ["a ", "a b c"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


# ---------------------------------------------------------------- log-probabilities


def test_chat_logprobs(start, tokenizer):
    with start() as stack:
        whole = stack.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        chunks = list(stack.chat(logprobs=True, top_logprobs=2, stream=True))
        bare = stack.chat(logprobs=True).choices[0].logprobs.content
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == whole
    assert bytes(byte for entry in whole for byte in entry.bytes).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in whole)
    assert all(entry.top_logprobs[0].token == entry.token for entry in whole)
    assert whole[0].token == "hello" or whole[0].token == tokenizer.decode(tokenizer.encode(ANSWER)[:1])
    assert any(entry.token.startswith("bytes:\\x") for entry in whole), "part of an emoji is shown as bytes"
    assert all(entry.top_logprobs == [] for entry in bare) and len(bare) == len(whole)


def test_completion_logprobs(start, tokenizer):
    with start() as stack:
        whole = stack.complete(logprobs=2).choices[0].logprobs
        chunks = list(stack.complete(logprobs=2, stream=True))
        bare = stack.complete(logprobs=0).choices[0].logprobs
    token_ids = tokenizer.encode(ANSWER)
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.text_offset) == len(token_ids)
    assert whole.token_logprobs == [-0.5] * len(token_ids)
    assert all(token in top and top[token] == -0.5 for token, top in zip(whole.tokens, whole.top_logprobs, strict=True))
    assert all(len(top) == 1 for top in bare.top_logprobs)
    for token, offset in zip(whole.tokens, whole.text_offset, strict=True):
        assert token.startswith("bytes:") or ANSWER[offset:].startswith(token)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == whole.tokens
    assert [offset for part in parts for offset in part.text_offset] == whole.text_offset


def test_token_ids_of_a_stream_are_those_of_the_answer(start, tokenizer):
    asked = {"max_tokens": 5, "extra_body": {"return_token_ids": True}}
    with start(saying(tokenizer, ANSWER)) as stack:
        for ask, said in ((stack.complete, lambda c: c.text), (stack.chat, lambda c: c.delta.content)):
            whole = ask(**asked).choices[0]
            chunks = [chunk.choices[0] for chunk in ask(**asked, stream=True)]
            assert whole.token_ids == list(tokenizer.encode(ANSWER)[:5])
            told = [getattr(chunk, "token_ids", None) or [] for chunk in chunks]
            assert [token_id for ids in told for token_id in ids] == whole.token_ids
            assert all(bool(ids) == bool(said(chunk)) for ids, chunk in zip(told, chunks, strict=True))
        assert "token_ids" not in stack.post("/v1/completions", prompt="say").text


def test_logprobs_end_where_the_text_ends(start, tokenizer):
    with start(saying(tokenizer, "hello world END of it")) as stack:
        logprobs = stack.complete(logprobs=0, stop="END").choices[0].logprobs
    assert "".join(logprobs.tokens) == "hello world "


def test_impossible_logprob_is_a_number(start, tokenizer):
    def reply(request):
        [output] = outputs(request, tokenizer.encode("a"))
        token = output.tokens[0]
        never = type(token)(token_id=token.token_id, logprob=float("-inf"), top_logprobs=())
        return [TokenOutput(request_id=output.request_id, tokens=(never,), finish_reason="length")]

    with start(reply) as stack:
        assert stack.chat(logprobs=True).choices[0].logprobs.content[0].logprob == -9999.0


# ---------------------------------------------------------------- many at once


def test_32_streams(start, tokenizer):
    """Each gets its own text, whole."""

    def echo(request):
        return outputs(request, request.prompt_token_ids * 3)

    async def one(client, i):
        stream = await client.completions.create(model=MODEL, prompt=f"number {i} 🙂", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def everyone(stack):
        async with stack.new_openai(openai.AsyncOpenAI, openai.DefaultAsyncHttpxClient) as client:
            texts = asyncio.gather(*(one(client, i) for i in range(32)))
            await asyncio.to_thread(stack.engine.wait_for, lambda: len(stack.engine.submitted) == 32)
            assert stack.engine.num_running == 32, "all wait at once"
            stack.engine.allow(float("inf"))
            return await asyncio.wait_for(texts, DEADLINE_S)

    with start(echo, num_steps=0) as stack:
        texts = asyncio.run(everyone(stack))
        metrics = stack.http.get("/metrics").text
    assert texts == [f"number {i} 🙂" * 3 for i in range(32)]
    assert 'anchortp_choices_total{outcome="length"} 32.0' in metrics


# ---------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("num_steps", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_hanging_up_aborts(start, path, stream, num_steps):
    """Before the first token and after it, streaming or not; the engine makes no step meanwhile."""
    body = {"messages": CHAT} if "chat" in path else {"prompt": ["one", "two"]}
    with start(num_steps=num_steps) as stack:
        payload = json.dumps({"model": MODEL, "stream": stream, **body}).encode()
        num_requests = len(body.get("prompt", [0]))
        with socket.create_connection(("127.0.0.1", stack.server.port), timeout=DEADLINE_S) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
            connection.sendall(head.encode() + payload)
            stack.engine.wait_for(lambda: len(stack.engine.submitted) == num_requests)
            if stream and num_steps:
                assert b"data: " in _read_until(connection, b"data: ")
        stack.engine.wait_for(lambda: len(stack.engine.aborted) == num_requests)
        assert stack.engine.num_running == 0
        assert sorted(stack.engine.aborted) == sorted(r.request_id for r in stack.engine.submitted)


def _read_until(connection, mark):
    seen = b""
    while mark not in seen:
        part = connection.recv(4096)
        assert part, seen
        seen += part
    return seen


def test_openai_client_that_closes_a_stream(start):
    with start(num_steps=1) as stack:
        stream = stack.chat(stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        stream.close()
        stack.engine.wait_for(lambda: len(stack.engine.aborted) == 1)
        assert 'outcome="abandoned"} 1.0' in stack.http.get("/metrics").text


def test_finished_requests_are_not_aborted(start):
    with start() as stack:
        stack.chat()
        list(stack.chat(stream=True))
        assert stack.engine.aborted == []


# ---------------------------------------------------------------- the engine says no


@pytest.mark.parametrize("stream", [False, True])
def test_full(start, stream):
    with start() as stack:
        stack.engine.refuse_with = EngineFull("128 requests are waiting; try again later.")
        with pytest.raises(openai.RateLimitError) as caught:
            stack.chat(stream=stream)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.body == {
        "message": "128 requests are waiting; try again later.",
        "type": "rate_limit_error",
        "param": None,
        "code": "engine_full",
    }


def test_full_in_the_middle_of_many_prompts_takes_back_the_first(start):
    with start(num_steps=0) as stack:
        stack.engine.max_running = 2
        with pytest.raises(openai.RateLimitError):
            stack.complete(prompt=["one", "two", "three"])
        assert len(stack.engine.aborted) == 2 and stack.engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_stopped(start, stream):
    with start() as stack:
        stack.engine.refuse_with = stopped()
        with pytest.raises(openai.InternalServerError) as caught:
            stack.complete(stream=stream)
    assert caught.value.status_code == 503 and caught.value.code == "service_unavailable"


@pytest.mark.parametrize(("state", "status"), [("serving", 500), ("refusing", 503)])
@pytest.mark.parametrize("stream", [False, True])
def test_error_before_the_first_token_is_a_status(start, stream, state, status):
    with start(lambda request: failing(request, (), "two devices are left, three are needed")) as stack:
        stack.engine.state = state
        with pytest.raises(openai.InternalServerError) as caught:
            stack.chat(stream=stream)
    assert caught.value.status_code == status
    assert caught.value.body["message"] == "two devices are left, three are needed"


def test_error_inside_a_stream_is_its_last_event(start, tokenizer):
    token_ids = tokenizer.encode("hello world")
    with start(lambda request: failing(request, token_ids, "no layout fits")) as stack:
        response = stack.post("/v1/completions", prompt="a", stream=True)
        *chunks, last = map(json.loads, events(response))
        with pytest.raises(openai.APIError, match="no layout fits"):
            list(stack.complete(stream=True))
        with pytest.raises(openai.InternalServerError, match="no layout fits"):
            stack.complete()
    assert response.status_code == 200
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert last["error"] == {
        "message": "no layout fits",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }


def test_a_request_the_engine_gives_up(start):
    def reply(request):
        return [TokenOutput(request_id=request.request_id, tokens=(), finish_reason="abort")]

    with start(reply) as stack, pytest.raises(openai.InternalServerError, match="gave this request up"):
        stack.chat()


def test_a_silent_engine_is_given_up(start):
    with start(num_steps=0, idle_timeout_s=0.05) as stack:
        with pytest.raises(openai.InternalServerError) as caught:
            stack.chat()
        assert caught.value.status_code == 504
        stack.engine.wait_for(lambda: len(stack.engine.aborted) == 1)


def test_a_bug_is_a_500_that_tells_nothing(start):
    with start() as stack:
        stack.engine.refuse_with = ZeroDivisionError("secret")
        # A connection of its own, since uvicorn closes it.
        response = httpx.post(f"{stack.server.url}/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert response.status_code == 500 and "secret" not in response.text
        assert response.json()["error"]["code"] == "internal_error"
        stack.engine.refuse_with = AnchorTPError("the engine lost its socket")
        assert stack.post("/v1/completions", prompt="a").json()["error"]["message"] == "the engine lost its socket"


# ---------------------------------------------------------------- the other endpoints


def test_models(start):
    with start() as stack:
        [card] = stack.openai.models.list().data
        assert card.id == MODEL and card.object == "model"
        assert stack.openai.models.retrieve(MODEL) == card
        with pytest.raises(openai.NotFoundError) as caught:
            stack.openai.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("state", "status"),
    [("starting", 503), ("serving", 200), ("recovering", 200), ("refusing", 503), ("stopped", 503)],
)
def test_health(start, state, status):
    with start() as stack:
        stack.engine.state = state
        response = stack.http.get("/health")
    assert response.status_code == status
    assert response.json() == {"state": state, "epoch": 7}


def test_status_and_faults(start):
    fault = {
        "device": "cpu:2",
        "kind": "lost",
        "timeline": [["plan", 0.01]],
        "reasons": ["disk is the only source"],
    }
    with start() as stack:
        assert stack.http.get("/faults").json() == {"object": "list", "data": []}
        stack.engine.extra_status = {"faults": [fault]}
        assert stack.http.get("/status").json() == {
            "state": "serving",
            "epoch": 7,
            "num_running": 0,
            "faults": [fault],
        }
        assert stack.http.get("/faults").json()["data"] == [fault]


def test_metrics(start, tokenizer):
    from prometheus_client.parser import text_string_to_metric_families

    with start() as stack:
        stack.engine.extra_status = {
            "step_s": 0.5,
            "model": "text is left out",
            "faults": [{"kind": "lost"}],
            "devices": {"cpu:0": {"used_bytes": 7, "state": "alive"}, "cpu:1": {"used_bytes": 9}},
            "requests": {"waiting": 3},
            "links": {"host>cpu:0": {"bytes_per_s": 2.5e9}},
        }
        stack.chat()
        stack.http.get("/nowhere")
        response = stack.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    samples = {(s.name, tuple(s.labels.values())): s.value for family in families for s in family.samples}
    assert all(name.startswith("anchortp_") for name, _ in samples)
    assert samples["anchortp_state", ("serving",)] == 1 and samples["anchortp_state", ("stopped",)] == 0
    assert samples["anchortp_epoch", ()] == 7
    assert samples["anchortp_num_running", ()] == 0
    assert samples["anchortp_step_seconds", ()] == 0.5
    assert samples["anchortp_devices_used_bytes", ("cpu:1",)] == 9
    assert samples["anchortp_requests", ("waiting",)] == 3
    assert samples["anchortp_links_bytes_per_s", ("host>cpu:0",)] == 2.5e9
    assert not any("per_seconds" in name for name, _ in samples)
    assert samples["anchortp_choices_total", ("stop",)] == 1
    assert samples["anchortp_http_errors_total", ("404",)] == 1
    assert samples["anchortp_prompt_tokens_total", ()] == len(tokenizer.encode_chat(CHAT))
    assert samples["anchortp_generated_tokens_total", ()] == len(tokenizer.encode(ANSWER)) + 1
    assert samples["anchortp_first_token_seconds_count", ()] == 1


def test_two_servers_in_one_process_count_apart(start):
    with start() as one, start() as two:
        one.chat()
        assert 'outcome="stop"' in one.http.get("/metrics").text
        assert 'outcome="stop"' not in two.http.get("/metrics").text


def test_api_key(start):
    with start(api_key="schlüssel") as stack:
        guarded = ["/v1/models", f"/v1/models/{MODEL}", "/status", "/faults"]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": b"Basic schl\xc3\xbcssel"}):
            for path in guarded:
                response = stack.http.get(path, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            # The body is not looked at before the key is.
            assert stack.http.post("/v1/completions", content="{", headers=headers).status_code == 401
            assert stack.http.get("/health", headers=headers).status_code == 200
            assert stack.http.get("/metrics", headers=headers).status_code == 200
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert all(stack.http.get(path, headers=right).status_code == 200 for path in guarded)
        assert stack.engine.submitted == []


def test_api_key_with_the_openai_client(start):
    with start(api_key="secret") as stack:
        assert stack.chat().choices[0].message.content == ANSWER
        with pytest.raises(openai.AuthenticationError):
            stack.openai.with_options(api_key="other").models.list()


def test_unknown_paths_and_methods_have_openais_error_body(start):
    with start() as stack:
        missing, wrong = stack.http.get("/v1/embeddings"), stack.http.get("/v1/completions")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
    assert wrong.status_code == 405 and "GET /v1/completions" in wrong.json()["error"]["message"]


# ---------------------------------------------------------------- stopping


def test_streams_may_finish_when_the_server_stops(start, tokenizer):
    with start(num_steps=1) as stack:
        stream = stack.chat(stream=True)
        next(stream)
        stack.server.stop()
        _wait_until_refused(stack.server.port)
        stack.engine.allow(float("inf"))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == ANSWER
        stack.server.join()


def _wait_until_refused(port):
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            continue  # it was accepted just as the server closed its door
    raise AssertionError("the server still takes connections")


def test_streams_that_do_not_finish_are_told(start):
    """A stream gets an error event, a request that waits for its answer a 503, and the engine is told."""
    with start(num_steps=1, grace_s=0.05) as stack, httpx.Client(base_url=stack.server.url) as other:
        stream = stack.chat(stream=True)
        next(stream)
        answers = []
        body = {"model": MODEL, "prompt": "a"}
        waiting = threading.Thread(target=lambda: answers.append(other.post("/v1/completions", json=body)))
        waiting.start()
        stack.engine.wait_for(lambda: len(stack.engine.submitted) == 2)
        stack.server.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        waiting.join(DEADLINE_S)
        stack.server.join()
        assert len(stack.engine.aborted) == 2
    [answer] = answers
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "service_unavailable"


def test_a_server_that_drains_takes_no_request(start):
    with start() as stack:
        app = create_app(stack.engine, stack.tokenizer, model_name=MODEL)
        app.state.in_flight.drain()
        transport = httpx.ASGITransport(app=app)

        async def ask():
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                health = await client.get("/health")
                answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
                return health, answer

        health, answer = asyncio.run(ask())
    assert health.status_code == 503 and health.json()["state"] == "stopping"
    assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]


def serve_in_main_thread(tokenizer, client, **options):
    """As the command line runs it, with `client(engine, stream, port)` in a thread, one chunk into a stream.

    Returns (what serve_http returned, what the client returned).
    """
    engine = FakeEngine(saying(tokenizer, ANSWER), num_steps=1)
    app = create_app(engine, tokenizer, model_name=MODEL)

    def talk(port):
        http_client = openai.DefaultHttpxClient(verify=False)
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=DEADLINE_S, http_client=http_client) as talking:
            stream = talking.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
            next(stream)
            return client(engine, stream, port)

    with ThreadPoolExecutor(1) as pool:
        talks = []
        ended_by = serve_http(
            app, "127.0.0.1", 0, on_ready=lambda port: talks.append(pool.submit(talk, port)), **options
        )
        told = talks[0].result(DEADLINE_S)
    engine.close()
    return ended_by, told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_server_and_nothing_else(tokenizer, number):
    """The stream may finish, the signal is returned and not raised, the handlers are given back."""

    def client(engine, stream, port):
        os.kill(os.getpid(), number)
        _wait_until_refused(port)
        engine.allow(float("inf"))
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    before = signal.getsignal(number)
    assert serve_in_main_thread(tokenizer, client, grace_s=DEADLINE_S) == (number, ANSWER)
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_grace(tokenizer):
    def client(engine, stream, port):
        os.kill(os.getpid(), signal.SIGTERM)
        _wait_until_refused(port)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        engine.wait_for(lambda: len(engine.aborted) == 1)

    ended_by, _ = serve_in_main_thread(tokenizer, client, grace_s=100 * DEADLINE_S)
    assert ended_by == signal.SIGTERM


def test_port_in_use(start, tokenizer):
    with start() as stack:
        app = create_app(stack.engine, tokenizer, model_name=MODEL)
        with pytest.raises(ConfigError, match="port is in use"):
            serve_http(app, "127.0.0.1", stack.server.port)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("127.0.0.1", 70000)])
def test_an_address_that_cannot_be_served(start, tokenizer, host, port):
    with start() as stack:
        app = create_app(stack.engine, tokenizer, model_name=MODEL)
        with pytest.raises(ConfigError, match="Cannot serve on"):
            serve_http(app, host, port)
