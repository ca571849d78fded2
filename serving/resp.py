"""Redis over pipelined connections: many commands may be under way, replies come in their order.

A general client spends more on one command than gRPC on one call; here a command is bytes that lie ready and a reply is
what hiredis made of it. Every failure of a connection is an OSError, and an error reply tells by `of_the_value` whether it is
one of the server.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hiredis
from hiredis import ReplyError
from redis.asyncio.connection import parse_url

from recsys_core.online import RECORD_FIELDS, recs_key, user_key
from recsys_core.settings import RedisSettings

CONNECT_SECONDS = 2.0
FEED_BYTES = 8192
"""hiredis is given so much at a time, because after each reply it moves all that it has not read yet: 560 kB, which hold 256
users, take 7.7 ms at once and .7 ms this way."""
WRONG_TYPE = "WRONGTYPE"
REDIRECTS = ("MOVED", "ASK", "CLUSTERDOWN Hash slot not served")
"""How replies begin by which a node of a cluster says that a key's slot is not its own, or nobody's for now."""


class RespError(OSError):
    """The connection is gone, or the server refuses what is asked of it."""


def of_the_value(error: ReplyError) -> bool:
    """Whether an error reply is about the value of a key; any other is about the server or the caller's rights."""
    return str(error).startswith(WRONG_TYPE)


def is_redirect(error: ReplyError) -> bool:
    """Whether a node of a cluster says that it does not have the key."""
    return str(error).startswith(REDIRECTS)


Sink = Callable[[list[Any] | None, Exception | None], None]
"""Takes the replies of a batch of commands, or the error for which there are none."""
Resend = Callable[[bytes, int, Sink], None]
"""Takes encoded commands, the number of their replies and who waits for these."""


class _Protocol(asyncio.Protocol):
    """Matches replies with the batches that wait for them.

    `resend` takes those of a connection that the other side cut: a server closes idle connections and a proxy forgets them,
    and only what is sent over one shows that it is gone.
    """

    def __init__(self, resend: Resend) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self._resend = resend
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[int, Sink, bytes]] = deque()
        self._replies: list[Any] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, replies: int, sink: Sink, again: bool = False) -> None:
        """Must not be called on a lost connection. `again` says that this is the second connection for these commands."""
        assert self.transport is not None
        self._waiting.append((replies, sink, b"" if again else data))
        self.transport.write(data)

    async def ask(self, data: bytes, replies: int, again: bool = False) -> list[Any]:
        """The replies to encoded commands; an error reply is a `hiredis.ReplyError` among them. `again` as in `send`.

        Raises RespError.
        """
        waiting: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def take(found: list[Any] | None, error: Exception | None) -> None:
            if waiting.done():
                return
            if found is None:
                waiting.set_exception(error or RespError("no reply"))
            else:
                waiting.set_result(found)

        self.send(data, replies, take, again)
        return await waiting

    def data_received(self, data: bytes) -> None:
        reader, replies = self._reader, self._replies
        try:
            for at in range(0, len(data), FEED_BYTES):
                reader.feed(data, at, min(FEED_BYTES, len(data) - at))
                while (reply := reader.gets()) is not False:
                    replies.append(reply)
                    if len(replies) == self._waiting[0][0]:
                        whole, replies = replies, []
                        self._replies = replies
                        self._waiting.popleft()[1](whole, None)
        except (hiredis.HiredisError, IndexError) as error:
            said = f": {replies[-1]}" if replies and isinstance(replies[-1], ReplyError) else ""
            self.close(RespError(f"what it sends is no reply to anything ({error}){said}"))

    def connection_lost(self, error: Exception | None) -> None:
        waiting, self._waiting = self._waiting, deque()
        self.close(lost := RespError(f"the connection to Redis was lost: {error or 'closed by the server'}"))
        for replies, sink, data in waiting:
            if data:
                self._resend(data, replies, sink)
            else:
                sink(None, lost)

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

    @classmethod
    def of(cls, settings: RedisSettings) -> Login:
        """What the settings say."""
        password = settings.password.get_secret_value()
        return cls(settings.username, password, settings.ca_file, settings.cert_file, settings.key_file)

    def tls(self) -> ssl.SSLContext:
        """Raises OSError when a file can't be read."""
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file or None)
        return context


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it is greeted: `greetings` are commands that a new connection begins with."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    tls: ssl.SSLContext | None = None
    greetings: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of_url(cls, url: str, login: Login | None = None) -> Endpoint:
        """Raises ValueError when `url` is not that of one server, OSError when a file for TLS can't be read."""
        login = login or Login()
        options: dict[str, Any] = dict(parse_url(url))
        tls = None
        if url.startswith("rediss:"):
            tls = replace(login, ca_file=login.ca_file or options.get("ssl_ca_certs", "")).tls()
            if options.get("ssl_cert_reqs") in ("none", "CERT_NONE"):
                tls.check_hostname = False
                tls.verify_mode = ssl.CERT_NONE
        named = replace(
            login,
            username=login.username or options.get("username") or "",
            password=login.password or options.get("password") or "",
        )
        greetings = _greetings(named)
        if database := int(options.get("db") or 0):
            greetings += (command(b"SELECT", b"%d" % database),)
        host, port = options.get("host", "localhost"), int(options.get("port", 6379))
        return cls(host, port, options.get("path", ""), tls, greetings)

    @classmethod
    def of_node(cls, host: str, port: int, login: Login, tls: ssl.SSLContext | None, *greetings: bytes) -> Endpoint:
        """A node that a topology names."""
        return cls(host, port, "", tls, _greetings(login) + greetings)


