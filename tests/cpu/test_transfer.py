"""Loads: right bytes or none, from any source, whatever strikes, within a bound."""

from __future__ import annotations

import os
import random
import resource
import shutil
import threading
import time

import pytest
import torch

from anchortp.arena import MemfdArena
from anchortp.config import cache_folder
from anchortp.engine.scheduler import ScheduledSeq
from anchortp.errors import GroupAborted
from anchortp.layout import FAMILIES, empty_shard, initial_layout
from anchortp.model import ForwardBatch
from anchortp.native import build_kernels
from anchortp.transfer import checkpoint, checksum, executor, sources, work
from anchortp.transfer import queue as transfer_queue
from anchortp.transfer.checksum import sum_key
from anchortp.transfer.executor import Loaded
from anchortp.transfer.faulty import Fault
from anchortp.transfer.queue import Failure
from anchortp.transfer.sources import Destination, map_pages
from anchortp.transfer.streamed import Streamer
from anchortp.transfer.work import HOST
from tests.cpu.transfer_tools import Bench, moves_from
from tests.tiny_model import Oracle, write_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and segments even in a tiny model; peers are given up soon."""
    monkeypatch.setattr(work, "SEGMENT_BYTES", 2048)
    monkeypatch.setattr(work, "CHUNK_BYTES", 8192)
    monkeypatch.setattr(transfer_queue, "GRACE_S", {False: 0.1, True: 0.3})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def stream():
    return Streamer(str(build_kernels(cache_folder() / "kernels")))


@pytest.fixture
def bench(folder, stream):
    bench = Bench(folder, stream=stream)
    yield bench
    bench.close()


@pytest.fixture(params=["descriptor", "mapping"])
def peers_are_read(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "panels"])
def wide(request, tmp_path, peers_are_read, stream):
    """A model whose weights may lie in panels."""
    shape = {"head_dim": 64, "intermediate_size": 512, "vocab_size": 600}
    folder = write_model(tmp_path / "wide", dtype="bfloat16", tie_word_embeddings=False, **shape)
    bench = Bench(folder, panels=request.param, stream=stream if peers_are_read == "mapping" else None)
    in_panels = {tensor.key for tensor in bench.units.tensors if bench.units.in_panels(tensor)}
    assert in_panels == ({"q", "kv", "gate_up", "lm_head"} if request.param else set())
    yield bench
    bench.close()


def whole(bench):
    return initial_layout(bench.units, ["cpu:0"]).shards[0]


def shuffled(bench, device="cpu:0", share=0.5, seed=1):
    rng = random.Random(seed)
    shard = empty_shard(device)
    for family in FAMILIES:
        total = bench.units.num_units[family]
        shard = shard.appended(family, rng.sample(range(total), max(1, int(total * share))))
    return shard


def assert_same(bench, device, shard, fresh=True):
    """Byte for byte what the plain loader writes, and nothing beside it."""
    reference = bench.fill("reference", shard, fresh=fresh)
    assert torch.equal(bench.arena(device), reference)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_load_writes_what_the_plain_loader_writes(tmp_path, dtype):
    bench = Bench(write_model(tmp_path, dtype=dtype))
    shard = shuffled(bench)
    result = bench.run("cpu:0", shard)
    assert isinstance(result, Loaded) and result.peer_bytes == 0 and result.rerouted == ()
    weights = sum(len(shard[f]) * bench.units.unit_bytes[f] for f in FAMILIES)
    assert result.num_bytes == weights + bench.units.replicated_bytes
    assert result.links["host"][0] == result.num_bytes
    assert_same(bench, "cpu:0", shard)
    bench.close()


def test_a_checkpoint_in_another_dtype_is_converted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    bench = Bench(tmp_path / "m")
    shard = shuffled(bench)
    assert isinstance(bench.run("cpu:0", shard), Loaded)
    assert_same(bench, "cpu:0", shard)
    bench.close()


def test_peers_and_host_together_and_the_sums_agree_whatever_the_way(wide):
    shard = whole(wide)
    first = wide.run("cpu:0", shard)
    peers = {"cpu:1": shuffled(wide, "cpu:1", 0.5, 2), "cpu:2": shuffled(wide, "cpu:2", 0.4, 3)}
    for device, held in peers.items():
        wide.fill(device, held)
    moves = moves_from(wide, "cpu:3", shard, peers)
    second = wide.run("cpu:3", shard, moves=moves, expected=first.sums)
    assert second.sums == first.sums and second.rerouted == ()
    assert second.peer_bytes == sum(move.num_bytes for move in moves) > 0
    assert set(second.links) == {"host", "cpu:1", "cpu:2"}
    assert wide.num_closed == 2
    assert_same(wide, "cpu:3", shard)


def test_a_unit_in_parts_over_several_routes(wide):
    shard = whole(wide)
    first = wide.run("cpu:0", shard)
    wide.fill("cpu:1", shard)
    rng = random.Random(7)
    moves = []
    for move in moves_from(wide, "cpu:2", shard, {"cpu:1": shard}):
        start = rng.randrange(move.num_bytes)
        stop = rng.randrange(start, move.num_bytes) + 1
        moves.append(work.replace(move, first_byte=start, num_bytes=stop - start))
    result = wide.run("cpu:2", shard, moves=moves, expected=first.sums)
    assert result.sums == first.sums and result.peer_bytes == sum(m.num_bytes for m in moves)
    assert_same(wide, "cpu:2", shard)


def test_a_relocation_within_the_device(bench):
    held = empty_shard("cpu:0").appended("mlp", [3])
    bench.fill("cpu:0", held)
    (move,) = moves_from(bench, "cpu:0", held, {"cpu:0": held})
    result = bench.run("cpu:0", held, before=held, moves=[work.replace(move, slot=1)], fresh=False)
    assert isinstance(result, Loaded)
    two = empty_shard("cpu:0").appended("mlp", [3, 3])
    assert_same(bench, "cpu:0", two)


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", ["slow", "hang", "error", "corrupt", "short", "gone"])
@pytest.mark.parametrize("source", [HOST, "cpu:1"])
@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "always"])
@pytest.mark.parametrize("share", [0.0, 0.37, 0.999])
def test_whatever_strikes_a_source_at_any_byte(bench, kind, source, times, share):
    """The bytes are right, or the load is refused with a reason; within a bound, and no thread stays behind."""
    shard = shuffled(bench)
    expected = bench.run("cpu:0", whole(bench)).sums
    peer = shuffled(bench, "cpu:1", 0.6, 5)
    bench.fill("cpu:1", peer)
    moves = moves_from(bench, "cpu:2", shard, {"cpu:1": peer})
    carried = sum(m.num_bytes for m in moves)
    if source == HOST:
        weights = sum(len(shard[f]) * bench.units.unit_bytes[f] for f in FAMILIES)
        carried = weights + bench.units.replicated_bytes - carried
    fault = Fault(kind=kind, at_byte=int(share * carried), times=times)
    result = bench.run("cpu:2", shard, moves=moves, expected=expected, faults={source: fault})
    assert bench.sources[source].fired >= 1, "the fault did not strike"
    if source == HOST and times > 1 and kind != "slow":
        assert isinstance(result, Failure) and result.reason
        return
    assert isinstance(result, Loaded), result
    assert_same(bench, "cpu:2", shard)
    if times > 1 and kind != "slow":
        assert result.rerouted and "cpu:1" in result.rerouted[0]


def test_a_peer_that_rots_is_read_from_the_host(bench):
    """A device that is dying overwrites what it had while it is copied."""
    shard = whole(bench)
    expected = bench.run("cpu:0", shard).sums
    bench.fill("cpu:1", shard).fill_(0xFF)
    moves = moves_from(bench, "cpu:2", shard, {"cpu:1": shard})
    result = bench.run("cpu:2", shard, moves=moves, expected=expected)
    assert isinstance(result, Loaded) and result.peer_bytes == 0
    assert "not those that were loaded first" in result.rerouted[0]
    assert_same(bench, "cpu:2", shard)


def test_a_peer_whose_anchor_is_gone_is_not_believed_even_without_sums(bench):
    shard = whole(bench)
    bench.fill("cpu:1", shard)
    bench.gone.add("cpu:1")
    moves = moves_from(bench, "cpu:2", shard, {"cpu:1": shard})
    result = bench.run("cpu:2", shard, moves=moves)
    assert isinstance(result, Loaded) and result.peer_bytes == 0
    assert_same(bench, "cpu:2", shard)


@pytest.fixture
def own_folder(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def test_a_file_that_is_cut_off_while_it_is_served(own_folder):
    bench = Bench(own_folder)
    path = own_folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4096 * 3)
    result = bench.run("cpu:0", whole(bench))
    assert isinstance(result, Failure)
    assert "Download the model again" in result.reason or "too early" in result.reason
    bench.close()


def test_a_file_that_changes_on_disk_is_found_by_its_sums(own_folder):
    bench = Bench(own_folder)
    shard = whole(bench)
    expected = bench.run("cpu:0", shard).sums
    flip_last_byte(own_folder)
    result = bench.run("cpu:1", shard, expected=expected)
    assert isinstance(result, Failure) and "changed on disk" in result.reason
    bench.close()


def test_a_file_that_changes_on_disk_is_found_without_sums_too(own_folder):
    bench = Bench(own_folder)
    flip_last_byte(own_folder)
    result = bench.run("cpu:1", whole(bench))
    assert isinstance(result, Failure) and "was written to" in result.reason
    bench.close()


def flip_last_byte(folder):
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 0x10]))
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.fixture
def by_descriptor(folder, monkeypatch):
    """Several reads of the kernel to a chunk, of peers too."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 2048)
    monkeypatch.setattr(checksum, "PIECE_BYTES", 2048)
    bench = Bench(folder)
    yield bench
    bench.close()


