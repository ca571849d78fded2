"""A server in front of a Redis that does what a test says. It is a Sentinel and the one node of a Cluster as well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import hiredis
from worlds import LoopThread

Answer = Callable[[list[bytes]], bytes | None]
"""The bytes with which a command is answered; None ends the connection."""


class Puppet:
    """Passes commands on to a Redis, or answers them itself.

    Attributes:
        delay: seconds by which replies of the Redis come later, without holding up those behind them.
        answer: answers commands in place of the Redis, and b"" never.
    """

    def __init__(self, upstream: int) -> None:
        self.delay = 0.0
        self.answer: Answer | None = None
        self._upstream = upstream
        self._loop = LoopThread()
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.listen()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def listen(self) -> None:
        """Take connections, always on the same port."""

        async def begin() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

        self._loop.run(begin())

    def refuse(self) -> None:
        """End all connections and take no new ones."""

        async def end() -> None:
            assert self._server is not None
            self._server.close()
            for writer in self._open:
                writer.transport.abort()

        self._loop.run(end())

    def stop(self) -> None:
        self.refuse()
        self._loop.run(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
        back = asyncio.create_task(self._pass_back(upstream_reader, writer))
        commands = hiredis.Reader()
        try:
            while data := await reader.read(65536):
                commands.feed(data)
                while (words := commands.gets()) is not False:
                    if not self._take(words, writer, upstream):
                        return
        except ConnectionError:
            pass
        finally:
            self._open.discard(writer)
            back.cancel()
            upstream.close()
            writer.transport.abort()

    def _take(self, words: list[bytes], writer: asyncio.StreamWriter, upstream: asyncio.StreamWriter) -> bool:
        if self.answer is not None:
            answer = self.answer(words)
        elif words[0].upper() == b"SENTINEL":
            answer = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%d\r\n" % (len(str(self.port)), self.port)
        elif [word.upper() for word in words[:2]] == [b"CLUSTER", b"SLOTS"]:
            answer = b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$40\r\n%b\r\n" % (self.port, b"a" * 40)
        else:
            answer = b""
            parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
            upstream.write(b"*%d\r\n" % len(words) + b"".join(parts))
        if answer is None:
            return False
        writer.write(answer)
        return True

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            if self.delay:
                loop.call_later(self.delay, self._write, writer, data)
            else:
                writer.write(data)
        writer.transport.abort()

    def _write(self, writer: Any, data: bytes) -> None:
        if writer in self._open:
            writer.write(data)
