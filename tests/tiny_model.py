"""Small random models as Hugging Face folders, made without transformers, and what they must answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from anchortp.config import load_model_config, parse_model_config
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import KVAddresses, WeightAddresses, initial_layout, model_units
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews
from anchortp.transfer.checkpoint import Checkpoint
from anchortp.transfer.loader import load_replicated, load_units

TINY = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 259,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "dtype": "float32",
    "eos_token_id": 258,
}


def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """Random weights, large enough that greedy answers vary and differ clearly between prompts."""
    raw = TINY | changes
    units = model_units(parse_model_config(raw))
    generator = torch.Generator().manual_seed(seed)
    c = units.config
    tensors = {}
    for name, shape in units.stored_tensors():
        noise = torch.randn(shape, generator=generator)
        value = 1 + 0.1 * noise if len(shape) == 1 else 0.2 * noise  # norms are vectors, all others matrices
        tensors[name] = value.to(getattr(torch, c.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# No multiple of a row: rows that are alike would give logits that are alike.
NOISE_ELEMENTS = (1 << 24) + 3


def write_repetitive_model(folder: Path, seed: int = 0, **changes) -> Path:
    """As `write_model`, a shard per layer, for models that are larger than memory and time allow to make up: all
    matrices are pieces of one stretch of noise, from different places on."""
    raw = TINY | changes
    units = model_units(parse_model_config(raw))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(NOISE_ELEMENTS, generator=generator).mul_(0.2).to(getattr(torch, units.config.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    for name, shape in units.stored_tensors():
        layer = re.search(r"layers\.(\d+)\.", name)
        file = index[name] = f"model-{layer[1] if layer else 'rest'}.safetensors"
        shards.setdefault(file, {})[name] = torch.empty(shape, dtype=noise.dtype, device="meta")
    for file, tensors in shards.items():
        made = {name: _piece_of(noise, meta.shape, generator) for name, meta in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _piece_of(noise: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    start = int(torch.randint(noise.numel(), (), generator=generator))
    num_times = -(-(start + shape.numel()) // noise.numel())
    piece = noise.repeat(num_times)[start : start + shape.numel()].view(shape)
    return piece.clone() if len(shape) > 1 else piece * 0.5 + 1  # norms are vectors


class Oracle:
    """One device, in this process: greedy answers by computing the whole sequence anew for every token."""

    size, rank = 1, 0

    def __init__(self, folder: Path):
        config = load_model_config(folder)
        units = model_units(config)
        layout = initial_layout(units, ("cpu:0",))
        addresses = WeightAddresses(units=units)
        buffer = torch.zeros(addresses.reserved_bytes, dtype=torch.uint8)
        checkpoint = Checkpoint.open(folder, units)
        load_replicated(checkpoint, buffer, addresses)
        everything = [(f, unit, unit) for f in units.families for unit in range(units.num_units[f])]
        load_units(checkpoint, buffer, addresses, everything)
        self._block_size = 16
        kv = KVAddresses(config=config, block_size=self._block_size, num_blocks=64)
        cache = torch.zeros(kv.reserved_bytes, dtype=torch.uint8)
        shard = layout.shards[0]
        self._decoder = Decoder(
            units, layout, 0, WeightViews(buffer, addresses, shard), KVCache(cache, kv, shard), max_model_len=512
        )

    def all_reduce(self, x):
        return x

    def gather(self, x, cols, root=0):
        return [x]

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        entry = ScheduledSeq(
            request_id="oracle",
            token_ids=tuple(token_ids),
            start=0,
            position=len(token_ids),
            block_ids=tuple(range(64)),
            sample=True,
        )
        return self._decoder.forward(ForwardBatch.build([entry], self._block_size), self)[0]

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids).argmax()))
        return token_ids[len(prompt) :]
