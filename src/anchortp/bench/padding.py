"""A copy of a model with more attention heads, all zero, for engines that only cut into equal shares.

A head whose rows of v and columns of o are zero adds nothing, so the answers are the same.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from anchortp.config import cache_folder
from anchortp.errors import ConfigError

_PART = re.compile(r"self_attn\.([qkvo])_proj\.weight$")


def padded(model: Path, tp: int) -> Path:
    """The folder itself where its heads can be cut into `tp` equal shares, else a padded copy, made once into the
    cache. Raises ConfigError for a model without separate q, k, v, o."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    num_q = int(config["num_attention_heads"])
    num_kv = int(config.get("num_key_value_heads") or num_q)
    if num_q % tp == 0 and num_kv % tp == 0:
        return model
    folder = cache_folder() / "models" / f"{model.name}-padded-tp{tp}"
    if (folder / "config.json").exists():
        return folder
    wanted_kv = -(-num_kv // tp) * tp
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_q)
    wanted = {"q": num_q // num_kv * wanted_kv, "k": wanted_kv, "v": wanted_kv, "o": num_q // num_kv * wanted_kv}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        partial = Path(work, "padded")
        shutil.copytree(model, partial, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        _write_weights(model, partial, {part: heads * head_dim for part, heads in wanted.items()})
        heads = {"num_attention_heads": wanted["q"], "num_key_value_heads": wanted_kv, "head_dim": head_dim}
        (partial / "config.json").write_text(json.dumps(config | heads, indent=2), encoding="utf-8")
        partial.rename(folder)
    return folder


def _write_weights(model: Path, folder: Path, widths: dict[str, int]) -> None:
    """`widths`: rows of q, k, v and columns of o. All files of the checkpoint become one."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found = _PART.search(name)
            tensors[name] = tensor if found is None else _grown(tensor, widths[found[1]], axis=int(found[1] == "o"))
    if not any(_PART.search(name) for name in tensors):
        raise ConfigError(f"{model} has no q_proj, k_proj, v_proj, o_proj; it cannot be padded for another engine.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _grown(tensor: Any, size: int, *, axis: int) -> Any:
    """Zeros appended along `axis` up to `size`."""
    shape = list(tensor.shape)
    shape[axis] = size
    grown = tensor.new_zeros(shape)
    grown.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return grown
