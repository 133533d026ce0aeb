"""What Prometheus sees: the engine's status as it is at each scrape, and what this server counted itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anchortp.engine.api import Engine

ENGINE_STATES = ("starting", "serving", "recovering", "refusing", "stopped")

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP_BUCKETS_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class EngineCollector(Collector):
    """`engine.status()` as gauges.

    - `state` becomes `anchortp_state{state=...}`, 1 for the present one;
    - a number `x` becomes `anchortp_x`; a time `x_s` becomes `anchortp_x_seconds`, a rate `x_per_s` keeps its
      name;
    - a mapping `xs` of name to numbers, or to a mapping of numbers, gets a label:
      `{"devices": {"cpu:0": {"used_bytes": 7}}}` becomes `anchortp_devices_used_bytes{name="cpu:0"} 7`;
    - anything else (text, lists such as `faults`) is for /status and /faults.
    """

    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # so that registering does not ask the engine

    def collect(self) -> Iterator[Metric]:
        status = self._engine.status()
        yield _state_metric(status["state"])
        families: dict[str, GaugeMetricFamily] = {}
        for key, value in status.items():
            _add_samples(families, key, value)
        yield from families.values()


def _state_metric(present: str) -> Metric:
    family = GaugeMetricFamily("anchortp_state", "1 for the state the engine is in.", labels=["state"])
    for state in ENGINE_STATES:
        family.add_metric([state], float(state == present))
    return family


def _add_samples(families: dict[str, GaugeMetricFamily], key: str, value: Any) -> None:
    if isinstance(value, int | float):
        _family(families, key, labels=()).add_metric([], float(value))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            parts = inner.items() if isinstance(inner, Mapping) else (("", inner),)
            for part, number in parts:
                if isinstance(number, int | float):
                    family = _family(families, f"{key}_{part}" if part else key, labels=("name",))
                    family.add_metric([str(name)], float(number))


def _family(families: dict[str, GaugeMetricFamily], key: str, *, labels: tuple[str, ...]) -> GaugeMetricFamily:
    name = "anchortp_" + re.sub(r"[^a-zA-Z0-9_]", "_", re.sub(r"(?<!_per)_s$", "_seconds", key))
    if name not in families:
        families[name] = GaugeMetricFamily(name, f"'{key}' of the engine's status.", labels=labels)
    return families[name]


class ServerMetrics:
    """Counted by the server itself, in a registry of its own. Event loop only."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self._choices = Counter(
            "anchortp_choices",
            "Answers by how they ended; abandoned: the client went away, or an error.",
            ["outcome"],
            registry=self._registry,
        )
        self._errors = Counter(
            "anchortp_http_errors", "Answers other than 2xx, by status.", ["status"], registry=self._registry
        )
        self._prompt_tokens = Counter("anchortp_prompt_tokens", "Tokens of prompts accepted.", registry=self._registry)
        self._tokens = Counter("anchortp_generated_tokens", "Tokens received.", registry=self._registry)
        self._first_token_s = Histogram(
            "anchortp_first_token_seconds",
            "From a request's acceptance to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._gap_s = Histogram(
            "anchortp_token_gap_seconds",
            "Between the arrivals of a request's tokens, recoveries included.",
            buckets=_GAP_BUCKETS_S,
            registry=self._registry,
        )

    def choice_ended(self, outcome: str) -> None:
        self._choices.labels(outcome).inc()

    def error_answered(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def prompt_accepted(self, num_tokens: int) -> None:
        self._prompt_tokens.inc(num_tokens)

    def tokens_arrived(self, num_tokens: int, waited_s: float, *, first: bool) -> None:
        self._tokens.inc(num_tokens)
        (self._first_token_s if first else self._gap_s).observe(waited_s)

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)
