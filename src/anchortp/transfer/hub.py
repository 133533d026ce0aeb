"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from anchortp.errors import ConfigError

NEEDED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # weights, tokenizer, chat template


def resolve_model(name_or_path: str | Path) -> Path:
    """A folder as it is; a hub name ("owner/model") as the folder of its snapshot, fetched if it is not cached.

    Blocks while downloading, with the hub library's own timeouts and progress bars. Raises ConfigError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"{path} is a file; give the folder that holds config.json and *.safetensors.")
    name = str(name_or_path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{path} does not exist; give a Hugging Face model folder or a hub name (owner/model).")
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed by hub names only

    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED_FILES))
    except Exception as error:  # the border: the hub's, the HTTP library's and the system's errors alike
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{name!r} is neither a folder here nor a model that could be fetched ({reason}). "
            f"Check the name and the network, or download it elsewhere and give its folder."
        ) from error
