"""The benchmarks, run tiny, so that they do not rot: a random model, few requests, and a system that is not ours."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.fake_engine import byte_level_bpe, save_tokenizer
from tests.procs.engine_tools import DEADLINE_S, nothing_left
from tests.tiny_model import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level_bpe()
    # transformers, which loads the tokenizer, wants a hidden size that is a multiple of the number of heads.
    changes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 96, "eos_token_id": None}
    folder = write_model(tmp_path_factory.mktemp("bench") / "model", **changes)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def other(tmp_path):
    """A system file for the fake server."""
    path = tmp_path / "other.json"
    command = [sys.executable, "-m", "tests.procs.fake_server", "{port}"]
    path.write_text(json.dumps({"name": "other", "command": command, "settings": "fake"}))
    return path


def bench(*arguments: object) -> dict:
    """Runs `anchortp bench`; the document in its last line."""
    command = [sys.executable, "-m", "anchortp", "bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def in_private_tmp(monkeypatch):
    """Runtime folders of the benchmark are made under one that is checked at the end."""
    with nothing_left() as tmp:
        monkeypatch.setenv("TMPDIR", str(tmp))
        yield tmp
        assert not list(Path(tmp).glob("anchortp-bench-*")), "a runtime folder is left"


def test_serving_of_two_systems(folder, other, monkeypatch):
    with in_private_tmp(monkeypatch):
        sizes = ["--requests", 4, "--input", 8, "--output", 6, "--concurrency", 2, "--prefill", 16, "--runs", 2]
        options = ["--tp", 2, "--serve-option=--device-memory=256M"]
        document = bench("serving", "--model", folder, "--systems", f"anchortp,{other}", *sizes, *options)
    assert list(document["systems"]) == ["anchortp", "other"]
    assert document["conditions"]["num_cores"] >= 1
    for found in document["systems"].values():
        assert found["batched"]["output_tokens_per_s"] > 0 and found["start_s"] > 0
        for run in found["batched"]["runs"]:
            assert run["first_token_s"]["n"] == 4
            assert run["gap_s"]["n"] <= 4 * 5  # fewer where tokens came together
            assert run["num_cached_tokens"] == 0
        assert found["prefill"]["prompt_tokens_per_s"] > 0
