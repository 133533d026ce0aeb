"""The KV cache through faults and restarts: what is kept, where it comes from, and that it is never wrong."""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from anchortp.config import load_model_config
from anchortp.engine import messages as m
from anchortp.engine.blocks import extend_block_hashes
from anchortp.engine.faults import Strike
from anchortp.engine.keeper import INDEX_ARENA, MAX_CACHED_BYTES
from anchortp.engine.kv_index import KVIndex
from anchortp.engine.mirror_addresses import HOST, MirrorAddresses
from anchortp.errors import AnchorTPError
from anchortp.layout import KVAddresses
from anchortp.state.client import AnchorClient
from anchortp.transfer.fingerprint import fingerprint
from tests.procs.engine_tools import (
    Driver,
    Stream,
    kill_process,
    nothing_left,
    prompt_of,
    running_engine,
)
from tests.procs.test_engine_limits import MAX_MODEL_LEN, budget_bytes
from tests.tiny_model import write_model

BLOCK = 16  # tokens

# No worker hangs here, and on a loaded machine one that is slow is not to be taken for one that does.
kv_engine = functools.partial(running_engine, min_step_deadline_s=30.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """6 q heads and 2 KV heads: on two devices each KV head is held once, on three each is held twice."""
    return write_model(tmp_path_factory.mktemp("grouped") / "model")


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """As many KV heads as q heads: every plane of every device is the only one."""
    return write_model(tmp_path_factory.mktemp("lonely") / "model", num_key_value_heads=6)


# ---------------------------------------------------------------------------------------------- what is seen


def kv_of(driver: Driver) -> dict[str, int]:
    return driver.engine.status()["kv"]


def wait_mirrored(driver: Driver, num_blocks: int | None = None) -> None:
    """Until so many blocks, by default all that the cache holds, have a whole copy in the mirror."""

    def mirrored() -> bool:  # asked at every token; the status is written less often
        wanted = driver.engine.pool.num_cached if num_blocks is None else num_blocks
        return driver.engine._keeper.counts()["blocks_mirrored"] >= wanted > 0

    driver.wait(mirrored, f"{num_blocks or 'all'} blocks to be mirrored")


def mirror_bytes(folder: Path, num_slots: int) -> int:
    kv = KVAddresses(config=load_model_config(folder), block_size=BLOCK, num_blocks=1)
    return num_slots * MirrorAddresses(kv=kv, num_slots=1).slot_bytes


def replayed(driver: Driver) -> int:
    return driver.engine.scheduler.num_replayed_tokens


def ask(driver: Driver, prompt: tuple[int, ...], num_tokens: int = 12) -> int:
    """A whole request, answered rightly; returns how many tokens of its prompt the cache had."""
    stream = driver.submit(prompt, num_tokens)
    stream.check()
    return stream.num_cached_tokens


def speak(driver: Driver, num_streams: int, length: int, num_tokens: int, first: int = 0) -> list[Stream]:
    """Streams with prompts of `length` tokens that have all begun to answer."""
    streams = [driver.submit(prompt_of(first + i, length), num_tokens) for i in range(num_streams)]
    for stream in streams:
        stream.wait_tokens(2)
    return streams


def check_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.check()


def last_episode(driver: Driver, number: int) -> dict[str, Any]:
    episodes = driver.wait_recovered(number)
    assert len(episodes) == number, [e["cause"] for e in episodes]
    return episodes[-1]


def tap(driver: Driver) -> list[Any]:
    """What the keeper tells the workers from now on."""
    keeper = driver.engine._keeper
    orders, send = [], keeper._send

    def heard(device: str, message: Any) -> None:
        orders.append(message)
        send(device, message)

    keeper._send = heard
    return orders


def around(
    owner: Any, name: str, *, before: Callable[[], object] = bool, after: Callable[[], object] = bool
) -> threading.Event:
    """Does something once, in the engine's thread, right before and after the next call of a method of its.

    Returns what is set when it was done.
    """
    method, done = getattr(owner, name), threading.Event()

    def once(*args: Any, **options: Any) -> Any:
        setattr(owner, name, method)
        try:
            before()
            result = method(*args, **options)
            after()
            return result
        finally:
            done.set()

    setattr(owner, name, once)
    return done


# -------------------------------------------------------------------------------------- the mirror and peers


@pytest.mark.parametrize(("kv_mirror", "kind"), [("host", "cpu:"), ("host", "sim:0/"), ("off", "cpu:")])
def test_the_only_copy_of_a_kv_head_is_lost(folder, kv_mirror, kind):
    with kv_engine(folder, 2, kv_mirror=kv_mirror, kind=kind) as driver:
        streams = speak(driver, 4, length=160, num_tokens=150)
        if kv_mirror == "host":
            wait_mirrored(driver, 4 * 160 // BLOCK)
        driver.inject(f"{kind}1", "lost")
        check_all(streams)
        episode = last_episode(driver, 2)
        assert episode["devices_lost"] == [f"{kind}1"]
        moved = episode["bytes"]
        if kv_mirror == "host":
            assert episode["kv"] == "mirrored"
            assert moved["kv_restored"] >= 4 * 160 // BLOCK * driver.engine._plane.kv.block_bytes
            # Each has an unfinished block, and perhaps one whose copy was under way.
            assert 0 < replayed(driver) <= 4 * 2 * BLOCK
        else:
            assert episode["kv"] == "lost" and moved["kv_restored"] == 0
            assert replayed(driver) >= 4 * 160
        assert moved["kv_copied"] == 0
        # What was restored is as good as what was computed, and is found as such.
        assert ask(driver, (*prompt_of(0, 160), *streams[0].tokens[:40])) == 192


@pytest.mark.parametrize(("lost", "kv"), [("cpu:1", "mirrored"), ("cpu:0", "whole")])
def test_of_what_nobody_holds_only_the_latest_is_moved_in_a_recovery(folder, monkeypatch, lost, kv):
    """Room for ten blocks that are only cached: of two prompts that have ended the later one is found again. With two
    devices the KV head comes from the mirror, with four from another device."""
    block_bytes = KVAddresses(config=load_model_config(folder), block_size=BLOCK, num_blocks=1).block_bytes
    monkeypatch.setitem(MAX_CACHED_BYTES, "cpu", 10 * 2 * block_bytes)
    with kv_engine(folder, 2 if kv == "mirrored" else 4) as driver:
        for old in (10, 11):
            ask(driver, prompt_of(old, 160), num_tokens=2)
        streams = speak(driver, 2, length=160, num_tokens=150)
        wait_mirrored(driver)
        driver.inject(lost, "lost")
        check_all(streams)
        episode = last_episode(driver, 2)
        assert episode["kv"] == kv
        moved = episode["bytes"]["kv_restored"] + episode["bytes"]["kv_copied"]
        assert 0 < moved <= (10 + 2 * (160 + 150) // BLOCK + 2) * block_bytes * (2 if kv == "whole" else 1)
        assert replayed(driver) <= (0 if kv == "whole" else 2 * 2 * BLOCK)
        assert ask(driver, prompt_of(11, 160)) >= 8 * BLOCK
        assert ask(driver, prompt_of(10, 160)) == 0


def test_a_kv_head_that_another_device_holds_is_copied_from_there(folder):
    with kv_engine(folder, 4, kv_mirror="off") as driver:
        assert [shard["kv"] for shard in driver.engine.recovery.layout.shards] == [(0,), (0, 1), (1,), (1,)]
        streams = speak(driver, 4, length=160, num_tokens=150)
        driver.inject("cpu:0", "lost")
        check_all(streams)
        episode = last_episode(driver, 2)
        assert (episode["kv"], episode["devices_lost"]) == ("whole", ["cpu:0"])
        # To both devices that take over a q head of it, and of each stream.
        planes = driver.engine._plane.kv.block_bytes
        assert episode["bytes"]["kv_copied"] >= 2 * 4 * 160 // BLOCK * planes
        assert episode["bytes"]["kv_restored"] == 0
        assert replayed(driver) == 0


@pytest.mark.parametrize(("moment", "kv_mirror"), [("before", "host"), ("after", "host"), ("after", "off")])
def test_a_source_that_dies_while_it_is_copied_from(folder, moment, kv_mirror):
    with kv_engine(folder, 4, kv_mirror=kv_mirror) as driver:
        streams = speak(driver, 3, length=160, num_tokens=150)
        if kv_mirror == "host":
            wait_mirrored(driver, 3 * 160 // BLOCK)
        orders = tap(driver)
        # Of the two orders the first is on its way, or neither: the source's memory is overwritten meanwhile.
        died = around(driver.engine._keeper, "restore", **{moment: lambda: driver.inject("cpu:1", "lost")})
        driver.inject("cpu:0", "lost")
        check_all(streams)
        assert died.is_set()
        episode = last_episode(driver, 2)
        assert sorted(episode["devices_lost"]) == ["cpu:0", "cpu:1"]
        assert any(("cpu:1" in dict(o.from_peers).values()) for o in orders if isinstance(o, m.RestorePlanes))
        assert episode["kv"] == ("mirrored" if kv_mirror == "host" else "lost")
        assert (replayed(driver) <= 3 * 2 * BLOCK) == (kv_mirror == "host")


def test_faults_in_the_middle_of_mirroring_and_of_restoring(lonely):
    strikes = (
        Strike(device="cpu:1", point="save", nth=2, kind="crash"),
        Strike(device="cpu:0", point="save", nth=3, kind="lost"),
        Strike(device="cpu:2", point="restore", nth=1, kind="crash"),
    )
    with kv_engine(lonely, 4, strikes) as driver:
        check_all(speak(driver, 3, length=40, num_tokens=120))
        driver.submit(prompt_of(7), 5).check()
        driver.check_fired()
        crash, loss = driver.wait_recovered(3)[1:]
        assert (crash["kv"], crash["workers_replaced"], crash["devices_lost"]) == ("whole", ["cpu:1"], [])
        assert (loss["kv"], loss["workers_replaced"], loss["devices_lost"]) == (
            "mirrored",
            ["cpu:2"],
            ["cpu:0"],
        )
        before = replayed(driver)
        assert before <= 3 * 3 * BLOCK  # the order that was cut off, twice, may have held a block of each
        wait_mirrored(driver)  # what was cut off is copied again

        # The device that restores is lost itself; the last one restores all.
        streams = speak(driver, 3, length=40, num_tokens=120)
        driver.arm(Strike(device="cpu:3", point="restore", kind="lost"))
        pid = driver.worker_pid("cpu:3")
        driver.inject("cpu:3", "crash")
        driver.replaced("cpu:3", pid)
        driver.inject("cpu:1", "lost")
        check_all(streams)
        driver.submit(prompt_of(8), 5).check()
        driver.check_fired()
        again = last_episode(driver, 5)
        assert (again["kv"], sorted(again["devices_lost"])) == ("mirrored", ["cpu:1", "cpu:3"])
        assert replayed(driver) - before <= 3 * 2 * BLOCK
        assert set(driver.engine.status()["devices"]) == {"cpu:2"}
        driver.engine._keeper._mirror.validate()


def test_a_fault_after_planes_were_restored_does_not_forget_them(lonely):
    """While the group forms, planes and weights are whole again; the next recovery has nothing left to move."""
    with kv_engine(lonely, 3) as driver:
        streams = speak(driver, 3, length=160, num_tokens=150)
        wait_mirrored(driver, 3 * 160 // BLOCK)
        driver.arm(Strike(device="cpu:0", point="form", nth=2, kind="crash"))
        pid = driver.worker_pid("cpu:0")
        driver.inject("cpu:0", "crash")
        driver.replaced("cpu:0", pid)
        driver.inject("cpu:2", "lost")
        check_all(streams)
        driver.check_fired()
        episode = last_episode(driver, 3)
        assert (episode["kv"], episode["workers_replaced"]) == ("mirrored", ["cpu:0"])
        assert "restoring" in episode["phases"]
        assert 0 < replayed(driver) <= 3 * 2 * BLOCK


# ------------------------------------------------------------------------------------------- less memory


def test_hot_sessions_keep_their_blocks_when_the_cache_shrinks(lonely):
    budget = budget_bytes(lonely, 2, num_blocks=24)
    with kv_engine(lonely, 3, device_memory_bytes=budget, max_model_len=MAX_MODEL_LEN) as driver:
        sessions = [prompt_of(i, 64) for i in range(9)]
        assert [ask(driver, prompt) for prompt in sessions] == [0] * 9
        assert ask(driver, sessions[1]) == 48  # old, but used again
        before = kv_of(driver)["blocks"]
        assert kv_of(driver)["blocks_evicted"] == 0 and before > 9 * 4
        streams = speak(driver, 2, length=33, num_tokens=80, first=20)
        wait_mirrored(driver, 9 * 4)
        orders = tap(driver)
        driver.inject("cpu:1", "lost")
        check_all(streams)
        assert last_episode(driver, 2)["kv"] == "mirrored"
        after = kv_of(driver)["blocks"]
        assert 24 <= after < 9 * 4 and driver.engine.pool.num_blocks == after
        moves = [order.pairs for order in orders if isinstance(order, m.MoveBlocks)]
        assert len(moves) == 2 and moves[0] == moves[1] != []
        assert all(to < after <= source for source, to in moves[0])
        # The streams were running, so nobody's blocks were dropped under them: the coldest sessions' were.
        assert driver.engine.scheduler.num_preempted == 0
        assert replayed(driver) <= 2 * 2 * BLOCK
        hits = [ask(driver, sessions[i]) for i in (1, 8, 0)]
        assert hits == [48, 48, 0]
        assert kv_of(driver)["blocks_evicted"] > 0


def test_a_mirror_that_is_smaller_than_the_cache_keeps_what_was_used_last(lonely):
    with kv_engine(lonely, 2, kv_mirror_bytes=mirror_bytes(lonely, 12)) as driver:
        sessions = [prompt_of(i, 64) for i in range(6)]
        assert [ask(driver, prompt) for prompt in sessions] == [0] * 6
        assert ask(driver, sessions[0]) == 48
        driver.wait(lambda: kv_of(driver)["mirror_evicted"] >= 6 * 4 - 12, "evictions in the mirror")
        assert kv_of(driver)["mirror_slots"] == kv_of(driver)["blocks_mirrored"] == 12
        assert kv_of(driver)["blocks_evicted"] == 0
        stream = driver.submit(prompt_of(9, 40), 60)
        stream.wait_tokens(2)
        driver.inject("cpu:0", "lost")
        stream.check()
        assert last_episode(driver, 2)["kv"] == "mirrored"
        # Used last, or its beginning at least; and the one that was pushed out of the mirror long before.
        hits = [ask(driver, sessions[i]) for i in (5, 1)]
        assert hits[0] > 0 and hits[1] == 0
        driver.engine._keeper._mirror.validate()


# ----------------------------------------------------------------------------------------------- anchors


def host_pid(driver: Driver) -> int:
    return driver.anchor_pid(HOST)


def kill_host(driver: Driver) -> None:
    kill_process(host_pid(driver))


def test_the_host_anchor_and_a_devices_anchor_die(lonely):
    with nothing_left() as runtime_dir:
        with kv_engine(lonely, 4, runtime_dir=runtime_dir, keep_anchors=True) as driver:
            streams = speak(driver, 3, length=80, num_tokens=150)
            wait_mirrored(driver, 3 * 80 // BLOCK)
            epoch, orders = driver.engine.status()["epoch"], tap(driver)
            first = host_pid(driver)
            # The next one, too, while it is asked for memory.
            killed = around(driver.engine._plane, "host_arena", before=lambda: kill_host(driver))
            kill_process(first)
            check_all(streams)
            assert killed.is_set() and host_pid(driver) != first
            assert driver.engine.status()["epoch"] == epoch, "serving stopped"
            saved = {block for o in orders if isinstance(o, m.SaveBlocks) for block, _ in o.pairs}
            assert len(saved) >= 3 * 80 // BLOCK, "the new mirror is filled from the beginning"
            wait_mirrored(driver)
            check_a_devices_anchor_dies(driver)
            check_the_host_dies_with_a_device(driver)
        # What the last of them left is believed by the next engine.
        with kv_engine(lonely, 1, runtime_dir=runtime_dir) as driver:
            assert driver.episodes[0]["bytes"]["loaded"] == 0
            assert ask(driver, prompt_of(0, 80)) == 64


def check_a_devices_anchor_dies(driver: Driver) -> None:
    """Its memory outlives it; then another device is lost, whose planes come from the mirror."""
    streams, before = speak(driver, 3, length=120, num_tokens=150), replayed(driver)
    kill_process(driver.anchor_pid("cpu:2"))
    driver.wait(
        lambda: any(
            "new anchor of cpu:2 holds its memory" in line["text"] for e in driver.episodes for line in e["timeline"]
        ),
        "a new anchor of cpu:2",
    )
    wait_mirrored(driver, 3 * 120 // BLOCK)
    driver.inject("cpu:3", "lost")
    check_all(streams)
    episode = last_episode(driver, 2)
    assert (episode["kv"], episode["devices_lost"]) == ("mirrored", ["cpu:3"])
    assert replayed(driver) - before <= 3 * 3 * BLOCK


def check_the_host_dies_with_a_device(driver: Driver) -> None:
    """Together, and while planes are restored from it."""
    streams = speak(driver, 3, length=80, num_tokens=150)
    kill_host(driver)
    driver.inject("cpu:1", "lost")
    check_all(streams)
    assert last_episode(driver, 3)["devices_lost"] == ["cpu:1"]
    streams = speak(driver, 3, length=80, num_tokens=150)
    killed = around(driver.engine._keeper, "restore", before=lambda: kill_host(driver))
    driver.inject("cpu:2", "lost")
    check_all(streams)
    assert killed.is_set()
    assert last_episode(driver, 4)["devices_lost"] == ["cpu:2"]
    wait_mirrored(driver)


# ------------------------------------------------------------------------------------------ warm restarts


SESSIONS = tuple(prompt_of(i, 100) for i in range(3))
WARM = [96, 96, 96]  # of each the whole blocks
COLD = [0, 0, 0]


@contextmanager
def index_memory(runtime_dir: Path) -> Iterator[mmap]:
    """What the host's anchor holds between two engines."""
    with (
        AnchorClient.connect(runtime_dir, HOST, role="tool") as tool,
        tool.open_arena(INDEX_ARENA, tool.welcome.epoch) as arena,
        arena.map() as memory,
    ):
        yield memory


def offset_of(memory: mmap, prompt: tuple[int, ...], index: int) -> int:
    """Where the entry of the prompt's block is: it begins with the block's hash."""
    hashes: list[bytes] = []
    extend_block_hashes(hashes, prompt, BLOCK)
    offset = memory.find(hashes[index])
    assert offset > 0, "the index has no such block"
    return offset


def tear_entries(memory: mmap) -> None:
    """Two sessions' first blocks change places; of the third's second block the use counter is half written."""
    first, second = (offset_of(memory, prompt, 0) for prompt in SESSIONS[:2])
    entries = memory[first : first + 32], memory[second : second + 32]
    memory[second : second + 32], memory[first : first + 32] = entries
    memory[offset_of(memory, SESSIONS[2], 1) + 16] ^= 0xFF


def tear_header(memory: mmap) -> None:
    memory[20] ^= 0xFF


class Restarts:
    """Engines one after another over the same anchors."""

    def __init__(self, runtime_dir: Path):
        self.runtime_dir = runtime_dir

    def run(self, folder: Path, *, then: Callable[[Driver], object] = bool, **options: Any) -> tuple[list[int], int]:
        """A next engine answers all sessions; returns what it found cached of each, and how much it loaded."""
        options = {"keep_anchors": True} | options
        with kv_engine(folder, 2, runtime_dir=self.runtime_dir, **options) as driver:
            hits = [ask(driver, prompt) for prompt in SESSIONS]
            then(driver)
            return hits, driver.episodes[0]["bytes"]["loaded"]

    def kill_anchor(self, device: str) -> None:
        with AnchorClient.connect(self.runtime_dir, device, role="tool") as tool:
            pid = tool.welcome.pid
        kill_process(pid)
        with suppress(ChildProcessError):  # an engine in this process made it a subreaper
            os.waitpid(pid, 0)


def test_the_next_engine_finds_the_cache_warm_and_believes_nothing_torn(folder):
    with nothing_left() as runtime_dir:
        restarts = Restarts(runtime_dir)
        hits, loaded = restarts.run(folder)
        assert hits == COLD and loaded > 0
        for tear, expected in ((tear_entries, [0, 0, 16]), (tear_header, COLD)):
            with index_memory(runtime_dir) as memory:
                tear(memory)
            assert restarts.run(folder) == (expected, 0), tear.__name__
        with index_memory(runtime_dir) as memory:
            index = open_index(folder, memory)
            index.set_epoch(index.epoch - 1)  # whole, but of other planes than those that are there
            index.close()
        assert restarts.run(folder) == (COLD, 0)
        restarts.kill_anchor(HOST)  # the planes are there, but nobody knows what is in them
        assert restarts.run(folder, then=lose_the_index) == (COLD, 0)
        assert restarts.run(folder, keep_anchors=False) == (WARM, 0)


def lose_the_index(driver: Driver) -> None:
    """The host's anchor dies under a running engine, which writes the index anew and goes on."""
    first = host_pid(driver)
    kill_process(first)
    ask(driver, prompt_of(9))  # its end is heard before this is answered
    assert host_pid(driver) != first


def open_index(folder: Path, memory: mmap) -> KVIndex:
    model = bytes.fromhex(fingerprint(folder, load_model_config(folder)))
    return KVIndex.open(memoryview(memory), num_blocks=16 * 512 // BLOCK, block_size=BLOCK, model=model)


def test_other_settings_another_model_and_a_device_that_died_start_empty(folder, lonely):
    with nothing_left() as runtime_dir:
        restarts = Restarts(runtime_dir)
        _, everything = restarts.run(folder, kv_block_size=8)
        # More than the host's anchor was started for; then no mirror any more.
        assert restarts.run(folder, kv_tokens=1 << 20) == (COLD, 0)
        assert restarts.run(folder, kv_tokens=1 << 20, kv_mirror="off") == (WARM, 0)
        # The index is there, and half of the planes it speaks of.
        restarts.kill_anchor("cpu:1")
        hits, loaded = restarts.run(folder, kv_tokens=1 << 20)
        assert hits == COLD and 0 < loaded < everything
        hits, loaded = restarts.run(lonely, keep_anchors=False)
        assert hits == COLD and loaded > everything


# ------------------------------------------------------------------------------------------------ a soak


class Soak:
    """Prompts with prefixes in common, more of them than the cache holds, while whatever may die dies."""

    NUM_FAULTS = 20

    def __init__(self, driver: Driver, seed: int):
        self.driver = driver
        self.dice = random.Random(seed)
        self.story: list[str] = []
        prefixes = [prompt_of(i, 32) for i in range(3)]
        self.prompts = [
            (
                *self.dice.choice(prefixes),
                *(self.dice.randrange(250) for _ in range(self.dice.randrange(1, 50))),
            )
            for _ in range(12)
        ]
        self.streams = [self.next_stream() for _ in range(4)]

    def next_stream(self) -> Stream:
        prompt = self.dice.choice(self.prompts)
        return self.driver.submit(prompt, self.dice.randrange(20, MAX_MODEL_LEN - len(prompt)))

    def run(self) -> None:
        for _ in range(self.NUM_FAULTS):
            self.story.append(self.strike())
            # One token at least, so that no request is in every step that is cut off.
            stream = self.dice.choice(self.streams)
            if stream.finish_reason is None:
                wanted = len(stream.tokens) + self.dice.choice([1, 10, 40])
                stream.wait_tokens(min(stream.request.params.max_tokens, wanted))
            self.streams = [s if s.finish_reason is None else self.checked(s) for s in self.streams]
        check_all(self.streams)
        for prompt in self.prompts:
            ask(self.driver, prompt)

    def checked(self, stream: Stream) -> Stream:
        stream.check()
        return self.next_stream()

    def strike(self) -> str:
        devices = self.driver.engine.status()["devices"]
        device = self.dice.choice(sorted(devices))
        kind = self.dice.choice(["crash", "host", "host"] + ["lost", "anchor"] * (len(devices) > 2))
        try:
            match kind:
                case "crash" | "lost":
                    self.driver.inject(device, kind)
                case "host":
                    kill_host(self.driver)
                case "anchor" if all(d["has_anchor"] and d["has_worker"] for d in devices.values()):
                    kill_process(self.driver.anchor_pid(device))
        except AnchorTPError as error:  # no anchor, or no worker, just now
            return f"{kind} {device}: {error}"
        return f"{kind} {device}"


def test_a_soak(lonely):
    options = {"max_model_len": MAX_MODEL_LEN, "kv_tokens": 40 * BLOCK, "max_num_seqs": 4}
    with kv_engine(lonely, 5, kv_mirror_bytes=mirror_bytes(lonely, 24), **options) as driver:
        soak = Soak(driver, seed=1)
        soak.run()
        status = driver.engine.status()
        assert len(status["devices"]) < 5 and status["kv"]["hit_tokens"] > 0, soak.story
        assert status["kv"]["blocks_evicted"] > 0 and status["kv"]["blocks_held"] == 0
        driver.engine._keeper._mirror.validate()
