"""What a layer's attention takes by each library, for a section of `bench.gpu_check`: `--attention`'s three ways."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from anchortp.config import parse_model_config
from anchortp.devices import parse_device
from anchortp.engine.accelerator import Accelerator
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.layout import KVAddresses, WeightAddresses, initial_layout, model_units
from anchortp.model import Decoder, ForwardBatch, KVCache, WeightViews
from bench.gpu_ranks import timed
from tests.tiny_model import TINY

BLOCK_SIZE = 16


def attention(scale: Any) -> dict[str, Any]:
    """Seconds of one layer's attention, projections and all, without graphs; and how far its result is from that of
    multiplied matrices."""
    accelerator = Accelerator.of(parse_device(scale.device(0)))
    keys = 4096 if scale.kind == "cuda" else 64
    cases = {  # sequences, tokens that are in the cache, new tokens
        f"decode 1 after {keys}": (1, keys, 1),
        f"decode 16 after {keys // 4}": (16, keys // 4, 1),
        f"prefill {keys // 8}": (1, 0, keys // 8),
        f"prefill {keys // 8} after {keys // 2}": (1, keys // 2, keys // 8),
    }
    decoder = _decoder(scale, accelerator, num_blocks=16 * (keys // 4 // BLOCK_SIZE + 1))
    ways = ["torch", "sdpa"]
    if scale.kind == "cuda" and importlib.util.find_spec("flashinfer") is not None:
        ways.append("flashinfer")
    result: dict[str, Any] = {}
    with torch.inference_mode():
        for name, case in cases.items():
            result[name] = _compare(decoder, accelerator, ways, scale.repeats, *case)
    return result


def _compare(
    decoder: Decoder,
    accelerator: Accelerator,
    ways: list[str],
    repeats: int,
    num_sequences: int,
    num_cached: int,
    num_new: int,
) -> dict[str, float]:
    num_blocks = -(-(num_cached + num_new) // BLOCK_SIZE)
    seqs = [
        ScheduledSeq(
            request_id=str(index),
            token_ids=(1,) * num_new,
            start=num_cached,
            position=num_cached + num_new,
            block_ids=tuple(range(index * num_blocks, (index + 1) * num_blocks)),
            sample=True,
        )
        for index in range(num_sequences)
    ]
    figures, wanted = {}, None
    layer = decoder.weights.layers[0]
    for way in ways:
        with accelerator.placing():
            decoder.paged = accelerator.paged(way, decoder.config, BLOCK_SIZE)
            batch = ForwardBatch.build(seqs, BLOCK_SIZE)
            x = torch.randn(len(batch.positions), decoder.config.hidden_size, generator=_generator(accelerator))
            x, step = x.to(decoder.dtype), decoder.prepare(batch)
            found = decoder.attention(0, layer, x, step)
            figures[f"{way}_s"] = timed(
                accelerator, repeats, lambda x=x, step=step: decoder.attention(0, layer, x, step)
            )
        wanted = found if wanted is None else wanted
        figures[f"{way}_largest_difference"] = float((found - wanted).abs().max() / wanted.abs().max())
    return figures


def _decoder(scale: Any, accelerator: Accelerator, num_blocks: int) -> Decoder:
    """One layer with the large model's attention and hardly anything else; random weights, a random cache."""
    little = {"num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 256}
    units = model_units(parse_model_config(TINY | scale.large_model | little))
    layout = initial_layout(units, ["cpu:0"])
    addresses = WeightAddresses(units=units)
    kv = KVAddresses(config=units.config, block_size=BLOCK_SIZE, num_blocks=num_blocks)
    dtype = getattr(torch, units.config.dtype)
    with torch.inference_mode(), accelerator.placing():
        memory = (torch.empty(size, dtype=torch.uint8) for size in (addresses.reserved_bytes, kv.reserved_bytes))
        weights, cache = memory
        for buffer, deviation in ((weights, 0.02), (cache, 1.0)):
            buffer.view(dtype).normal_(0.0, deviation, generator=_generator(accelerator))
        views = WeightViews(weights, addresses, layout.shards[0]), KVCache(cache, kv, layout.shards[0])
        return Decoder(units, layout, 0, *views, max_model_len=scale.large_model.get("max_position_embeddings", 512))


def _generator(accelerator: Accelerator) -> torch.Generator:
    return torch.Generator(accelerator.torch_device or "cpu").manual_seed(0)
