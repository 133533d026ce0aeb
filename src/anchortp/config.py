"""Frozen configs. Whatever may be "auto" is resolved before it is frozen. No torch here."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

from anchortp.devices import Device, check_engine_devices, parse_device
from anchortp.errors import ConfigError, UnsupportedModel
from anchortp.native import build_kernels, cpu_flags

DType = Literal["bfloat16", "float32"]
GROUPS_WITH_SLOTS = ("peer", "mixed")  # that sum in memory of the devices' own
# What "mixed" moves at most without NCCL, per rank: the sum of a decode step of 16 sequences of hidden size 4096.
MIXED_SLOT_BYTES = 256 << 10
FLASHINFER_HEAD_DIMS = (64, 128, 256)  # that it is compiled for
_CACHE_LINE_BYTES = 64  # to which slots are rounded up

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}

ExpertCut = Literal["experts", "columns"]

log = logging.getLogger("anchortp.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a Hugging Face `model_type` says beyond the numbers in config.json."""

    qk_norm: bool = False  # q and k are normalised per head
    is_moe: bool = False
    rope_theta: float = 10000.0  # where config.json names none


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "qwen3": Architecture(qk_norm=True),
    "mixtral": Architecture(is_moe=True, rope_theta=1e6),
    "qwen3_moe": Architecture(qk_norm=True, is_moe=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `kind` is "default", "linear" or "llama3"; the last four fields serve "llama3"."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """The experts that every layer has in place of an MLP; each token takes `top_k` of them.

    `width`: columns of one expert. `normalise`: the weights of a token's experts are scaled to sum to 1.
    `cut`: what a device holds: whole experts, or some columns of every expert (a choice of serving, as the dtype).
    """

    num_experts: int
    top_k: int
    width: int
    normalise: bool
    cut: ExpertCut = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Widths in elements; `dtype` is that of weights and KV cache.

    `moe` is None for dense models, and `mlp_width` 0 for the others.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int
    tie_embeddings: bool
    qk_norm: bool
    rms_eps: float
    rope: RopeConfig
    max_position: int
    dtype: DType
    eos_token_ids: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    panels: bool = False  # column-parallel weights lie in the arena in panels (`layout.units`)

    @property
    def q_heads_per_kv(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def expert_cut(self) -> ExpertCut:
        return self.moe.cut if self.moe else "experts"

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


def load_model_config(folder: str | Path, dtype: str = "auto", expert_cut: str = "experts") -> ModelConfig:
    """Reads `config.json` (and `generation_config.json`, for the end-of-text tokens) of a Hugging Face folder.

    `dtype="auto"` keeps the checkpoint's, with float16 served as bfloat16. `expert_cut`: see `MoEConfig.cut`; it
    changes nothing for dense models.
    Raises ConfigError (no such folder, broken JSON, missing fields) and UnsupportedModel.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path, "Give a Hugging Face model folder (config.json, *.safetensors, tokenizer.json).")
    generation = path.with_name("generation_config.json")
    if generation.exists():
        eos = _read_json(generation, "Remove it or repair it.").get("eos_token_id")
        if eos is not None:
            raw = {**raw, "eos_token_id": eos}
    return parse_model_config(raw, dtype, expert_cut)


