"""The forward pass on units: one decoder for the Llama and Qwen3 families, over memory that others own."""

from anchortp.model.batch import BatchEntry, DecodeGroup, ForwardBatch, PrefillChunk
from anchortp.model.decoder import Decoder
from anchortp.model.kv_cache import KVCache
from anchortp.model.weights import LayerWeights, WeightViews, check_weights

__all__ = [
    "BatchEntry",
    "DecodeGroup",
    "Decoder",
    "ForwardBatch",
    "KVCache",
    "LayerWeights",
    "PrefillChunk",
    "WeightViews",
    "check_weights",
]
