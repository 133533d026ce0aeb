"""Loads of the benchmarks: what is asked, when, and what strikes when."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
import torch

from anchortp.bench import faults, grid, padding, sharegpt, systems, workload
from anchortp.bench.systems import System
from anchortp.bench.workload import WorkloadOptions
from anchortp.errors import ConfigError
from tests.cpu.fake_engine import byte_level_bpe
from tests.tiny_model import Oracle, write_model

DEVICES = tuple(f"cpu:{index}" for index in range(4))


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer and the size of its vocabulary."""
    tokenizer = byte_level_bpe()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": tokenizer.get_vocab_size()}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A ShareGPT file that ends in the middle of a record, as the real one does."""
    talks = [
        {"conversations": [{"value": f"question {i} {turn} " * (1 + i % 7)} for turn in range(2 + i % 5)]}
        for i in range(60)
    ]
    short = {"conversations": [{"value": "hi"}, {"value": ""}, {"value": "x"}]}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([short, *talks])[:-100])
    monkeypatch.setattr(sharegpt, "data_file", lambda: path)
    return path


def test_a_trace_that_is_cut_off_gives_what_is_whole(trace):
    talks = list(sharegpt.conversations())
    assert len(talks) == 60 and talks[0] == ["hi", "x"], "the last record is cut; a turn without text is none"
    assert all(len(talk) >= 2 for talk in talks)


@pytest.mark.parametrize("multi_turn", [False, True])
def test_sharegpt_requests_are_capped_and_the_same_each_time(model, trace, multi_turn):
    options = WorkloadOptions(requests=40, max_input=20, max_output=12, multi_turn=multi_turn, max_context=70, seed=3)
    sessions = workload.make(options, model)
    assert sessions == workload.make(options, model)
    turns = [turn for session in sessions for turn in session.turns]
    assert len(turns) == 40 and all(4 <= turn.max_tokens <= 12 for turn in turns)
    assert all(len(turn.prompt) <= (70 if multi_turn else 20) for turn in turns)
    if not multi_turn:
        assert all(len(session.turns) == 1 for session in sessions)
        return
    assert any(len(session.turns) > 1 for session in sessions)
    for session in sessions:
        for before, after in zip(session.turns, session.turns[1:], strict=False):
            assert after.prompt[: len(before.prompt)] == before.prompt, "a turn's prompt holds all turns before it"
            assert len(after.prompt) > len(before.prompt) + before.max_tokens


def test_another_seed_makes_other_requests(model, trace):
    one, two = (workload.make(WorkloadOptions(requests=20, seed=seed), model) for seed in (0, 1))
    assert [s.turns for s in one] != [s.turns for s in two]


def test_a_trace_that_is_too_short_says_so(model, trace):
    with pytest.raises(ConfigError, match="has 59 requests"):
        workload.make(WorkloadOptions(requests=1000), model)


def test_synthetic_requests_have_one_length(model):
    options = WorkloadOptions(trace="synthetic", requests=9, rate=3, max_input=7, max_output=5)
    sessions = workload.make(options, model)
    assert [(len(s.turns), len(s.turns[0].prompt), s.turns[0].max_tokens) for s in sessions] == [(1, 7, 5)] * 9
    assert [s.arrival_s for s in sessions] == pytest.approx([i / 3 for i in range(9)])


@pytest.mark.parametrize(("kind", "deviation"), [("fixed", 0.0), ("poisson", 1.0), ("bursty", 2.0)])
def test_arrivals_have_the_rate_and_the_deviation_that_their_name_says(kind, deviation):
    gaps = workload.arrival_gaps(kind, 4.0, 40_000, random.Random(1))
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(0.25 * deviation, rel=0.05, abs=1e-9)


# -------------------------------------------------------------------------------------------------------- faults


def test_standard_faults_strike_other_devices_each_time():
    found = faults.standard((0.5, 0.25), "lost", DEVICES, 1)
    assert [(f.at, f.devices) for f in found] == [(0.25, ("cpu:2",)), (0.5, ("cpu:3",))]
    with pytest.raises(ConfigError, match="leave none of 4"):
        faults.standard((0.25, 0.5), "lost", DEVICES, 2)


