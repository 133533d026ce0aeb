"""What a model is made of: unit families, and how a unit's tensors lie in a checkpoint and in an arena.

Nothing else in the project knows how a tensor is cut. A *unit* is the smallest slice that moves; it spans all
layers, unless it is an expert of one layer. Storage is unit-major: a copy of a tensor (one per layer, say) is the
concatenation of its units' blocks in slot order, each block `[rows, hidden]` with the hidden axis last.
Row-parallel weights (attention output, MLP down) are cut along their columns in a checkpoint and stored
transposed, so that here too a shard grows by appending rows.

Experts can be cut in two ways. As units of family expert: then their tensors have one copy, a pool of slots, each
for any expert of any layer. Or as columns: then a unit of family mlp is a block of columns of every expert of
every layer, and the tensors have a copy per layer and expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    family that a model lacks has 0 units or is not in the mappings, and is not among `families`."""

    @property
    def families(self) -> tuple[str, ...]: ...

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

    `name` may hold `{layer}` and `{expert}`. Unit u owns indices `[u*extent, (u+1)*extent)` of axis `axis` (an
    expert that is a unit all of them); axis 1 is stored transposed. Indices beyond the checkpoint tensor's end are
    padding (zeros).
    """

    name: str
    axis: Literal[0, 1]
    extent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTensor:
    """A tensor of one family: per copy and unit a block of `rows` x `hidden` elements, its parts stacked."""

    key: str
    family: str
    rows: int
    parts: tuple[Source, ...]
    per_layer: bool = True
    per_expert: bool = False  # and per layer: copy layer * num_experts + expert


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
        units = {
            ATTENTION: c.num_q_heads,
            KV: c.num_kv_heads,
            MLP: (c.moe.width if c.moe else c.mlp_width) // self.mlp_block,
            VOCAB: -(-c.vocab_size // self.vocab_block),
        }
        if c.moe and c.moe.cut == "experts":
            units |= {MLP: 0, EXPERT: c.num_layers * c.moe.num_experts}
        return units

    @cached_property
    def families(self) -> tuple[str, ...]:
        """The families that this model has units of."""
        return tuple(family for family, count in self.num_units.items() if count)

    @cached_property
    def tensors(self) -> tuple[UnitTensor, ...]:
        c, hd, vb = self.config, self.config.head_dim, self.vocab_block
        q, k, v, o = (f"model.layers.{{layer}}.self_attn.{name}_proj.weight" for name in "qkvo")
        tensors = [
            UnitTensor(key="q", family=ATTENTION, rows=hd, parts=(_rows(q, hd),)),
            UnitTensor(key="o", family=ATTENTION, rows=hd, parts=(_columns(o, hd),)),
            UnitTensor(key="kv", family=KV, rows=2 * hd, parts=(_rows(k, hd), _rows(v, hd))),
            *self._mlp_tensors(),
        ]
        vocab = {"embed": "model.embed_tokens.weight"}
        if not c.tie_embeddings:
            vocab["lm_head"] = "lm_head.weight"
        for key, name in vocab.items():
            tensors.append(UnitTensor(key=key, family=VOCAB, rows=vb, parts=(_rows(name, vb),), per_layer=False))
        return tuple(tensors)

    def _mlp_tensors(self) -> tuple[UnitTensor, UnitTensor]:
        """gate_up and down, of the MLP or of the experts."""
        moe, mb = self.config.moe, self.mlp_block
        names = ("gate_proj", "up_proj", "down_proj")
        if moe is not None:
            expert_names = ("w1", "w3", "w2") if self.config.architecture == "mixtral" else names
            names = tuple(f"experts.{{expert}}.{name}" for name in expert_names)
        gate, up, down = (f"model.layers.{{layer}}.{self._mlp_name}.{name}.weight" for name in names)
        in_pool = moe is not None and moe.cut == "experts"
        family, per_expert = EXPERT if in_pool else MLP, moe is not None and not in_pool

        def tensor(key: str, rows: int, *parts: Source) -> UnitTensor:
            return UnitTensor(
                key=key, family=family, rows=rows, parts=parts, per_layer=not in_pool, per_expert=per_expert
            )

        return tensor("gate_up", 2 * mb, _rows(gate, mb), _rows(up, mb)), tensor("down", mb, _columns(down, mb))

    @property
    def _mlp_name(self) -> str:
        return "block_sparse_moe" if self.config.architecture == "mixtral" else "mlp"

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
        if c.moe is not None:
            name, shape = f"{layer}{self._mlp_name}.gate.weight", (c.moe.num_experts, c.hidden_size)
            tensors.append(ReplicatedTensor(key="router", name=name, shape=shape))
        final = ReplicatedTensor(key="final_norm", name="model.norm.weight", shape=(c.hidden_size,))
        return (*tensors, final)

    def in_panels(self, tensor: UnitTensor) -> bool:
        """Whether its blocks are made of panels. A tied embedding is its lm_head."""
        c = self.config
        wanted = tensor.key in _PANEL_KEYS or (tensor.key == "embed" and c.tie_embeddings)
        fits = tensor.rows % PANEL_ROWS == 0 and c.hidden_size % PANEL_COLUMNS == 0
        return c.panels and wanted and fits

    def piece_bytes(self, tensor: UnitTensor) -> int:
        """Bytes of the smallest part of a block that can be read by itself: a row, or a panel."""
        row_bytes = self.config.hidden_size * self.config.dtype_bytes
        return row_bytes * PANEL_ROWS if self.in_panels(tensor) else row_bytes

    def block_bytes(self, tensor: UnitTensor) -> int:
        """Bytes of one unit's block in one copy of `tensor`."""
        return tensor.rows * self.config.hidden_size * self.config.dtype_bytes

    def num_copies(self, tensor: UnitTensor | ReplicatedTensor) -> int:
        """How often the tensor occurs: once for embeddings, the last norm and the pool of experts, else in every
        layer; where columns are cut out of every expert, once per layer and expert."""
        if isinstance(tensor, UnitTensor) and tensor.per_expert:
            return self.config.num_layers * self._num_experts
        return self.config.num_layers if tensor.per_layer else 1

    def copies_in_layer(self, tensor: UnitTensor, layer: int) -> range:
        """Of a tensor that is per layer: its copies in `layer`."""
        each = self.num_copies(tensor) // self.config.num_layers
        return range(layer * each, (layer + 1) * each)

    def stored_at(self, tensor: UnitTensor, part: Source, copy: int, unit: int) -> tuple[str, int]:
        """The checkpoint tensor that holds `part` of a unit's block in one copy, and the index where it begins."""
        if tensor.family == EXPERT:
            return self._stored_name(part, unit), 0
        return self._stored_name(part, copy if tensor.per_expert else copy * self._num_experts), unit * part.extent

    def stored_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape in elements of every checkpoint tensor that the units are made of."""
        for tensor in self.tensors:
            for part in tensor.parts:
                shape = self._stored_shape(tensor, part)
                for copy in range(self.num_copies(tensor)):
                    for unit in range(self.num_units[EXPERT]) if tensor.family == EXPERT else (0,):
                        yield self.stored_at(tensor, part, copy, unit)[0], shape
        for replicated in self.replicated:
            for layer in range(self.num_copies(replicated)):
                yield replicated.name.format(layer=layer), replicated.shape

    @property
    def _num_experts(self) -> int:
        return self.config.moe.num_experts if self.config.moe else 1

    def _stored_name(self, part: Source, expert: int) -> str:
        layer, expert = divmod(expert, self._num_experts)
        return part.name.format(layer=layer, expert=expert)

    def _stored_shape(self, tensor: UnitTensor, part: Source) -> tuple[int, int]:
        # Only the vocabulary may end within a unit; the rest of its last unit is padding.
        extent = self.config.vocab_size
        if tensor.family != VOCAB:
            extent = part.extent * (1 if tensor.family == EXPERT else self.num_units[tensor.family])
        return (extent, self.config.hidden_size) if part.axis == 0 else (self.config.hidden_size, extent)

    @cached_property
    def unit_bytes(self) -> dict[str, int]:
        """Bytes of one unit of each family, all its tensors and copies."""
        sizes = dict.fromkeys(self.num_units, 0)
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
        sharded = sum(self.num_units[f] * self.unit_bytes[f] for f in self.families)
        return sharded + self.replicated_bytes

    def num_groups(self, family: str) -> int:
        return self.config.num_layers if family == EXPERT else 1

    def kv_head_of(self, q_head: int) -> int:
        """The KV head (unit of family kv) that q head reads."""
        return q_head // self.config.q_heads_per_kv


def _rows(name: str, extent: int) -> Source:
    return Source(name=name, axis=0, extent=extent)


def _columns(name: str, extent: int) -> Source:
    return Source(name=name, axis=1, extent=extent)


def model_units(config: ModelConfig) -> ModelUnits:
    """Cuts a model into units. Blocks are as wide as kernels like, but never so wide that the finest degree of
    tensor parallelism (one q head a device) would leave a device without an MLP block that it could have. Where
    experts are units, an expert is one block."""
    if config.moe is None:
        mlp_block = _block(config.mlp_width, config.num_q_heads)
    elif config.moe.cut == "columns":
        mlp_block = _block(config.moe.width, config.num_q_heads)
    else:
        mlp_block = config.moe.width
    return ModelUnits(
        config=config,
        mlp_block=mlp_block,
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
