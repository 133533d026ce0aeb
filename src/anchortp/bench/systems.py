"""The systems that are compared: how each is started, struck, and started again.

An adapter is a value: a command with placeholders, an environment, and what a fault means for it. More of them can be
given as JSON files (`--systems anchortp,FILE.json`), so that whatever speaks OpenAI HTTP can be measured beside the
built-in ones:

    {"name": "other", "command": ["other-server", "{model}", "--port", "{port}", "--name", "{served_name}"],
     "env": {"OTHER_THREADS": "2"}, "settings": "version 1.2, all defaults"}

Placeholders: `{model}` (folder), `{served_name}`, `{port}`, `{host}`, `{devices}` (comma-separated names of those that
are left), `{tp}` (how many), `{runtime_dir}` (private, kept over restarts).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from anchortp.bench import vllm_env
from anchortp.bench.padding import padded
from anchortp.errors import ConfigError

# Where a fault strikes. `anchor`: the device's anchor injects it, the system is on its own. `everything`: all of the
# system's processes are killed at the fault, as by a supervisor that knows of it at once. `victim`: the processes
# whose command line matches `victim` are; the supervisor waits for the system to notice and to end.
Faults = Literal["anchor", "everything", "victim"]


class System(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`degrees`: the tensor-parallel degrees that it can be started with; None: any. `settings`: for the report."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str | None] = {}  # None: not set
    faults: Faults = "everything"
    victim: str = ""
    model: str = ""  # another folder than the benchmark's, with the same answers
    settings: str = ""
    degrees: tuple[int, ...] | None = None
    start_timeout_s: float = 900.0

    def command_for(self, **values: Any) -> list[str]:
        """Raises ConfigError for a placeholder that there is none of."""
        if self.model:
            values["model"] = self.model
        try:
            return [part.format_map(values) for part in self.command]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"system {self.name}: its command has an unknown placeholder: {error}") from None

    def environment(self, **more: str) -> dict[str, str]:
        changed: dict[str, str | None] = {**os.environ, **self.env, **more}
        return {name: value for name, value in changed.items() if value is not None}


MAX_NUM_SEQS = 16  # of all systems, so that none has an advantage by its default
SERVE = (sys.executable, "-m", "anchortp", "serve", "{model}", "--devices", "{devices}", "--port", "{port}")
SERVE += ("--host", "{host}", "--served-model-name", "{served_name}", "--runtime-dir", "{runtime_dir}")
SERVE += ("--log-file", "{runtime_dir}/serve.log", "--max-num-seqs", str(MAX_NUM_SEQS), "--max-waiting", "100000")


def anchortp(name: str = "anchortp", *options: str, faults: Faults = "anchor", settings: str = "") -> System:
    return System(name=name, command=(*SERVE, *options), faults=faults, settings=settings)


def vllm(folder: Path, model: Path, *, tp: int, compiled: bool) -> System:
    """vLLM for CPUs, from the environment in `folder`. Compiled starts with what former starts left in its cache."""
    python = vllm_env.python_of(folder)
    served = padded(model, tp)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}"]
    command += ["--served-model-name", "{served_name}", "--host", "{host}", "--port", "{port}"]
    command += ["--tensor-parallel-size", str(tp), "--max-num-seqs", str(MAX_NUM_SEQS), "--max-model-len", "2048"]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    if not compiled:
        command.append("--enforce-eager")
    env: dict[str, str | None] = {
        "OMP_NUM_THREADS": None,  # it binds its threads to cores itself
        "PYTHONPATH": None,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    if tp > 1:  # left to itself it wants a NUMA node for each worker
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(_shares_of_cores(tp))
    settings = f"vllm-cpu {vllm_env.VERSION}, TP {tp}, {'compiled, warm cache' if compiled else 'eager'}, at most "
    settings += f"{MAX_NUM_SEQS} sequences, KV cache 2 GiB" + (
        "" if served == model else ", model padded with zero heads"
    )
    return System(
        name=f"vllm-tp{tp}-{'compiled' if compiled else 'eager'}",
        command=tuple(command),
        env=env,
        model="" if served == model else str(served),
        settings=settings,
        degrees=(tp,),
    )


def _shares_of_cores(count: int) -> list[str]:
    """The cores that this process may use, divided: each share as vLLM wants it, as '0,2'. At least one in each."""
    cores = sorted(os.sched_getaffinity(0))
    return [",".join(map(str, cores[index::count] or [cores[index % len(cores)]])) for index in range(count)]


def builtin(name: str, model: Path, vllm_folder: Path, serve_options: tuple[str, ...] = ()) -> System:
    """The built-in system of that name, for this model. Raises ConfigError.

    `serve_options` go to every `anchortp serve`. vLLM wants heads that divide by its degree; where they do not, it gets
    a copy of the model with heads of zeros, which answers the same. Names: anchortp, anchortp-restart,
    anchortp-published, vllm-tpN-eager, vllm-tpN-compiled.
    """
    if name == "anchortp":
        return anchortp(name, *serve_options, settings="as it comes: makespan plans, KV mirror in host memory")
    if name == "anchortp-restart":
        settings = "this engine killed whole at the fault, anchors too, and started again at once on the devices left"
        return anchortp(name, *serve_options, faults="everything", settings=settings)
    if name == "anchortp-published":
        settings = (
            "this engine with the paper's choices: contiguous intervals (CMM), no KV mirror but replay, and serving "
        )
        settings += "once all is loaded"
        options = ("--plan-policy", "cmm", "--kv-mirror", "off", "--no-pipelined-load")
        return anchortp(name, *serve_options, *options, settings=settings)
    if match := re.fullmatch(r"vllm-tp(\d+)-(eager|compiled)", name):
        return vllm(vllm_folder, model, tp=int(match[1]), compiled=match[2] == "compiled")
    raise ConfigError(
        f"no system is called {name!r}; take anchortp, anchortp-restart, anchortp-published, vllm-tpN-eager, "
        f"vllm-tpN-compiled (N: its degree), or give a JSON file."
    )


def resolve(names: list[str], model: Path, vllm_folder: Path, serve_options: tuple[str, ...] = ()) -> list[System]:
    """Built-in names and JSON files, in order. Raises ConfigError."""
    return [_read(Path(n)) if n.endswith(".json") else builtin(n, model, vllm_folder, serve_options) for n in names]


def _read(path: Path) -> System:
    try:
        return msgspec.json.decode(path.read_bytes(), type=System)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"system file {path}: {error}") from None
