"""`anchortp serve`: resolve what was left open, start the engine, serve HTTP, and stop cleanly."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp.config import EngineConfig, default_runtime_dir, resolve_engine_config
from anchortp.errors import ConfigError

SERVE_FILE = "serve.json"  # where tools find the server: its address, pid and model
START_TIMEOUT_S = 3600.0  # a large model from a slow disk
SWITCH_INTERVAL_S = 0.5e-3
PACKAGED = ("smollm2", "smollm2-moe", "smollm2-moe-exact")  # names of models that install like a library
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What concerns the server; what concerns the engine goes to `resolve_engine_config`."""

    model: str
    devices: tuple[str, ...]
    host: str
    port: int
    served_model_name: str | None = None
    api_key: str | None = None
    keep_anchors: bool = False
    grace_s: float = 30.0
    fault_script: Path | None = None
    log_file: Path | None = None
    runtime_dir: Path | None = None


def serve(options: ServeOptions, **engine_options: Any) -> None:
    """Serves until SIGTERM or SIGINT; then nothing that it started is left. Raises AnchorTPError."""
    _log_to(options.log_file)
    folder = resolve_folder(options.model)
    config = resolve_engine_config(
        folder,
        runtime_dir=options.runtime_dir or default_runtime_dir(),
        devices=options.devices,
        **engine_options,
    )
    from anchortp.engine.controller import ElasticEngine

    # The engine's thread is woken when a step is done, and all workers wait for it: not for 5 ms of somebody's HTTP.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    engine = ElasticEngine(config, strikes=read_strikes(options.fault_script), keep_anchors=options.keep_anchors)
    engine.start()
    try:
        tokenizer = _load_while_starting(engine, folder)
        _serve_http(engine, tokenizer, config, options, folder)
    finally:
        engine.stop()


def _load_while_starting(engine: Any, folder: Path) -> Any:
    """The tokenizer is read while the weights are loaded."""
    from anchortp.cli.progress import show_start
    from anchortp.server.tokenizer import load_tokenizer

    loaded: dict[str, Any] = {}

    def load() -> None:
        try:
            loaded["tokenizer"] = load_tokenizer(str(folder))
        except Exception as error:
            loaded["error"] = error

    thread = threading.Thread(target=load, name="anchortp-tokenizer")
    thread.start()
    show_start(engine.status)
    engine.wait_ready(START_TIMEOUT_S)
    thread.join()
    if "error" in loaded:
        raise loaded["error"]
    return loaded["tokenizer"]


def _serve_http(engine: Any, tokenizer: Any, config: EngineConfig, options: ServeOptions, folder: Path) -> None:
    from anchortp.server.app import create_app
    from anchortp.server.run import serve_http

    name = options.served_model_name or default_model_name(options.model, folder)
    app = create_app(engine, tokenizer, model_name=name, api_key=options.api_key)
    announce = Path(config.runtime_dir, SERVE_FILE)
    # The libraries imported so far are not garbage: keep the collector from walking them while tokens wait.
    gc.collect()
    gc.freeze()

    def on_ready(port: int) -> None:
        url = f"http://{options.host}:{port}"
        partial = announce.with_suffix(".partial")
        partial.write_text(json.dumps({"url": url, "pid": os.getpid(), "model": name}), encoding="utf-8")
        partial.replace(announce)
        print(f"serving {name} on {len(config.devices)} device(s) at {url}/v1", file=sys.stderr, flush=True)

    try:
        serve_http(
            app,
            options.host,
            options.port,
            on_ready=on_ready,
            should_stop=lambda: engine.status()["state"] == "stopped",
            grace_s=options.grace_s,
        )
    finally:
        with contextlib.suppress(FileNotFoundError):
            announce.unlink()
    if engine.status()["state"] == "stopped":
        raise ConfigError("the engine failed while serving; its log says why. Start again: weights are still there.")


def resolve_folder(model: str) -> Path:
    """A folder, a hub name, 'smollm2' for the model that installs like a library, or one of its MoEs: 'smollm2-moe'
    with uneven load, 'smollm2-moe-exact' with experts that are copies of the MLP."""

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if model == "smollm2":
        from anchortp.cli.smollm2 import fetch_smollm2

        return fetch_smollm2(tell)
    if model in PACKAGED:
        from anchortp.cli.upcycle import fetch_moe

        return fetch_moe("exact" if model.endswith("exact") else "skewed", tell)
    from anchortp.transfer.hub import resolve_model

    return resolve_model(model)


def default_model_name(model: str, folder: Path) -> str:
    """What the API calls `model`, which was found in `folder`: a hub name as it is, all else by its folder."""
    fetched = model not in PACKAGED and folder != Path(model).expanduser()
    return model if fetched else Path(os.path.abspath(folder)).name


def parse_devices(tp: int | None, devices: str | None) -> tuple[str, ...]:
    """`--devices cpu:0,cpu:2` or `--tp 2`; both must agree where both are given."""
    if devices is None:
        return tuple(f"cpu:{i}" for i in range(tp or 1))
    names = tuple(name.strip() for name in devices.split(",") if name.strip())
    if not names:
        raise ConfigError("--devices is empty; name devices as cpu:0,cpu:1.")
    if tp is not None and tp != len(names):
        raise ConfigError(f"--tp is {tp}, but --devices names {len(names)} device(s); leave one of them out.")
    return names


def parse_bytes(text: str | None) -> int | None:
    """'4G' -> 4 << 30. Raises ConfigError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is not a size; write 4G, 512M or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_speeds(pairs: list[str]) -> tuple[tuple[str, float], ...]:
    """['cpu:0=2.0'] -> (('cpu:0', 2.0),). Raises ConfigError."""
    speeds = []
    for pair in pairs:
        device, _, value = pair.partition("=")
        try:
            speeds.append((device, float(value)))
        except ValueError:
            raise ConfigError(f"--speed {pair!r}: write a device and a number, as cpu:0=2.0.") from None
    return tuple(speeds)


def read_strikes(path: Path | None) -> tuple:
    """The strikes of a fault script. Raises ConfigError."""
    if path is None:
        return ()
    import msgspec

    from anchortp.engine.faults import Strike

    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Strike, ...])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--fault-script {path}: {error}") from None


def _log_to(path: Path | None) -> None:
    handler: logging.Handler = logging.StreamHandler() if path is None else logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@contextlib.contextmanager
def serving_url(runtime_dir: Path) -> Iterator[str]:
    """The address of the server that serves from `runtime_dir`. Raises ConfigError if none does."""
    try:
        found = json.loads((runtime_dir / SERVE_FILE).read_text(encoding="utf-8"))
        os.kill(found["pid"], 0)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        raise ConfigError(f"no server serves from {runtime_dir}; start one with `anchortp serve`.") from None
    yield found["url"]
