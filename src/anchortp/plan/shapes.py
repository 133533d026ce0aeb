"""Models as a planner sees them: how many units of which size. Built in by name, or from a `config.json`.

Nothing here is needed to serve; an engine plans with its own `ModelUnits`, which cuts a dense model the same way.
Sizes follow the public config.json files (bfloat16; DeepSeek-V3 is published in 8 bits). Biases and scales are
left out: they are far below a thousandth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anchortp.errors import ConfigError, UnsupportedModel
from anchortp.layout import ATTENTION, EXPERT, KV, MLP, VOCAB
from anchortp.layout.units import MAX_BLOCK


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder, dense or MoE. Widths in elements. Satisfies `UnitCatalog`.

    `mlp_width`: of the dense MLP, or of the shared experts; 0 if there is none. `num_experts`: per layer, 0 for
    dense models. `q_head_params`, `kv_head_params`, `replicated_params`: weights of one q head, one KV head and of
    what every device holds, per layer, where they are not those of plain grouped-query attention (None).
    """

    name: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_width: int = 0
    num_experts: int = 0
    expert_width: int = 0
    tie_embeddings: bool = False
    qk_norm: bool = False
    dtype_bytes: int = 2
    q_head_params: int | None = None
    kv_head_params: int | None = None
    replicated_params: int | None = None

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "vocab_size"):
            _at_least(self.name, field, getattr(self, field), 1)
        for field in ("mlp_width", "num_experts", "expert_width"):
            _at_least(self.name, field, getattr(self, field), 0)
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.name}: {self.num_q_heads} attention heads are not a multiple of {self.num_kv_heads} KV heads."
            )

    @cached_property
    def mlp_block(self) -> int:
        """Columns per MLP unit; chosen as `layout.model_units` does."""
        block = 1
        while block < MAX_BLOCK and self.mlp_width % (2 * block) == 0:
            if self.mlp_width // (2 * block) < self.num_q_heads:
                break
            block *= 2
        return block

    @cached_property
    def vocab_block(self) -> int:
        block = MAX_BLOCK
        while block > 1 and -(-self.vocab_size // block) < self.num_q_heads:
            block //= 2
        return block

    @cached_property
    def num_units(self) -> dict[str, int]:
        return {
            ATTENTION: self.num_q_heads,
            KV: self.num_kv_heads,
            MLP: self.mlp_width // self.mlp_block,
            VOCAB: -(-self.vocab_size // self.vocab_block),
            EXPERT: self.num_layers * self.num_experts,
        }

    @cached_property
    def families(self) -> tuple[str, ...]:
        return tuple(family for family, count in self.num_units.items() if count)

    @cached_property
    def unit_bytes(self) -> dict[str, int]:
        row = self.hidden_size * self.dtype_bytes
        q = 2 * self.head_dim * self.hidden_size if self.q_head_params is None else self.q_head_params
        kv = 2 * self.head_dim * self.hidden_size if self.kv_head_params is None else self.kv_head_params
        return {
            ATTENTION: q * self.num_layers * self.dtype_bytes,
            KV: kv * self.num_layers * self.dtype_bytes,
            MLP: 3 * self.mlp_block * self.num_layers * row,
            VOCAB: self.vocab_block * row * (1 if self.tie_embeddings else 2),
            EXPERT: 3 * self.expert_width * row,
        }

    @cached_property
    def replicated_bytes(self) -> int:
        if self.replicated_params is not None:
            per_layer = self.replicated_params
        else:
            norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
            per_layer = norms + self.num_experts * self.hidden_size  # the router
        return (per_layer * self.num_layers + self.hidden_size) * self.dtype_bytes

    @cached_property
    def total_bytes(self) -> int:
        return self.replicated_bytes + sum(n * self.unit_bytes[f] for f, n in self.num_units.items())

    def plane_bytes(self, num_tokens: int) -> int:
        """KV cache of one KV head for `num_tokens` tokens: keys and values of all layers, 2 bytes each."""
        return 2 * 2 * self.num_layers * self.head_dim * num_tokens

    def num_groups(self, family: str) -> int:
        return self.num_layers if family == EXPERT else 1

    def kv_head_of(self, q_head: int) -> int:
        return q_head // (self.num_q_heads // self.num_kv_heads)


def _at_least(name: str, field: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}: {field} is {value}; it must be at least {least}.")


def _qwen3(name: str, layers: int, hidden: int, q: int, kv: int, **more: Any) -> Shape:
    return Shape(
        name=name,
        num_layers=layers,
        hidden_size=hidden,
        num_q_heads=q,
        num_kv_heads=kv,
        head_dim=128,
        vocab_size=151936,
        qk_norm=True,
        **more,
    )


def _deepseek_v3_like() -> Shape:
    """61 layers of 256 experts (the model itself has 58; its first three are dense), multi-head latent attention.

    Per head: q_b (1536 x 192), kv_b (512 x 256), o (128 x 7168). The latent (7168 x 576, and its cache) is one KV
    head that every device holds. Replicated: q_a (7168 x 1536), the router, norms. One shared expert as MLP.
    """
    return Shape(
        name="deepseek-v3-like",
        num_layers=61,
        hidden_size=7168,
        num_q_heads=128,
        num_kv_heads=1,
        head_dim=192,
        vocab_size=129280,
        mlp_width=2048,
        num_experts=256,
        expert_width=2048,
        dtype_bytes=1,
        q_head_params=1536 * 192 + 512 * 256 + 128 * 7168,
        kv_head_params=7168 * 576,
        replicated_params=7168 * 1536 + 256 * 7168 + 2 * 7168 + 1536 + 512,
    )


_BUILT_IN = (
    _qwen3("Qwen3-8B", 36, 4096, 32, 8, mlp_width=12288),
    _qwen3("Qwen3-14B", 40, 5120, 40, 8, mlp_width=17408),
    _qwen3("Qwen3-30B-A3B", 48, 2048, 32, 4, num_experts=128, expert_width=768),
    _qwen3("Qwen3-235B-A22B", 94, 4096, 64, 4, num_experts=128, expert_width=1536),
    Shape(
        name="Mixtral-8x22B",
        num_layers=56,
        hidden_size=6144,
        num_q_heads=48,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=32768,
        num_experts=8,
        expert_width=16384,
    ),
    Shape(
        name="Llama-3.1-70B",
        num_layers=80,
        hidden_size=8192,
        num_q_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        mlp_width=28672,
    ),
    _deepseek_v3_like(),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _BUILT_IN}
PAPER_MODELS = ("Qwen3-8B", "Qwen3-14B", "Qwen3-30B-A3B", "Mixtral-8x22B")


def shape(name: str) -> Shape:
    """A built-in shape by its name, with or without the hub's owner and endings such as `-Instruct`, in any case."""
    plain = name.rsplit("/", 1)[-1].lower()
    for known, found in SHAPES.items():
        if plain == known.lower() or plain.startswith(known.lower() + "-"):
            return found
    raise UnsupportedModel(
        f"model {name!r} is not built in; give a folder with its config.json, or one of {', '.join(SHAPES)}."
    )


# model_type -> (q and k are normalised, it has experts)
_CONFIG_TYPES = {
    "llama": (False, False),
    "qwen3": (True, False),
    "mixtral": (False, True),
    "qwen3_moe": (True, True),
}


def shape_from_config(raw: Mapping[str, Any], name: str = "") -> Shape:
    """The shape that a parsed `config.json` describes: Llama, Qwen3, Mixtral or Qwen3-MoE.

    Raises UnsupportedModel for another type, ConfigError for missing or impossible numbers.
    """
    kind = raw.get("model_type")
    if kind not in _CONFIG_TYPES:
        raise UnsupportedModel(f"model_type {kind!r} cannot be planned; these can: {', '.join(_CONFIG_TYPES)}.")
    qk_norm, is_moe = _CONFIG_TYPES[kind]
    if kind == "qwen3_moe" and (raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1):
        raise UnsupportedModel("layers without experts between layers with experts cannot be planned yet.")
    try:
        hidden, q_heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        experts = int(raw["num_experts" if "num_experts" in raw else "num_local_experts"]) if is_moe else 0
        width = int(raw["moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"])
        return Shape(
            name=name or str(raw.get("_name_or_path") or kind),
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=hidden,
            num_q_heads=q_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or q_heads),
            head_dim=int(raw.get("head_dim") or hidden // max(1, q_heads)),
            vocab_size=int(raw["vocab_size"]),
            mlp_width=0 if is_moe else width,
            num_experts=experts,
            expert_width=width if is_moe else 0,
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=qk_norm,
            dtype_bytes=4 if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else 2,
        )
    except KeyError as error:
        raise ConfigError(f"{error.args[0]!r} is missing; a config.json of a {kind} model has it.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json holds a value of the wrong kind: {error}") from None
