"""`anchortp serve` and its tools as processes: attach, crash, stop, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from anchortp.cli.client import wait_served
from tests.cpu.fake_engine import byte_level_bpe, save_tokenizer
from tests.procs.engine_tools import DEADLINE_S, kill_process, nothing_left, processes_naming, wait_dead
from tests.tiny_model import write_model

PROMPT = "hello world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level_bpe()
    changes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 96, "eos_token_id": None}
    folder = write_model(tmp_path_factory.mktemp("served") / "model", **changes)
    save_tokenizer(tokenizer, folder)
    return folder


def anchortp(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "anchortp", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(anchortp(*arguments), capture_output=True, text=True, timeout=DEADLINE_S)


class Served:
    """An `anchortp serve` and a client of it."""

    def __init__(self, folder: Path, runtime_dir: Path, tp: int, *options: object):
        self.runtime_dir = runtime_dir
        command = anchortp("serve", folder, "--tp", tp, "--port", 0, "--runtime-dir", runtime_dir)
        command += map(str, ["--device-memory", "256M", "--log-file", runtime_dir / "serve.log", *options])
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = wait_served(runtime_dir, self.process, DEADLINE_S)

    def status(self) -> dict:
        return httpx.get(f"{self.url}/status", timeout=DEADLINE_S).json()

    def loaded_at_start(self) -> int:
        return self.status()["episodes"][0]["bytes"]["loaded"]

    def body(self, num_tokens: int) -> dict:
        model = httpx.get(f"{self.url}/v1/models", timeout=DEADLINE_S).json()["data"][0]["id"]
        return {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0}

    def answer(self, num_tokens: int) -> str:
        reply = httpx.post(f"{self.url}/v1/completions", json=self.body(num_tokens), timeout=DEADLINE_S)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]

    @contextlib.contextmanager
    def streaming(self, num_tokens: int):
        """The events of a stream, one by one; entered when the first has come."""
        body = self.body(num_tokens) | {"stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=DEADLINE_S) as reply:
            assert reply.status_code == 200
            lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: "))
            events = (json.loads(line) for line in lines if line != "[DONE]")
            first = next(events)
            yield (event for head in ([first], events) for event in head)

    def computing(self) -> list[int]:
        """Its zygote, workers and spares."""
        return list(processes_naming(f"--controller {self.process.pid} "))

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)


def text_of(events) -> tuple[str, str | None]:
    text, finish = "", None
    for event in events:
        if "error" in event:
            return text, f"error: {event['error']['message']}"
        for choice in event["choices"]:
            text += choice["text"]
            finish = choice["finish_reason"] or finish
    return text, finish


def anchors(runtime_dir: Path) -> list[int]:
    return [pid for pid, line in processes_naming(str(runtime_dir)).items() if "anchor" in line and "serve" not in line]


def reap(*pids: int) -> None:
    """Orphans of a server that was killed: they may have become our children (an engine in this process makes
    it a subreaper)."""
    for pid in pids:
        wait_dead(pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def test_a_server_that_is_killed_and_one_that_attaches(folder):
    with nothing_left() as runtime_dir:
        first = Served(folder, runtime_dir, 3)
        expected = first.answer(200)
        check_tools(first, expected)
        refused = run("serve", folder, "--tp", 3, "--port", 0, "--runtime-dir", runtime_dir)
        assert refused.returncode == 2 and "another engine serves from" in refused.stderr
        held, computing = anchors(runtime_dir), first.computing()
        assert len(held) == 4 and len(computing) >= 4  # the host has an anchor too
        first.kill()
        reap(*computing)
        assert sorted(anchors(runtime_dir)) == sorted(held)

        second = Served(folder, runtime_dir, 3, "--grace", 30)
        assert second.loaded_at_start() == 0
        assert second.answer(200) == expected
        with second.streaming(400) as events:
            second.process.send_signal(signal.SIGTERM)
            text, finish = text_of(events)
        assert finish == "length" and text.startswith(expected)
        assert second.process.wait(DEADLINE_S) == 0
        reap(*held)


def check_tools(served: Served, expected: str) -> None:
    """`status` and `fault` from another terminal, while a stream runs."""
    with served.streaming(200) as events:
        faulted = run("fault", "cpu:1", "--kind", "crash", "--runtime-dir", served.runtime_dir)
        assert (faulted.returncode, faulted.stdout) == (0, "cpu:1: crash\n")
        assert text_of(events) == (expected, "length")
    assert served.answer(200) == expected
    shown = run("status", "--json", "--runtime-dir", served.runtime_dir)
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert sorted(document["anchors"]) == ["cpu:0", "cpu:1", "cpu:2", "host"]
    assert all(bool(anchor["worker_pid"]) == (name != "host") for name, anchor in document["anchors"].items())
    assert document["engine"]["state"] == "serving"
    fault = document["engine"]["episodes"][-1]
    assert fault["bytes"]["loaded"] == 0 and fault["workers_replaced"] == ["cpu:1"]
    unknown = run("fault", "cpu:7", "--kind", "lost", "--runtime-dir", served.runtime_dir)
    assert unknown.returncode == 2 and "cpu:7 has no anchor" in unknown.stderr


def test_anchors_by_hand_and_a_start_after_everything_was_killed(folder):
    with nothing_left() as runtime_dir, anchor_by_hand(runtime_dir) as anchor:
        first = Served(folder, runtime_dir, 2, "--grace", 0)
        expected = first.answer(20)
        with first.streaming(490) as events:
            started = [pid for pid in anchors(runtime_dir) if pid != anchor.pid]
            first.process.send_signal(signal.SIGTERM)
            text, finish = text_of(events)
        assert finish.startswith("error: ") and expected.startswith(text[: len(expected)])
        assert first.process.wait(DEADLINE_S) == 0
        # What serve started is gone, what a person started is not, with the half of the weights that it holds.
        for pid in started:
            wait_dead(pid)
        assert anchor.poll() is None

        second = Served(folder, runtime_dir, 2)
        assert second.answer(20) == expected
        started = [pid for pid in anchors(runtime_dir) if pid != anchor.pid]
        killed = [*started, *second.computing()]
        for pid in (second.process.pid, anchor.pid, *started):
            kill_process(pid)
        second.process.wait(DEADLINE_S)
        anchor.wait(DEADLINE_S)
        reap(*killed)

        third = Served(folder, runtime_dir, 2)
        assert third.loaded_at_start() > 0
        assert third.answer(20) == expected
        assert third.terminate() == 0


@contextlib.contextmanager
def anchor_by_hand(runtime_dir: Path):
    command = anchortp("anchor", "cpu:0", "--device-memory", "256M", "--runtime-dir", runtime_dir)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert "ends on SIGTERM" in process.stderr.readline()
        yield process
    finally:
        process.stderr.close()
        process.kill()
        process.wait(DEADLINE_S)


def test_a_server_that_cannot_serve_says_why_and_leaves_nothing(folder):
    with nothing_left() as runtime_dir:
        small = run("serve", folder, "--tp", 2, "--port", 0, "--runtime-dir", runtime_dir, "--device-memory", "64K")
        assert small.returncode == 2
        assert "its budget is 65.5 kB (65,536 bytes)" in small.stderr
