"""What identifies the weights in an arena. No torch: whoever decides about a warm attach imports this alone."""

from __future__ import annotations

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

from anchortp.config import ModelConfig
from anchortp.errors import ConfigError

DIGEST_BYTES = 16


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, by name. Empty if there are none."""
    return tuple(sorted(Path(folder).glob("*.safetensors")))


def fingerprint(folder: str | Path, config: ModelConfig) -> str:
    """Hex digest of `config.json`, dtype, how weights are cut and laid out, and each weight file's name, size, mtime.

    Two arenas with the same fingerprint hold slices of the same weights; the files' content is not read, since
    that would cost as much as loading them. (Measured: 0.2 ms for nine files.) Raises ConfigError if the folder cannot
    be read.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        _feed(digest, "config.json", (Path(folder) / "config.json").read_bytes())
        _feed(digest, "dtype", config.dtype.encode())
        if config.moe is not None:
            _feed(digest, "cut", config.moe.cut.encode())
        if config.panels:  # as one release of torch wants them
            _feed(digest, "panels", torch_version().encode())
        for path in weight_files(folder):
            status = path.stat()
            _feed(digest, path.name, f"{status.st_size} {status.st_mtime_ns}".encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}. Give a Hugging Face model folder.") from None
    return digest.hexdigest()


@functools.cache
def torch_version() -> str:
    """Of the torch that is installed. The first call in a process searches for it, for 3 ms."""
    return version("torch")


def _feed(digest: hashlib.blake2b, name: str, value: bytes) -> None:
    # Lengths first: no two different lists of fields may feed the same bytes.
    for part in (name.encode(), value):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