@pytest.mark.parametrize("source", [HOST, "cpu:1"])
def test_a_read_that_takes_too_long_is_left_after_the_piece_and_tried_again(by_descriptor, monkeypatch, source):
    """The first piece takes until the load has lost its patience; those of the next try do not."""
    bench, shard = by_descriptor, whole(by_descriptor)
    bench.fill("cpu:1", shard)
    moves = [] if source == HOST else moves_from(bench, "cpu:2", shard, {"cpu:1": shard})
    load, results = bench.load("cpu:2", shard, moves=moves)
    place = checkpoint if source == HOST else checksum
    read, turn, asked = place.fill, threading.Lock(), []

    def slow_once(*args):
        with turn:
            is_first, deadline_s = not asked, time.monotonic() + 20.0
            while is_first and not asked and time.monotonic() < deadline_s:
                asked.extend(key for key, stop in list(load._stops.items()) if stop.asked_s is not None)
        read(*args)

    monkeypatch.setattr(place, "fill", slow_once)
    load.start()
    result = results.get(timeout=30)
    load.cancel()
    assert isinstance(result, Loaded) and result.rerouted == ()
    assert asked and set(asked) <= {(index, 1) for index, _ in load._queue._tries}
    assert {name for _, name in load._queue._tries} == {source}
    assert_same(bench, "cpu:2", shard)


