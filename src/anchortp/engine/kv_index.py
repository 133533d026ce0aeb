"""A table from block id to content hash that outlives the engine, so that its successor finds the cache warm.

It lies in shared memory that an anchor owns. One engine writes it, as blocks are sealed and reused; the next
one reads it after the first was killed, at any instruction. So each record carries a check over itself: a
record that is torn, or was written for another table or another block, does not pass and is not there.

Little-endian, one record after the other:

```
0    header    magic 8, version 4, block_size 4, num_blocks 8, model 16, check 16
64   epoch     epoch 8, check 8
128  entries   num_blocks times: hash 16, use counter 8 (0: no entry), check 8
```

Runs in the engine process. One thread at a time.
"""

from __future__ import annotations

import struct
from hashlib import blake2b

from anchortp.errors import ManifestInvalid

VERSION = 1
NOT_WHOLE = 0  # the epoch of a table that must not be believed

_MAGIC = b"ANCHORKV"
_HEADER = struct.Struct("<8sIIQ16s16s")
_HEADER_CHECKED = struct.Struct("<8sIIQ16s")
_EPOCH = struct.Struct("<Q8s")
_EPOCH_OFFSET = 64
_ENTRIES_OFFSET = 128
_ENTRY = struct.Struct("<16sQ8s")
_ENTRY_CHECKED = struct.Struct("<16sQ16sQ")  # salt, block id, hash, use counter
_EPOCH_CHECKED = struct.Struct("<16sQ")  # salt, epoch
_NO_ENTRY = bytes(_ENTRY.size)


