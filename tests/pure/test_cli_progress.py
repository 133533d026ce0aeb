"""What a person sees of a load: `status`, `device`, the demo, each on a terminal or not."""

from __future__ import annotations

import io
import re

import httpx
import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from anchortp.cli import demo, device, status
from anchortp.cli.client import Stream
from anchortp.cli.main import app
from anchortp.cli.progress import MAX_LINKS, loading_lines, loading_view

MB = 1_000_000
LINKS = {
    "host>cpu:0": {"bytes": 9 * MB, "bytes_per_s": 4.5e8},
    "cpu:1>cpu:0": {"bytes": 2 * MB, "bytes_per_s": 1.25e9},
    "host>cpu:1": {"bytes": 4 * MB, "bytes_per_s": 2e6},
}


def loading(done_mb: float, total_mb: float = 20, left_s: float | None = 0.5, links=LINKS) -> dict:
    return {
        "loading_bytes": int(done_mb * MB),
        "loading_total_bytes": int(total_mb * MB),
        "loading_left_s": left_s,
        "loading_links": links,
    }


QUIET = loading(0, 0, 0.0, {})


def drawn(view: RenderableType, *, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    console.print(view)
    return console.file.getvalue()


def check_figures(text: str, now: dict) -> None:
    """Bytes, share, time left, and each link with its rate, the slowest first: read back from the text."""
    done, total = now["loading_bytes"], now["loading_total_bytes"]
    found = re.search(r"weights: ([\d.]+) of ([\d.]+) MB \((\d+)%\), ([\d.]+) (ms|s) left", text)
    assert found, text
    assert float(found[1]) == pytest.approx(done / 1e6, abs=0.05) and float(found[2]) == total / 1e6
    assert int(found[3]) == round(100 * done / total)
    assert float(found[4]) * {"ms": 1e-3, "s": 1.0}[found[5]] == pytest.approx(now["loading_left_s"])
    links = re.findall(r"(\S+>\S+): ([\d.]+) MB at ([\d.]+) GB/s", text)
    rates = [float(rate) for _, _, rate in links]
    assert rates == sorted(rates)
    assert {name: (float(size), float(rate)) for name, size, rate in links} == {
        name: (link["bytes"] / 1e6, link["bytes_per_s"] / 1e9) for name, link in now["loading_links"].items()
    }


def test_lines_have_the_figures_and_a_link_each():
    check_figures("\n".join(loading_lines(loading(13))), loading(13))
    assert len(loading_lines(loading(13))) == 1 + len(LINKS)
    assert loading_lines(loading(0, 20, None, {})) == ["weights: 0.0 of 20.0 MB (0%), time left unknown"]
    assert loading_lines(QUIET) == [] and loading_lines({"state": "serving"}) == []


def test_a_live_view_has_a_bar_and_as_many_links_as_there_is_room_for():
    text = drawn(loading_view(loading(13)))
    check_figures(text, loading(13))
    first, bar, *links = (line.rstrip() for line in text.splitlines())
    assert [first, *links] == loading_lines(loading(13)) and re.fullmatch("━{39}", bar)
    lengths = [len(re.findall("[━╸]", drawn(loading_view(loading(done))))) for done in (0, 5, 10, 20)]
    assert lengths == [0, 15, 30, 60]
    many = {f"cpu:{i}>cpu:0": {"bytes": MB, "bytes_per_s": 1e8 * (i + 1)} for i in range(MAX_LINKS + 3)}
    text = drawn(loading_view(loading(13, links=many)))
    assert "and 3 faster" in text and text.count(" GB/s") == MAX_LINKS
    assert f"cpu:{MAX_LINKS}>cpu:0" not in text, "the slowest are shown"
    assert drawn(loading_view(QUIET)) == ""


# ------------------------------------------------------------------------------------------------- status


ENGINE = {
    "state": "serving",
    "epoch": 4,
    "num_running": 2,
    "num_waiting": 0,
    "num_spares": 1,
    "reason": "",
    "episodes": [],
}


@pytest.mark.parametrize("now", [loading(13), QUIET])
def test_status_shows_a_load_while_there_is_one(monkeypatch, tmp_path, now):
    monkeypatch.setattr(status, "_engine", lambda folder, api_key: {**ENGINE, **now})
    answer = CliRunner().invoke(app, ["status", "--runtime-dir", str(tmp_path)])
    assert answer.exit_code == 0 and "engine: serving, epoch 4" in answer.output
    if now is QUIET:
        assert "weights:" not in answer.output
    else:
        check_figures(answer.output, now)


# ------------------------------------------------------------------------------------------------- device


def episode(outcome: str, *texts: str, change_id: int = 7, **more) -> dict:
    return {
        "change_id": change_id,
        "cause": "add cpu:4",
        "outcome": outcome,
        "seconds": 1.25,
        "bytes": {"loaded": 13 * MB, "copied": 2 * MB, "lost": 0, "replica": 0},
        "links": LINKS,
        "phases": {"attaching": 0.25, "loading": 0.5, "leaving": 0.5},
        "timeline": [{"at_s": 0.5 * i, "text": text} for i, text in enumerate(texts)],
    } | more


FIRST = episode("interrupted: cpu:3 is lost", "first try, cut short")
SAYS = ("planned", "10.0 of 20.0 MB of weights are there, 500 ms left; host>cpu:0 0.45 GB/s")
STATUSES = [
    {"changes": [episode("serving", "an older change", change_id=6)], **QUIET},
    {"changes": [FIRST], **QUIET},
    {"changes": [FIRST, episode("", *SAYS[:1])], **loading(2, left_s=4.5)},
    {"changes": [FIRST, episode("", *SAYS)], **loading(10)},
    {"changes": [FIRST, episode("serving", *SAYS, "all is there")], **QUIET},
]


class Server:
    """Answers /status from a script, one entry a time, and the rest as an engine would."""

    def __init__(self, statuses: list[dict]):
        self.statuses = list(statuses)
        self.asked: list[tuple[str, str, bytes]] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path, request.content))
        if request.url.path == "/status":
            return httpx.Response(200, json=self.statuses.pop(0))
        if request.method == "POST":
            return httpx.Response(202, json={"object": "device_change", "change_id": 7})
        found = {"speed": 1.0, "weight_bytes": 15 * MB, "budget_bytes": 64 * MB, "attention_units": 3}
        return httpx.Response(200, json={"data": {"cpu:4": found}})

    def client(self, *_) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer), base_url="http://test")


