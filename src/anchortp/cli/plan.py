"""`anchortp plan`: what would move, over which links, for how long, and what other planners would do. No weights
are needed, no device is touched.

The options become a `Problem`, every policy answers it, and `plan_view` and `plan_plot` show the answers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anchortp.cli.serving import parse_speeds
from anchortp.cli.topology import load_topology
from anchortp.errors import ConfigError, DoesNotFit, UnsupportedModel, in_words
from anchortp.layout import ATTENTION, EXPERT, KV, MLP, VOCAB, Layout, initial_layout
from anchortp.plan import (
    PLANE,
    POLICIES,
    REPLICATED,
    SHAPES,
    Problem,
    Shape,
    Topology,
    explain,
    makespan,
    shape,
    shape_from_config,
)

DEFAULT_TOPOLOGY = "mi210-2x4"  # the paper's machine
DEFAULT_POLICY = "makespan"
_FAMILIES = {"attention": ATTENTION, "kv": KV, "mlp": MLP, "vocab": VOCAB, "expert": EXPERT, "plane": PLANE}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """As typed. `num_before`: the topology's devices if None. `num_after`: the survivors if None. `lost`,
    `already_lost`, `speeds` and `memory` name devices, or ranks of the old group; `onto`, or places in the topology."""

    model: str
    num_before: int | None = None
    num_after: int | None = None
    onto: str = ""
    lost: str = ""
    already_lost: str = ""
    topology: str = DEFAULT_TOPOLOGY
    policy: str = DEFAULT_POLICY
    speeds: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    kv_tokens: int = 0
    kv_mirror: str = ""
    weights_at: str = ""


def run(options: PlanOptions, *, json_output: bool, plot: Path | None, explain_unit: str | None) -> None:
    """Prints tables, or one JSON document, or where one unit comes from; writes the chart where one is asked for.

    Raises ConfigError, UnsupportedModel, DoesNotFit and TopologyError, each in one line with the number that does
    not fit.
    """
    from anchortp.cli import plan_view
    from anchortp.plan import Refused, compare

    _check_policy(options.policy)
    problem = build_problem(options)
    unit = None if explain_unit is None else parse_unit(explain_unit, problem)
    if unit is not None and not json_output and plot is None:
        print(explain(POLICIES[options.policy](problem), *unit))
        return
    rows = compare(problem)
    chosen = next(row for row in rows if row.policy == options.policy)
    if isinstance(chosen, Refused):
        raise DoesNotFit(f"{chosen.policy}: {chosen.why}")
    if plot is not None:
        from anchortp.cli.plan_plot import draw

        draw(problem, rows, options.policy, plot)
        print(f"wrote {plot}", file=sys.stderr)
    if json_output:
        document = plan_view.as_document(problem, rows, chosen)
        if unit is not None:
            document["explanation"] = explain(chosen.plan, *unit)
        print(json.dumps(document))
        return
    plan_view.show(problem, rows, chosen)
    if unit is not None:
        print(explain(chosen.plan, *unit))


def _check_policy(name: str) -> None:
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} is unknown; choose one of {', '.join(POLICIES)}.")


# --------------------------------------------------------------------------------------------------- the model


def load_shape(model: str) -> Shape:
    """A built-in name, a folder with a `config.json`, or such a file. Raises UnsupportedModel or ConfigError."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ConfigError(f"{path.parent} holds no config.json; give a model's folder, or a built-in name.")
    elif not path.is_file():
        if model.endswith(".json") or model.startswith((".", "/", "~")):
            raise ConfigError(f"{model} does not exist; give a config.json, its folder, or a built-in name.")
        return shape(model)
    return _shape_from_file(path)


def _shape_from_file(path: Path) -> Shape:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); give a model's config.json.") from None
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not a mapping; give a model's config.json.")
    try:
        return shape_from_config(raw, name=str(raw.get("_name_or_path") or path.resolve().parent.name))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{path}: {error} Built in by name: {', '.join(SHAPES)}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------- the question


def build_problem(options: PlanOptions) -> Problem:
    """The question that the options ask. The old group is the first `--from` devices of the topology, cut evenly;
    those that join come after them."""
    units = load_shape(options.model)
    wanted = None if options.num_before is None else max(options.num_before, options.num_after or 0)
    topology = load_topology(options.topology, wanted)
    first = _first_devices(topology, options.num_before)
    gone = _named(options.already_lost, first, "--already-lost")
    old = tuple(device for device in first if device not in gone)
    lost = _named(options.lost, first, "--lost")
    if again := set(lost).intersection(gone):
        raise ConfigError(f"--lost names {min(again)}, which --already-lost names too; give it once.")
    devices = _new_group(options, topology, old, lost, gone)
    everyone = (*first, *(device for device in devices if device not in first))
    memory = _memory(options.memory, everyone)
    even = initial_layout(units, first)
    _check_before(units, even, topology, memory)
    change = Problem(
        units=units,
        before=even,
        devices=first,
        topology=topology,
        speeds=_speeds(options.speeds, everyone) or None,
        memory_bytes=memory or None,
        plane_bytes=units.plane_bytes(options.kv_tokens),
        planes_at=_split(options.kv_mirror),
        weights_at=_split(options.weights_at) or None,
    )
    return replace(change, before=_after_faults(change, gone), devices=devices, lost=lost)


def _after_faults(start: Problem, gone: Sequence[str]) -> Layout:
    """What the default policy makes of one loss after the other."""
    layout = start.before
    for lost in gone:
        rest = tuple(device for device in layout.devices if device != lost)
        layout = makespan(replace(start, before=layout, devices=rest, lost=(lost,), speeds=None)).after
    return layout


