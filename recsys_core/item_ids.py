"""The id map of a release: item ids by position and positions by item id, without an object for each id.

A position is found by a hash of the id and then by comparing the ids themselves, so that a collision misleads nobody. The
hash is the number that the id's UTF-8 bytes are (little-endian) modulo a prime, one operation in Python and a few in NumPy,
multiplied so that ids that differ in few bytes spread. It is looked up in an open table, one slot after the other from the
hash's own on (Knuth, "The Art of Computer Programming" vol. 3, section 6.4: division, multiplication, linear probing).

A digest of an id is this hash and some bits of a second one, six bytes that stand for the id where there are very many. Two ids
have the same digest once in 2.8 · 10^14 pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

PRIME = 2_654_435_761
SPREAD = 0x85EB_CA77
HASH_BITS = 31
HASH_MASK = (1 << HASH_BITS) - 1
POSITION_BITS = 32
POSITION_MASK = (1 << POSITION_BITS) - 1
CHECK_PRIME = 4_294_967_291
CHECK_BITS = 17
CHECK_MASK = (1 << CHECK_BITS) - 1
DIGEST_BYTES = (HASH_BITS + CHECK_BITS) // 8
EMPTY = -1
BLOCK = 1 << 16
"""Ids hashed at a time: what is computed of them stays in the processor's cache."""
FEW = 300
"""Up to so many ids are found faster one by one."""

