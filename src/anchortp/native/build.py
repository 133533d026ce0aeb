"""Compiles `kernels.cpp` and its headers for this machine, once: what it made is kept in the cache. Free of torch.

A C++ compiler is all that it needs, no headers of Python or torch: the kernels are functions over pointers. They could
come compiled if they did not have to be for the very CPU: without its vector instructions they would gain nothing.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from anchortp.errors import ConfigError

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-Wno-psabi")
FLAGS += ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# Compiled with OpenMP but not linked to one: a second one beside torch's would have threads of its own.
OPENMP = "-fopenmp"
TIMEOUT_S = 120.0


def build_kernels(folder: Path) -> Path:
    """The library for this CPU, in `folder`; a second or two where it has to be made.

    Raises ConfigError if it cannot be: there is no compiler, or it fails.
    """
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    made_of = (*sources, " ".join(FLAGS).encode(), " ".join(sorted(cpu_flags())).encode())
    library = folder / f"kernels-{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"
    if not library.exists():
        _compile(library)
    return library


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """What /proc/cpuinfo says that this CPU can do."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _compile(library: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(None, map(shutil.which, COMPILERS)))[:1]
    if not compiler:
        raise ConfigError(f"no C++ compiler was found ({', '.join(COMPILERS)}); install one, or set CXX.")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="making-") as folder:
            compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
            _run([*compiler, *FLAGS, OPENMP, "-c", str(SOURCE), "-o", str(compiled)])
            _run([*compiler, "-shared", str(compiled), "-o", str(linked)])
            os.replace(linked, library)  # whole or not at all, whoever else compiles at this moment
    except OSError as error:
        raise ConfigError(f"the kernels cannot be compiled: {error}.") from error


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]} has not compiled the kernels in {TIMEOUT_S:.0f} s.") from error
    if done.returncode:
        raise ConfigError(f"{command[0]} does not compile the kernels: {done.stderr.strip()[-2000:]}")
