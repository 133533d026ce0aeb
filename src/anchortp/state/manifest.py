"""What is in a device's arenas, well enough for a new process to attach to them."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import msgspec

from anchortp.errors import ManifestInvalid


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device's contents at one epoch. Only a sealed manifest that passes `verify` may be believed.

    `model` is a fingerprint of the weights, `shards` the unit ids of each family in slot order, `arenas` each
    arena's name and reserved bytes, `kv_block_size` in tokens.
    """

    VERSION: ClassVar[int] = 1

    device: str
    model: str
    dtype: str
    epoch: int
    shards: dict[str, tuple[int, ...]]
    arenas: dict[str, int]
    num_kv_blocks: int
    kv_block_size: int
    version: int = VERSION
    digest: str = ""

    def seal(self) -> Manifest:
        """The same manifest with the digest of its contents."""
        return msgspec.structs.replace(self, digest=self._digest())

    def verify(self, *, device: str | None = None) -> None:
        """Raises ManifestInvalid unless seal, version and (if given) device are right."""
        _check_version(self.version)
        if self.digest != self._digest():
            raise ManifestInvalid(
                f"the manifest of {self.device} is torn: the seal does not fit the contents. Load the device afresh."
            )
        if device is not None and self.device != device:
            raise ManifestInvalid(f"this manifest is of {self.device}, not of {device}; load the device afresh")

    def to_bytes(self) -> bytes:
        """msgpack, for the wire or a file; the inverse of `from_bytes`."""
        return _encoder.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, *, device: str | None = None) -> Manifest:
        """Decodes and verifies. Raises ManifestInvalid for anything but a sealed manifest of our version."""
        try:
            # The version alone first: another version may have other fields.
            _check_version(_version_decoder.decode(data).version)
            manifest = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ManifestInvalid(f"these bytes are no manifest ({error}); load the device afresh") from error
        manifest.verify(device=device)
        return manifest

    def _digest(self) -> str:
        contents = _encoder.encode(msgspec.structs.replace(self, digest=""))
        return hashlib.blake2b(contents, digest_size=16).hexdigest()


class _Version(msgspec.Struct):
    version: int


_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder = msgspec.msgpack.Decoder(Manifest)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def _check_version(version: int) -> None:
    if version != Manifest.VERSION:
        raise ManifestInvalid(
            f"the manifest has version {version} and this anchortp reads {Manifest.VERSION}; "
            f"load the device afresh, or use the version that wrote it"
        )
