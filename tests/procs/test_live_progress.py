"""A load that is slow is seen while it goes on: over HTTP, in the story, and by `anchortp device`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from anchortp.cli import device
from anchortp.cli.main import app
from anchortp.engine.faults import Strike
from anchortp.server.app import create_app
from anchortp.transfer.faulty import SLOW_BYTES_PER_S
from tests.cpu.fake_engine import serving
from tests.procs.engine_tools import DEADLINE_S, Driver, running_engine
from tests.tiny_model import write_model

NUM_MOVERS = 2  # threads of a load that has the machine to itself
SHAPE = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024}  # 13 MB
MIDDLE = 3_000_000  # of the 7 MB that a device gets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    uvloop.new_event_loop().close()  # libuv keeps a pipe for signals, one per process: it is no leak of a test
    return write_model(tmp_path_factory.mktemp("slow") / "model", **SHAPE)


def metrics(http: httpx.Client) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, sample.labels.get("name", "")): sample.value for sample in samples}


def watched(driver: Driver, http: httpx.Client) -> Iterator[tuple[dict, dict, dict]]:
    """Whenever the engine's status changes: /status, /metrics, /status."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        with driver.changed:
            driver.changed.wait(1.0)
        yield http.get("/status").json(), metrics(http), http.get("/status").json()
    raise AssertionError("the load does not end")


def test_a_slow_load_is_seen_while_it_goes_on(folder, monkeypatch):
    slow = Strike(device="cpu:0", point="read", kind="slow", times=10_000)
    with running_engine(folder, 2) as driver:
        no_tokenizer = create_app(driver.engine, None, model_name="slow")
        with serving(no_tokenizer) as server, httpx.Client(base_url=server.url, timeout=DEADLINE_S) as http:
            pid = driver.worker_pid("cpu:0")
            driver.arm(slow)
            driver.inject("cpu:0", "crash")
            driver.replaced("cpu:0", pid)
            streams = driver.speak(2, 40)
            driver.inject("cpu:1", "lost")
            check_recovery(driver, http)
            for stream in streams:
                stream.check()
            driver.check_fired()

            driver.arm(Strike(device="cpu:1", point="read", kind="slow", source="cpu:0", at_byte=MIDDLE, times=4))
            monkeypatch.setattr(device, "_client", lambda *_: httpx.Client(base_url=server.url, timeout=DEADLINE_S))
            check_change(driver, CliRunner().invoke(app, ["device", "add", "cpu:1"]))
            driver.check_fired()


def check_recovery(driver: Driver, http: httpx.Client) -> None:
    """Bytes rise, and what is shown agrees; it is gone when the last byte is there, and then it is in the story."""
    seen: list[dict] = []
    for before, measured, after in watched(driver, http):
        if seen and not after["loading_total_bytes"]:
            break
        if before["loading_bytes"] and after["loading_total_bytes"]:
            seen.append(before)
            check_metrics(before, measured, after)
    moved = [status["loading_bytes"] for status in seen]
    assert moved == sorted(moved) and len(set(moved)) > 3
    (total,) = {status["loading_total_bytes"] for status in seen}
    for status in seen:
        (link,) = status["loading_links"].values()
        assert link["bytes"] == status["loading_bytes"] == status["devices"]["cpu:0"]["loading_bytes"] <= total
        assert 0 < link["bytes_per_s"] <= NUM_MOVERS * SLOW_BYTES_PER_S
        rest_s = (total - link["bytes"]) / link["bytes_per_s"]
        assert status["loading_left_s"] >= 0.9 * rest_s, "less than it takes while the link is busy"

    quiet = metrics(http)
    assert quiet["anchortp_loading_total_bytes", ""] == quiet["anchortp_loading_left_seconds", ""] == 0
    assert ("anchortp_loading_links_bytes", "host>cpu:0") not in quiet
    fault = http.get("/faults").json()["data"][-1]
    assert fault["bytes"]["loaded"] == fault["links"]["host>cpu:0"]["bytes"] == total
    texts = [line["text"] for line in fault["timeline"]]
    assert 1 <= sum("of weights are there" in text for text in texts) <= 3
    (last,) = [text for text in texts if text.startswith("all ") and "of weights came in" in text]
    rate = fault["links"]["host>cpu:0"]["bytes_per_s"]
    assert last.endswith(f"; host>cpu:0 {rate / 1e9:.3g} GB/s")


def check_metrics(before: dict, measured: dict, after: dict) -> None:
    """They were asked for between the two."""
    now = measured["anchortp_loading_bytes", ""]
    assert before["loading_bytes"] <= now <= after["loading_bytes"]
    assert measured["anchortp_loading_links_bytes", "host>cpu:0"] == now
    assert measured["anchortp_loading_total_bytes", ""] == before["loading_total_bytes"]
    assert 0 < measured["anchortp_loading_links_bytes_per_s", "host>cpu:0"] <= NUM_MOVERS * SLOW_BYTES_PER_S
    assert ("anchortp_loading_left_seconds", "") in measured


def check_change(driver: Driver, answer) -> None:
    """What `anchortp device add` printed, without a terminal: the story as it went, and the rates."""
    assert answer.exit_code == 0, (answer.output, answer.exception)
    made = driver.engine.status()["changes"][-1]
    assert made["outcome"] == "serving" and made["bytes"]["copied"] > 0
    printed = re.findall(r"^\+[\d.]+ s  (.*)$", answer.output, re.MULTILINE)
    assert printed == [line["text"] for line in made["timeline"]]
    assert any("of weights are there" in text for text in printed)
    assert any(text.startswith("all ") and "cpu:0>cpu:1" in text for text in printed)
    link = made["links"]["cpu:0>cpu:1"]
    assert f"cpu:0>cpu:1: {link['bytes'] / 1e6:.1f} MB at {link['bytes_per_s'] / 1e9:.3g} GB/s" in answer.output
