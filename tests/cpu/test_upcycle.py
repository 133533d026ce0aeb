"""A dense model made into a mixture of experts: still the same function, or nearly, and read by transformers too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anchortp.cli import upcycle as made
from anchortp.cli.upcycle import fetch_moe, upcycle
from anchortp.config import load_model_config
from anchortp.errors import ConfigError
from tests.cpu.model_tools import reference_logits
from tests.tiny_model import Oracle, write_model

PROMPT = [5, 40, 7, 200, 11, 3, 90, 17, 4]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def folders(dense: Path) -> dict[str, Path]:
    return {variant: upcycle(dense, dense.parent / variant, variant=variant) for variant in ("exact", "skewed")}


def test_copies_compute_what_the_mlp_did(dense, folders):
    ours, theirs = Oracle(folders["exact"]), Oracle(dense)
    torch.testing.assert_close(ours.logits(PROMPT), theirs.logits(PROMPT), atol=1e-4, rtol=1e-4)
    assert ours.greedy(PROMPT, 24) == theirs.greedy(PROMPT, 24)
    assert (ours._decoder.moe.load > 0).sum() > 3 * 4, "more than half of the experts were used"


def test_skewed_experts_differ_and_their_load_is_uneven(dense, folders):
    skewed, plain = Oracle(folders["skewed"]), Oracle(dense).logits(PROMPT)
    assert 1e-3 < (skewed.logits(PROMPT) - plain).norm() / plain.norm() < 0.5
    skewed.greedy(PROMPT, 40)
    load = skewed._decoder.moe.load.float()
    assert float((load.amax(1) / load.mean(1)).mean()) > 1.5


@pytest.mark.parametrize("variant", ["exact", "skewed"])
def test_transformers_reads_it(folders, variant):
    expected = reference_logits(folders[variant], PROMPT)[-1]
    torch.testing.assert_close(Oracle(folders[variant]).logits(PROMPT), expected, atol=1e-4, rtol=1e-4)


def test_what_is_written(dense, folders):
    moe = load_model_config(folders["exact"]).moe
    assert (moe.num_experts, moe.top_k, moe.width) == (8, 2, 128)
    assert (folders["exact"] / "tokenizer.json").read_text() == "{}"
    again = upcycle(dense, dense.parent / "again", variant="skewed")
    for path in sorted(folders["skewed"].iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), "the same seed, another model"


def test_only_llama_models_become_mixtral_ones(dense, tmp_path):
    raw = json.loads((dense / "config.json").read_text()) | {"model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="is a qwen3 model; only llama models"):
        upcycle(tmp_path, tmp_path / "out", variant="exact")
    assert not (tmp_path / "out").exists()


def test_it_is_made_once_in_the_cache(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("ANCHORTP_CACHE", str(tmp_path))
    monkeypatch.setattr(made, "fetch_smollm2", lambda tell: dense)
    (tmp_path / "models").mkdir()
    heard: list[str] = []
    folder = fetch_moe("exact", heard.append)
    assert folder == fetch_moe("exact", heard.append) and len(heard) == 1
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["smollm2-135m-moe-exact"]