def test_a_source_that_never_returns_ends_the_load_and_is_reported(by_descriptor, monkeypatch):
    """A read that the kernel does not give back: nobody can write these bytes safely, so the load is refused."""
    bench, shard = by_descriptor, whole(by_descriptor)
    monkeypatch.setattr(executor, "STUCK_S", 0.3)
    bench.fill("cpu:1", shard)
    release = threading.Event()
    monkeypatch.setattr(checksum, "fill", lambda *_: release.wait(30))
    load, results = bench.load("cpu:2", shard, moves=moves_from(bench, "cpu:2", shard, {"cpu:1": shard}))
    load.start()
    result = results.get(timeout=20)
    assert isinstance(result, Failure) and "hangs" in result.reason and result.device == "cpu:1"
    release.set()
    load.cancel()


def test_rows_that_were_mapped_ahead_come_in_one_pass(wide, peers_are_read, monkeypatch):
    """If our kernels are there; with the bytes and the sums that they have when they are read from the descriptor."""
    shard = shuffled(wide)
    first = wide.run("cpu:1", shard)
    assert list(wide.checkpoint.map_ahead()) and wide.checkpoint._ready
    read_rows, by_descriptor = wide.checkpoint.read_rows, set()

    def read(tensor, *args):
        by_descriptor.add(tensor.key)
        read_rows(tensor, *args)

    with monkeypatch.context() as patch:
        patch.setattr(wide.checkpoint, "read_rows", read)
        result = wide.run("cpu:0", shard)
    everything = {tensor.key for tensor in wide.units.tensors}
    assert by_descriptor == ({"o", "down"} if peers_are_read == "mapping" else everything)
    assert result.sums == first.sums
    assert_same(wide, "cpu:0", shard)


