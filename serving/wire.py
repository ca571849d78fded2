"""Protobuf's wire format, as far as answers are put together from bytes and plain requests are read from them.

(protobuf.dev/programming-guides/encoding. A concatenation of messages is their merge.)
"""

from __future__ import annotations

from functools import lru_cache

from recsys_core.online import varint
from serving import recsys_pb2 as pb

USER_ID_TAG = pb.RecommendRequest.USER_ID_FIELD_NUMBER << 3 | 2
COUNT_TAG = pb.RecommendRequest.COUNT_FIELD_NUMBER << 3
RESPONSES_TAG = bytes([pb.RecommendBatchResponse.RESPONSES_FIELD_NUMBER << 3 | 2])


def joined_responses(responses: list[bytes]) -> bytes:
    """A RecommendBatchResponse of encoded responses."""
    return b"".join([part for response in responses for part in (_head(len(response)), response)])


@lru_cache(8192)
def _head(size: int) -> bytes:
    """What stands before a response of so many bytes."""
    return RESPONSES_TAG + varint(size)


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
