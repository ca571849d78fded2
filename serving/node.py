"""One Redis server as serving reads it: a deadline for every round trip, and no round trip while it does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from hiredis import ReplyError

from recsys_core.online import RECORD_FIELDS
from serving.breaker import Breaker
from serving.crowd import GATHERED_USERS, Gathering
from serving.metrics import Metrics
from serving.resp import RespError, Sink, is_redirect, of_the_value
from serving.seldom import Seldom

log = logging.getLogger(__name__)

MAX_USERS = 512
"""Users read in one round trip."""
MANY_USERS = 64
"""Users read together for one caller in one round trip."""
USERS_A_DEADLINE = 32
"""So many users of one caller make the deadline longer by itself."""
NEXT_SHARE = 0.2
"""Of the deadline, after which a round trip that is still under way no longer holds up the next one."""
LAST_LOOK_SECONDS = 0.001
"""After the deadline: a reply may have come while the event loop was busy and has yet to be read."""
BACKGROUND_SECONDS = 1.0
"""Deadline of what no caller waits for: trends and write-back."""

Raw = tuple[Any, Any]
"""The replies for a user: values of RECORD_FIELDS, and the cached answer."""
NOTHING: Raw = ((None,) * len(RECORD_FIELDS), None)
Asked = tuple[Sequence[bytes], "asyncio.Future[list[Raw]]"]
"""Users, and who waits for what Redis holds of them."""


class Link(Protocol):
    """How a server is reached; `resp.Pipelined` is one."""

    def read(self, user_ids: Sequence[bytes], sink: Sink, many: bool = False) -> None: ...
    def read_one(self, user_id: bytes, asking: bool) -> Awaitable[list[Any]]: ...
    def call(self, commands: Sequence[tuple[bytes, ...]]) -> Awaitable[list[Any]]: ...
    def drop(self) -> None: ...
    def close(self) -> Awaitable[None]: ...


Redirected = Callable[[bytes, ReplyError], Awaitable[Raw]]
"""Finds what there is of a user whose keys a node of a cluster says are not its own."""


class _Read:
    """Calls that share a round trip; takes its replies."""

    __slots__ = ("began", "calls", "ended", "looked", "many", "node", "started", "timer")

    def __init__(self, node: Node, calls: Sequence[Asked], many: bool) -> None:
        self.node = node
        self.calls = calls
        self.many = many
        self.started = time.perf_counter()
        self.began = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None
        self.looked = False
        self.ended = False

    def __call__(self, replies: list[Any] | None, error: Exception | None) -> None:
        """The replies, or why there are none."""
        if self.ended:
            return
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
        self.node.metrics.steps["redis"].observe(time.perf_counter() - self.started)
        if replies is None:
            self.node.note_failure(error or TimeoutError("no answer in time"), self.began)
            self.give_nothing()
        elif ReplyError in map(type, replies):
            self.node.take_errors(self.calls, replies)
        else:
            self.node.breaker.succeeded()
            self.give(replies)
        if not self.many:
            self.node.ended()

    def give(self, replies: list[Any]) -> None:
        at = 0
        for users, future in self.calls:
            upto = at + 2 * len(users)
            if not future.done():
                future.set_result([(replies[i], replies[i + 1]) for i in range(at, upto, 2)])
            at = upto

    def late(self) -> None:
        if self.looked:
            self(None, TimeoutError("no answer in time"))
        else:
            self.looked = True
            self.timer = asyncio.get_running_loop().call_later(LAST_LOOK_SECONDS, self.late)

    def give_nothing(self) -> None:
        for users, future in self.calls:
            if not future.done():
                future.set_result([NOTHING] * len(users))


class Node:
    """Reads that never raise and never last much longer than their deadline.

    Calls that come while a round trip is under way share the next one, which waits for it at most NEXT_SHARE of the
    deadline. Of callers that queue most would come too late for that, because gRPC hands their calls over one by one: then a
    round trip waits for some of them.

    Attributes:
        breaker: of this server.
        gathering: the reads of all nodes that wait for others; without one none does.
        redirected: for nodes of a cluster. Elsewhere a server that sends callers to another one is a fault of the settings.
        on_failure: is called when a call failed.
    """

    def __init__(self, name: str, link: Link, deadline: float, metrics: Metrics) -> None:
        """`deadline` of a round trip in seconds."""
        self.breaker = Breaker(name)
        self.metrics = metrics
        self.gathering: Gathering | None = None
        self.redirected: Redirected | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._link = link
        self._deadline = deadline
        self._waiting: list[Asked] = []
        self._users_waiting = 0
        self._under_way = 0
        self._sent_at = 0.0
        self._next: asyncio.TimerHandle | None = None
        self._refusals = Seldom(log)
        self._tasks: set[asyncio.Task[None]] = set()

    # -- reads --------------------------------------------------------------------------------------------------

    def read(self, user_ids: Sequence[bytes]) -> asyncio.Future[list[Raw]]:
        """What Redis holds of some users; NOTHING for each when it does not answer in time."""
        loop = asyncio.get_running_loop()
        if len(user_ids) > GATHERED_USERS:
            return loop.create_task(self._read_many(user_ids))
        found: asyncio.Future[list[Raw]] = loop.create_future()
        self._waiting.append((user_ids, found))
        self._users_waiting += len(user_ids)
        if not self._under_way:
            self._send_or_gather()
        elif self._next is None:
            self._next = loop.call_at(self._sent_at + NEXT_SHARE * self._deadline, self._wait_no_longer)
        return found

    async def _read_many(self, user_ids: Sequence[bytes]) -> list[Raw]:
        """Some users at a time, over a connection of their own: a single caller is never behind all of them."""
        loop = asyncio.get_running_loop()
        raws: list[Raw] = []
        for at in range(0, len(user_ids), MANY_USERS):
            some = user_ids[at : at + MANY_USERS]
            found: asyncio.Future[list[Raw]] = loop.create_future()
            self._send(list(some), [(some, found)], many=True)
            raws += await found
        return raws

    def ended(self) -> None:
        """A round trip is over: send what has come meanwhile."""
        self._under_way -= 1
        if self._waiting and not self._under_way:
            self._send_or_gather()

    def _wait_no_longer(self) -> None:
        self._next = None
        if not (self._waiting and self._under_way):
            return
        loop = asyncio.get_running_loop()
        due = self._sent_at + NEXT_SHARE * self._deadline
        if due > loop.time():
            self._next = loop.call_at(due, self._wait_no_longer)
        else:
            self._send_or_gather()

    def _send_or_gather(self) -> None:
        """Send what waits, at once or together with others."""
        if self.gathering is None or not self.gathering.takes(self._send_waiting, len(self._waiting), self._users_waiting):
            self._send_waiting()

    def _send_waiting(self) -> None:
        waiting, self._waiting, self._users_waiting = self._waiting, [], 0
        while waiting:
            taken: list[Asked] = []
            users: list[bytes] = []
            while waiting and (not taken or len(users) + len(waiting[0][0]) <= MAX_USERS):
                call = waiting.pop(0)
                if not call[1].done():
                    taken.append(call)
                    users += call[0]
            if taken:
                self._send(users, taken)

    def _send(self, users: list[bytes], calls: list[Asked], many: bool = False) -> None:
        read = _Read(self, calls, many)
        if not self.breaker.allows():
            self.metrics.events["redis_skipped"] += 1
            read.give_nothing()
            return
        loop = asyncio.get_running_loop()
        deadline = self._deadline * (1 + len(users) / USERS_A_DEADLINE) if many else self._deadline
        read.timer = loop.call_later(deadline, read.late)
        if not many:
            self._under_way += 1
            self._sent_at = loop.time()
        if many:
            self._link.read(users, read, many=True)
        else:
            self._link.read(users, read)

    # -- what goes wrong ----------------------------------------------------------------------------------------

    def note_failure(self, error: Exception, began: float | None = None) -> None:
        """Count a failed call; connections that time out again and again are given up."""
        self.metrics.events["redis_failures"] += 1
        if self.breaker.failed(error, began):
            self._link.drop()
        self.on_failure()

    def take_errors(self, calls: Sequence[Asked], replies: Sequence[Any]) -> None:
        """Give callers what there is among error replies. A server that answers nothing but errors does not work."""
        errors = [reply for reply in replies if type(reply) is ReplyError and not self._is_bearable(reply)]
        if len(errors) == len(replies):
            self.note_failure(RespError(meaning(errors[0])))
        else:
            self.breaker.succeeded()
            if errors:
                self.metrics.events["redis_failures"] += 1
                self._refusals.warn("%s refuses some reads (%s)", self.breaker.name, errors[0])
        at = 0
        for users, future in calls:
            raws = [(replies[at + i], replies[at + i + 1]) for i in range(0, 2 * len(users), 2)]
            at += 2 * len(users)
            if future.done():
                continue
            if self.redirected is not None and any(_redirect(raw) for raw in raws):
                task = asyncio.get_running_loop().create_task(self._ask_elsewhere(users, raws, future))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            else:
                future.set_result([self._usable(raw) for raw in raws])

    def _is_bearable(self, error: ReplyError) -> bool:
        return of_the_value(error) or (self.redirected is not None and is_redirect(error))

    def _usable(self, raw: Raw) -> Raw:
        """Error replies of the server are nothing; those that are about a value stay and are told of with its key."""
        return (
            NOTHING[0] if type(raw[0]) is ReplyError and not of_the_value(raw[0]) else raw[0],
            None if type(raw[1]) is ReplyError and not of_the_value(raw[1]) else raw[1],
        )

    async def _ask_elsewhere(self, users: Sequence[bytes], raws: list[Raw], future: asyncio.Future[list[Raw]]) -> None:
        assert self.redirected is not None
        found = await asyncio.gather(
            *(self.redirected(user, error) for user, raw in zip(users, raws, strict=True) if (error := _redirect(raw)))
        )
        rest = iter(found)
        if not future.done():
            future.set_result([self._usable(next(rest) if _redirect(raw) else raw) for raw in raws])

    # -- the rest -----------------------------------------------------------------------------------------------

    async def read_redirected(self, user_id: bytes, asking: bool) -> Raw:
        """What there is of a user whose keys another node says are here, or (`asking`) just being moved here."""
        if not self.breaker.allows():
            return NOTHING
        try:
            record, answer = await self._link.read_one(user_id, asking)
        except OSError as error:
            self.note_failure(error)
            return NOTHING
        return self._usable((record, answer))

    async def call(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any] | None:
        """Replies of commands, error replies among them; None, counted, without an answer."""
        if not self.breaker.allows():
            self.metrics.events["redis_skipped"] += 1
            return None
        began = time.monotonic()
        try:
            async with asyncio.timeout(BACKGROUND_SECONDS):
                replies = await self._link.call(commands)
        except OSError as error:
            self.note_failure(error, began)
            return None
        if ReplyError not in map(type, replies):
            self.breaker.succeeded()
        return replies

    async def close(self) -> None:
        await self._link.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _redirect(raw: Raw) -> ReplyError | None:
    """The reply by which a node sends callers elsewhere, if one of a user's two is one."""
    return next((reply for reply in raw if type(reply) is ReplyError and is_redirect(reply)), None)


def meaning(error: ReplyError) -> str:
    """What an error reply says, with what to do where that is known."""
    if is_redirect(error):
        return f'{error}: this is a node of a Redis Cluster; set redis.mode = "cluster" and redis.nodes'
    return str(error)
