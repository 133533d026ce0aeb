"""Imports go one way, and what is called pure is pure (docs/structure.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "anchortp"

# What each room may import; `errors` and `config` are everyone's.
MAY_IMPORT = {
    "layout": set(),
    "plan": {"layout"},
    "recovery": {"plan", "layout"},
    "eplb": {"layout"},
    "arena": set(),
    "state": {"arena"},
    "transfer": {"arena", "plan", "layout", "native"},
    "native": set(),
    "comm": {"native"},
    "model": {"layout", "native"},
    "engine": {"recovery", "eplb", "model", "comm", "native", "transfer", "state", "arena", "plan", "layout"},
    "server": {"engine"},
    "bench": {"state", "plan", "layout"},
    "cli": {"bench", "server", "engine", "transfer", "state", "plan", "layout"},
}
COMMON = {"errors", "config", "devices"}
PURE = ("layout", "plan", "recovery", "eplb")
PURE_FILES = ("transfer/work.py", "transfer/queue.py")
IMPURE_MODULES = {"torch", "socket", "threading", "time", "asyncio", "multiprocessing", "subprocess", "selectors"}
LIGHT = ("anchortp.layout", "anchortp.plan", "anchortp.recovery", "anchortp.arena", "anchortp.state.anchor")
LIGHT += ("anchortp.bench.recovery", "anchortp.bench.supervisor", "anchortp.bench.stats")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    package = ("anchortp", *path.relative_to(SOURCE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            names |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return names


def rooms(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "anchortp" and len(p) > 1 and (SOURCE / p[1]).exists()} | {
        p[1] for p in parts if p[0] == "anchortp" and len(p) > 1 and (SOURCE / f"{p[1]}.py").exists()
    }


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    files = list((SOURCE / room).rglob("*.py"))
    assert files, f"{room} is empty"
    for path in files:
        extra = rooms(imported(path)) - MAY_IMPORT[room] - COMMON - {room}
        assert not extra, f"{path.relative_to(SOURCE)} imports {sorted(extra)}"


def test_every_room_is_listed():
    found = {path.name for path in SOURCE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert found == set(MAY_IMPORT)


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_no_torch_socket_thread_or_clock(room):
    for path in [*(SOURCE / room).rglob("*.py"), *(SOURCE / f"{name}.py" for name in COMMON)]:
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & IMPURE_MODULES, f"{path.relative_to(SOURCE)} imports {sorted(tops & IMPURE_MODULES)}"


@pytest.mark.parametrize("name", PURE_FILES)
def test_so_do_the_decisions_of_a_load(name):
    tops = {imported_name.split(".")[0] for imported_name in imported(SOURCE / name)}
    assert not tops & IMPURE_MODULES, sorted(tops & IMPURE_MODULES)


def test_what_must_be_light_does_not_import_torch():
    names = ", ".join(LIGHT)
    code = f"import sys, {names}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    code = "import sys, anchortp.eplb; assert 'torch' not in sys.modules"  # numpy is what it is made of
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_server_knows_the_engine_by_its_front_door_alone():
    for path in (SOURCE / "server").rglob("*.py"):
        inside = {name for name in imported(path) if name.startswith("anchortp.engine.")}
        assert all(name.startswith("anchortp.engine.api") for name in inside), path.name
