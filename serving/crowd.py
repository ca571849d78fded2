"""Whether callers queue, and reads that go out together while they do.

Callers queue while there are calls that gRPC has taken in and that no handler has seen yet. grpc.aio hands over one call at a
time, so a process that is behind looks idle from inside; gRPC's own counts (channelz) do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from grpc_channelz.v1 import channelz, channelz_pb2

QUEUE = 10
"""Calls that wait before a process counts as crowded. Taking that many in lasts about as long as a crowded process gathers."""
LOOK_CALLS = 500
"""From one look at the counts to the next: it takes 0.2 ms, which far fewer than one call in a hundred may pay."""
LONE = 3
"""Waits in a row that bring no second call after which nobody waits for others any more."""
GATHER_SECONDS = 0.002
GATHERED_USERS = 32
"""While callers queue, a read waits this long for others, or until they are for so many users."""


class Crowd:
    """Tells whether callers queue at the gRPC server of this process that was made last.

    An answer that is on its way out to a slow reader counts as waiting too: gRPC says only that the call has not ended.
    """

    def __init__(self, in_handlers: Callable[[], int]) -> None:
        """`in_handlers` is the number of calls that handlers have under way."""
        self._in_handlers = in_handlers
        self._server_id = max(server.ref.server_id for server in _servers(0))
        self._since = LOOK_CALLS
        self._lone = 0
        self._crowded = False

    def waiting(self) -> int:
        """Calls that wait for a handler; none once the server is gone."""
        for server in _servers(self._server_id)[:1]:
            if server.ref.server_id == self._server_id:
                counts = server.data
                return max(0, counts.calls_started - counts.calls_succeeded - counts.calls_failed - self._in_handlers())
        return 0

    def crowded(self) -> bool:
        """Whether QUEUE calls or more waited when this was last looked at; to be asked for each read."""
        if not self._crowded:
            self._look(1, 0)
        return self._crowded

    def gathered(self, calls: int) -> None:
        """So many calls have come while a crowded process waited for them. Lone ones in a row show that the crowd is gone."""
        self._lone = self._lone + 1 if calls == 1 else 0
        if self._lone == LONE:
            self._lone = 0
            self._crowded = False
        else:
            self._look(calls, calls)

    def _look(self, calls: int, gathered: int) -> None:
        self._since += calls
        if self._since >= LOOK_CALLS:
            self._since = 0
            self._crowded = gathered + self.waiting() >= QUEUE


class Gathering:
    """Reads that wait for others while callers queue, whichever server each is for: then all of them go out at once.

    What comes in one moment for the nodes of a cluster is one gathering, because a third of it would look like no crowd.
    """

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._held: dict[Callable[[], None], tuple[int, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def takes(self, send: Callable[[], None], calls: int, users: int) -> bool:
        """Whether `send`, which by now reads so many users for so many calls, is called later; not while nobody queues."""
        if self._timer is None:
            if not self._crowd.crowded():
                return False
            self._timer = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._end)
        self._held[send] = calls, users
        if sum(users for _, users in self._held.values()) >= GATHERED_USERS:
            self._timer.cancel()
            self._end()
        return True

    def _end(self) -> None:
        held, self._held, self._timer = self._held, {}, None
        self._crowd.gathered(sum(calls for calls, _ in held.values()))
        for send in held:
            send()


def _servers(start: int) -> list[channelz_pb2.Server]:
    """The servers of this process with an id of at least `start`."""
    request = channelz_pb2.GetServersRequest(start_server_id=start)
    return list(channelz.ChannelzServicer.GetServers(request, None).server)