def test_a_mapped_file_that_was_cut_off_is_an_error(folder, tmp_path, stream):
    """Not the end of this process, which is what it would be to read beyond its end."""
    shutil.copytree(folder, tmp_path / "m")
    bench = Bench(tmp_path / "m", stream=stream)
    assert list(bench.checkpoint.map_ahead())
    os.truncate(tmp_path / "m" / "model.safetensors", 4096)
    result = bench.run("cpu:0", whole(bench), fresh=False)  # norms are copied in another way
    assert isinstance(result, Failure) and "now ends after 4096 bytes" in result.reason
    bench.close()


def test_columns_are_read_a_strip_at_a_time(wide, monkeypatch):
    """Between two of them a load may be told to stop."""
    (down,) = [tensor for tensor in wide.units.tensors if tensor.key == "down"]
    out = torch.empty(512, wide.units.config.hidden_size, dtype=torch.bfloat16)
    monkeypatch.setattr(checkpoint, "STREAMED_BYTES", out[: checkpoint.STRIP_COLUMNS].nbytes)

    class Enough(Exception):
        pass

    checks = iter([None, None, None])

    def check():
        if next(checks, Enough) is Enough:
            raise Enough

    out.fill_(7.0)
    with pytest.raises(Enough):
        wide.checkpoint.read_rows(down, 0, 0, 0, out, check)
    assert (out[:256] != 7.0).any(1).all() and (out[256:] == 7.0).all()


class BrokenDevice(RuntimeError):
    """As torch raises it."""

    error_code = 214


def broken(*_):
    raise BrokenDevice("CUDA error: uncorrectable ECC error")


def check_it_breaks(load, results, told):
    """The load ends with what `broken` raises, and tells `told` of it."""
    load.start()
    result = results.get(timeout=20)
    assert isinstance(result, Failure) and "ECC" in result.reason and result.device == ""
    assert {type(error) for error in told} == {BrokenDevice}
    load.cancel()
    load._queue.validate()


@pytest.mark.parametrize("where", ["read", "view"])
def test_an_error_of_the_device_is_told_and_ends_the_load(bench, where):
    """`view`: the bytes have arrived and are to be summed, where the load has nothing left to wait for."""
    told: list[Exception] = []
    load, results = bench.load("cpu:0", whole(bench), hooks={"on_error": told.append})
    if where == "view":
        load._destination.view = broken
    else:
        opened = load._hooks.open_source
        bench.sources[HOST] = source = opened(HOST)
        source.read = broken
        object.__setattr__(load._hooks, "open_source", lambda name: source)
    check_it_breaks(load, results, told)
    assert not load.is_whole


@pytest.mark.parametrize("where", ["before_chunk", "prepare"])
def test_an_error_of_our_own_before_a_copy_ends_the_load(bench, where):
    told: list[Exception] = []
    hooks = {"on_error": told.append} | ({"before_chunk": broken} if where == "before_chunk" else {})
    load, results = bench.load("cpu:0", whole(bench), hooks=hooks)
    if where == "prepare":
        load._destination.prepare = broken
    check_it_breaks(load, results, told)
    assert load._queue.in_flight == 0


