"""The benchmarks, run tiny, so that they do not rot: a random model, few requests, and a system that is not ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cpu.fake_engine import byte_level_bpe, save_tokenizer
from tests.procs.engine_tools import DEADLINE_S, nothing_left, processes_naming
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


def recovery(folder, systems, *options):
    sizes = ["--trace", "synthetic", "--requests", 40, "--rate", 20, "--max-input", 8, "--max-output", 24]
    memory = ["--device-memory", "256M"]
    return bench("recovery", "--model", folder, "--systems", systems, "--tp", 3, *sizes, *memory, *options)


def test_a_lost_device_under_load_of_this_engine_and_of_another(folder, other, tmp_path, monkeypatch):
    results = tmp_path / "results"
    with in_private_tmp(monkeypatch):
        document = recovery(folder, f"anchortp,{other}", "--output", results)
    elastic, restarted = document["runs"]
    assert not document["interrupted"] and document["num_cases"] == len(list(results.iterdir())) == 2
    for run in (elastic, restarted):
        assert run["change"] == "3→2" and run["requests"] | {"retried": 0} == {
            "sent": 40,
            "finished": 40,
            "failed": 0,
            "retried": 0,
        }
        (fault,) = run["faults"]
        assert (fault["kind"], fault["devices"]) == ("lost", ["cpu:1"])
        assert fault["tfs_s"] > 0 and fault["at_s"] > 0.4
        assert run["throughput"]["before"] > 0 and sum(run["curve"]["tokens"]) >= 40 * 24

    assert elastic["tokens"]["delivered"] == 40 * 24
    assert [elastic["tokens"][kind] for kind in ("thrown_away", "lost", "repeated")] == [0, 0, 0]
    (episode,) = elastic["engine"]["episodes"]
    assert episode["devices_lost"] == ["cpu:1"] and episode["bytes"]["loaded"] > 0 and episode["phases"]
    assert elastic["requests"]["retried"] == 0 and elastic["restarts_s"] == []

    assert restarted["requests"]["retried"] > 0 and restarted["tokens"]["thrown_away"] > 0
    assert len(restarted["restarts_s"]) == 1 and restarted["tokens"]["lost"] is None and restarted["engine"] == {}


def test_runs_that_are_there_are_not_run_again(folder, other, tmp_path, monkeypatch):
    results = tmp_path / "results"
    with in_private_tmp(monkeypatch):
        first = recovery(folder, other, "--output", results)
        again = recovery(folder, other, "--output", results)
        none_left = recovery(folder, other, "--output", results, "--seed", 1, "--budget-s", 0)
    assert again["runs"] == first["runs"] and none_left["runs"] == [] and none_left["num_cases"] == 1


def test_ctrl_c_keeps_what_was_measured(folder, other, tmp_path, monkeypatch):
    with in_private_tmp(monkeypatch):
        command = [sys.executable, "-m", "anchortp", "bench", "recovery", "--model", str(folder), "--tp", "2"]
        command += ["--systems", f"{other},{other}", "--trace", "synthetic", "--rate", "5", "--max-output", "20"]
        command += ["--output", str(tmp_path / "results")]
        log = tmp_path / "progress.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
            wait_until(lambda: processes_naming("fake-worker"))
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log.read_text()
    document = json.loads(stdout.splitlines()[-1])
    (run,) = document["runs"]
    assert document["interrupted"] and run["requests"]["sent"] < 1000 and not (tmp_path / "results").exists()


def wait_until(condition):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        os.sched_yield()
