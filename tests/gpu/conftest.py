"""Without a GPU, or without cuda-bindings, every test here is skipped, and says why."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

PROBE = """
from anchortp.arena.cuda import open_cuda
from anchortp.errors import ConfigError
try:
    open_cuda(0)
except ConfigError as error:
    print(error)
"""


@functools.cache
def why_not() -> str:
    """Asked in another process: after cuInit in this one, no process that is forked from it could use CUDA."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr.strip()[-300:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(__file__.rpartition("/")[0])]
    if here and (why := why_not()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=why))
