"""Protobuf's wire format, as far as answers are put together from bytes and plain requests are read from them.

(protobuf.dev/programming-guides/encoding. A concatenation of messages is their merge.)
"""

from __future__ import annotations

import struct
from functools import lru_cache

from serving import recsys_pb2 as pb

USER_ID_TAG = pb.RecommendRequest.USER_ID_FIELD_NUMBER << 3 | 2
COUNT_TAG = pb.RecommendRequest.COUNT_FIELD_NUMBER << 3
RESPONSES_TAG = bytes([pb.RecommendBatchResponse.RESPONSES_FIELD_NUMBER << 3 | 2])

_HEADER = struct.Struct("<BHqB")
"""Head of a cached answer, see `recsys_core.online.AnswerEncoder`."""
_FORMAT = 1
_END = struct.Struct("<i")


def varint(value: int) -> bytes:
    """A non-negative integer as a varint."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def joined_responses(responses: list[bytes]) -> bytes:
    """A RecommendBatchResponse of encoded responses."""
    parts: list[bytes] = []
    for response in responses:
        parts += (RESPONSES_TAG, varint(len(response)), response)
    return b"".join(parts)


@lru_cache(8192)
def tail(tier: int, release_id: str, computed_at: int) -> bytes:
    """The fields of a RecommendResponse that stand behind its items."""
    return pb.RecommendResponse(tier=pb.Tier.Name(tier), release_id=release_id, computed_at_ms=computed_at).SerializeToString()


def plain_request(data: bytes) -> tuple[bytes, int] | None:
    """User id (not yet checked) and count (0: none) of a RecommendRequest that has no other field, else None.

    It takes the encoding that every protobuf library writes; any other is left to the parser.
    """
    size = len(data)
    if size < 3 or data[0] != USER_ID_TAG:
        return None
    length = data[1]
    end = 2 + length
    if length & 0x80 or end > size:
        return None
    if end == size:
        return data[2:end], 0
    if end + 2 == size and data[end] == COUNT_TAG and 0 < data[end + 1] < 0x80:
        return data[2:end], data[end + 1]
    return None


def first_items(value: bytes, release: bytes, count: int, oldest: int, last_ts: int) -> tuple[bytes, int] | None:
    """The first `count` items of a cached answer in wire format and its `computed_at`.

    None when the value is not of `release` (its id encoded), was computed before `oldest` or before `last_ts` (ms), or
    holds fewer items: what the general path looks at again.
    """
    if len(value) < _HEADER.size:
        return None
    version, held, computed_at, name_length = _HEADER.unpack_from(value)
    if version != _FORMAT or held < count or computed_at < oldest or last_ts > computed_at:
        return None
    ends = _HEADER.size + name_length
    if name_length != len(release) or value[_HEADER.size : ends] != release:
        return None
    start = ends + 4 * held
    if start > len(value):
        return None
    last, whole = _END.unpack_from(value, ends + 4 * count - 4)[0], _END.unpack_from(value, start - 4)[0]
    if start + whole != len(value) or not 0 <= last <= whole:
        return None
    return value[start : start + last], computed_at
