"""Everything that needs a GPU, in one command: `make gpu-check`, or `python -m bench.gpu_check`.

Runs the tests of `tests/gpu`, then measures (`bench.gpu_sections`), each part in a process of its own with a bound on
its time: one that hangs or fails is a line of the table and does not keep the others from running. Needs torch with
CUDA, cuda-bindings, msgspec, xxhash, numpy, safetensors, transformers, rich, pytest and pytest-timeout; no network; for
the last part a GPU of 80 GB and 25 GB of disk; at most a quarter of an hour. Prints a table, writes
`bench/reports/DATE-gpu.md` and its JSON, and ends with that JSON on one line.
Without a GPU it says what is missing and exits with 0. Exit status 1: a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEEDED = (
    "torch",
    "cuda.bindings",
    "msgspec",
    "xxhash",
    "numpy",
    "safetensors",
    "transformers",
    "rich",
    "pytest",
    "pytest_timeout",
)
TEST_TIMEOUT_S = 210
# Together with the tests under a quarter of an hour, whatever hangs; without the last under ten minutes.
SECTION_TIMEOUT_S = {
    "memory": 60,
    "survival": 75,
    "collectives": 60,
    "kernels": 35,
    "attention": 35,
    "engine": 120,
    "qwen3_8b": 300,
}


def missing() -> str:
    """What keeps a GPU from being used here, in words; "" if nothing does."""
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"the package {name.replace('_', '-')} is not installed"
    from anchortp.arena.cuda import open_cuda
    from anchortp.errors import AnchorTPError

    try:
        open_cuda(0)
    except AnchorTPError as error:
        return str(error)
    # In another process: this one must stay free of CUDA contexts.
    probe = "import torch; assert torch.cuda.is_available(), torch.__version__"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    return "" if done.returncode == 0 else f"torch sees no GPU: {done.stderr.strip().splitlines()[-1]}"


def run_tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    began_s = time.perf_counter()
    output, status = _run(command, TEST_TIMEOUT_S)
    counts = {word: int(num) for num, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)}
    return {
        "ok": status == 0 and counts.get("passed", 0) > 0,
        "seconds": time.perf_counter() - began_s,
        "counts": counts,
        "output": "" if status == 0 else output[-6000:],
    }


def run_section(name: str, kind: str) -> dict[str, Any]:
    began_s = time.perf_counter()
    output, status = _run([sys.executable, "-m", "bench.gpu_sections", name, "--kind", kind], SECTION_TIMEOUT_S[name])
    seconds = time.perf_counter() - began_s
    if status != 0:
        return {"ok": False, "seconds": seconds, "output": output[-6000:]}
    return {"ok": True, "seconds": seconds, "figures": json.loads(output.strip().splitlines()[-1])}


def _run(command: list[str], timeout_s: float) -> tuple[str, int]:
    """Output and exit status (124 when it was ended by the bound). All of its process group ends with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *sys.path[1:]])}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
            return output, process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return f"{output}\nended after {timeout_s} s", 124


def figures(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """The short table: what was measured, in words and numbers."""
    rows = []
    for name, part in parts.items():
        rows.append((name, ("ok" if part["ok"] else "FAILED") + f", {part['seconds']:.0f} s"))
        rows += [(f"  {key}", value) for key, value in _flat(part.get("figures") or part.get("counts") or {})]
    return rows


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += _flat(value, f"{label}: ")
        else:
            rows.append((label, _in_words(key, value)))
    return rows


def _in_words(key: str, value: Any) -> str:
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return str(value)
    if key.endswith("_share"):
        return f"{value:.1%}"
    if key.endswith("_ratio"):
        return f"{value:.2f}x"
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,} B"
    if key.endswith("bytes_per_s"):
        return f"{value / 1e9:.1f} GB/s"
    if key.endswith("_s") and not key.endswith("per_s"):
        return f"{value * 1e3:.3f} ms"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Markdown for people, JSON beside it; a second run on one day takes the next number."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['date']}-gpu-{result['kind']}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in range(1, 1000))
    path = next(folder / f"{name}.md" for name in names if not (folder / f"{name}.md").exists())
    lines = [f"# {result['date']}: `make gpu-check` on {result['machine'].get('gpu', result['kind'])}", ""]
    lines += [f"- {key}: {value}" for key, value in result["machine"].items()]
    lines += ["", "| what | measured |", "|---|---|"]
    lines += [f"| {name.strip()} | {value} |" for name, value in figures(result["parts"])]
    for name, part in result["parts"].items():
        if part.get("output"):
            lines += ["", f"## {name} failed", "", "```", part["output"].strip(), "```"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def machine(kind: str) -> dict[str, Any]:
    """Asked in another process: this one must stay free of CUDA contexts."""
    probe = """
import json, platform, sys, torch
from importlib.metadata import version
from bench.common import conditions
found = conditions() | {"cuda-bindings": version("cuda-bindings"), "cuda": torch.version.cuda}
if sys.argv[1] == "cuda":
    properties = torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "num_gpus": torch.cuda.device_count()}
print(json.dumps(found))
"""
    output, status = _run([sys.executable, "-c", probe, kind], 60)
    return json.loads(output.strip().splitlines()[-1]) if status == 0 else {"unknown": output[-500:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", choices=("cuda", "sim"), default="cuda", help="sim: does it run? Its numbers are void."
    )
    parser.add_argument("--parts", default=",".join(["tests", *SECTION_TIMEOUT_S]), help="which, separated by commas")
    parser.add_argument("--reports", type=Path, default=ROOT / "bench" / "reports", help="where the report goes")
    options = parser.parse_args()
    if options.kind == "cuda" and (why := missing()):
        print(f"gpu-check: nothing was checked, for {why}", file=sys.stderr)
        print(json.dumps({"benchmark": "gpu-check", "checked": False, "why": why}))
        return 0
    result: dict[str, Any] = {
        "benchmark": "gpu-check",
        "checked": True,
        "kind": options.kind,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(options.kind),
        "parts": {},
    }
    for name in options.parts.split(","):
        print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
        result["parts"][name] = run_tests() if name == "tests" else run_section(name, options.kind)
        if output := result["parts"][name].get("output"):
            print(output, file=sys.stderr, flush=True)
    path = write_report(result, options.reports)
    width = max(len(name) for name, _ in figures(result["parts"]))
    for name, value in figures(result["parts"]):
        print(f"{name:<{width}}  {value}", file=sys.stderr)
    print(f"gpu-check: the report is {path}", file=sys.stderr)
    print(json.dumps(result), flush=True)
    return 0 if all(part["ok"] for part in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