def _greetings(login: Login) -> tuple[bytes, ...]:
    if not login.password:
        return ()
    user = (login.username.encode(),) if login.username else ()
    return (command(b"AUTH", *user, login.password.encode()),)


class Connection:
    """One connection, made when it is needed. Every failure is an OSError.

    Commands must bear to be run twice: those whose connection is cut before all their replies are here are sent once more.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._protocol: _Protocol | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, data: bytes, replies: int, sink: Sink) -> None:
        """Send encoded commands, now when there is a connection; `sink` gets their replies."""
        protocol = self._protocol
        if protocol is not None and not protocol.lost:
            protocol.send(data, replies, sink)
        else:
            self._send_connected(data, replies, sink, again=False)

    def _send_connected(self, data: bytes, replies: int, sink: Sink, again: bool = True) -> None:
        task = asyncio.get_running_loop().create_task(self._connect_and_send(data, replies, sink, again))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect_and_send(self, data: bytes, replies: int, sink: Sink, again: bool) -> None:
        try:
            protocol = await self.connect()
        except OSError as error:
            sink(None, error)
        else:
            protocol.send(data, replies, sink, again)

    async def call(self, data: bytes, replies: int) -> list[Any]:
        """See `_Protocol.ask`. Raises OSError."""
        return await (await self.connect()).ask(data, replies)

    async def connect(self) -> _Protocol:
        """The connection, made unless there is one. Raises OSError.

        Callers that come while it is being made share it; one that gives up leaves it to the others.
        """
        if self._protocol is None or self._protocol.lost:
            if self._connecting is None:
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(self._made)
            await asyncio.shield(self._connecting)
        if self._protocol is None or self._protocol.lost:
            raise RespError("the connection to Redis was lost at once")
        return self._protocol

    def _made(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # those who wait for it have it; nobody may

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                self._protocol = await self._greet()
        except (ValueError, RuntimeError) as error:  # of the names and of TLS in asyncio and uvloop
            raise RespError(f"no connection to Redis can be made: {error}") from error

    async def _greet(self) -> _Protocol:
        loop, at = asyncio.get_running_loop(), self._endpoint

        def protocol_of_it() -> _Protocol:
            return _Protocol(self._send_connected)

        if at.path:
            _, protocol = await loop.create_unix_connection(protocol_of_it, at.path)
        else:
            _, protocol = await loop.create_connection(protocol_of_it, at.host, at.port, ssl=at.tls)
        try:
            greetings = b"".join(at.greetings)
            replies = await protocol.ask(greetings, len(at.greetings), again=True) if greetings else []
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
            protocol, self._protocol = self._protocol, None
            protocol.close(RespError("the connection to Redis was given up"))

    async def close(self) -> None:
        """Give up the connection, or the making of one."""
        self.drop()
        tasks = [*self._tasks, *([self._connecting] if self._connecting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.drop()


def command(*words: bytes) -> bytes:
    """A command as Redis reads it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def words_of(call: Sequence[object]) -> tuple[bytes, ...]:
    """The words of a call (`redis_client.Script.call`) as bytes."""
    return tuple(word if isinstance(word, bytes) else str(word).encode() for word in call)


_NAMES = b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in RECORD_FIELDS)
_ONE = (
    b"*%d\r\n$5\r\nHMGET\r\n$%%d\r\nuser:{%%b}\r\n" % (len(RECORD_FIELDS) + 2)
    + _NAMES.replace(b"%", b"%%")
    + b"*2\r\n$3\r\nGET\r\n$%d\r\nrecs:{%b}\r\n"
)
_ASKING = command(b"ASKING")


def reads_of(user_ids: Sequence[bytes]) -> bytes:
    """The two commands that read a user, for each: HMGET of the record's fields, GET of the cached answer."""
    if any(brace in b"".join(user_ids) for brace in (b"{", b"}")):
        return b"".join([part for user_id in user_ids for part in _read_of(user_id.decode())])
    return b"".join([_ONE % (len(user_id) + 7, user_id, len(user_id) + 7, user_id) for user_id in user_ids])


def _read_of(user_id: str) -> tuple[bytes, bytes]:
    return _keyed(user_key(user_id).encode(), recs_key(user_id).encode())


def _keyed(record: bytes, answer: bytes) -> tuple[bytes, bytes]:
    return command(b"HMGET", record, *RECORD_FIELDS), command(b"GET", answer)


class Pipelined:
    """Reads and calls of one server, over three connections: what callers wait for, what is for many users, and the rest."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._reads = Connection(endpoint)
        self._many = Connection(endpoint)
        self._calls = Connection(endpoint)

    def read(self, user_ids: Sequence[bytes], sink: Sink, many: bool = False) -> None:
        """Give `sink` two replies for each user, see `reads_of`; with `many` those of single callers are not behind them."""
        connection = self._many if many else self._reads
        connection.send(reads_of(user_ids), 2 * len(user_ids), sink)

    async def read_one(self, user_id: bytes, asking: bool) -> list[Any]:
        """The two replies for a user; `asking` when a cluster is just moving its slot to this node. Raises OSError."""
        record, answer = _read_of(user_id.decode())
        if not asking:
            return await self._calls.call(record + answer, 2)
        return (await self._calls.call(_ASKING + record + _ASKING + answer, 4))[1::2]

    async def call(self, commands: Sequence[tuple[bytes, ...]]) -> list[Any]:
        """Replies of commands, on a connection of their own. Raises OSError."""
        return await self._calls.call(b"".join(command(*words) for words in commands), len(commands))

    def drop(self) -> None:
        """Give the connections up; what comes next makes new ones."""
        for connection in (self._reads, self._many, self._calls):
            connection.drop()

    async def close(self) -> None:
        for connection in (self._reads, self._many, self._calls):
            await connection.close()
