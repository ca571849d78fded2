"""Users who were forgotten: what they did before that moment is not taken in again, wherever it comes from.

A topic keeps messages for days and a source file can be ingested twice, so a removal alone does not last. The landing zone and
the speed layer leave such events out. What a user does after that moment is taken in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_core.events import TS, USER_ID
from recsys_core.lake import Lake

FORGOTTEN = "forgotten_users"
"""Lake table with a partition for each removal, named by its moment and the user's hash."""
USER_HASH, FORGOTTEN_AT = "user_hash", "forgotten_at"


def hash_of(user_id: str) -> str:
    """SHA-256 of a user's id, hexadecimal: what stands for it in what is kept."""
    return sha256(user_id.encode()).hexdigest()


@dataclass(frozen=True)
class Tombstones:
    """`moments` has the time (ms) up to which a user's events are left out, by the hash of the id."""

    moments: Mapping[str, int]

    @classmethod
    def read(cls, lake: Lake) -> Tombstones:
        """Those of a lake."""
        moments: dict[str, int] = {}
        for part in lake.find_all(FORGOTTEN, lake.keys(FORGOTTEN)).values():
            user, moment = part.extra[USER_HASH], part.extra[FORGOTTEN_AT]
            moments[user] = max(moment, moments.get(user, 0))
        return cls(moments)

    def __bool__(self) -> bool:
        return bool(self.moments)

    def covers(self, events: pa.Table) -> np.ndarray:
        """Which events are left out, bool (n,). `events` has the columns `user_id` and `ts`."""
        if not self.moments or not events.num_rows:
            return np.zeros(events.num_rows, bool)
        users = events[USER_ID].combine_chunks().dictionary_encode()
        upto = [self.moments.get(hash_of(user), -1) if user is not None else -1 for user in users.dictionary.to_pylist()]
        limits = np.array([*upto, -1], np.int64)[pc.fill_null(users.indices, len(upto)).to_numpy(zero_copy_only=False)]
        found: np.ndarray = pc.fill_null(events[TS], np.iinfo(np.int64).max).to_numpy() <= limits
        return found

    def covers_one(self, user_id: str, ts: int) -> bool:
        """Whether one event is left out."""
        return bool(self.moments) and ts <= self.moments.get(hash_of(user_id), -1)

    def filtered(self, events: pa.Table) -> pa.Table:
        """The events that are not left out."""
        left_out = self.covers(events)
        return events.filter(pa.array(~left_out)) if left_out.any() else events