Same = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""Given numbers of what is looked for and positions with the same hash, which of them are the same item."""


class ItemIds:
    """Distinct item ids in the order of their positions.

    Attributes:
        array: large_string (n,).
        content: uint8, the UTF-8 of all ids joined.
        offsets: int64 (n + 1,), where each id starts in `content`; the last is its end.
    """

    def __init__(self, ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> None:
        """Raises ValueError when an id is null, is not UTF-8 or occurs more than once."""
        given = _large_strings(ids)
        if given.null_count:
            raise ValueError(f"{given.null_count} item ids are null")
        given.validate(full=True)
        self.offsets, content = _parts(given)
        joined = content.tobytes()
        self.content = np.frombuffer(joined, np.uint8)
        self.array = pa.LargeStringArray.from_buffers(len(given), pa.py_buffer(self.offsets), pa.py_buffer(joined))
        hashes = _hashes(self.array)
        order = _sorted_order(hashes)
        self._refuse_repetitions(hashes, order)
        self._shift = HASH_BITS - (2 * len(hashes)).bit_length()
        self._table = _table(hashes[order].astype(np.int64), order, self._shift)
        self._views = self._table.data, self.offsets.data, joined, self._shift

    def _refuse_repetitions(self, hashes: npt.NDArray[np.uint32], order: npt.NDArray[np.intp]) -> None:
        """Only ids of one hash can be equal."""
        inorder = hashes[order]
        alike = np.flatnonzero(inorder[1:] == inorder[:-1])
        suspects = self.array.take(order[np.union1d(alike, alike + 1)])
        if repeated := len(suspects) - len(suspects.unique()):
            raise ValueError(f"{repeated} item ids occur more than once")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, position: int) -> str:
        item: str = self.array[int(position)].as_py()
        return item

    def __iter__(self) -> Iterator[str]:
        for at in range(0, len(self), BLOCK):
            yield from self.array[at : at + BLOCK].to_pylist()

    def __contains__(self, item_id: str) -> bool:
        return self.position(item_id) >= 0

    def position(self, item_id: str) -> int:
        """Position of an item, -1 when it is not known."""
        return self._one_by_one((item_id,))[0]

    def positions(self, item_ids: Sequence[str] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Position of each item, int64 (k,), -1 for those that are not known."""
        if len(item_ids) <= FEW:
            return np.array(self._one_by_one(item_ids), np.int64)
        wanted = pa.array(item_ids, pa.large_string())

        def same(asked: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
            return np.asarray(pc.equal(self.array.take(candidates), wanted.take(asked)))

        return self._found(_hashes(wanted).astype(np.int64), same)

    def positions_of_digests(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Position of the item of each digest (`digests`), int64 (k,), -1 for those that are not known."""
        wanted = digests.astype(np.int64)
        checks = wanted & CHECK_MASK
        return self._found(wanted >> CHECK_BITS, lambda asked, candidates: self._checks[candidates] == checks[asked])

    def _found(self, hashes: npt.NDArray[np.int64], same: Same) -> npt.NDArray[np.int64]:
        """Position of the item of each hash (k,), -1 for those that are not known; `same` tells items of one hash apart."""
        slots = hashes >> self._shift
        found = np.full(len(hashes), -1, np.int64)
        open_ones = np.arange(len(hashes))
        while len(open_ones):
            entries = self._table[slots[open_ones]]
            open_ones, entries = open_ones[entries != EMPTY], entries[entries != EMPTY]
            alike = entries >> POSITION_BITS == hashes[open_ones]
            asked, candidates = open_ones[alike], entries[alike] & POSITION_MASK
            right = same(asked, candidates)
            found[asked[right]] = candidates[right]
            open_ones = open_ones[found[open_ones] < 0]
            slots[open_ones] += 1
        return found

    @cached_property
    def _checks(self) -> npt.NDArray[np.uint32]:
        """What tells apart the ids of one hash, by position."""
        return _checks(self.array)

    def _one_by_one(self, item_ids: Iterable[str]) -> list[int]:
        table, offsets, content, shift = self._views
        number = int.from_bytes
        found = []
        for item_id in item_ids:
            key = item_id.encode()
            hashed = number(key, "little") % PRIME * SPREAD & HASH_MASK
            slot = hashed >> shift
            while (entry := table[slot]) != EMPTY:
                if entry >> POSITION_BITS == hashed:
                    position = entry & POSITION_MASK
                    if content[offsets[position] : offsets[position + 1]] == key:
                        found.append(position)
                        break
                slot += 1
            else:
                found.append(-1)
        return found


def _large_strings(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> pa.LargeStringArray:
    if isinstance(ids, pa.ChunkedArray):
        return ids.cast(pa.large_string()).combine_chunks()
    return ids.cast(pa.large_string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.large_string())


def _parts(strings: pa.LargeStringArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The n strings joined, uint8, and where each starts in it, int64 (n + 1,), its last value the end of all."""
    if not len(strings):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    _, offsets, content = strings.buffers()
    starts = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    return starts - starts[0], np.frombuffer(content or b"", np.uint8)[starts[0] : starts[-1]]


def digests(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> npt.NDArray[np.uint64]:
    """The digest of each id, uint64 (n,), below 2^48."""
    given = _large_strings(ids)
    return _hashes(given).astype(np.uint64) << np.uint64(CHECK_BITS) | _checks(given)


def packed(digests: npt.NDArray[np.uint64]) -> bytes:
    """DIGEST_BYTES of each digest, little-endian."""
    return np.ascontiguousarray(digests, "<u8").view(np.uint8).reshape(-1, 8)[:, :DIGEST_BYTES].tobytes()


def unpacked(data: bytes) -> npt.NDArray[np.uint64]:
    """What `packed` made. Raises ValueError for any other number of bytes."""
    wide = np.zeros((len(data) // DIGEST_BYTES, 8), np.uint8)
    wide[:, :DIGEST_BYTES] = np.frombuffer(data, np.uint8).reshape(-1, DIGEST_BYTES)
    return wide.view("<u8")[:, 0]


def _hashes(ids: pa.LargeStringArray) -> npt.NDArray[np.uint32]:
    """The hash of each id, uint32 (n,)."""
    return (_remainders(ids, PRIME) * np.uint64(SPREAD) & np.uint64(HASH_MASK)).astype(np.uint32)


def _checks(ids: pa.LargeStringArray) -> npt.NDArray[np.uint32]:
    """CHECK_BITS of a second hash of each id, uint32 (n,); the size tells ids apart that end in zeros."""
    sizes = np.diff(_parts(ids)[0]).astype(np.uint64)
    mixed = _remainders(ids, CHECK_PRIME) * np.uint64(SPREAD) + sizes * np.uint64(PRIME)
    spread = mixed & np.uint64((1 << 32) - 1)
    return (spread >> np.uint64(32 - CHECK_BITS)).astype(np.uint32)


def _remainders(ids: pa.LargeStringArray, divisor: int) -> npt.NDArray[np.uint64]:
    """The remainder of the number that each id's bytes are, uint64 (n,)."""
    blocks = [_remainders_of_block(ids[at : at + BLOCK], divisor) for at in range(0, len(ids), BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.uint64)


def _remainders_of_block(ids: pa.LargeStringArray, divisor: int) -> npt.NDArray[np.uint64]:
    """Four bytes of all ids at a time, their last ones first: the remainder of the number so far is carried on."""
    starts, content = _parts(ids)
    padded = np.append(content, np.zeros(4, np.uint8))
    words = np.ndarray((len(content) + 1,), "<u4", padded, 0, (1,))
    sizes = np.diff(starts)
    remainder = np.zeros(len(ids), np.uint64)
    prime, word_bits = np.uint64(divisor), np.uint64(32)
    for at in range((int(sizes.max()) - 1) // 4 * 4, -1, -4):
        some = np.flatnonzero(sizes > at)
        kept = np.minimum(sizes[some] - at, 4).astype(np.uint64) * np.uint64(8)
        word = words[starts[some] + at] & ((np.uint64(1) << kept) - np.uint64(1))
        number = remainder[some] << word_bits | word
        remainder[some] = number - number // prime * prime
    return remainder


def _table(hashes: npt.NDArray[np.int64], order: npt.NDArray[np.intp], shift: int) -> npt.NDArray[np.int64]:
    """Hash and position in each slot, or EMPTY, int64, from ascending hashes: each takes the first free slot from its own on.

    There are two to four times as many slots as ids, and an empty one behind the last.
    """
    own = hashes >> shift
    place = np.arange(len(hashes))
    slots = place + np.maximum.accumulate(own - place)
    table = np.full(max(1 << (HASH_BITS - shift), slots.max(initial=0) + 1) + 1, EMPTY, np.int64)
    table[slots] = hashes << POSITION_BITS | order
    return table


def _sorted_order(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
    """What sorts the hashes; NumPy sorts 16-bit numbers by their digits, in linear time."""
    order = np.argsort(hashes.astype(np.uint16), kind="stable")
    return order[np.argsort((hashes >> np.uint32(16)).astype(np.uint16)[order], kind="stable")]
