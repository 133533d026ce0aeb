"""Faults of every kind, at random moments and one after another: no request may notice."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from anchortp.errors import AnchorTPError
from tests.procs.engine_tools import Driver, check_bytes, kill_process, prompt_of, running_engine, wait_balanced
from tests.tiny_model import write_model

NUM_FAULTS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model")


def strike(driver: Driver, dice: random.Random) -> str:
    """One fault, on whatever is there at this moment."""
    devices = driver.engine.status()["devices"]
    device = dice.choice(sorted(devices))
    kinds = ["crash", "worker", "anchor", "zygote", "spare"] + ["lost"] * (len(devices) > 2)
    kind = dice.choice(kinds)
    match kind:
        case "crash" | "lost":
            try:
                driver.inject(device, kind)
            except AnchorTPError as error:  # no anchor, or no worker, just now
                return f"{device} {kind}: {error}"
        case "worker" if devices[device]["worker_pid"]:
            kill_process(devices[device]["worker_pid"])
        # With its worker also being replaced that is a loss, for which another device must be left.
        case "anchor" if len(devices) > 2 and all(d["has_anchor"] for d in devices.values()):
            kill_process(driver.anchor_pid(device))
        case "zygote":
            kill_process(driver.engine._processes._zygote.pid)
        case "spare":
            for process in list(driver.engine._processes._spares):
                kill_process(process.pid)
    return f"{device} {kind}"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("mixtral") / "model",
        model_type="mixtral",
        num_local_experts=7,
        num_experts_per_tok=2,
        intermediate_size=32,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_a_storm_of_faults(folder, seed):
    driver = storm(folder, seed)
    check_bytes(driver.episodes[1:])


@pytest.mark.parametrize("seed", [3, 4])
def test_a_storm_of_faults_while_experts_are_rebalanced(experts, seed):
    storm(experts, seed, eplb_interval_s=0.05, eplb_replica_choices=0.0)


def storm(folder: Path, seed: int, **options: Any) -> Driver:
    """The driver of an engine that has ended."""
    dice = random.Random(seed)
    with running_engine(folder, 6, **options) as driver:
        if options:
            wait_balanced(driver, 1)
        streams = driver.speak(3, 150)
        for _ in range(NUM_FAULTS):
            print(strike(driver, dice))
            # A few tokens later, or none: but one, so that no request is in every step that is cut off.
            stream = dice.choice(streams)
            if stream.finish_reason is None:
                stream.wait_tokens(min(150, len(stream.tokens) + dice.choice([1, 2, 20])))
            ended = [stream for stream in streams if stream.finish_reason is not None]
            for stream in ended:
                stream.check()
            streams = [s for s in streams if s not in ended]
            streams += [driver.submit(prompt_of(dice.randrange(6)), 150) for _ in ended]
        for stream in streams:
            stream.check()
        driver.submit(prompt_of(7), 20).check()
    return driver
