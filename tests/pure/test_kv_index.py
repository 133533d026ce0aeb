"""The persistent index: what a successor may believe after its predecessor was killed at any byte."""

from __future__ import annotations

import mmap
import struct
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchortp.engine.kv_index import NOT_WHOLE, VERSION, KVIndex
from anchortp.errors import ManifestInvalid

NUM_BLOCKS = 6
KIND = {"num_blocks": NUM_BLOCKS, "block_size": 16, "model": b"weights and dtype"}


def hash_of(number):
    return number.to_bytes(16, "little")


def formatted(epoch=1):
    memory = bytearray(KVIndex.bytes_needed(NUM_BLOCKS))
    index = KVIndex.format(memory, **KIND)
    index.set_epoch(epoch)
    return memory, index


def reopened(memory):
    return KVIndex.open(bytearray(memory), **KIND)


# What is written next: block id and content, or None to drop it.
CHANGES = st.lists(st.tuples(st.integers(0, NUM_BLOCKS - 1), st.none() | st.integers(1, 1000)), max_size=30)


def write(index, changes):
    for block_id, number in changes:
        index.update(block_id, None if number is None else hash_of(number))


def entries_after(changes):
    """What an index should give after these writes."""
    last = {block_id: (when, number) for when, (block_id, number) in enumerate(changes)}
    by_use = sorted((when, block_id, number) for block_id, (when, number) in last.items() if number is not None)
    newest = {number: block_id for _, block_id, number in by_use}  # a content is given once
    return [(block_id, hash_of(number)) for _, block_id, number in by_use if newest[number] == block_id]


@given(changes=CHANGES)
def test_a_successor_finds_the_entries_in_the_order_of_use(changes):
    memory, index = formatted(epoch=7)
    write(index, changes)
    successor = reopened(memory)
    assert successor.entries() == index.entries() == entries_after(changes)
    assert successor.epoch == 7


@given(changes=CHANGES, more=CHANGES)
def test_a_successor_goes_on_counting_where_the_other_stopped(changes, more):
    memory, index = formatted()
    write(index, changes)
    successor = KVIndex.open(memory, **KIND)
    write(successor, more)
    undisturbed = formatted()[1]
    write(undisturbed, [*changes, *more])
    assert successor.entries() == undisturbed.entries()


@settings(max_examples=300)
@given(changes=CHANGES.filter(bool), rng=st.randoms(use_true_random=False))
def test_a_write_cut_at_any_byte_is_there_or_not_and_hurts_no_other(changes, rng):
    memory, index = formatted()
    write(index, changes[:-1])
    before = bytes(memory)
    write(index, changes[-1:])
    written = [i for i in range(len(before)) if before[i] != memory[i]]
    allowed = [entries_after(past) for past in (changes[:-1], changes, [*changes[:-1], (changes[-1][0], None)])]
    for damage in ("old", "any"):
        torn = bytearray(memory)
        for i in rng.sample(written, rng.randint(0, len(written))):
            torn[i] = before[i] if damage == "old" else rng.getrandbits(8)
        assert reopened(torn).entries() in allowed


@pytest.mark.parametrize("num_bytes", range(1, 32))
def test_a_new_entry_of_which_only_a_beginning_arrived_is_ignored(num_bytes):
    memory, index = formatted()
    index.put(0, hash_of(1))
    before = bytes(memory)
    index.put(3, hash_of(2**127 + 5))
    start = 128 + 3 * 32
    torn = memory[: start + num_bytes] + before[start + num_bytes :]
    assert reopened(torn).entries() == [(0, hash_of(1))]


@pytest.mark.parametrize("byte", range(32))
def test_an_entry_with_any_byte_damaged_is_ignored(byte):
    memory, index = formatted()
    write(index, [(0, 1), (3, 2)])
    memory[128 + 3 * 32 + byte] ^= 0x10
    assert reopened(memory).entries() == [(0, hash_of(1))]


def test_an_entry_in_the_place_of_another_block_is_ignored():
    memory, index = formatted()
    index.put(0, hash_of(1))
    memory[128 + 32 : 128 + 64] = memory[128 : 128 + 32]
    assert reopened(memory).entries() == [(0, hash_of(1))]


def test_an_entry_of_another_model_is_ignored_even_under_the_right_header():
    memory, index = formatted()
    index.put(0, hash_of(1))
    other = bytearray(len(memory))
    KVIndex.format(other, **KIND | {"model": b"another"}).put(2, hash_of(2))
    memory[128 + 64 : 128 + 96] = other[128 + 64 : 128 + 96]
    assert reopened(memory).entries() == [(0, hash_of(1))]


