"""Which Redis server has a user's keys: the one server there is, the one that Sentinels name, or one of a Cluster's.

A topology holds the nodes by shard and, for a Cluster, the shard of each slot. It is asked for again every REFRESH_SECONDS,
and soon after a node fails or says that keys are elsewhere, so that a fail-over is followed. While nobody can say, what was
known last stays in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from binascii import crc_hqx
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hiredis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from recsys_core.online import recs_key
from recsys_core.settings import RedisSettings
from serving.crowd import Crowd, Gathering
from serving.metrics import Metrics
from serving.node import NOTHING, Node, Raw
from serving.resp import Connection, Endpoint, Login, Pipelined, command

log = logging.getLogger(__name__)

REFRESH_SECONDS = 10.0
RETRY_SECONDS = 0.5
"""Between two looks while something fails."""
ASK_SECONDS = 0.5
"""Deadline of one server's answer about the topology."""

Address = tuple[str, int]


class Unknown(Exception):
    """Nobody could say where the keys are."""


@dataclass
class Shard:
    """A master and the nodes that are read, of which there is one without replicas."""

    master: Node
    readers: list[Node]
    _turn: int = field(default=0, repr=False)

    def reader(self) -> Node:
        """The next node in turn that answers, or that is to be asked whether it answers again."""
        count = len(self.readers)
        if count == 1:
            return self.readers[0]
        self._turn = (self._turn + 1) % count
        turns = [self.readers[(self._turn + i) % count] for i in range(count)]
        return next((node for node in turns if node.breaker.passes), turns[0])


@dataclass
class Layout:
    """What is known of where keys are.

    Attributes:
        shards: by number; empty while nothing is known.
        slots: number of the shard of each slot, -1 for none; None where one shard has everything.
    """

    shards: list[Shard]
    slots: list[int] | None = None

    def shard(self, user_id: bytes) -> Shard | None:
        """Which shard has a user's keys; None when nobody does."""
        if self.slots is None:
            return self.shards[0] if self.shards else None
        at = self.slots[slot_of(user_id)]
        return self.shards[at] if at >= 0 else None


def slot_of(user_id: bytes) -> int:
    """The Cluster's slot of a user's keys, whose hash tag is the id."""
    if b"{" in user_id or b"}" in user_id:
        return key_slot(recs_key(user_id.decode()).encode())
    return crc_hqx(user_id, 0) % REDIS_CLUSTER_HASH_SLOTS


