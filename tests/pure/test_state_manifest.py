"""The manifest's seal, and errors that cross the wire."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp import errors
from anchortp.errors import (
    AnchorTPError,
    BudgetExceeded,
    ManifestInvalid,
    ProtocolError,
    StaleEpoch,
    StateError,
)
from anchortp.state.manifest import Manifest
from anchortp.state.messages import Failure, Reply, error_of, failure_of
from anchortp.state.wire import AddressHeld

MANIFEST = Manifest(
    device="cpu:1",
    model="smol-1f3a",
    dtype="bfloat16",
    epoch=4,
    shards={"attention": (0, 3, 8), "mlp": (), "vocab": (7,)},
    arenas={"weights": 1 << 20, "kv": 1 << 22},
    num_kv_blocks=128,
    kv_block_size=16,
).seal()


def test_a_sealed_manifest_comes_back() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes(), device="cpu:1") == MANIFEST


def test_the_seal_does_not_depend_on_the_order_of_keys() -> None:
    arenas = dict(reversed(MANIFEST.arenas.items()))
    assert msgspec.structs.replace(MANIFEST, arenas=arenas).seal().digest == MANIFEST.digest


CHANGES = {
    "device": "cpu:2",
    "model": "other",
    "dtype": "float32",
    "epoch": 5,
    "shards": {"attention": (3, 0, 8), "mlp": (), "vocab": (7,)},
    "arenas": {"weights": 1 << 20},
    "num_kv_blocks": 127,
    "kv_block_size": 32,
    "version": 2,
    "digest": "",
}


def test_every_field_is_under_the_seal() -> None:
    assert set(CHANGES) == {field.name for field in msgspec.structs.fields(Manifest)}
    for name, value in CHANGES.items():
        with pytest.raises(ManifestInvalid):
            msgspec.structs.replace(MANIFEST, **{name: value}).verify()


def test_a_manifest_of_another_device_or_version_is_foreign() -> None:
    with pytest.raises(ManifestInvalid, match="of cpu:1, not of cpu:0"):
        MANIFEST.verify(device="cpu:0")
    newer = msgspec.msgpack.encode({"version": 9, "something": "else"})
    with pytest.raises(ManifestInvalid, match="version 9"):
        Manifest.from_bytes(newer)


@given(st.data())
def test_damaged_bytes_are_never_believed(data: st.DataObject) -> None:
    blob = bytearray(MANIFEST.to_bytes())
    index = data.draw(st.integers(0, len(blob) - 1))
    blob[index] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(blob)))
    for damaged in (bytes(blob), MANIFEST.to_bytes()[:cut] if cut < len(blob) else b""):
        with pytest.raises(ManifestInvalid):
            Manifest.from_bytes(damaged)


ERRORS = [
    BudgetExceeded(device="cpu:0", requested_bytes=3, committed_bytes=2, budget_bytes=4),
    StaleEpoch(epoch=3, current=5),
    errors.LeaseHeld("held"),
    errors.ArenaUnknown("unknown"),
    errors.AnchorRunning("running"),
    ManifestInvalid("torn"),
    StateError("state"),
    ProtocolError("protocol"),
    errors.ConfigError("config"),
    AnchorTPError("bug"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_the_wire_whole(error: AnchorTPError) -> None:
    failure = msgspec.msgpack.decode(msgspec.msgpack.encode(failure_of(error)), type=Reply)
    again = error_of(failure)
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_an_error_without_a_code_travels_as_its_nearest_base(tmp_path) -> None:
    assert type(error_of(failure_of(AddressHeld(tmp_path, 7)))) is AnchorTPError


def test_failures_that_no_anchor_sends() -> None:
    for failure in (Failure(code="nonsense", message="m"), Failure(code="budget_exceeded", message="m")):
        assert type(error_of(failure)) is ProtocolError
