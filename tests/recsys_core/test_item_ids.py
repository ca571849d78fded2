"""Every item id is found at its position, one by one and many at a time, and nothing else is taken for one."""

from __future__ import annotations

import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_core.item_ids import DIGEST_BYTES, EMPTY, FEW, POSITION_BITS, PRIME, ItemIds, digests, packed, unpacked

FAMILIES = {
    "numbers": [str(n) for n in range(30_000)],
    "padded numbers": [f"{n:09d}" for n in range(30_000)],
    "steps": [str(64 * n) for n in range(30_000)],
    "a long end in common": [f"{n:06d}.example.shop/item" for n in range(30_000)],
    "hexadecimal": [uuid.UUID(int=n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).hex for n in range(30_000)],
    "pairs of letters": [f"{chr(97 + n % 26)}{'x' * 6}{chr(97 + n // 26 % 26)}{n // 676}" for n in range(30_000)],
}


def same_hash(item_id: str) -> str:
    """Another id of the same hash: its number is the first one's plus a multiple of the prime, and all of it is ASCII."""
    number = int.from_bytes(item_id.encode(), "little")
    while True:
        number += PRIME
        raw = number.to_bytes(len(item_id), "little")
        if all(32 < byte < 127 for byte in raw):
            return raw.decode()


@settings(deadline=None)
@given(
    known=st.lists(st.text(max_size=40), max_size=50, unique=True),
    others=st.lists(st.text(max_size=40), max_size=3 * FEW),
)
def test_positions_are_those_of_a_dictionary(known: list[str], others: list[str]) -> None:
    ids = ItemIds(known)
    asked = known + others
    dictionary = {item: position for position, item in enumerate(known)}
    expected = [dictionary.get(item, -1) for item in asked]
    assert ids.positions(asked).tolist() == expected
    assert ids.positions(asked * 2 * FEW)[: len(asked)].tolist() == expected
    assert [ids.position(item) for item in asked] == expected
    assert [item in ids for item in asked] == [position >= 0 for position in expected]
    assert list(ids) == known == [ids[position] for position in range(len(ids))]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_every_make_are_found_in_a_few_steps(family: str) -> None:
    known = FAMILIES[family]
    ids = ItemIds(known)
    shuffled = np.random.default_rng(0).permutation(len(known))
    np.testing.assert_array_equal(ids.positions([known[place] for place in shuffled]), shuffled)
    assert [ids.position(item) for item in known[:200]] == list(range(200))
    taken = np.flatnonzero(ids._table != EMPTY)
    own = ids._table[taken] >> POSITION_BITS + ids._shift
    assert (taken - own).max() <= 40


def test_a_collision_misleads_nobody() -> None:
    one = "item-000001x"
    other = same_hash(one)
    third = same_hash(other)
    ids = ItemIds([one, "between", other])
    for asked in ([one, other, third, "between"], [one, other, third, "between"] * FEW):
        assert ids.positions(asked)[:4].tolist() == [0, 2, -1, 1]
    with pytest.raises(ValueError, match="1 item ids occur more than once"):
        ItemIds([one, other, one])


def test_trailing_zeros_are_a_part_of_an_id() -> None:
    ids = ItemIds(["a", "a\0", "", "\0"])
    assert [ids.position(item) for item in ("a", "a\0", "", "\0", "a\0\0")] == [0, 1, 2, 3, -1]


def test_ids_come_in_chunks_and_slices_of_any_string_type() -> None:
    names = [f"item-{n}" for n in range(1000)]
    chunks = pa.chunked_array([pa.array(["x", *names[:400]]).slice(1), pa.array(names[400:])])
    for ids in (ItemIds(chunks), ItemIds(chunks.cast(pa.large_string())), ItemIds(pa.array(["x", *names]).slice(1))):
        assert list(ids) == names
        assert ids.positions(names).tolist() == list(range(1000))
        assert ids.position("x") == -1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a", "a"], "2 item ids occur more than once"),
        (pa.array(["a", None]), "1 item ids are null"),
        (pa.array([b"a", b"\xff"], pa.binary()).view(pa.string()), "UTF8"),
    ],
)
def test_what_is_no_map_of_ids_is_refused(ids: pa.Array | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemIds(ids)


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=60, unique=True), st.lists(st.text(max_size=40), max_size=20))
def test_a_digest_leads_to_the_item_that_it_was_made_of(known: list[str], asked: list[str]) -> None:
    ids = ItemIds(known)
    some = unpacked(packed(digests([*known, *asked])))
    assert ids.positions_of_digests(some).tolist() == ids.positions([*known, *asked]).tolist()
    assert len(packed(some)) == DIGEST_BYTES * len(some)


def test_digests_stay_the_same_from_release_to_release_and_differ_where_hashes_do_not() -> None:
    assert digests(["item-1", "", "ü" * 100, "a\0"]).tolist() == [14897071179625, 0, 82596869350394, 137092909757837]
    one = "item-000001x"
    other = same_hash(one)
    assert len(set(digests([one, other, same_hash(other)]).tolist())) == 3
    assert ItemIds([one]).positions_of_digests(digests([other, one])).tolist() == [-1, 0]


def test_a_million_ids_have_a_million_digests() -> None:
    names = [f"{kind}{number}" for kind in ("", "item-") for number in range(500_000)]
    assert len(np.unique(digests(names))) == 1_000_000


@pytest.mark.parametrize("data", [b"x", b"1234567"])
def test_bytes_that_are_no_digests_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="reshape"):
        unpacked(data)