def test_a_fault_script(tmp_path):
    path = tmp_path / "script.json"
    path.write_text(
        '[{"at": 0.5, "devices": ["cpu:1"], "kind": "hang", "after_s": 2}, {"at": 0, "devices": ["cpu:0"]}]'
    )
    first, second = faults.read_script(path, DEVICES)
    assert (first.at, first.kind, first.devices) == (0, "lost", ("cpu:0",))
    assert (second.kind, second.after_s) == ("hang", 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "truncated"),
        ('[{"at": 0.5, "devices": ["cpu:9"]}]', "cpu:9"),
        ('[{"at": 25, "devices": ["cpu:1"]}]', "share from 0 to 1"),
        ('[{"at": 0.5, "devices": []}]', "names some"),
        ('[{"at": 0.5, "devices": ["cpu:1"], "when": 3}]', "when"),
    ],
)
def test_a_fault_script_that_is_wrong_says_why(tmp_path, text, why):
    path = tmp_path / "script.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        faults.read_script(path, DEVICES)


# ------------------------------------------------------------------------------------------------------- systems


def test_a_command_is_filled_in_and_knows_its_placeholders():
    system = System(name="s", command=("run", "{model}", "--tp={tp}", "{devices}"), env={"A": "1", "PATH": None})
    values = dict(model="/m", served_name="n", host="h", port=1, devices="cpu:0,cpu:1", tp=2, runtime_dir="/r")
    assert system.command_for(**values) == ["run", "/m", "--tp=2", "cpu:0,cpu:1"]
    environment = system.environment(B="2")
    assert (environment["A"], environment["B"]) == ("1", "2") and "PATH" not in environment
    with pytest.raises(ConfigError, match="placeholder"):
        System(name="s", command=("{modle}",)).command_for(**values)


def test_systems_by_name_and_file(model, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"name": "other", "command": ["other"], "faults": "victim", "victim": "worker"}')
    options = ("--device-memory=1G",)
    found = systems.resolve(
        ["anchortp", "anchortp-restart", "anchortp-published", str(path)], tmp_path, tmp_path, options
    )
    assert [system.name for system in found] == ["anchortp", "anchortp-restart", "anchortp-published", "other"]
    assert [system.faults for system in found] == ["anchor", "everything", "anchor", "victim"]
    assert all("--device-memory=1G" in system.command for system in found[:3])
    with pytest.raises(ConfigError, match="no system is called 'nonesuch'"):
        systems.resolve(["nonesuch"], model, tmp_path)
    with pytest.raises(ConfigError, match="setup-vllm"):
        systems.resolve(["vllm-tp1-eager"], model, tmp_path)
    path.write_text('{"name": "other"}')
    with pytest.raises(ConfigError, match="command"):
        systems.resolve([str(path)], tmp_path, tmp_path)


def test_a_model_with_heads_of_zeros_answers_the_same(tmp_path, monkeypatch):
    """TINY has 6 q and 2 KV heads: at 3 devices of equal shares it needs 9 and 3."""
    monkeypatch.setenv("ANCHORTP_CACHE", str(tmp_path / "cache"))
    plain = write_model(tmp_path / "plain")
    assert padding.padded(plain, 2) == plain
    folder = padding.padded(plain, 3)
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 16)
    prompt = [5, 100, 3, 250, 17]
    assert torch.allclose(Oracle(folder).logits(prompt), Oracle(plain).logits(prompt), atol=1e-5)
    assert padding.padded(plain, 3) == folder and sorted(p.name for p in (tmp_path / "cache" / "models").iterdir()) == [
        folder.name
    ]


# ---------------------------------------------------------------------------------------------------------- grid


def test_the_grid_has_the_most_telling_runs_first():
    chosen = [
        System(name="elastic", command=("a",), faults="anchor"),
        System(name="restart", command=("b",)),
        System(name="fixed", command=("c",), degrees=(1,)),
    ]
    found = grid.cases(
        models={Path("m"): chosen},
        changes=grid.parse_changes("4-3,8-6"),
        shares=(0.25, 0.5),
        workload=WorkloadOptions(requests=1000),
        requests_more=50,
    )
    told = [(c.change, c.faults[0].kind, c.faults[0].at, c.system.name, c.workload.requests) for c in found]
    assert told[:6] == [
        ("4→3", "lost", at, name, 1000) for at in (0.25, 0.5) for name in ("elastic", "restart", "fixed")
    ]
    assert told[6:8] == [("4→4", kind, 0.25, "elastic", 50) for kind in ("crash", "hang")]
    assert told[8:] == [("8→6", "lost", at, name, 50) for at in (0.25, 0.5) for name in ("elastic", "restart")]
    assert len({case.file_name() for case in found}) == len(found)


@pytest.mark.parametrize("text", ["4", "3-4", "4-0", "4-x", ""])
def test_a_change_that_is_none(text):
    with pytest.raises(ConfigError, match="as 4-3"):
        grid.parse_changes(text)
