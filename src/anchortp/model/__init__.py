"""The forward pass on units: one decoder for Llama, Qwen3 and their mixtures of experts, over memory of others."""

from anchortp.model.batch import BatchEntry, DecodeGroup, ForwardBatch, PrefillChunk
from anchortp.model.decoder import Decoder
from anchortp.model.graphs import Capture, CudaGraphs, DecodeGraphs
from anchortp.model.kernels import TorchKernels
from anchortp.model.kv_cache import KVCache
from anchortp.model.native import NativeDecoder, NativeKernels
from anchortp.model.weights import LayerWeights, WeightViews, check_weights

__all__ = [
    "BatchEntry",
    "Capture",
    "CudaGraphs",
    "DecodeGraphs",
    "DecodeGroup",
    "Decoder",
    "ForwardBatch",
    "KVCache",
    "LayerWeights",
    "NativeDecoder",
    "NativeKernels",
    "PrefillChunk",
    "TorchKernels",
    "WeightViews",
    "check_weights",
]
