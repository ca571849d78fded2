"""Redis over one pipelined connection: many commands may be under way, replies come in their order.

A general client spends more on one command than gRPC on one call; here a command is bytes that lie ready and a reply is
what hiredis made of it. For one server (plain or TLS, with password and database) as `redis.url` names it.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError

from recsys_core.online import encoded_hash_tag

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0


class RespError(OSError):
    """The connection is gone or the server refuses it."""


Sink = Callable[[list[Any] | None, Exception | None], None]
"""Takes the replies of a batch of commands, or the error for which there are none."""


class _Protocol(asyncio.Protocol):
    """Matches replies with the batches that wait for them."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[int, Sink]] = deque()
        self._replies: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, replies: int, sink: Sink) -> None:
        """Must not be called on a lost connection."""
        assert self.transport is not None
        self._waiting.append((replies, sink))
        self.transport.write(data)

    async def ask(self, data: bytes, replies: int) -> list[Any]:
        """The replies to encoded commands; an error reply is a `hiredis.ReplyError` among them. Raises RespError."""
        waiting: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def take(found: list[Any] | None, error: Exception | None) -> None:
            if waiting.done():
                return
            if found is None:
                waiting.set_exception(error or RespError("no reply"))
            else:
                waiting.set_result(found)

        self.send(data, replies, take)
        return await waiting

    def data_received(self, data: bytes) -> None:
        reader, replies = self._reader, self._replies
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                replies.append(reply)
                if len(replies) == self._waiting[0][0]:
                    whole, replies = replies, []
                    self._replies = replies
                    self._waiting.popleft()[1](whole, None)
        except (hiredis.HiredisError, IndexError) as error:
            log.warning("Redis sent what is no reply to anything: %s", error)
            self.close(RespError(f"Redis does not speak its protocol: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.close(RespError(f"the connection to Redis was lost: {error or 'closed by the server'}"))

    def close(self, error: Exception) -> None:
        """Fail everything that waits, at once."""
        self.lost = True
        if self.transport is not None:
            self.transport.abort()
        while self._waiting:
            self._waiting.popleft()[1](None, error)


@dataclass(frozen=True)
class Login:
    """What a URL does not say, or says otherwise: the user and password, and PEM files for TLS."""

    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class Connection:
    """One connection, made when it is needed. Every failure is an OSError."""

    def __init__(self, url: str, login: Login | None = None) -> None:
        """Raises ValueError when `url` is not that of one server, OSError when a file for TLS can't be read."""
        login = login or Login()
        options: dict[str, Any] = dict(parse_url(url))
        self._path = options.get("path")
        self._host, self._port = options.get("host", "localhost"), int(options.get("port", 6379))
        self._tls: ssl.SSLContext | None = None
        if url.startswith("rediss:"):
            self._tls = ssl.create_default_context(cafile=login.ca_file or options.get("ssl_ca_certs"))
            if login.cert_file:
                self._tls.load_cert_chain(login.cert_file, login.key_file or None)
        if self._tls is not None and options.get("ssl_cert_reqs") in ("none", "CERT_NONE"):
            self._tls.check_hostname = False
            self._tls.verify_mode = ssl.CERT_NONE
        self._greetings: list[bytes] = []
        if password := login.password or options.get("password"):
            name = login.username or options.get("username")
            user = [name.encode()] if name else []
            self._greetings.append(command(b"AUTH", *user, password.encode()))
        if database := int(options.get("db") or 0):
            self._greetings.append(command(b"SELECT", b"%d" % database))
        self._protocol: _Protocol | None = None
        self._connecting: asyncio.Task[None] | None = None

    def send(self, data: bytes, replies: int, sink: Sink) -> bool:
        """Send encoded commands now; `sink` gets their replies. False, and nothing sent, when there is no connection."""
        protocol = self._protocol
        if protocol is None or protocol.lost:
            return False
        protocol.send(data, replies, sink)
        return True

    async def call(self, data: bytes, replies: int) -> list[Any]:
        """See `_Protocol.ask`. Raises OSError."""
        await self.connect()
        if self._protocol is None or self._protocol.lost:
            raise RespError("the connection to Redis was lost at once")
        return await self._protocol.ask(data, replies)

    async def connect(self) -> None:
        """Make the connection unless there is one. Raises OSError.

        Callers that come while it is being made share it; one that gives up leaves it to the others.
        """
        if self._protocol is not None and not self._protocol.lost:
            return
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._made)
        await asyncio.shield(self._connecting)

    def _made(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # those who wait for it have it; nobody may

    async def _connect(self) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            self._protocol = await self._greet()

    async def _greet(self) -> _Protocol:
        loop = asyncio.get_running_loop()
        if self._path:
            _, protocol = await loop.create_unix_connection(_Protocol, self._path)
        else:
            _, protocol = await loop.create_connection(_Protocol, self._host, self._port, ssl=self._tls)
        try:
            replies = await protocol.ask(b"".join(self._greetings), len(self._greetings)) if self._greetings else []
            for reply in replies:
                if isinstance(reply, Exception):
                    raise RespError(f"Redis refuses the connection: {reply}")
        except (OSError, asyncio.CancelledError):
            protocol.close(RespError("the connection to Redis was not made in time"))
            raise
        return protocol

    def drop(self) -> None:
        """Give the connection up; the next call makes a new one."""
        if self._protocol is not None:
            self._protocol.close(RespError("the connection to Redis was given up"))
            self._protocol = None


def command(*words: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Pipelined:
    """Reads and calls over one pipelined connection to one server."""

    def __init__(self, url: str, fields: Sequence[bytes], login: Login | None = None) -> None:
        """Raises ValueError when `url` is not that of one server, OSError when a file for TLS can't be read."""
        names = b"".join(b"$%d\r\n%b\r\n" % (len(field), field) for field in fields)
        self._one = (
            b"*%d\r\n$5\r\nHMGET\r\n$%%d\r\nuser:{%%b}\r\n" % (len(fields) + 2)
            + names.replace(b"%", b"%%")
            + b"*2\r\n$3\r\nGET\r\n$%d\r\nrecs:{%b}\r\n"
        )
        self._reads = Connection(url, login)
        self._calls = Connection(url, login)
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, user_ids: Sequence[bytes], sink: Sink) -> None:
        """Give `sink` two replies for each user: HMGET of the record's fields, GET of the cached answer."""
        one = self._one
        data = b"".join([one % (len(u) + 7, u, len(u) + 7, u) for u in map(encoded_hash_tag, user_ids)])
        if not self._reads.send(data, 2 * len(user_ids), sink):
            task = asyncio.create_task(self._connect_and_send(data, 2 * len(user_ids), sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect_and_send(self, data: bytes, replies: int, sink: Sink) -> None:
        try:
            await self._reads.connect()
        except OSError as error:
            sink(None, error)
            return
        if not self._reads.send(data, replies, sink):
            sink(None, RespError("the connection to Redis was lost at once"))

    async def call(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        """Replies of commands, on a connection of their own. Raises OSError."""
        return await self._calls.call(b"".join(command(*words) for words in commands), len(commands))

    def drop(self) -> None:
        """Give the connections up; what comes next makes new ones."""
        self._reads.drop()
        self._calls.drop()

    async def close(self) -> None:
        self.drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class ThroughClient:
    """The same through a client of `redis.asyncio`, which knows Cluster and Sentinel and costs more for a command."""

    def __init__(self, client: Any, fields: Sequence[bytes]) -> None:
        self._client = client
        self._fields = fields
        self._tasks: set[asyncio.Task[None]] = set()

    def read(self, user_ids: Sequence[bytes], sink: Sink) -> None:
        """See `Pipelined.read`."""
        task = asyncio.create_task(self._read(user_ids, sink))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, user_ids: Sequence[bytes], sink: Sink) -> None:
        commands: list[tuple[bytes, ...]] = []
        for user in map(encoded_hash_tag, user_ids):
            commands += ((b"HMGET", b"user:{%b}" % user, *self._fields), (b"GET", b"recs:{%b}" % user))
        try:
            replies = await self.call(commands)
        except OSError as error:
            sink(None, error)
            return
        sink(replies, None)

    async def call(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        """See `Pipelined.call`; error replies are `redis.ResponseError` here."""
        pipeline = self._client.pipeline(transaction=False) if isinstance(self._client, Redis) else self._client.pipeline()
        for words in commands:
            pipeline.execute_command(*words)
        try:
            return list(await pipeline.execute(raise_on_error=False))
        except RedisError as error:
            raise RespError(str(error)) from error

    def drop(self) -> None:
        """redis-py replaces what is broken by itself."""

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()
