"""What a model is made of: unit families, and how a unit's tensors lie in a checkpoint and in an arena.

Nothing else in the project knows how a tensor is cut. A *unit* is the smallest slice that moves; it spans all
layers. Storage is unit-major: the tensor of one layer is the concatenation of its units' blocks in slot order,
each block `[rows, hidden]` with the hidden axis last. Row-parallel weights (attention output, MLP down) are cut
along their columns in a checkpoint and stored transposed, so that here too a shard grows by appending rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from anchortp.config import ModelConfig

ATTENTION, KV, MLP, VOCAB = "attention", "kv", "mlp", "vocab"
FAMILIES = (ATTENTION, KV, MLP, VOCAB)
EXPERT = "expert"
# A mixture of experts has one family more. Its unit is one expert of one layer: layer * num_experts + expert.
EVERY_FAMILY = (*FAMILIES, EXPERT)
MAX_BLOCK = 64  # columns of an MLP block, rows of a vocabulary block: a size that matmul kernels like

# Weights in panels, as oneDNN's matmul wants them (its format AB16b64a2b): 64 rows, transposed, where two
# neighbouring columns count as one. A block of whole panels is as large as a plain one, and a shard of such blocks
# grows by appending, like any other. Row-parallel weights cannot be had like that: their panels would run across
# all units.
PANEL_ROWS = 64
PANEL_COLUMNS = 32  # a multiple of so many
_PANEL_KEYS = ("q", "kv", "gate_up", "lm_head")


class UnitCatalog(Protocol):
    """What a layout or a plan must know about a model: how many units of which size. `ModelUnits` is one; a
    family that a model lacks has 0 units or is not in the mappings."""

    @property
    def num_units(self) -> Mapping[str, int]: ...

    @property
    def unit_bytes(self) -> Mapping[str, int]: ...

    @property
    def replicated_bytes(self) -> int: ...

    def num_groups(self, family: str) -> int:
        """Into how many equal runs of units a family falls that are spread over the devices one by one: one per
        layer for experts, since the slowest device of *each* layer is waited for; 1 for all others."""

    def kv_head_of(self, q_head: int) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one part of a unit's block lies in the checkpoint.

    `name` may hold `{layer}`. Unit u owns indices `[u*extent, (u+1)*extent)` of axis `axis`; axis 1 is stored
    transposed. Indices beyond the checkpoint tensor's end are padding (zeros).
    """

    name: str
    axis: Literal[0, 1]
    extent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTensor:
    """A tensor of one family: per layer and unit a block of `rows` x `hidden` elements, its parts stacked."""

    key: str
    family: str
    rows: int
    parts: tuple[Source, ...]
    per_layer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedTensor:
    """A tensor that every device holds whole. `shape` in elements; per layer if `name` holds `{layer}`."""

    key: str
    name: str
    shape: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name


