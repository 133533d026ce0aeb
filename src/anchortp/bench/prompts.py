"""Prompts of an exact length in tokens, which no prefix cache has seen."""

from __future__ import annotations

import json
import random
from pathlib import Path

from anchortp.errors import ConfigError


def vocabulary_size(folder: Path) -> int:
    """Of the model. Raises ConfigError."""
    path = folder / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} does not give a vocab_size ({error!r}); give a Hugging Face model folder.") from None


def random_prompts(num_prompts: int, num_tokens: int, vocabulary: int, seed: str) -> list[list[int]]:
    """Token ids. The lowest hundredth of the vocabulary is left out: special tokens live there."""
    rng = random.Random(seed)
    lowest = min(vocabulary - 1, max(1, vocabulary // 100))
    return [[rng.randrange(lowest, vocabulary) for _ in range(num_tokens)] for _ in range(num_prompts)]
