"""The benchmark of balanced steps, tiny: ranks that take turns compute what one rank alone does."""

from __future__ import annotations

import argparse

import pytest
import torch

from anchortp.config import load_model_config
from anchortp.engine.balancer import ExpertBalancer
from anchortp.layout import initial_layout, model_units
from bench import moe_step
from tests.cpu.model_tools import make_tiny_model

WORKLOADS = {"prefill of 4 x 512": (2, 24, 24), "decode of 8": (3, 1, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "mixtral", "mixtral")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(moe_step, "WORKLOADS", WORKLOADS)


def test_ranks_that_take_turns_route_as_one_rank_does(folder):
    config = load_model_config(folder)
    units = model_units(config)
    loads = []
    for degree in (1, 3):
        layout = initial_layout(units, tuple(f"cpu:{i}" for i in range(degree)))
        with moe_step.Group(folder, units, layout, ExpertBalancer(units, 0.0).parts(layout)) as group:
            assert group.step(moe_step.batch_of(config, 2, 24, 24, "same")) > 0.0
            loads.append(group.decoders[0].moe.load.clone())
    assert torch.equal(loads[0], loads[1]) and loads[0].sum() == 2 * 24 * 2 * config.num_layers


def test_a_case_is_measured_and_reported(folder):
    options = argparse.Namespace(slots=2, runs=2)
    case = moe_step.measure(folder, load_model_config(folder), 3, 2, options)
    for row in case["workloads"].values():
        assert row["imbalance_after"] <= row["imbalance_before"] and row["without_eplb_s"]["n"] == 2
    decode = case["workloads"]["decode of 8"]
    assert decode["replicas"] == 0, "three tokens a step are no reason for a replica"
    moe_step.show([case])