class Topology:
    """Follows where the keys are.

    Attributes:
        layout: what is known at the moment.
    """

    def __init__(self, settings: RedisSettings, metrics: Metrics) -> None:
        """Raises OSError when a file for TLS can't be read."""
        self.layout = Layout([])
        self._settings = settings
        self._metrics = metrics
        self._deadline = settings.timeout_ms / 1000
        self._gathering: Gathering | None = None
        self._login = Login.of(settings)
        self._tls = self._login.tls() if settings.tls else None
        self._nodes: dict[Address, Node] = {}
        self._looking: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._looked_at = float("-inf")
        self._silent = False
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def nodes(self) -> list[Node]:
        """All nodes that keys may be on."""
        return list(self._nodes.values())

    def follow_crowd(self, crowd: Crowd) -> None:
        """Have reads wait for others while callers queue."""
        self._gathering = Gathering(crowd)
        for node in self._nodes.values():
            node.gathering = self._gathering

    # -- looking ------------------------------------------------------------------------------------------------

    async def find(self) -> None:
        """Look now, or wait for the look under way; what the last one found is new enough for RETRY_SECONDS."""
        loop = asyncio.get_running_loop()
        if self._looking is None and loop.time() >= self._looked_at + RETRY_SECONDS:
            self._looking = loop.create_task(self._look())
        if self._looking is not None:
            await asyncio.shield(self._looking)

    def look_soon(self) -> None:
        """Something has changed, or fails: look again, but not more often than every RETRY_SECONDS."""
        self._look_in(max(0.0, self._looked_at + RETRY_SECONDS - asyncio.get_running_loop().time()))

    def _look_in(self, seconds: float) -> None:
        if self._looking is not None:
            return
        loop = asyncio.get_running_loop()
        if self._again is not None:
            if self._again.when() <= loop.time() + seconds:
                return
            self._again.cancel()
        self._again = loop.call_later(seconds, self._begin)

    def _begin(self) -> None:
        self._again = None
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        wait = REFRESH_SECONDS
        try:
            self.layout = await self._found()
            if self._silent:
                log.info("Redis says again where keys are")
            self._silent = False
        except Unknown as error:
            wait = RETRY_SECONDS
            if not self._silent:
                log.warning("%s; what was known of Redis stays in use", error)
            self._silent = True
        except Exception:
            log.exception("where Redis has its keys could not be found out; what was known stays in use")
        finally:
            self._looked_at = asyncio.get_running_loop().time()
            self._looking = None
            self._look_in(wait)

    async def _found(self) -> Layout:
        """Raises Unknown."""
        return self.layout

    async def _first(self, addresses: Sequence[Address], login: Login, *words: bytes) -> tuple[Address, Any]:
        """The first of some servers that answers a command, and its answer. Raises Unknown."""
        said = ""
        for host, port in addresses:
            connection = Connection(Endpoint.of_node(host, port, login, self._tls))
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    [reply] = await connection.call(command(*words), 1)
            except OSError as error:
                said = f"{host}:{port}: {type(error).__name__}: {error}"
                continue
            finally:
                await connection.close()
            if isinstance(reply, hiredis.ReplyError):
                said = f"{host}:{port}: {reply}"
            elif reply:
                return (host, port), reply
            else:
                said = f"{host}:{port} answers {words[0].decode()} with nothing"
        raise Unknown(f"of {len(addresses)} servers none says where keys are ({said})")

    # -- nodes --------------------------------------------------------------------------------------------------

    def _node(self, address: Address, *greetings: bytes) -> Node:
        """The node at an address, the same one as long as it is in use."""
        node = self._nodes.get(address)
        if node is None:
            host, port = address
            endpoint = Endpoint.of_node(host, port, self._login, self._tls, *greetings)
            node = self._add(address, f"Redis at {host}:{port}", endpoint)
        return node

    def _add(self, address: Address, name: str, endpoint: Endpoint) -> Node:
        node = Node(name, Pipelined(endpoint), self._deadline, self._metrics)
        node.gathering, node.on_failure = self._gathering, self.look_soon
        self._nodes[address] = node
        return node

    def _keep(self, layout: Layout) -> Layout:
        """Let go of nodes that a new layout does not have."""
        used = {id(node) for shard in layout.shards for node in (shard.master, *shard.readers)}
        for address, node in list(self._nodes.items()):
            if id(node) not in used:
                del self._nodes[address]
                task = asyncio.get_running_loop().create_task(node.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        return layout

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._again is not None:
            self._again.cancel()
        await asyncio.gather(*(node.close() for node in self.nodes), *self._closing, return_exceptions=True)


class OneServer(Topology):
    """The server at `redis.url`; there is nothing to look for."""

    def __init__(self, settings: RedisSettings, metrics: Metrics, node: Node | None = None) -> None:
        """`node` in place of the one at the URL. Raises OSError when a file for TLS can't be read."""
        super().__init__(settings, metrics)
        self._nodes[("", 0)] = node = node or Node(
            "Redis", Pipelined(Endpoint.of_url(settings.url, self._login)), self._deadline, metrics
        )
        self.layout = Layout([Shard(node, [node])])

    async def find(self) -> None:
        """It is where the settings say."""

    def look_soon(self) -> None:
        """The one server stays where it is."""


class Sentinels(Topology):
    """The master that the Sentinels name, and its replicas where they are read."""

    async def _found(self) -> Layout:
        login = Login(password=self._settings.sentinel_password.get_secret_value())
        watchers = _configured(self._settings)
        random.shuffle(watchers)
        service = self._settings.service.encode()
        watcher, answer = await self._first(watchers, login, b"SENTINEL", b"get-master-addr-by-name", service)
        master = self._node(_address(answer))
        readers = [master]
        if self._settings.read_replicas:
            with contextlib.suppress(Unknown):  # a master without replicas is read itself
                _, replicas = await self._first([watcher], login, b"SENTINEL", b"replicas", service)
                readers += [self._node(address) for address in _usable_replicas(replicas)]
        return self._keep(Layout([Shard(master, readers)]))


class ClusterMap(Topology):
    """The nodes of a Redis Cluster by slot."""

    def __init__(self, settings: RedisSettings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._greetings = (command(b"READONLY"),) if settings.read_replicas else ()

    async def _found(self) -> Layout:
        known = [a for a, n in self._nodes.items() if not n.breaker.open]
        random.shuffle(known)
        others = [a for a in (*_configured(self._settings), *self._nodes) if a not in known]
        (host, _), ranges = await self._first([*known, *others], self._login, b"CLUSTER", b"SLOTS")
        shards: dict[Address, int] = {}
        layout = Layout([], [-1] * REDIS_CLUSTER_HASH_SLOTS)
        assert layout.slots is not None
        try:
            for first, last, *nodes in ranges:
                addresses = [_node_address(node, host) for node in nodes]
                if addresses[0] not in shards:
                    shards[addresses[0]] = len(layout.shards)
                    layout.shards.append(self._shard(addresses))
                layout.slots[first : last + 1] = [shards[addresses[0]]] * (last + 1 - first)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise Unknown(f"{host} does not answer CLUSTER SLOTS as a Redis Cluster does: {error}") from error
        return self._keep(layout)

    def _shard(self, addresses: Sequence[Address]) -> Shard:
        master, *replicas = (self._cluster_node(address) for address in addresses)
        return Shard(master, [master, *replicas] if self._settings.read_replicas else [master])

    def _cluster_node(self, address: Address) -> Node:
        node = self._node(address, *self._greetings)
        node.redirected = self._redirected
        return node

    async def _redirected(self, user_id: bytes, error: hiredis.ReplyError) -> Raw:
        """What the node has that an error reply names; the map is looked at again, as a slot has moved."""
        self.look_soon()
        kind, *words = str(error).split()
        if kind not in ("MOVED", "ASK") or len(words) != 2:
            return NOTHING
        host, _, port = words[1].rpartition(":")
        address = host, int(port) if port.isdigit() else 0
        try:
            async with asyncio.timeout(self._deadline):
                if address not in self._nodes:  # the map does not know of it yet
                    await self.find()
                named = self._nodes.get(address)
                return NOTHING if named is None else await named.read_redirected(user_id, kind == "ASK")
        except TimeoutError:
            return NOTHING


def topology_of(settings: RedisSettings, metrics: Metrics) -> Topology:
    """The one that the settings describe. Raises OSError when a file for TLS can't be read."""
    kinds: dict[str, Callable[[RedisSettings, Metrics], Topology]] = {
        "standalone": OneServer,
        "sentinel": Sentinels,
        "cluster": ClusterMap,
    }
    return kinds[settings.mode](settings, metrics)


def _configured(settings: RedisSettings) -> list[Address]:
    return [(host, int(port)) for host, _, port in (node.rpartition(":") for node in settings.nodes)]


def _address(answer: Any) -> Address:
    """Raises Unknown."""
    try:
        host, port = answer
        return str(host.decode()), int(port)
    except (ValueError, TypeError, AttributeError) as error:
        raise Unknown(f"a Sentinel names no address but {answer!r}") from error


def _usable_replicas(answer: Any) -> list[Address]:
    """Of replicas as Sentinel describes them, a list of names and values each, those that are up and follow the master.

    Raises Unknown.
    """
    found = []
    try:
        for flat in answer:
            state = dict(zip(flat[::2], flat[1::2], strict=False))
            down = {b"s_down", b"o_down", b"disconnected"} & set(state[b"flags"].split(b","))
            if not down and state[b"master-link-status"] == b"ok":
                found.append((state[b"ip"].decode(), int(state[b"port"])))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise Unknown(f"a Sentinel does not describe replicas as it should: {error}") from error
    return found


def _node_address(node: Sequence[Any], asked: str) -> Address:
    """A node of CLUSTER SLOTS. A node that does not know its own name is the one that was asked."""
    name, port = node[0], int(node[1])
    host = name.decode() if isinstance(name, bytes) else ""
    return (asked if host in ("", "?") else host), port