def _first_devices(topology: Topology, count: int | None) -> tuple[str, ...]:
    known = topology.devices
    if count is not None and count > len(known):
        raise ConfigError(
            f"--from {count}, but topology {topology.name} has {len(known)} device(s); give a larger one with "
            f"--topology, such as cluster-{-(-count // 8)}x8."
        )
    return known if count is None else known[:count]


def _new_group(
    options: PlanOptions, topology: Topology, old: tuple[str, ...], lost: tuple[str, ...], gone: tuple[str, ...]
) -> tuple[str, ...]:
    """Survivors first, in rank order. With fewer places than survivors the last leave, readable until the end;
    with more, devices of the topology that were not in the old group join."""
    count, survivors = options.num_after, tuple(device for device in old if device not in lost)
    if options.onto:
        if count is not None:
            raise ConfigError(f"--to {count} and --onto {options.onto} both say which devices go on; give one of them.")
        devices = _named(options.onto, topology.devices, "--onto")
        if dead := [device for device in devices if device in (*lost, *gone)]:
            raise ConfigError(f"--onto names {dead[0]}, which is lost; give devices that work.")
        return devices
    if count is None or count <= len(survivors):
        return survivors[:count]
    idle = [device for device in topology.devices if device not in (*old, *gone)]
    missing = count - len(survivors)
    if missing > len(idle):
        raise ConfigError(
            f"--to {count} needs {missing} device(s) beside the {len(survivors)} that are left, but topology "
            f"{topology.name} has {len(idle)} more; use --to {len(survivors) + len(idle)} or a larger --topology."
        )
    return (*survivors, *idle[:missing])


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _named(text: str, group: Sequence[str], option: str) -> tuple[str, ...]:
    names = tuple(_device(part, group, option) for part in _split(text))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{option} names {twice} twice; give each device once.")
    return names


def _device(text: str, group: Sequence[str], option: str) -> str:
    """A device by its name, or by its place in `group` (ranks of the old group come first)."""
    if text.isdecimal():
        if int(text) >= len(group):
            raise ConfigError(f"{option} {text}: there are {len(group)} devices, ranks 0 to {len(group) - 1}.")
        return group[int(text)]
    if text not in group:
        raise ConfigError(f"{option}: {text!r} takes no part; give {', '.join(group)}, or a rank.")
    return text


def _speeds(entries: Sequence[str], group: Sequence[str]) -> dict[str, float]:
    return {_device(name, group, "--speed"): speed for name, speed in parse_speeds(list(entries))}


def _memory(entries: Sequence[str], group: Sequence[str]) -> dict[str, int]:
    """GB (1e9 bytes, as in a topology's memory_gb): `64` for every device, `gpu:3=32` (or `3=32`) for one; later
    entries win."""
    result: dict[str, int] = {}
    for entry in entries:
        name, equals, value = entry.rpartition("=")
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB?)?", value.strip(), re.IGNORECASE)
        if number is None or not float(number[1]):
            raise ConfigError(f"--memory {entry!r}: write GB, as 48 for every device or 3=32 for one.")
        size = int(float(number[1]) * 1e9)
        for device in [_device(name, group, "--memory")] if equals else group:
            result[device] = size
    return result


def _check_before(units: Shape, before: Layout, topology: Topology, memory: Mapping[str, int]) -> None:
    """A plan from a state that cannot exist would be worth nothing."""
    for device in before.devices:
        limit = memory.get(device, topology.by_name[device].memory_bytes)
        needed = before.weight_bytes(units, device)
        if limit is not None and needed > limit:
            raise DoesNotFit(
                f"{units.name} on {len(before.devices)} device(s) puts {in_words(needed)} of weights on "
                f"{device}, which has {in_words(limit)}; use a larger --from, more --memory or another --topology."
            )


# --------------------------------------------------------------------------------------------------- one unit


def parse_unit(text: str, problem: Problem) -> tuple[str, int]:
    """`attention:5`, `expert:12.3` (layer 12, expert 3), `plane:2` (the KV cache of KV head 2), `replicated`.

    Raises ConfigError that says how many there are.
    """
    if text == REPLICATED:
        return REPLICATED, 0
    name, _, number = text.partition(":")
    if name not in _FAMILIES:
        raise ConfigError(f"--explain {text!r}: write one of {', '.join(f'{f}:5' for f in _FAMILIES)}, {REPLICATED}.")
    family = _FAMILIES[name]
    total = problem.units.num_units.get(KV if family == PLANE else family, 0)
    if not total:
        raise ConfigError(f"--explain {text!r}: {problem.units.name} has no unit of that family.")
    if family == PLANE and not problem.plane_bytes:
        raise ConfigError(f"--explain {text!r}: no KV cache is planned; give --kv-tokens.")
    unit = _unit_number(text, number, family, problem)
    if not 0 <= unit < total:
        raise ConfigError(f"--explain {text!r}: {name} units are numbered 0 to {total - 1}.")
    return family, unit


def _unit_number(text: str, number: str, family: str, problem: Problem) -> int:
    layer, dot, expert = number.partition(".")
    if not layer.isdecimal() or (dot and (family != EXPERT or not expert.isdecimal())):
        form = "layer.expert, as expert:12.3" if family == EXPERT else f"a number, as {text.partition(':')[0]}:5"
        raise ConfigError(f"--explain {text!r}: write {form}.")
    if not dot:
        return int(layer)
    num_layers = problem.units.num_groups(EXPERT)
    per_layer = problem.units.num_units[EXPERT] // num_layers
    if int(layer) >= num_layers or int(expert) >= per_layer:
        raise ConfigError(
            f"--explain {text!r}: {problem.units.name} has layers 0 to {num_layers - 1} "
            f"with experts 0 to {per_layer - 1}."
        )
    return int(layer) * per_layer + int(expert)