def test_a_peer_that_is_slow_to_answer_does_not_hold_up_the_host(bench):
    shard = whole(bench)
    bench.fill("cpu:1", shard)
    (move, *_) = moves_from(bench, "cpu:2", shard, {"cpu:1": shard})
    load, results = bench.load("cpu:2", shard, moves=[move])
    opened, is_read, waited = load._hooks.open_source, threading.Event(), []

    def open_source(name):
        source = opened(name)
        if name == HOST:
            read = source.read
            source.read = lambda *args: (read(*args), is_read.set())[0]
        else:
            waited.append(is_read.wait(timeout=20))
        return source

    object.__setattr__(load._hooks, "open_source", open_source)
    load.start()
    result = results.get(timeout=30)
    load.cancel()
    assert isinstance(result, Loaded) and waited == [True]
    assert_same(bench, "cpu:2", shard)


def test_the_clock_of_a_link_stands_while_memory_is_made_ready_and_sources_are_opened(bench):
    load, results = bench.load("cpu:0", whole(bench), num_movers=1)
    opened, prepare, seen = load._hooks.open_source, load._destination.prepare, []

    def note(what):
        seen.append((what, load._queue._links["host"].copying))

    def open_source(name):
        source = opened(name)
        read = source.read
        source.read = lambda *args: (note("read"), read(*args))[1]
        note("open")
        return source

    load._destination.prepare = lambda *args: (note("prepare"), prepare(*args))[1]
    object.__setattr__(load._hooks, "open_source", open_source)
    load.start()
    assert isinstance(results.get(timeout=30), Loaded)
    load.cancel()
    assert set(seen) == {("prepare", 0), ("open", 0), ("read", 1)}


# --------------------------------------------------------------------------------- layers, cancelling, pacing


def gate_of(load):
    """Which positions a forward pass could use now, asked without waiting."""

    class NotYet(Exception):
        pass

    def refuse():
        raise NotYet

    def ready(position):
        try:
            load.wait(position, refuse, 1)
        except NotYet:
            return False
        return True

    return ready


def test_a_layer_is_ready_when_its_bytes_are_there_and_not_before(bench):
    """The load is held before each chunk in turn; what `wait` lets through has every byte."""
    shard = whole(bench)
    reference = bench.fill("reference", shard)
    turn, go = threading.Semaphore(0), threading.Semaphore(0)

    def hold():
        turn.release()
        assert go.acquire(timeout=30)

    load, results = bench.load("cpu:0", shard, hooks={"before_chunk": hold}, num_movers=1)
    ready = gate_of(load)
    load.start()
    num_chunks, seen = len(load._queue.chunks), []
    for _ in range(num_chunks):
        assert turn.acquire(timeout=30)
        upto = max((p for p in range(bench.geometry.num_positions) if ready(p)), default=-1)
        seen.append(upto)
        for chunk in load._queue.chunks:
            if chunk.position <= upto:
                here = bench.arena("cpu:0")[chunk.start : chunk.stop]
                assert torch.equal(here, reference[chunk.start : chunk.stop])
        go.release()
    assert isinstance(results.get(timeout=30), Loaded)
    assert seen == sorted(seen) and {-1, 0, 1, 2, 3} <= set(seen), "layers became ready one after another"
    assert load.is_whole and all(ready(p) for p in range(bench.geometry.num_positions))
    load.cancel()


def test_whoever_waits_for_a_layer_is_told_when_the_load_fails(bench):
    fault = Fault(kind="error", at_byte=0, times=10**9)
    load, results = bench.load("cpu:0", whole(bench), faults={HOST: fault})
    load.start()
    with pytest.raises(GroupAborted, match="did not arrive"):
        load.wait(2, lambda: None, 7)
    assert isinstance(results.get(timeout=30), Failure)
    load.cancel()


def test_cancel_stops_promptly_and_nothing_is_written_afterwards(bench):
    fault = Fault(kind="hang", at_byte=50_000, times=10**9)
    load, results = bench.load("cpu:0", whole(bench), faults={HOST: fault})
    told = []

    def wait():
        try:
            load.wait(3, lambda: None, 1)
        except GroupAborted as error:
            told.append(error)

    waiting = threading.Thread(target=wait)
    load.start()
    waiting.start()
    assert bench.struck.wait(timeout=30)
    began_s = time.monotonic()
    load.cancel()
    assert time.monotonic() - began_s < 2.0
    waiting.join(timeout=5)
    assert not waiting.is_alive() and len(told) == 1
    before = bench.arena("cpu:0").clone()
    assert results.empty(), "a load that was cancelled is not answered"
    assert not [t for t in threading.enumerate() if t.name.startswith("load")]
    assert torch.equal(before, bench.arena("cpu:0"))


