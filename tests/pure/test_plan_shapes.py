"""Built-in shapes and those of config.json files, against published sizes and against the engine's own units."""

from __future__ import annotations

import pytest

from anchortp.config import parse_model_config
from anchortp.errors import ConfigError, UnsupportedModel
from anchortp.layout import EXPERT, initial_layout, model_units
from anchortp.plan import SHAPES, shape, shape_from_config

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "torch_dtype": "float32"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = (
    LLAMA | {"model_type": "qwen3_moe", "num_experts": 16, "moe_intermediate_size": 32} | {"num_experts_per_tok": 4}
)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Qwen3-8B", 16.4), ("Qwen3-14B", 29.5), ("Qwen3-30B-A3B", 61.0), ("Mixtral-8x22B", 281), ("Llama-3.1-70B", 141)],
)
def test_built_in_shapes_weigh_what_is_published(name, gigabytes):
    assert SHAPES[name].total_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_deepseek_has_61_layers_of_256_experts():
    assert SHAPES["deepseek-v3-like"].num_units[EXPERT] == 61 * 256


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b", "Qwen3-30B-A3B-Instruct-2507"])
def test_names_may_carry_an_owner_and_an_ending(name):
    assert shape(name) is SHAPES["Qwen3-30B-A3B"]


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"'gpt-9' is not built in.*Qwen3-8B"):
        shape("gpt-9")


@pytest.mark.parametrize("raw", [LLAMA, QWEN3, MIXTRAL, QWEN3_MOE])
def test_shapes_agree_with_the_units_of_the_engine(raw):
    ours, engine = shape_from_config(raw), model_units(parse_model_config(raw))
    assert ours.families == engine.families
    for family in engine.families:
        assert ours.num_groups(family) == engine.num_groups(family)
        assert ours.num_units[family] == engine.num_units[family]
        assert ours.unit_bytes[family] == engine.unit_bytes[family]
    assert ours.replicated_bytes == engine.replicated_bytes
    assert [ours.kv_head_of(q) for q in range(6)] == [engine.kv_head_of(q) for q in range(6)]
    assert initial_layout(ours, ("a", "b", "c")) == initial_layout(engine, ("a", "b", "c"))


@pytest.mark.parametrize(("raw", "experts", "width"), [(MIXTRAL, 8, 256), (QWEN3_MOE, 16, 32)])
def test_experts_of_a_layer_are_units(raw, experts, width):
    found = shape_from_config(raw, "mine")
    assert found.name == "mine" and found.num_units[EXPERT] == 4 * experts
    assert found.unit_bytes[EXPERT] == 3 * width * 96 * 2
    layout = initial_layout(found, ("a", "b", "c"))
    layout.check(found)
    for layer in range(4):
        units = set(range(layer * experts, (layer + 1) * experts))
        widths = [len(units & set(shard[EXPERT])) for shard in layout.shards]
        assert max(widths) - min(widths) <= 1, "every layer is spread evenly"
    totals = [len(shard[EXPERT]) for shard in layout.shards]
    assert max(totals) - min(totals) <= 1, "and so are all layers together"


def test_transformers_5_writes_another_name_for_the_number_of_experts():
    raw = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 16}
    assert shape_from_config(raw) == shape_from_config(QWEN3_MOE)


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        ({"model_type": "gpt2"}, UnsupportedModel, "'gpt2' cannot be planned; these can: llama"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, ConfigError, "'vocab_size' is missing"),
        (LLAMA | {"hidden_size": "wide"}, ConfigError, "wrong kind"),
        (LLAMA | {"num_key_value_heads": 4}, ConfigError, "6 attention heads are not a multiple of 4"),
        (LLAMA | {"num_hidden_layers": 0}, ConfigError, "num_layers is 0"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, UnsupportedModel, "layers without experts"),
    ],
)
def test_bad_configs_are_refused_in_words(raw, error, message):
    with pytest.raises(error, match=message):
        shape_from_config(raw)