def parse_model_config(raw: dict[str, Any], dtype: str = "auto", expert_cut: str = "experts") -> ModelConfig:
    """As `load_model_config`, from the parsed JSON."""
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"model_type {kind!r} is not supported; these are: {', '.join(sorted(ARCHITECTURES))}.")
    _refuse_unsupported(raw)
    architecture = ARCHITECTURES[kind]
    try:
        hidden, q_heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        config = ModelConfig(
            architecture=kind,
            num_layers=int(raw["num_hidden_layers"]),
            hidden_size=hidden,
            num_q_heads=q_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or q_heads),
            head_dim=int(raw.get("head_dim") or hidden // q_heads),
            mlp_width=0 if architecture.is_moe else int(raw["intermediate_size"]),
            vocab_size=int(raw["vocab_size"]),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=architecture.qk_norm,
            rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_parse_rope(raw, architecture.rope_theta),
            max_position=int(raw.get("max_position_embeddings", 2048)),
            dtype=_resolve_dtype(dtype, raw),
            eos_token_ids=_as_tuple(raw.get("eos_token_id")),
            moe=_parse_moe(raw, expert_cut) if architecture.is_moe else None,
        )
    except KeyError as error:
        raise ConfigError(f"config.json lacks {error.args[0]!r}; it must describe a {kind} model.") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json holds a value of the wrong kind: {error}") from None
    _check_shape(config)
    return config


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. {advice}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. {advice}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} does not hold a JSON object. {advice}")
    return raw


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Features that would silently change the result if they were ignored."""
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise UnsupportedModel("attention_bias and mlp_bias are not supported.")
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is.")
    if raw.get("use_sliding_window") and raw.get("sliding_window"):
        raise UnsupportedModel("sliding-window attention is not supported.")
    # Mixtral has no `use_sliding_window`: there a window is used wherever one is given.
    window = raw.get("sliding_window") if raw.get("model_type") == "mixtral" else None
    if window is not None and window < raw.get("max_position_embeddings", 2048):
        raise UnsupportedModel(f"sliding-window attention is not supported (sliding_window is {window}).")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise UnsupportedModel(
            "layers without experts between layers with experts are not supported "
            "(mlp_only_layers must be empty and decoder_sparse_step 1)."
        )
    if raw.get("quantization_config"):
        raise UnsupportedModel("quantised checkpoints are not supported; convert to bfloat16 first.")


def _parse_moe(raw: dict[str, Any], cut: str) -> MoEConfig:
    if cut not in ("experts", "columns"):
        raise ConfigError(f"expert_cut is {cut!r}; choose 'experts' or 'columns'.")
    mixtral = raw["model_type"] == "mixtral"
    # transformers 5 writes `num_local_experts` for Qwen3-MoE too.
    experts = "num_local_experts" if mixtral or "num_experts" not in raw else "num_experts"
    return MoEConfig(
        num_experts=int(raw[experts]),
        top_k=int(raw["num_experts_per_tok"]),
        width=int(raw["intermediate_size" if mixtral else "moe_intermediate_size"]),
        normalise=mixtral or bool(raw.get("norm_topk_prob", False)),
        cut=cut,  # type: ignore[arg-type]
    )


def _parse_rope(raw: dict[str, Any], default_theta: float) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before it, `rope_theta` stood beside `rope_scaling`.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"rope type {kind!r} is not supported; default, linear and llama3 are.")
    return RopeConfig(
        theta=float(rope.get("rope_theta") or raw.get("rope_theta") or default_theta),
        kind=kind,
        factor=float(rope.get("factor", 1.0)),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position=int(rope.get("original_max_position_embeddings", 8192)),
    )


def _resolve_dtype(dtype: str, raw: dict[str, Any]) -> DType:
    if dtype == "auto":
        stored = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
        return "float32" if stored == "float32" else "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; choose auto, {' or '.join(DTYPE_BYTES)}.")
    return dtype  # type: ignore[return-value]


def _as_tuple(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)


def _check_shape(config: ModelConfig) -> None:
    sizes = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.moe is None:
        sizes["intermediate_size"] = config.mlp_width
    else:
        sizes["number of experts"] = config.moe.num_experts
        sizes["num_experts_per_tok"] = config.moe.top_k
        sizes["width of an expert"] = config.moe.width
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"config.json: {name} is {value}; it must be at least 1.")
    if config.moe is not None and config.moe.top_k > config.moe.num_experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok is {config.moe.top_k}, but there are {config.moe.num_experts} experts."
        )
    if config.num_q_heads % config.num_kv_heads:
        raise ConfigError(
            f"config.json: {config.num_q_heads} attention heads are not a multiple of "
            f"{config.num_kv_heads} key-value heads."
        )
    if config.head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {config.head_dim}; rotary embeddings need an even one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start; nothing is "auto" any more (see `resolve_engine_config`).

    `device_memory_bytes` is the budget of anchors that have to be started; running ones keep theirs.
    `kv_blocks` is wanted, and reserved as address space; fewer are used where memory is short.
    """

    model_folder: str
    runtime_dir: str
    model: ModelConfig
    devices: tuple[str, ...]
    device_memory_bytes: int
    max_model_len: int
    max_num_seqs: int = 16
    max_batch_tokens: int = 512
    max_waiting: int = 256
    kv_block_size: int = 16
    kv_blocks: int = 2048
    num_spares: int = 1
    threads_per_worker: int = 1
    collectives: Literal["shm", "gloo", "peer", "nccl", "mixed"] = "shm"
    plan_policy: Literal["makespan", "units", "cmm", "greedy"] = "makespan"
    eplb: bool = True  # of a mixture of experts: replicate hot ones where memory allows
    eplb_interval_s: float = 10.0
    attention: Literal["torch", "sdpa", "flashinfer"] = "torch"  # see `model.paged`; "torch": matrices, multiplied
    kernels: str = ""  # on CPUs: the library of our own kernels (`anchortp.native`); "": torch's
    triton: bool = False  # on GPUs: kernels of ours by Triton (`anchortp.model.fused`)
    cuda_graphs: bool = True  # on GPUs decode steps are captured and replayed
    eplb_replica_choices: float | None = None  # see `eplb.Limits.choices_per_replica`; None: by the kind of device
    pipelined_load: bool = True  # a layer computes when its weights are there
    speeds: tuple[tuple[str, float], ...] = ()
    min_step_deadline_s: float = 2.0
    packed_folder: str = ""  # where weights are kept as arenas hold them (`transfer.packed`); "": nowhere
    kv_mirror_slots: int = 0  # blocks, with all KV heads, that the host's mirror holds; 0: no mirror

    @property
    def page_bytes(self) -> int:
        """The step in which the devices commit memory."""
        return parse_device(self.devices[0]).page_bytes

    @property
    def gpus(self) -> tuple[int, ...]:
        """The indices of the GPUs that the devices are on."""
        return tuple(sorted({d.index for d in map(parse_device, self.devices) if d.kind == "cuda"}))

    @property
    def slot_bytes(self) -> int:
        """Room for the largest all-reduce, one step's hidden states in float32; larger gathers go in pieces. Of "mixed"
        groups the largest that is summed there."""
        largest = self.max_batch_tokens * self.model.hidden_size * 4
        return min(largest, MIXED_SLOT_BYTES) if self.collectives == "mixed" else largest

    @property
    def peer_slots_bytes(self) -> int:
        """What collectives take of each device's own memory: two slots, as `comm.peer` wants them."""
        if self.collectives not in GROUPS_WITH_SLOTS:
            return 0
        return -(-2 * (self.slot_bytes + _CACHE_LINE_BYTES) // self.page_bytes) * self.page_bytes

    @property
    def min_kv_blocks(self) -> int:
        """Blocks for one sequence of the full length: with fewer, requests that are promised cannot be served."""
        return -(-self.max_model_len // self.kv_block_size)


def resolve_engine_config(
    model_folder: str | Path,
    *,
    runtime_dir: str | Path,
    devices: tuple[str, ...],
    dtype: str = "auto",
    weights: str = "auto",
    expert_cut: str = "experts",
    device_memory_bytes: int | None = None,
    max_model_len: int | None = None,
    kv_tokens: int | None = None,
    kv_mirror: str = "host",
    kv_mirror_bytes: int | None = None,
    max_num_seqs: int = 16,
    max_batch_tokens: int = 512,
    kv_block_size: int = 16,
    collectives: str = "auto",
    attention: str = "auto",
    kernels: str = "auto",
    **more: Any,
) -> EngineConfig:
    """Resolves what was left open from the model and this machine, and freezes it.

    `weights`: "plain", or "auto": in panels where those are known to be what the CPU's matmul reads.
    `device_memory_bytes`: an equal share of 80 % of the memory that is free now. `max_model_len`: the model's,
    but at most 8192. `kv_tokens`: every sequence at full length. `kv_mirror`: "host" or "off"; `kv_mirror_bytes`:
    room for the whole KV cache, but at most a tenth of the free memory. `expert_cut`: see `MoEConfig.cut`.
    `collectives`: shared memory on the host; on GPUs memory that all map where devices share one, else NCCL, and beside
    it such memory for small messages where the driver says that the GPUs can use each other's.
    `attention`: on GPUs "sdpa" is torch's fused attention and "flashinfer" that package's; "torch" multiplies matrices;
    "auto": sdpa on GPUs, and torch elsewhere. `kernels`: on CPU devices "native", which a C++ compiler makes once
    (`anchortp.native`), on GPUs "triton", anywhere "torch", or "auto": native where they can be made, else torch's.
    Raises ConfigError.
    """
    model = load_model_config(model_folder, dtype, expert_cut)
    parsed = check_engine_devices(devices)
    if parsed[0].kind == "cuda" and device_memory_bytes is None:
        raise ConfigError("devices on GPUs need a budget; give each one with --device-memory, as 20G.")
    if weights not in ("auto", "plain"):
        raise ConfigError(f"weights is {weights!r}; choose 'auto' or 'plain'.")
    if weights == "auto" and model.dtype == "bfloat16" and parsed[0].kind != "cuda" and reads_panels():
        model = replace(model, panels=True)
    max_model_len = max_model_len or min(model.max_position, 8192)
    if not 2 <= max_model_len <= model.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; this model takes from 2 to {model.max_position} tokens.")
    for name, value in {"max_num_seqs": max_num_seqs, "kv_block_size": kv_block_size}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")
    kv_tokens = kv_tokens or max_num_seqs * max_model_len
    if kv_tokens < max_model_len:
        raise ConfigError(f"kv_tokens is {kv_tokens}; one sequence alone may take {max_model_len} (max_model_len).")
    cores = len(os.sched_getaffinity(0))
    kv_blocks = -(-kv_tokens // kv_block_size)
    return EngineConfig(
        model_folder=str(Path(model_folder).resolve()),
        runtime_dir=str(runtime_dir),
        model=model,
        devices=devices,
        attention=_resolve_attention(attention, model, parsed[0].kind),  # type: ignore[arg-type]
        kernels=_resolve_kernels(kernels, parsed[0].kind),
        triton=kernels == "triton",
        device_memory_bytes=device_memory_bytes or int(0.8 * _available_bytes() / len(devices)),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        kv_block_size=kv_block_size,
        kv_blocks=kv_blocks,
        kv_mirror_slots=_mirror_slots(model, kv_mirror, kv_mirror_bytes, kv_block_size, kv_blocks),
        threads_per_worker=max(1, cores // max(1, len(devices))),
        collectives=_resolve_collectives(collectives, parsed),  # type: ignore[arg-type]
        **more,
    )


def _resolve_collectives(collectives: str, devices: tuple[Device, ...]) -> str:
    kind, share = devices[0].kind, any(device.part is not None for device in devices)
    if collectives == "auto":
        if kind != "cuda" or share:
            return "shm" if kind != "cuda" else "peer"
        separate = "there is one rank" if len(devices) == 1 else _separate_gpus(devices)
        log.info("collectives: %s", f"NCCL alone, as {separate}" if separate else "NCCL, small ones in mapped memory")
        return "nccl" if separate else "mixed"
    gpu_kinds = ("shm", "peer") if share else ("shm", "peer", "nccl", "mixed")
    fitting = {"cpu": ("shm", "gloo"), "sim": ("shm", "gloo", "peer"), "cuda": gpu_kinds}[kind]
    why = ""
    if collectives not in fitting:
        is_nccl = share and collectives in ("nccl", "mixed")
        why = "NCCL wants a GPU per rank" if is_nccl else f"{kind} devices have not that kind"
    elif collectives in GROUPS_WITH_SLOTS and kind == "cuda" and (why := _separate_gpus(devices)):
        fitting = tuple(name for name in fitting if name not in GROUPS_WITH_SLOTS)
    if why:
        raise ConfigError(f"collectives {collectives!r}: {why}; choose auto, or one of {', '.join(fitting)}.")
    return collectives


def _separate_gpus(devices: tuple[Device, ...]) -> str:
    """Why the ranks' GPUs cannot all use each other's memory, by the driver's word; "" if they can."""
    pairs = permutations(sorted({device.index for device in devices}), 2)
    try:
        return next((f"GPU {a} cannot use the memory of GPU {b}" for a, b in pairs if not _reaches(a, b)), "")
    except ConfigError as error:
        return f"the driver cannot be asked: {error}"


def _reaches(gpu: int, other: int) -> bool:
    from anchortp.arena.cuda import open_cuda  # not without a GPU: it is an extra, and this module is everyone's

    return open_cuda(gpu).reaches(other)


def _resolve_attention(attention: str, model: ModelConfig, kind: str) -> str:
    if attention not in ("auto", "torch", "sdpa", "flashinfer"):
        raise ConfigError(f"attention is {attention!r}; choose 'auto', 'torch', 'sdpa' or 'flashinfer'.")
    if attention == "auto":
        return "sdpa" if kind == "cuda" else "torch"
    why = ""
    if attention == "sdpa" and kind == "cpu":
        why = "CPU devices have a faster one"
    elif attention == "flashinfer" and kind != "cuda":
        why = f"the devices are of kind {kind}"
    elif attention == "flashinfer" and (model.dtype != "bfloat16" or model.head_dim not in FLASHINFER_HEAD_DIMS):
        dims = ", ".join(map(str, FLASHINFER_HEAD_DIMS))
        why = f"heads are of {model.head_dim} in {model.dtype}, and it serves heads of {dims} in bfloat16"
    elif attention == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
        why = "the package flashinfer-python is not installed"
    if why:
        raise ConfigError(f"attention {attention!r} cannot be used: {why}; choose 'auto'.")
    return attention


def _resolve_kernels(kernels: str, kind: str) -> str:
    """The path of the library, which is made where it has to be; "" for torch's kernels."""
    if kernels not in ("auto", "native", "torch", "triton"):
        raise ConfigError(f"kernels is {kernels!r}; choose 'auto', 'native', 'torch' or 'triton'.")
    only = {"native": "cpu", "triton": "cuda"}.get(kernels, kind)
    if kind != only:
        raise ConfigError(f"kernels {kernels!r} are for {only} devices, and these are of kind {kind}; choose 'auto'.")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError("kernels 'triton' cannot be used: the package triton is not installed; choose 'torch'.")
    if kernels == "torch" or kind != "cpu":
        return ""
    try:
        return str(build_kernels(cache_folder() / "kernels"))
    except ConfigError as error:
        if kernels == "native":
            raise
        log.warning("torch's kernels are used, which are slower: %s", error)
        return ""


def reads_panels() -> bool:
    """Whether this CPU is one on which oneDNN's bfloat16 weights are known to come in the panels of `layout.units`."""
    return "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()


def _mirror_slots(model: ModelConfig, kv_mirror: str, num_bytes: int | None, block_size: int, kv_blocks: int) -> int:
    if kv_mirror not in ("host", "off"):
        raise ConfigError(f"kv_mirror is {kv_mirror!r}; choose 'host' or 'off'.")
    if kv_mirror == "off":
        return 0
    slot_bytes = 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * model.dtype_bytes
    if num_bytes is None:
        num_bytes = max(slot_bytes, _available_bytes() // 10)
    if num_bytes < slot_bytes:
        raise ConfigError(
            f"kv_mirror_bytes is {num_bytes}, but one block of {block_size} tokens takes {slot_bytes}; "
            f"give the mirror more, or switch it off."
        )
    return min(kv_blocks, num_bytes // slot_bytes)


def _available_bytes() -> int:
    """Memory that can be had without swapping: what is free, and what the page cache would give back."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo does not say how much memory is available; give --device-memory.")


def cache_folder() -> Path:
    """Where models, data and environments fetched by this project are kept: outside of any checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ANCHORTP_CACHE") or Path(base, "anchortp"))


def default_runtime_dir() -> Path:
    """Where anchors and server meet: `$ANCHORTP_RUNTIME_DIR`, else a private folder of this user."""
    if given := os.environ.get("ANCHORTP_RUNTIME_DIR"):
        return Path(given)
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base, "anchortp") if base else Path(tempfile.gettempdir(), f"anchortp-{os.getuid()}")