@pytest.fixture
def server(monkeypatch):
    server = Server(STATUSES)
    monkeypatch.setattr(device, "_client", server.client)
    monkeypatch.setattr(device, "POLL_S", 0.0)
    return server


@pytest.mark.parametrize(
    ("arguments", "body"),
    [(["add", "cpu:4"], b'{"add":["cpu:4"],"memory_bytes":null}'), (["remove", "cpu:4"], b'{"remove":["cpu:4"]}')],
)
def test_device_without_a_terminal_prints_the_story_once_and_the_rates(server, arguments, body):
    answer = CliRunner().invoke(app, ["device", *arguments])
    assert answer.exit_code == 0, answer.output
    assert server.asked[0] == ("POST", "/devices", body)
    assert not server.statuses, "it waits for the end of the last try"
    for text in (*SAYS, "first try, cut short", "all is there"):
        assert answer.output.count(text) == 1
    assert "an older change" not in answer.output and "\x1b" not in answer.output
    assert "2.0 MB from peers and 13.0 MB from the host in 0.75 s" in answer.output
    assert "host>cpu:1: 4.0 MB at 0.002 GB/s" in answer.output


def test_device_on_a_terminal_has_a_bar_while_bytes_move(server):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with server.client() as client:
        ended = device._follow(client, 7, console)
    assert ended["outcome"] == "serving"
    frames = re.split(r"\x1b\[2K", console.file.getvalue())
    moving = [frame for frame in frames if "weights:" in frame]
    text = "".join(frames)
    assert len(moving) == 2 and "2.0 of 20.0 MB (10%), 4.5 s left" in text and "10.0 of 20.0 MB (50%)" in text
    assert "the engine serves on" in text and "planned" not in text


def test_device_says_why_a_change_was_refused(monkeypatch, server):
    server.statuses = [{"changes": [episode("refused: too little memory", "no room")], **QUIET}]
    answer = CliRunner().invoke(app, ["device", "add", "cpu:4"])
    assert isinstance(answer.exception, device.ChangeRefused)
    assert str(answer.exception) == "refused: too little memory"


# --------------------------------------------------------------------------------------------------- demo


def shown(**now) -> demo.Show:
    device = {"attention_units": 3, "kv_units": 1, "weight_bytes": 20 * MB}
    stream = Stream(body={})
    stream.times_s, stream.finish_reason = [0.0, 1.0, 1.5], "length"
    status = {"state": "recovering", "devices": {"cpu:0": device, "cpu:1": device}, **now}
    return demo.Show(lose="cpu:2", streams=[stream], status=status, fault_s=1.0)


def test_the_demo_draws_the_load_of_a_recovery():
    text = drawn(demo._view(shown(**loading(13))))
    check_figures(text, loading(13))
    assert "━" in text and "lost" in text
    assert "weights:" not in drawn(demo._view(shown(**QUIET)))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_demo_ends_with_the_rate_of_each_link(monkeypatch, terminal):
    moved = {"lost": 15 * MB, "loaded": 15 * MB, "replica": 0, "copied": 0}
    fault = episode("serving", *SAYS, bytes=moved, kv="whole", began_s=1.0, first_token_s=0.3)
    monkeypatch.setattr(demo, "time_to_first_success", lambda streams, fault_s, episode: 0.25)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    assert demo._verdict(console, shown(faults=[fault], **QUIET)) == 0
    text = console.file.getvalue()
    for name, link in LINKS.items():
        assert f"{name}: {link['bytes'] / 1e6:.1f} MB at {link['bytes_per_s'] / 1e9:g} GB/s" in text
    assert (SAYS[1] in text) == terminal, "without one the lines were printed as they came"


def test_the_demo_without_a_terminal_prints_each_line_of_the_story_once():
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    told = 0
    for texts in (SAYS[:1], SAYS, SAYS):
        told = demo._tell(console, shown(faults=[episode("", *texts)]), told)
    assert [line.split("ms  ")[1] for line in console.file.getvalue().splitlines()] == list(SAYS)
