"""The contract of arenas on a GPU's memory, and what ends a worker there without ending the memory."""

from __future__ import annotations

import pytest

from anchortp.errors import ConfigError
from anchortp.state.launch import start_anchor
from tests.arena_contract import DEADLINE_S, ArenaContract, World

DIE = {
    "a device-side assert": ("torch.zeros(4, device='cuda:0')[torch.tensor([99], device='cuda:0')].sum().item()", 710),
    "an illegal address": ("view('weights')[-8:].add_(1).sum().item()", 700),  # reserved, not committed
}


class TestCuda(ArenaContract):
    device = "cuda:0/0"

    @pytest.mark.parametrize("how", DIE)
    def test_what_ends_a_context_leaves_the_memory_whole(self, world: World, how: str) -> None:
        expression, code = DIE[how]
        client, page = world.client(), world.page
        client.create_arena("weights", 8 * page, 1).close()
        client.commit("weights", [(0, 4 * page)], 1)
        worker = world.worker()
        worker.do("client.lease(1)")
        worker.do("attach('weights', 1)")
        worker.do("put('weights', 0, b'state' * 1000)")
        assert worker.ask(f"verdict(lambda: {expression})").startswith("('crashed',")
        assert f"CUDA error {code})" in worker.ask("verdict(lambda: torch.ones(1, device='cuda:0').item())")  # sticky
        worker.kill()
        spare = world.worker()
        spare.do("client.lease(1)")
        spare.do("attach('weights', 1)")
        assert spare.ask("get('weights', 0, 5000) == b'state' * 1000") == "True"

    def test_virtual_devices_of_one_gpu_have_anchors_and_budgets_of_their_own(self, world: World) -> None:
        page = world.page
        start_anchor(device="cuda:0/1", budget_bytes=2 * page, runtime_dir=world.runtime_dir, timeout_s=DEADLINE_S)
        other = world.client_of("cuda:0/1")
        other.create_arena("weights", 8 * page, 1).close()
        other.commit("weights", [(0, 2 * page)], 1)
        assert world.client().status().committed_bytes == 0
        world.client("tool").inject("lost")
        world.wait_anchor_gone()
        assert other.status().committed_bytes == 2 * page

    def test_a_gpu_that_is_not_there_is_refused_by_its_anchor(self, world: World) -> None:
        with pytest.raises(ConfigError, match="is not there"):
            start_anchor(device="cuda:99", budget_bytes=1 << 30, runtime_dir=world.runtime_dir, timeout_s=DEADLINE_S)
