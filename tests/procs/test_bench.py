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

BURST = {"output_tokens_per_s": 9.0, "prompt_tokens_per_s": 8.0, "first_token_s": 0.1}
RUN = BURST | {"gap_s": {"median": 0.01, "p99": 0.02}}
SERVING = {
    "benchmark": "serving",
    "model": "tiny",
    "tp": 2,
    "systems": {
        "other": {
            "options": {"requests": 4, "input": 8, "output": 6, "concurrency": 2},
            **dict.fromkeys(("batched", "alone", "prefill"), BURST | {"runs": [RUN]}),
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = byte_level_bpe()
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S)
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
        document = recovery(folder, f"anchortp,anchortp-published,{other}", "--output", results)
    elastic, published, restarted = document["runs"]
    assert not document["interrupted"] and document["num_cases"] == len(list(results.iterdir())) == 3
    for run in document["runs"]:
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

    for run in (elastic, published):
        assert run["tokens"]["delivered"] == 40 * 24
        assert [run["tokens"][kind] for kind in ("thrown_away", "lost", "repeated")] == [0, 0, 0]
        (episode,) = run["engine"]["episodes"]
        assert episode["devices_lost"] == ["cpu:1"] and episode["bytes"]["loaded"] > 0 and episode["phases"]
        assert run["requests"]["retried"] == 0 and run["restarts_s"] == []

    assert restarted["requests"]["retried"] > 0 and restarted["tokens"]["thrown_away"] > 0
    assert len(restarted["restarts_s"]) == 1 and restarted["tokens"]["lost"] is None and restarted["engine"] == {}


def test_a_fault_script_with_a_crash_and_a_loss(folder, tmp_path, monkeypatch):
    script = tmp_path / "script.json"
    crash, loss = {"at": 0.25, "kind": "crash", "devices": ["cpu:0"]}, {"at": 0.7, "kind": "lost", "devices": ["cpu:2"]}
    script.write_text(json.dumps([loss, crash]))
    with in_private_tmp(monkeypatch):
        document = recovery(folder, "anchortp", "--fault-script", script, "--arrivals", "bursty")
    (run,) = document["runs"]
    assert [(fault["kind"], fault["devices"]) for fault in run["faults"]] == [("crash", ["cpu:0"]), ("lost", ["cpu:2"])]
    assert run["requests"] == {"sent": 40, "finished": 40, "failed": 0, "retried": 0}
    assert run["tokens"]["delivered"] == 40 * 24 and run["tokens"]["lost"] == run["tokens"]["repeated"] == 0
    episodes = run["engine"]["episodes"]
    assert [bool(e["devices_lost"]) for e in episodes] in ([False, True], [True]), "a later fault may extend the first"


def test_runs_that_are_there_are_not_run_again(folder, other, tmp_path, monkeypatch):
    results = tmp_path / "results"
    with in_private_tmp(monkeypatch):
        first = recovery(folder, other, "--output", results)
        again = recovery(folder, other, "--output", results)
        none_left = recovery(folder, other, "--output", results, "--seed", 1, "--budget-s", 0)
        slow = ["--max-output", 10_000, "--budget-s", 8]
        cut = recovery(folder, other, "--output", results, *slow)
    assert again["runs"] == first["runs"]
    assert none_left["interrupted"] and none_left["runs"] == [] and none_left["num_cases"] == 1
    assert cut["interrupted"] and len(list(results.iterdir())) == 1
    assert all(run["interrupted"] and run["requests"]["finished"] == 0 for run in cut["runs"])


@pytest.mark.parametrize("when", ["starting", "loaded"])
def test_ctrl_c_keeps_what_was_measured(folder, other, tmp_path, monkeypatch, when):
    asked, log = tmp_path / "asked", tmp_path / "progress.log"
    monkeypatch.setenv("FAKE_SERVER_ASKED", str(asked))
    if when == "starting":
        system = json.loads(other.read_text())
        other.write_text(json.dumps(system | {"command": [*system["command"], "600"]}))
    with in_private_tmp(monkeypatch):
        command = [sys.executable, "-m", "anchortp", "bench", "recovery", "--model", str(folder), "--tp", "2"]
        command += ["--systems", f"{other},{other}", "--trace", "synthetic", "--rate", "5", "--max-output", "20"]
        command += ["--output", str(tmp_path / "results")]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
            wait_until(asked.exists if when == "loaded" else lambda: processes_naming("tests.procs.fake_server"))
            process.send_signal(signal.SIGINT)
            stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log.read_text()
    document = json.loads(stdout.splitlines()[-1])
    assert document["interrupted"] and not (tmp_path / "results").exists()
    assert len(document["runs"]) == (when == "loaded")
    assert all(0 < run["requests"]["sent"] < 1000 for run in document["runs"])


def test_a_victim_of_another_system_and_the_report_of_all(folder, other, tmp_path, monkeypatch):
    """The system itself notices that its worker is gone, and ends; then the supervisor starts it again."""
    raw = json.loads(other.read_text())
    victim = tmp_path / "victim.json"
    victim.write_text(json.dumps(raw | {"name": "noticing", "faults": "victim", "victim": "fake-worker"}))
    results = tmp_path / "results"
    with in_private_tmp(monkeypatch):
        document = recovery(folder, f"{victim},{other}", "--output", results, "--arrivals", "poisson", "--at", "0.5")
    (tmp_path / "serving.json").write_text(json.dumps(SERVING))
    planned = tmp_path / "planner.json"
    bench("planner", "--models", "Qwen3-8B", "--repeats", 1, "--output", planned)
    for run in document["runs"]:
        assert run["requests"]["finished"] == 40 and len(run["restarts_s"]) == 1
    made = bench("report", results, tmp_path / "serving.json", planned, "--output", tmp_path, "--name", "tiny")
    markdown, page = (Path(made[kind]).read_text() for kind in ("markdown", "html"))
    assert "| noticing | lost cpu:1 at" in markdown and "makespan" in markdown and "TFS" in markdown
    pictures = sorted(path.name for path in (tmp_path / "tiny").iterdir())
    assert pictures == ["throughput-0-noticing.png", "throughput-0-other.png", "throughput-0.png"]
    assert all(f"tiny/{name}" in markdown for name in pictures) and page.count("data:image/png") == 3
    assert str(tmp_path) not in markdown, "no path of this machine"


def test_a_system_that_does_not_start_is_told_and_the_others_run(folder, other, tmp_path, monkeypatch):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"name": "broken", "command": [sys.executable, "-c", "print('out of luck')"]}))
    with in_private_tmp(monkeypatch):
        document = recovery(folder, f"{broken},{other}", "--output", tmp_path / "results")
    first, second = document["runs"]
    assert "status 0 before it answered" in first["error"] and "out of luck" in first["error"]
    assert second["requests"]["finished"] == 40
    assert len(list((tmp_path / "results").iterdir())) == 1, "it may start the next time"


def wait_until(condition):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        os.sched_yield()