@dataclass(frozen=True, kw_only=True)
class ModelUnits:
    """The unit families of one model: how many units, how large, made of which tensors."""

    config: ModelConfig
    mlp_block: int
    vocab_block: int

    @cached_property
    def num_units(self) -> dict[str, int]:
        c = self.config
        return {
            ATTENTION: c.num_q_heads,
            KV: c.num_kv_heads,
            MLP: c.mlp_width // self.mlp_block,
            VOCAB: -(-c.vocab_size // self.vocab_block),
        }

    @cached_property
    def tensors(self) -> tuple[UnitTensor, ...]:
        c, layer = self.config, "model.layers.{layer}."
        attn, mlp = layer + "self_attn.", layer + "mlp."

        def rows(name: str, extent: int) -> Source:
            return Source(name=name, axis=0, extent=extent)

        def columns(name: str, extent: int) -> Source:
            return Source(name=name, axis=1, extent=extent)

        hd, mb, vb = c.head_dim, self.mlp_block, self.vocab_block
        q, o = rows(attn + "q_proj.weight", hd), columns(attn + "o_proj.weight", hd)
        k, v = rows(attn + "k_proj.weight", hd), rows(attn + "v_proj.weight", hd)
        gate, up = rows(mlp + "gate_proj.weight", mb), rows(mlp + "up_proj.weight", mb)
        down = columns(mlp + "down_proj.weight", mb)
        tensors = [
            UnitTensor(key="q", family=ATTENTION, rows=hd, parts=(q,)),
            UnitTensor(key="o", family=ATTENTION, rows=hd, parts=(o,)),
            UnitTensor(key="kv", family=KV, rows=2 * hd, parts=(k, v)),
            UnitTensor(key="gate_up", family=MLP, rows=2 * mb, parts=(gate, up)),
            UnitTensor(key="down", family=MLP, rows=mb, parts=(down,)),
        ]
        vocab = {"embed": "model.embed_tokens.weight"}
        if not c.tie_embeddings:
            vocab["lm_head"] = "lm_head.weight"
        for key, name in vocab.items():
            tensors.append(UnitTensor(key=key, family=VOCAB, rows=vb, parts=(rows(name, vb),), per_layer=False))
        return tuple(tensors)

    @cached_property
    def replicated(self) -> tuple[ReplicatedTensor, ...]:
        c, layer = self.config, "model.layers.{layer}."
        names = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
        tensors = [
            ReplicatedTensor(key=key, name=f"{layer}{name}.weight", shape=(c.hidden_size,))
            for key, name in names.items()
        ]
        if c.qk_norm:
            for key in ("q_norm", "k_norm"):
                name = f"{layer}self_attn.{key}.weight"
                tensors.append(ReplicatedTensor(key=key, name=name, shape=(c.head_dim,)))
        final = ReplicatedTensor(key="final_norm", name="model.norm.weight", shape=(c.hidden_size,))
        return (*tensors, final)

    def is_packed(self, tensor: UnitTensor) -> bool:
        """Whether its blocks are made of panels. A tied embedding is its lm_head."""
        c = self.config
        wanted = tensor.key in _PANEL_KEYS or (tensor.key == "embed" and c.tie_embeddings)
        fits = tensor.rows % PANEL_ROWS == 0 and c.hidden_size % PANEL_COLUMNS == 0
        return c.packed_weights and wanted and fits

    def block_bytes(self, tensor: UnitTensor) -> int:
        """Bytes of one unit's block of `tensor` in one layer."""
        return tensor.rows * self.config.hidden_size * self.config.dtype_bytes

    def num_copies(self, tensor: UnitTensor | ReplicatedTensor) -> int:
        """In how many layers the tensor occurs (1 for embeddings and the last norm)."""
        return self.config.num_layers if tensor.per_layer else 1

    @cached_property
    def unit_bytes(self) -> dict[str, int]:
        """Bytes of one unit of each family, all its tensors and layers."""
        sizes = dict.fromkeys(FAMILIES, 0)
        for tensor in self.tensors:
            sizes[tensor.family] += self.block_bytes(tensor) * self.num_copies(tensor)
        return sizes

    @cached_property
    def replicated_bytes(self) -> int:
        total = 0
        for tensor in self.replicated:
            elements = 1
            for extent in tensor.shape:
                elements *= extent
            total += elements * self.config.dtype_bytes * self.num_copies(tensor)
        return total

    @cached_property
    def total_bytes(self) -> int:
        sharded = sum(self.num_units[f] * self.unit_bytes[f] for f in FAMILIES)
        return sharded + self.replicated_bytes

    def num_groups(self, family: str) -> int:
        return 1

    def kv_head_of(self, q_head: int) -> int:
        """The KV head (unit of family kv) that q head reads."""
        return q_head // self.config.q_heads_per_kv


def model_units(config: ModelConfig) -> ModelUnits:
    """Cuts a model into units. Blocks are as wide as kernels like, but never so wide that the finest degree of
    tensor parallelism (one q head a device) would leave a device without an MLP block that it could have."""
    return ModelUnits(
        config=config,
        mlp_block=_block(config.mlp_width, config.num_q_heads),
        vocab_block=_vocab_block(config.vocab_size, config.num_q_heads),
    )


def _block(width: int, degree: int) -> int:
    """The largest power of two that divides `width`, is at most MAX_BLOCK and leaves `degree` blocks."""
    block = 1
    while block < MAX_BLOCK and width % (2 * block) == 0 and width // (2 * block) >= degree:
        block *= 2
    return block


def _vocab_block(rows: int, degree: int) -> int:
    """As `_block`, but the last block of a vocabulary may be padded, so `rows` need not be a multiple."""
    block = MAX_BLOCK
    while block > 1 and -(-rows // block) < degree:
        block //= 2
    return block
