"""The mirror's books against a slow model, and a whole engine's KV lost and got back from it."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from anchortp.engine.blocks import BlockPool
from anchortp.engine.kv_index import KVIndex
from anchortp.engine.mirror import Mirror
from anchortp.engine.scheduler import Scheduler
from tests.pure.test_scheduler_simulation import Simulation


def content(number):
    return number.to_bytes(16, "little")


class SlowMirror:
    """The same promises, by search through all slots."""

    def __init__(self, num_slots):
        self.slots = {slot: ("blank", None, 0) for slot in range(num_slots)}  # state, content, last use
        self.clock = 0
        self.num_evicted = 0

    def in_state(self, state):
        return {slot: (h, used) for slot, (s, h, used) in self.slots.items() if s == state}

    def touch(self, block_hash):
        self.clock += 1
        for slot, (h, _) in self.in_state("whole").items():
            if h == block_hash:
                self.slots[slot] = ("whole", h, self.clock)

    def start(self, sealed):
        for _, h in reversed(sealed):
            self.touch(h)
        copies = []
        for block_id, h in sealed:
            if h in [other for state, other, _ in self.slots.values() if state != "blank"]:
                continue
            blank = sorted(self.in_state("blank"))
            named = {h for _, h in sealed}
            old = [slot for slot, (other, _) in self.in_state("whole").items() if other not in named]
            if not blank and not old:
                continue
            self.num_evicted += not blank
            slot = blank[0] if blank else min(old, key=lambda slot: self.slots[slot][2])
            self.slots[slot] = ("copying", h, 0)
            copies.append((block_id, slot))
        return copies

    def done(self, slots):
        for slot in reversed(slots):
            self.clock += 1
            self.slots[slot] = ("whole", self.slots[slot][1], self.clock)

    def abandon(self, slots):
        void = {self.slots[slot][1] for slot in slots}
        self.slots |= dict.fromkeys(slots, ("blank", None, 0))
        return void


@pytest.mark.parametrize("seed", range(60))
def test_the_mirror_agrees_with_the_slow_model(seed):
    rng = Random(seed)
    num_slots = rng.randint(1, 8)
    mirror, slow = Mirror(num_slots), SlowMirror(num_slots)
    for _ in range(150):
        copying = list(slow.in_state("copying"))
        match rng.choice(["start", "start", "done", "done", "touch", "find", "abandon", "abandon some", "clear"]):
            case "start":
                sealed = [(rng.randrange(50), content(rng.randrange(12))) for _ in range(rng.randint(0, 4))]
                assert mirror.start(sealed) == slow.start(sealed)
            case "done":
                slots = rng.sample(copying, rng.randint(0, len(copying)))
                mirror.done(slots)
                slow.done(slots)
            case "touch":
                block_hash = content(rng.randrange(12))
                mirror.touch(block_hash)
                slow.touch(block_hash)
            case "find":
                block_hash = content(rng.randrange(12))
                slow.touch(block_hash)
                wanted = [slot for slot, (h, _) in slow.in_state("whole").items() if h == block_hash]
                assert mirror.find(block_hash) == (wanted[0] if wanted else None)
            case "abandon":
                assert set(mirror.abandon()) == slow.abandon(copying)
            case "abandon some":
                slots = rng.sample(copying, rng.randint(0, len(copying)))
                assert set(mirror.abandon(slots)) == slow.abandon(slots)
            case "clear" if rng.random() < 0.1:
                mirror.clear()
                slow.slots = dict.fromkeys(range(num_slots), ("blank", None, 0))
        mirror.validate()
        assert mirror.num_whole == len(slow.in_state("whole"))
        assert mirror.num_copying == len(slow.in_state("copying"))
        assert mirror.num_evicted == slow.num_evicted


def test_a_content_is_found_only_when_its_copy_is_whole():
    mirror = Mirror(2)
    assert mirror.start([(7, content(1)), (8, content(2)), (9, content(1))]) == [(7, 0), (8, 1)]
    assert mirror.find(content(1)) is None
    mirror.done([0])
    assert (mirror.find(content(1)), mirror.find(content(2))) == (0, None)
    assert mirror.abandon() == [content(2)]
    assert mirror.find(content(2)) is None and mirror.start([(8, content(2))]) == [(8, 1)]
    mirror.validate()


def test_what_is_being_copied_or_named_just_now_is_not_evicted():
    mirror = Mirror(2)
    mirror.start([(0, content(1)), (1, content(2))])
    assert mirror.start([(2, content(3))]) == []
    mirror.done([0, 1])
    assert mirror.start([(0, content(1)), (1, content(2)), (2, content(3))]) == []
    assert mirror.start([(1, content(2)), (2, content(3))]) == [(2, 0)]
    assert (mirror.find(content(1)), mirror.find(content(2)), mirror.num_evicted) == (None, 1, 1)
    mirror.validate()


def test_the_beginning_of_a_prefix_outlives_its_end():
    mirror = Mirror(3)
    mirror.start([(number, content(number)) for number in range(3)])
    mirror.done([0, 1, 2])
    mirror.start([(9, content(9))])
    assert [mirror.find(content(number)) for number in range(3)] == [0, 1, None]
    mirror.validate()


@pytest.mark.parametrize("misuse", ["done twice", "done of a copy that is void", "no slots"])
def test_misuse_is_caught(misuse):
    mirror = Mirror(1)
    mirror.start([(0, content(1))])
    with pytest.raises(AssertionError):
        match misuse:
            case "done twice":
                mirror.done([0])
                mirror.done([0])
            case "done of a copy that is void":
                mirror.abandon()
                mirror.done([0])
            case "no slots":
                Mirror(0)


@pytest.mark.parametrize("damage", ["slot lost", "slot twice", "content twice"])
def test_validate_notices(damage):
    mirror = Mirror(3)
    mirror.start([(0, content(1))])
    mirror.validate()
    with pytest.raises(AssertionError):
        match damage:
            case "slot lost":
                mirror._blank.pop()
                mirror.validate()
            case "slot twice":
                mirror._blank.append(0)
                mirror.validate()
            case "content twice":
                mirror._whole[content(1)] = mirror._blank.pop()
                mirror.validate()


class MirroredSimulation(Simulation):
    """An engine with a mirror and an index, as the controller drives them; see the class it is made from.

    A copy takes a while: what it takes to the host is the block as it is when the copy ends.
    """

    def __init__(self, rng, *, num_slots, **sizes):
        super().__init__(rng, **sizes)
        self.mirror = Mirror(num_slots)
        self.host = {}
        self.copies = []
        self.index_kind = {"num_blocks": self.num_blocks, "block_size": sizes["block_size"], "model": b"m"}
        self.index_memory = bytearray(KVIndex.bytes_needed(self.num_blocks))
        self.index = KVIndex.format(self.index_memory, **self.index_kind)
        self.index.set_epoch(1)
        self.scheduler.pool._on_change = self.on_change

    def on_change(self, block_id, block_hash):
        self.index.update(block_id, block_hash)
        if block_hash is not None:
            self.mirror.touch(block_hash)

    def step(self, *, faults):
        self.mirror_some()
        super().step(faults=faults)

    def mirror_some(self):
        """Ends the copies of last time, unless the block was taken for something else meanwhile."""
        pool = self.scheduler.pool
        for block_id, slot, block_hash in self.copies:
            if pool.block_of(block_hash) == block_id:
                self.host[slot] = self.contents(block_id)
                self.mirror.done([slot])
            else:
                pool.offer(self.mirror.abandon([slot]))
        sealed = pool.take_sealed(self.rng.randint(0, 4))
        hash_of = dict(sealed)
        self.copies = [(b, slot, hash_of[b]) for b, slot in self.mirror.start(sealed)]
        self.events["mirrored"] += len(self.copies)
        self.mirror.validate()

    def contents(self, block_id):
        return [self.worker.memory[block_id, offset] for offset in range(self.scheduler.pool.block_size)]

    def stop_copies(self):
        self.events["copies cut off"] += len(self.copies)
        for _, slot, _ in self.copies:
            self.host[slot] = [self.rng.getrandbits(60)] * self.scheduler.pool.block_size
        self.copies = []
        self.scheduler.pool.offer(self.mirror.abandon())

    def lose_kv(self):
        self.index.set_epoch(0)
        self.stop_copies()
        pool = self.scheduler.pool
        kept = {block_id for block_id in range(self.num_blocks) if self.rng.random() < 0.2}
        self.worker.lose_all_but(kept)
        restored = {b: slot for b, h in pool.sealed() if b not in kept and (slot := self.mirror.find(h)) is not None}
        for block_id, slot in restored.items():
            self.worker.memory |= {(block_id, offset): kv for offset, kv in enumerate(self.host[slot])}
        self.scheduler.on_kv_lost(kept | restored.keys())
        self.events["restored"] += len(restored)
        self.index.set_epoch(1)

    def resize(self):
        self.index.set_epoch(0)
        self.stop_copies()
        is_valid = super().resize()
        self.index.set_epoch(1)
        return is_valid

    def kill_engine(self):
        """The next engine has the memory and the index; its clients ask again."""
        old = self.scheduler
        for request_id in [r for r in self.requests if r not in self.reasons]:
            self.reasons[request_id] = "abort"
        self.stop_copies()
        self.index = KVIndex.open(self.index_memory, **self.index_kind)
        pool = BlockPool(old.pool.num_blocks, old.pool.block_size, on_change=self.on_change)
        pool.adopt(self.index.entries())
        self.events["adopted"] += pool.num_cached
        self.mirror = Mirror(self.mirror.num_slots)
        self.scheduler = Scheduler(
            pool,
            max_num_seqs=old.max_num_seqs,
            max_batch_tokens=old.max_batch_tokens,
            max_model_len=old.max_model_len,
            max_waiting=old.max_waiting,
        )
        self.worker.pool = pool

    def check(self):
        super().check()
        assert self.index.entries() == self.scheduler.pool.sealed()
        self.events["mirror evicted"] += self.mirror.num_evicted


@pytest.fixture(scope="module")
def events():
    """Of 100 histories in which every token was right; see `Simulation.check`."""
    total = Counter()
    for seed in range(100):
        rng = Random(seed)
        simulation = MirroredSimulation(
            rng, num_slots=rng.randint(1, 24), num_blocks=20, block_size=4, max_num_seqs=5, max_batch_tokens=16
        )
        for _ in range(3):
            simulation.run(num_steps=20)
            for _ in range(3):
                simulation.arrive()
                simulation.step(faults=False)
            simulation.kill_engine()
        simulation.run(num_steps=20)
        total += simulation.events
    return total


@pytest.mark.parametrize(
    "event",
    ["finished", "mirrored", "restored", "copies cut off", "adopted", "mirror evicted", "moved", "hit", "preempted"],
)
def test_tokens_are_right_whatever_is_lost_restored_or_adopted(events, event):
    assert events[event] >= 50, events