def test_pace_bounds_the_share_of_time_in_which_bytes_move(bench):
    moving = []

    def note():
        moving.append(time.monotonic())

    load, results = bench.load("cpu:0", whole(bench), hooks={"before_chunk": note}, pace=0.25)
    began_s = time.monotonic()
    load.start()
    assert isinstance(results.get(timeout=60), Loaded)
    took_s = time.monotonic() - began_s
    busy_s = sum(size / rate for size, rate in load._queue.links(time.monotonic()).values())
    assert busy_s <= 0.5 * took_s
    load.cancel()


def test_sums_name_every_unit(bench):
    shard = shuffled(bench)
    sums = bench.run("cpu:0", shard).sums
    units = {sum_key(f, unit) for f in FAMILIES for unit in shard[f]}
    assert set(sums) == units | {sum_key("replicated", 0)}
    assert all(len(value) == 16 * bench.geometry.num_segments[key.split(":")[0]] for key, value in sums.items())


def test_progress_counts_up_to_the_end(bench):
    seen = []
    load, results = bench.load("cpu:0", whole(bench), hooks={"on_progress": seen.append})
    load.start()
    result = results.get(timeout=30)
    load.cancel()
    assert seen and all(p.total_bytes == result.num_bytes for p in seen)
    assert [p.num_bytes for p in seen] == sorted(p.num_bytes for p in seen)


# ------------------------------------------------------------------------------------------------ the decoder


def scheduled(token_ids):
    return ScheduledSeq(
        request_id="a",
        token_ids=token_ids,
        start=0,
        position=len(token_ids),
        block_ids=(0,),
        sample=True,
    )


def test_the_decoder_asks_before_each_layer_and_a_refusal_ends_the_step(folder):
    oracle = Oracle(folder)
    entry = scheduled((1, 2, 3))
    asked = []
    batch = ForwardBatch.build([entry], 16)
    logits = oracle._decoder.forward(batch, oracle, asked.append)
    assert asked == [0, 1, 2], "two layers, then the logits"
    assert torch.equal(logits, oracle._decoder.forward(batch, oracle))

    def refuse(layer):
        if layer == 1:
            raise GroupAborted(1, "no weights")

    with pytest.raises(GroupAborted):
        oracle._decoder.forward(batch, oracle, refuse)


def test_pages_are_made_ready_by_and_by_and_bytes_that_are_there_stay():
    page = 4096
    with MemfdArena.create("kv", 64 * page) as arena:
        buffer = torch.frombuffer(arena.map(), dtype=torch.uint8)
        buffer[7 * page] = 5
        ranges = [
            (2 * page, 4 * page),
            (7 * page + 10, 7 * page + 20),
            (9 * page, 9 * page + 1),
            (30 * page, 31 * page),
        ]
        step = Destination(arena, buffer).prepare_by_and_by(ranges, 3)
        committed = []
        for _ in range(3):
            step()
            committed.append(arena.committed_bytes() // page)
        assert committed == [3, 5, 5]  # two ranges at a time, one of which was there
        step()
        assert arena.committed_bytes() == 5 * page and buffer[7 * page] == 5
        assert arena.committed_ranges() == [
            (2 * page, 4 * page),
            (7 * page, 8 * page),
            (9 * page, 10 * page),
            (30 * page, 31 * page),
        ]


def test_mapping_pages_takes_the_faults_and_leaves_the_bytes():
    page = 4096
    with MemfdArena.create("weights", 256 * page) as arena:
        os.pwrite(arena.fd, b"x" * 10, 5 * page)
        memory = arena.map()
        buffer = torch.frombuffer(memory, dtype=torch.uint8)
        map_pages(buffer, 3 * page + 7, 131 * page - 9)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for at in range(3, 131):
            memory[at * page + 11] = 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 64, "pages were mapped one by one"
        assert memory[5 * page : 5 * page + 10] == b"x" * 10
        assert arena.committed_bytes() == 128 * page
