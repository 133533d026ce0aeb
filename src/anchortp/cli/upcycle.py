"""A real mixture of experts made from a dense model: every MLP is copied into several experts ("upcycling",
Komatsuzaki et al. 2023, section 2.1), and a router is put before them.

Top-k weights sum to 1, so experts that are exact copies compute what the MLP did, whatever the router says. With
experts that are perturbed and a router that has favourites, answers still make sense and load is as uneven as in
trained models. Both are made in the user's cache folder, from fixed seeds.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from anchortp.cli.smollm2 import fetch_smollm2
from anchortp.config import ModelConfig, cache_folder, load_model_config
from anchortp.errors import ConfigError

Variant = Literal["exact", "skewed"]
NAMES: dict[Variant, str] = {"exact": "smollm2-135m-moe-exact", "skewed": "smollm2-135m-moe-skewed"}
PERTURBATION = 0.1  # relative size of what is added to a copy
ROUTER_SPREAD = 0.6  # of the logs of the experts' router norms: a larger one gives fewer favourites more tokens
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def fetch_moe(variant: Variant, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of SmolLM2-135M upcycled to 8 experts, of which a token takes 2; made if it is not there (1.4 GB).

    Raises ConfigError as `fetch_smollm2` does.
    """
    folder = cache_folder() / "models" / NAMES[variant]
    if (folder / "config.json").exists():
        return folder
    source = fetch_smollm2(tell)
    tell(f"copying the MLPs of {source.name} into 8 experts each ({variant})")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        made = upcycle(source, Path(work, "made"), variant=variant)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


def upcycle(
    source: Path, folder: Path, *, variant: Variant, num_experts: int = 8, top_k: int = 2, seed: int = 0
) -> Path:
    """Writes the dense Llama model in `source` to `folder` as Mixtral; returns `folder`. A layer at a time.

    Raises ConfigError unless `source` is such a model, CheckpointError if its weights cannot be read.
    """
    config = load_model_config(source)
    if config.architecture != "llama":
        raise ConfigError(f"{source} is a {config.architecture} model; only llama models can become Mixtral ones.")
    folder.mkdir(parents=True)
    for path in source.iterdir():  # tokenizer, chat template, generation defaults
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    _write_weights(source, folder, config, variant, num_experts, seed)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
    }
    raw["rope_parameters"] = {"rope_theta": config.rope.theta, "rope_type": "default"} | raw.get("rope_parameters", {})
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    return folder


def _write_weights(
    source: Path, folder: Path, config: ModelConfig, variant: Variant, num_experts: int, seed: int
) -> None:
    """One file per layer and one for the rest, with an index: never more than a layer in memory."""
    import torch
    from safetensors.torch import save_file

    from anchortp.layout import model_units
    from anchortp.transfer.checkpoint import INDEX_NAME, Checkpoint

    units = model_units(config)
    checkpoint = Checkpoint.open(source, units)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, list[str]] = {}
    for name, _ in units.stored_tensors():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(layer, []).append(name)
    index: dict[str, str] = {}
    for layer, names in files.items():
        tensors: dict[str, Any] = {}
        for name in names:
            tensor = checkpoint.tensor(name)
            if ".mlp." not in name:
                tensors[name] = tensor.clone()
                continue
            block, kind = name.removesuffix(".weight").split("mlp.")
            for expert in range(num_experts):
                copy = tensor.clone() if variant == "exact" else _perturbed(tensor, generator)
                tensors[f"{block}block_sparse_moe.experts.{expert}.{EXPERT_NAMES[kind]}.weight"] = copy
        if layer != "rest":
            router = _router(num_experts, config.hidden_size, variant, generator)
            tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.to(
                next(iter(tensors.values())).dtype
            )
        file = f"model-{layer}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def _perturbed(tensor: Any, generator: Any) -> Any:
    """A copy with rows and columns scaled at random: another matrix, as large, for two vectors of random numbers."""
    import torch

    rows, columns = (1 + PERTURBATION * 0.5**0.5 * torch.randn(size, generator=generator) for size in tensor.shape)
    return (tensor.float() * rows.unsqueeze(1) * columns).to(tensor.dtype)


def _router(num_experts: int, hidden: int, variant: Variant, generator: Any) -> Any:
    """Random directions. Skewed: of unequal length, since the longer a row, the further its logit can reach."""
    import torch

    router = torch.randn(num_experts, hidden, generator=generator) / hidden**0.5
    if variant == "skewed":
        router *= torch.exp(ROUTER_SPREAD * torch.randn(num_experts, 1, generator=generator))
    return router
