"""The contract of arenas, on host memory and on a simulated GPU's chunks, every party a process."""

from __future__ import annotations

from tests.arena_contract import ArenaContract, World


class TestMemfd(ArenaContract):
    device = "cpu:0"


class TestChunks(ArenaContract):
    device = "sim:0/1"

    def test_only_the_worker_hands_chunks_over(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", page, 1).close()
        client.commit("kv", [(0, page)], 1)
        worker = world.worker()
        worker.do("attach('kv', 1)")
        answer = worker.ask(f"client.adopt_arena(arenas['kv'], [(0, {page})], 1)")
        assert answer.startswith("StateError") and "take the lease first" in answer

    def test_the_anchor_keeps_no_descriptor_open_for_what_it_has_sent(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", 1 << 30, 1).close()
        client.commit("kv", [(0, 100 * page)], 1)
        before = world.anchor_fds()
        worker = world.worker()
        worker.do("attach('kv', 1)")
        worker.kill()
        assert world.anchor_fds() <= before + 1  # the killed worker's connection may not have been dropped yet

    def test_hardware_that_its_worker_reports_lost_ends_its_anchor_and_nothing_else(self, world: World) -> None:
        client, page = world.client(), world.page
        client.create_arena("kv", page, 1).close()
        client.commit("kv", [(0, page)], 1)
        worker, bystander = world.worker(), world.worker()
        assert bystander.ask("client.report_lost('I say so', 1)").startswith("StateError")
        worker.do("client.lease(1)")
        for process_ in (worker, bystander):
            process_.do("attach('kv', 1)")
        worker.do("put('kv', 0, b'bytes')")
        worker.do("client.report_lost('uncorrectable ECC error', 1)")
        world.wait_anchor_gone()
        assert client.is_gone()
        assert bystander.ask("get('kv', 0, 5)") == "b'bytes'"
        assert "lost: uncorrectable ECC error" in world.log()
