"""How far a load is: sums, time left, and how much of it the story has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp.recovery import Progress, replay
from anchortp.recovery import events as ev
from anchortp.recovery.progress import MAX_LINKS_TOLD, NUM_PARTS, added
from tests.pure.test_recovery import CONFIG, UNITS, World, change, of_kind, serving

MB = 1_000_000
NAMES = ("cpu:0", "cpu:1", "cpu:2")
REPORTS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 100), st.floats(0.001, 1.0)), max_size=60)


def heard(progress: Progress, device: str, num_bytes: int, now_s: float, total_bytes: int = 100) -> Progress:
    """All from the host, at 7 bytes per second."""
    links = {"host": (num_bytes, 7.0)} if num_bytes else {}
    return progress.heard(device, num_bytes, total_bytes, links, now_s)


@given(REPORTS)
def test_the_sum_is_that_of_the_last_reports_and_the_slowest_device_decides(reports):
    progress, now_s = Progress(), 50.0
    said: dict[str, list[tuple[float, int]]] = {}
    for device, num_bytes, wait_s in reports:
        now_s += wait_s
        progress = heard(progress, device, num_bytes, now_s)
        said.setdefault(device, []).append((now_s, num_bytes))

    last = {device: lines[-1][1] for device, lines in said.items()}
    assert progress.num_bytes == sum(last.values()) and progress.total_bytes == 100 * len(last)
    assert progress.links == {f"host>{device}": (size, 7.0) for device, size in last.items() if size}
    lefts = []
    for lines in said.values():
        (first_s, _), (last_s, size) = lines[0], lines[-1]
        known = size == 100 or (size > 0 and len(lines) > 1)
        lefts.append((100 - size) / (size / (last_s - first_s)) if known and size < 100 else 0.0 if known else None)
    if None in lefts:
        assert progress.left_s is None
    else:
        assert progress.left_s == pytest.approx(max(lefts, default=0.0))
    assert json.loads(json.dumps(progress.as_dict()))["loading_bytes"] == progress.num_bytes


@given(REPORTS)
def test_a_story_has_a_line_per_part_at_most_and_never_two_of_the_same(reports):
    progress, now_s, told = Progress(), 0.0, []
    for device in NAMES:  # each says that it begins
        progress = heard(progress, device, 0, now_s)
    for device, num_bytes, wait_s in reports:
        now_s += wait_s
        progress = heard(progress, device, num_bytes, now_s)
        if progress.is_worth_a_line:
            progress = progress.told()
            told.append(NUM_PARTS * progress.num_bytes // progress.total_bytes)
            assert not progress.is_worth_a_line
    assert told == sorted(set(told)) and set(told) <= set(range(1, NUM_PARTS))


def test_nothing_loads():
    nothing = {"loading_bytes": 0, "loading_total_bytes": 0, "loading_left_s": 0.0, "loading_links": {}}
    assert Progress().as_dict() == nothing and not Progress().is_worth_a_line
    assert heard(Progress(), "cpu:0", 5, 1.0).without("cpu:0") == Progress()


def test_a_device_that_is_through_counts_until_all_are():
    progress = heard(heard(Progress(), "cpu:0", 0, 10.0), "cpu:1", 0, 10.0)
    progress = heard(heard(progress, "cpu:0", 100, 12.0), "cpu:1", 25, 12.0)
    assert (progress.num_bytes, progress.total_bytes, progress.left_s) == (125, 200, 6.0)
    assert progress.devices["cpu:0"].left_s == 0.0


def test_a_device_whose_bytes_were_rejected_goes_on_from_what_is_left():
    progress = heard(heard(heard(Progress(), "cpu:0", 0, 0.0), "cpu:0", 60, 1.0), "cpu:0", 50, 2.0)
    assert progress.num_bytes == 50 and progress.left_s == 2.0


def test_words_name_the_slowest_links_first_and_say_how_many_more_there_are():
    progress = Progress().heard("cpu:0", 0, 40 * MB, {}, 1.0)
    assert progress.in_words() == "0.0 of 40.0 MB of weights are there"
    progress = progress.heard("cpu:0", 10 * MB, 40 * MB, {"host": (8 * MB, 2.5e8), "cpu:1": (2 * MB, 1.25e9)}, 1.1)
    rates = "host>cpu:0 0.25 GB/s, cpu:1>cpu:0 1.25 GB/s"
    assert progress.in_words() == f"10.0 of 40.0 MB of weights are there, 300 ms left; {rates}"
    assert progress.in_words_at_the_end(0.04) == f"all 10.0 MB of weights came in 40 ms, 0.25 GB/s; {rates}"
    assert progress.in_words_at_the_end(2.0) == f"all 10.0 MB of weights came in 2.0 s, 0.005 GB/s; {rates}"
    many = Progress().heard("cpu:0", 1, 2, {f"cpu:{i}": (1, 1e9 * i) for i in range(1, MAX_LINKS_TOLD + 4)}, 0.0)
    assert many.in_words().endswith(f"cpu:{MAX_LINKS_TOLD}>cpu:0 {MAX_LINKS_TOLD} GB/s, 3 faster")


def test_links_of_two_loads_add_up_by_the_time_that_they_were_busy():
    both = added({"a": (100, 50.0), "b": (7, 1.0)}, {"a": (300, 300.0), "b": (0, 0.0), "c": (5, 2.0)})
    assert both == {"a": (400, pytest.approx(400 / (100 / 50 + 300 / 300))), "b": (7, 1.0), "c": (5, 2.0)}


# ---------------------------------------------------------------------------------------- in the coordinator


def rates_given(world: World, rate: float) -> dict[str, tuple[int, float]]:
    """The loads that are under way will say that all came from the host, at `rate`; returns it by link."""
    found = {}
    for index, event in enumerate(world.inflight):
        if isinstance(event, ev.Loaded):
            world.inflight[index] = replace(event, links=(("host", event.num_bytes, rate),))
            found[f"host>{event.device}"] = (event.num_bytes, rate)
    return found


def until_loading(world: World) -> None:
    while not of_kind(world.commands, ev.Load):
        world.step()


def texts(episode) -> list[str]:
    return [line.text for line in episode.lines]


def test_a_recovery_tells_how_far_it_is_and_what_each_link_reached():
    world = serving()
    world.lose("cpu:2")
    until_loading(world)
    coordinator, ordered_s = world.coordinator, world.now
    links = rates_given(world, 2.5e8)
    assert coordinator.is_loading and len(links) == 3
    tickets = [order.ticket for order in of_kind(world.commands, ev.Load)]
    assert all(coordinator.awaits(ticket) for ticket in tickets) and not coordinator.awaits(max(tickets) + 1)
    progress = Progress().heard("cpu:0", 5 * MB, 10 * MB, {"host": (5 * MB, 1e9)}, world.now)
    world.give(ev.Progressed(progress=progress))
    episode = coordinator.episodes[-1]
    assert episode.lines[-1].text == progress.in_words() and episode.lines[-1].at_s == world.now
    while coordinator.is_loading:
        world.step()
    total = sum(size for size, _ in links.values())
    (line,) = [line for line in texts(episode) if line.startswith("all ")]
    seconds = episode.whole_s - ordered_s
    assert f"{total / 1e6:.1f} MB of weights came in {1e3 * seconds:.0f} ms, {total / seconds / 1e9:.3g} GB/s" in line
    assert all(f"{name} 0.25 GB/s" in line for name in links)
    world.settle()
    assert total == episode.loaded_bytes and episode.links == links
    assert episode.as_dict()["links"]["host>cpu:0"] == {"bytes": links["host>cpu:0"][0], "bytes_per_s": 2.5e8}
    again, _ = replay(UNITS, CONFIG, coordinator.log)
    assert again.episodes == coordinator.episodes


def test_a_change_tells_its_own_story_and_a_load_that_is_cut_short_has_no_last_line():
    world = serving()
    change(world, remove=("cpu:3",))
    until_loading(world)
    told = world.coordinator.episodes[-1]
    assert told.change_id and world.coordinator.is_loading
    links = rates_given(world, 1e8)
    progress = Progress().heard("cpu:0", 1, 2, {}, world.now)
    world.give(ev.Progressed(progress=progress))
    assert texts(told)[-1] == progress.in_words()
    world.answer_one()
    world.lose("cpu:1")
    assert not world.coordinator.is_loading, "it was called off"
    assert not [line for line in texts(told) if line.startswith("all ") and "came" in line]
    assert len(told.links) == 1 and set(told.links.items()) <= set(links.items())
    world.settle()
    assert [line for line in texts(world.coordinator.episodes[-1]) if "MB of weights came in" in line]
    start = world.coordinator.episodes[0]
    assert sum("MB of weights came in" in line for line in texts(start)) == 1


def test_bytes_that_arrive_when_their_load_is_over_count_and_are_not_called_all():
    world = serving()
    world.lose("cpu:2")
    until_loading(world)
    links = rates_given(world, 1e8)
    late = next(event for event in world.inflight if isinstance(event, ev.Loaded) and event.device == "cpu:0")
    world.lose("cpu:1")
    world.give(late)
    episode = world.coordinator.episodes[-1]
    assert episode.links == {"host>cpu:0": links["host>cpu:0"]}
    assert not [line for line in texts(episode) if "of weights came in" in line]
    world.settle()
    assert sum("of weights came in" in line for line in texts(episode)) == 1