class KVIndex:
    """The table, in `memory`: any writable buffer of `bytes_needed` bytes or more, as a rule a shared mapping.

    Made by `format` or `open`. `close` lets go of the buffer, so that a mapping can be closed.

    The epoch says for which layout of the planes the entries hold. It is `NOT_WHOLE` while blocks move or are
    partly lost: set it so before a recovery touches the cache, and to the new epoch when the cache is whole.
    """

    def __init__(self, memory: memoryview, num_blocks: int, salt: bytes):
        self.num_blocks = num_blocks
        self._memory = memory
        self._salt = salt  # the header's check: entries of another model or shape do not pass
        self._num_uses = 0

    @staticmethod
    def bytes_needed(num_blocks: int) -> int:
        return _ENTRIES_OFFSET + num_blocks * _ENTRY.size

    @classmethod
    def format(cls, memory: memoryview, *, num_blocks: int, block_size: int, model: bytes) -> KVIndex:
        """An empty table over whatever was there; its epoch is `NOT_WHOLE`.

        `model` is a fingerprint of whatever decides what KV a token has: weights, dtype.
        """
        view = _view(memory, num_blocks)
        view[:] = bytes(len(view))  # first, so that a format cut short leaves no header
        salt, header = _header(num_blocks, block_size, model)
        view[: len(header)] = header
        index = cls(view, num_blocks, salt)
        index.set_epoch(NOT_WHOLE)
        return index

    @classmethod
    def open(cls, memory: memoryview, *, num_blocks: int, block_size: int, model: bytes) -> KVIndex:
        """The table that is there. Raises ManifestInvalid unless it is whole, of our version and of this kind."""
        if memoryview(memory).nbytes < cls.bytes_needed(num_blocks):
            raise ManifestInvalid(
                f"the KV index has {memoryview(memory).nbytes} bytes, and {num_blocks} blocks need "
                f"{cls.bytes_needed(num_blocks)}; format a new one and start with an empty KV cache"
            )
        view = _view(memory, num_blocks)
        salt, header = _header(num_blocks, block_size, model)
        if bytes(view[: len(header)]) != header:
            reason = _why_foreign(view, num_blocks, block_size)
            view.release()
            raise ManifestInvalid(f"the KV index {reason}; format it and start with an empty KV cache")
        index = cls(view, num_blocks, salt)
        index._num_uses = max((uses for _, uses, _ in index._scan()), default=0)
        return index

    @property
    def epoch(self) -> int:
        """The epoch for which the cache is whole; `NOT_WHOLE` if for none, or if the record is torn."""
        epoch, check = _EPOCH.unpack_from(self._memory, _EPOCH_OFFSET)
        return epoch if check == self._epoch_check(epoch) else NOT_WHOLE

    def set_epoch(self, epoch: int) -> None:
        assert epoch >= NOT_WHOLE, epoch
        _EPOCH.pack_into(self._memory, _EPOCH_OFFSET, epoch, self._epoch_check(epoch))

    def clear(self) -> None:
        """The cache is gone: no entry is left, and the epoch is `NOT_WHOLE`."""
        self.set_epoch(NOT_WHOLE)
        self._memory[_ENTRIES_OFFSET:] = bytes(self.num_blocks * _ENTRY.size)

    def put(self, block_id: int, block_hash: bytes) -> None:
        """The block holds this content, and was used just now. To be called once the content is whole."""
        assert 0 <= block_id < self.num_blocks and len(block_hash) == 16, (block_id, block_hash)
        self._num_uses = uses = self._num_uses + 1
        offset = _ENTRIES_OFFSET + block_id * _ENTRY.size
        _ENTRY.pack_into(self._memory, offset, block_hash, uses, self._check(block_id, block_hash, uses))

    def drop(self, block_id: int) -> None:
        """The block no longer holds it. To be called before the block is written to."""
        assert 0 <= block_id < self.num_blocks, block_id
        offset = _ENTRIES_OFFSET + block_id * _ENTRY.size
        self._memory[offset : offset + _ENTRY.size] = _NO_ENTRY

    def update(self, block_id: int, block_hash: bytes | None) -> None:
        """`put` or `drop`: what a `BlockPool` takes as `on_change`."""
        if block_hash is None:
            self.drop(block_id)
        else:
            self.put(block_id, block_hash)

    def entries(self) -> list[tuple[int, bytes]]:
        """Block id and hash of all whole entries, least recently used first, as `BlockPool.adopt` takes them.

        None while the epoch is `NOT_WHOLE`; the caller compares the epoch with that of the planes. No hash
        comes twice: where two blocks have one, the block used last is given.
        """
        if self.epoch == NOT_WHOLE:
            return []
        newest = {block_hash: (uses, block_id) for block_id, uses, block_hash in sorted(self._scan(), key=_by_use)}
        return [(block_id, block_hash) for block_hash, (_, block_id) in sorted(newest.items(), key=lambda e: e[1])]

    def close(self) -> None:
        """Lets go of the memory; what is in it stays. Idempotent."""
        self._memory.release()

    # --- inside ---

    def _scan(self) -> list[tuple[int, int, bytes]]:
        """Block id, use counter and hash of every entry that passes its check."""
        records = _ENTRY.iter_unpack(self._memory[_ENTRIES_OFFSET:])
        return [
            (block_id, uses, block_hash)
            for block_id, (block_hash, uses, check) in enumerate(records)
            if uses and check == self._check(block_id, block_hash, uses)
        ]

    def _check(self, block_id: int, block_hash: bytes, uses: int) -> bytes:
        return blake2b(_ENTRY_CHECKED.pack(self._salt, block_id, block_hash, uses), digest_size=8).digest()

    def _epoch_check(self, epoch: int) -> bytes:
        return blake2b(_EPOCH_CHECKED.pack(self._salt, epoch), digest_size=8).digest()


def _by_use(entry: tuple[int, int, bytes]) -> int:
    return entry[1]


def _view(memory: memoryview, num_blocks: int) -> memoryview:
    return memoryview(memory).cast("B")[: KVIndex.bytes_needed(num_blocks)]


def _header(num_blocks: int, block_size: int, model: bytes) -> tuple[bytes, bytes]:
    """The check of the header of such a table, and the header."""
    model_digest = blake2b(model, digest_size=16).digest()
    checked = _HEADER_CHECKED.pack(_MAGIC, VERSION, block_size, num_blocks, model_digest)
    check = blake2b(checked, digest_size=16).digest()
    return check, checked + check


def _why_foreign(view: memoryview, num_blocks: int, block_size: int) -> str:
    """What is wrong with a header that is not the one expected."""
    magic, version, size, blocks, _, check = _HEADER.unpack_from(view)
    if magic != _MAGIC or check != blake2b(view[: _HEADER_CHECKED.size], digest_size=16).digest():
        return "is torn, or was never written"
    if version != VERSION:
        return f"has version {version}, and this anchortp reads {VERSION}"
    if (blocks, size) != (num_blocks, block_size):
        return f"is of {blocks} blocks of {size} tokens, and this engine has {num_blocks} of {block_size}"
    return "is of another model"
