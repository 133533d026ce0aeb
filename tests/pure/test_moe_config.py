"""config.json files of mixtures of experts, as the hub has them and as transformers writes them now."""

from __future__ import annotations

import pytest

from anchortp.config import MoEConfig, parse_model_config
from anchortp.errors import ConfigError, UnsupportedModel

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
    "num_experts_per_tok": 2,
}
MIXTRAL = BASE | {"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}
QWEN3_MOE = BASE | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 16,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_mixtral():
    config = parse_model_config(MIXTRAL)
    assert config.moe == MoEConfig(num_experts=8, top_k=2, width=256, normalise=True)
    assert config.mlp_width == 0 and not config.qk_norm and config.rope.theta == 1e6


def test_qwen3_moe():
    config = parse_model_config(QWEN3_MOE)
    assert config.moe == MoEConfig(num_experts=16, top_k=2, width=32, normalise=True)
    assert config.mlp_width == 0 and config.qk_norm and config.rope.theta == 1e4


def test_qwen3_moe_does_not_normalise_unless_told():
    raw = {key: value for key, value in QWEN3_MOE.items() if key != "norm_topk_prob"}
    assert not parse_model_config(raw).moe.normalise


def test_qwen3_moe_as_transformers_5_writes_it():
    raw = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 16}
    assert parse_model_config(raw) == parse_model_config(QWEN3_MOE)


def test_the_cut_is_chosen_by_whoever_serves():
    assert parse_model_config(MIXTRAL, expert_cut="columns").expert_cut == "columns"
    assert parse_model_config(BASE | {"model_type": "llama"}, expert_cut="columns").moe is None


def test_a_window_that_holds_every_context_is_none():
    raw = MIXTRAL | {"sliding_window": 4096, "max_position_embeddings": 4096}
    assert parse_model_config(raw).max_position == 4096


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (QWEN3_MOE | {"mlp_only_layers": [1]}, UnsupportedModel, "mlp_only_layers must be empty"),
        (QWEN3_MOE | {"decoder_sparse_step": 2}, UnsupportedModel, "decoder_sparse_step 1"),
        (QWEN3_MOE | {"num_experts": 0}, ConfigError, "number of experts is 0; it must be at least 1"),
        (QWEN3_MOE | {"moe_intermediate_size": 0}, ConfigError, "width of an expert is 0"),
        (QWEN3_MOE | {"num_experts_per_tok": 17}, ConfigError, "num_experts_per_tok is 17, but there are 16 experts"),
        (MIXTRAL | {"num_experts_per_tok": 0}, ConfigError, "num_experts_per_tok is 0"),
        (MIXTRAL | {"num_local_experts": "many"}, ConfigError, "wrong kind"),
        (MIXTRAL | {"sliding_window": 512}, UnsupportedModel, "sliding_window is 512"),
        ({k: v for k, v in MIXTRAL.items() if k != "num_local_experts"}, ConfigError, "lacks 'num_local_experts'"),
        ({k: v for k, v in QWEN3_MOE.items() if k != "moe_intermediate_size"}, ConfigError, "lacks 'moe_interm"),
        ({k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}, ConfigError, "lacks 'num_local_experts'"),
        (BASE | {"model_type": "qwen2_moe"}, UnsupportedModel, "'qwen2_moe' is not supported; these are: llama, mixtr"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(raw, error, message):
    with pytest.raises(error, match=message):
        parse_model_config(raw)


def test_an_unknown_cut_is_refused():
    with pytest.raises(ConfigError, match="expert_cut is 'rows'; choose 'experts' or 'columns'"):
        parse_model_config(MIXTRAL, expert_cut="rows")
