"""`anchortp serve` that is killed, all of it at once: the next one finds its weights and its prefix cache warm."""

from __future__ import annotations

import re

import httpx
import pytest

from anchortp.state.client import AnchorClient
from tests.cpu.fake_engine import byte_level_bpe, save_tokenizer
from tests.procs.engine_tools import DEADLINE_S, kill_process, nothing_left
from tests.procs.test_serve import Served, anchors, reap
from tests.tiny_model import write_model

BLOCK = 16  # tokens
PROMPT = "tell me what is kept when everything that computes is killed at once, and why it is kept. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level_bpe()
    changes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 96, "eos_token_id": None}
    folder = write_model(tmp_path_factory.mktemp("served") / "model", **changes)
    save_tokenizer(tokenizer, folder)
    return folder


class Conversation:
    """Turns of one conversation over the completions endpoint; each prompt holds all turns before it."""

    def __init__(self, served: Served):
        self.served = served

    def ask(self, prompt: str) -> tuple[str, int, int]:
        """The answer, how many tokens the prompt has, and how many of them were cached."""
        body = self.served.body(32) | {"prompt": prompt}
        reply = httpx.post(f"{self.served.url}/v1/completions", json=body, timeout=DEADLINE_S)
        assert reply.status_code == 200, reply.text
        document = reply.json()
        usage = document["usage"]
        return (
            document["choices"][0]["text"],
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
        )


def kv_metrics(served: Served) -> dict[str, float]:
    """What /metrics says about the cache, by name."""
    text = httpx.get(f"{served.url}/metrics", timeout=DEADLINE_S).text
    return {
        name: float(value) for name, value in re.findall(r'^anchortp_kv\{name="(\w+)"\} (\S+)$', text, re.MULTILINE)
    }


def kill_all(served: Served) -> None:
    """The server with its engine, and whatever computes: nothing but the anchors is left."""
    computing = served.computing()
    assert len(computing) >= 3
    for pid in (served.process.pid, *computing):
        kill_process(pid)
    served.process.wait(DEADLINE_S)
    reap(*computing)


def whole_blocks(num_tokens: int) -> int:
    """Tokens that the cache can have of so many: whole blocks, and the last token is always computed."""
    return (num_tokens - 1) // BLOCK * BLOCK


def test_a_conversation_outlives_everything_that_computes(folder):
    with nothing_left() as runtime_dir:
        first = Served(folder, runtime_dir, 3)
        answer, num_tokens, cached = Conversation(first).ask(PROMPT)
        assert cached == 0 and num_tokens > 4 * BLOCK
        assert Conversation(first).ask(PROMPT) == (answer, num_tokens, whole_blocks(num_tokens))
        check_metrics(first, num_tokens)
        held = anchors(runtime_dir)
        kill_all(first)
        assert sorted(anchors(runtime_dir)) == sorted(held), "four anchors, the host's among them"

        # Only what is new in the second turn is computed. (As text the answer may be cut into other tokens.)
        second = Served(folder, runtime_dir, 3)
        assert second.loaded_at_start() == 0
        turn = PROMPT + answer + " And then? "
        told, length, cached = Conversation(second).ask(turn)
        assert whole_blocks(num_tokens) <= cached <= whole_blocks(num_tokens + 32) < length
        check_lost_while_warm(second, turn, told)
        assert second.terminate() == 0
        reap(*held)


def check_metrics(served: Served, num_tokens: int) -> None:
    kv = kv_metrics(served)
    assert kv["blocks_held"] == kv["blocks_evicted"] == kv["mirror_evicted"] == 0
    assert 0 < kv["blocks_cached"] <= kv["blocks"]
    assert 0 <= kv["blocks_mirrored"] <= kv["mirror_slots"]
    assert kv["replayed_tokens"] == 0
    assert kv["queried_tokens"] == 2 * num_tokens
    assert kv["hit_tokens"] == whole_blocks(num_tokens)
    assert kv == {name: value for name, value in served.status()["kv"].items() if name in kv}


def check_lost_while_warm(served: Served, turn: str, told: str) -> None:
    """What was taken over is in the new mirror, or held by another device: a loss does not make it cold."""
    with AnchorClient.connect(served.runtime_dir, "cpu:0", role="tool") as tool:
        tool.inject("lost")
    answer, length, cached = Conversation(served).ask(turn)
    assert answer == told and cached == whole_blocks(length)
    status = served.status()
    (fault,) = status["faults"]
    assert fault["devices_lost"] == ["cpu:0"] and fault["kv"] == "whole"
    assert fault["bytes"]["kv_copied"] > 0