def test_of_a_content_in_two_blocks_the_one_used_last_is_given():
    memory, index = formatted()
    for block_id, number in ((4, 1), (2, 2), (0, 1)):
        index.put(block_id, hash_of(number))
    assert reopened(memory).entries() == [(2, hash_of(2)), (0, hash_of(1))]


def test_the_epoch_says_whether_anything_may_be_believed():
    memory = bytearray(KVIndex.bytes_needed(NUM_BLOCKS))
    index = KVIndex.format(memory, **KIND)
    index.put(1, hash_of(1))
    assert (index.epoch, index.entries()) == (NOT_WHOLE, [])
    index.set_epoch(12)
    assert (reopened(memory).epoch, reopened(memory).entries()) == (12, [(1, hash_of(1))])
    index.set_epoch(NOT_WHOLE)
    assert reopened(memory).entries() == []
    index.set_epoch(13)
    assert reopened(memory).entries() == [(1, hash_of(1))]
    index.clear()
    index.set_epoch(14)
    assert reopened(memory).entries() == []


@pytest.mark.parametrize("byte", range(64, 80))
def test_a_torn_epoch_is_no_epoch(byte):
    memory, index = formatted(epoch=3)
    index.put(1, hash_of(1))
    memory[byte] ^= 0x5A
    assert (reopened(memory).epoch, reopened(memory).entries()) == (NOT_WHOLE, [])


@pytest.mark.parametrize(
    "other, message",
    [
        ({"model": b"another"}, "is of another model"),
        ({"block_size": 32}, "is of 6 blocks of 16 tokens, and this engine has 6 of 32"),
        ({"num_blocks": 5}, "is of 6 blocks of 16 tokens, and this engine has 5 of 16"),
        ({"num_blocks": 7}, "has 320 bytes, and 7 blocks need 352"),
    ],
)
def test_a_table_of_another_kind_is_refused(other, message):
    memory, _ = formatted()
    with pytest.raises(ManifestInvalid, match=message):
        KVIndex.open(memory, **KIND | other)


def test_a_table_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("anchortp.engine.kv_index.VERSION", VERSION + 1)
    memory, _ = formatted()
    monkeypatch.undo()
    with pytest.raises(ManifestInvalid, match=f"has version {VERSION + 1}, and this anchortp reads {VERSION}"):
        KVIndex.open(memory, **KIND)


@pytest.mark.parametrize("byte", range(56))
def test_a_torn_header_is_refused(byte):
    memory, _ = formatted()
    memory[byte] ^= 0x81
    with pytest.raises(ManifestInvalid, match="is torn, or was never written"):
        KVIndex.open(memory, **KIND)


def test_memory_that_was_never_written_is_refused():
    for memory in (bytearray(4096), bytearray(b"\xff" * 4096), bytearray(Random(1).randbytes(4096))):
        with pytest.raises(ManifestInvalid, match="never written"):
            KVIndex.open(memory, **KIND)


def test_formatting_leaves_nothing_of_what_was_there():
    memory, index = formatted()
    index.put(1, hash_of(1))
    again = KVIndex.format(memory, **KIND)
    assert again.epoch == NOT_WHOLE
    again.set_epoch(1)
    assert again.entries() == reopened(memory).entries() == []


def test_a_mapping_larger_than_the_table_serves_and_can_be_closed():
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as mapping:
        index = KVIndex.format(mapping, **KIND)
        index.set_epoch(2)
        index.put(5, hash_of(9))
        index.close()
        with pytest.raises(ManifestInvalid):
            KVIndex.open(mapping, **KIND | {"model": b"another"})  # and lets go of the mapping
        index = KVIndex.open(mapping, **KIND)
        assert index.entries() == [(5, hash_of(9))]
        index.close()
        index.close()


def test_the_layout_is_what_it_says():
    # Literals: another process, or another release, may have written the table.
    memory, index = formatted(epoch=5)
    index.put(2, hash_of(3))
    assert struct.unpack_from("<8sIIQ", memory) == (b"ANCHORKV", 1, 16, NUM_BLOCKS)
    assert struct.unpack_from("<Q", memory, 64) == (5,)
    assert struct.unpack_from("<16sQ", memory, 128 + 2 * 32) == (hash_of(3), 1)
    assert memory[128 + 2 * 32 + 24 : 128 + 3 * 32].hex() == "5926cb1c093fe117"


@pytest.mark.parametrize("misuse", ["block too high", "block below", "short hash", "drop too high", "epoch below"])
def test_misuse_is_caught(misuse):
    _, index = formatted()
    with pytest.raises(AssertionError):
        match misuse:
            case "block too high":
                index.put(NUM_BLOCKS, hash_of(1))
            case "block below":
                index.put(-1, hash_of(1))
            case "short hash":
                index.put(0, b"short")
            case "drop too high":
                index.drop(NUM_BLOCKS)
            case "epoch below":
                index.set_epoch(-1)
