"""A Redis Cluster whose nodes can be cut off from each other and still be reached by clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from redis_cluster import Cluster

CHUNK = 1 << 16
HOSTS = [f"127.0.0.{number}" for number in range(2, 8)]


class Links:
    """Passes on what nodes say to each other. A node is known by its address, from which it also connects."""

    def __init__(self) -> None:
        self._cut: set[str] = set()
        self._open: dict[asyncio.StreamWriter, set[str]] = {}
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def listen(self, host: str, bus: int) -> int:
        """The port at which others reach the bus of a node."""

        async def start() -> int:
            server = await asyncio.start_server(lambda r, w: self._pass_on(r, w, host, bus), host, 0)
            self._servers.append(server)
            return int(server.sockets[0].getsockname()[1])

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def cut(self, host: str) -> None:
        """From now on a node and the others hear nothing of each other."""

        def close() -> None:
            self._cut.add(host)
            for writer, ends in self._open.items():
                if host in ends:
                    writer.close()

        self._loop.call_soon_threadsafe(close)

    def mend(self, host: str) -> None:
        self._loop.call_soon_threadsafe(self._cut.discard, host)

    def close(self) -> None:
        async def stop() -> None:
            for server in self._servers:
                server.close()
            for writer in list(self._open):
                writer.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _pass_on(self, heard: asyncio.StreamReader, back: asyncio.StreamWriter, host: str, bus: int) -> None:
        ends = {host, back.get_extra_info("peername")[0]}
        if ends & self._cut:
            back.close()
            return
        try:
            answer, to = await asyncio.open_connection(host, bus)
        except OSError:
            back.close()
            return
        self._open |= {back: ends, to: ends}
        try:
            await asyncio.gather(_copy(heard, to), _copy(answer, back))
        finally:
            for writer in (back, to):
                self._open.pop(writer, None)
                writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(CHUNK):
            target.write(data)
            await target.drain()
    target.close()


class PartitionedCluster(Cluster):
    """Each node has an address of loopback to itself, and is reached by the others through `Links`."""

    def __init__(self, home: Path, links: Links, options: Sequence[str]) -> None:
        self._links = links
        super().__init__(home, True, options, HOSTS, links.listen)

    def cut_off(self, address: str) -> None:
        """Leave a node to its clients alone."""
        self._links.cut(address.rpartition(":")[0])

    def mend(self, address: str) -> None:
        self._links.mend(address.rpartition(":")[0])


@contextmanager
def partitioned_cluster(home: Path, options: Sequence[str] = ()) -> Iterator[PartitionedCluster]:
    """Three masters with a replica each."""
    links = Links()
    made = PartitionedCluster(home, links, options)
    try:
        made.join()
        yield made
    finally:
        made.stop()
        links.close()
