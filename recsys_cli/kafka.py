"""`recsys kafka`: a real broker on this machine, and the topics of the platform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys_cli.processes import LOOPBACK, StackError, accepts_connections, free_port, run_folder, running, wait_until

if TYPE_CHECKING:
    from recsys_core.settings import KafkaSettings, Settings
    from streaming.topics import Topic

BROKER_SECONDS = 60.0

app = typer.Typer(no_args_is_help=True, help="A real Kafka broker on this machine, and the topics of the platform.")
Home = Annotated[Path | None, typer.Option(help="Folder of the installation. Default: RECSYS_HOME, else .recsys.")]


@contextmanager
def kafka_server(home: Path, port: int = 0, settings: KafkaSettings | None = None) -> Iterator[str]:
    """Run a real broker on loopback while the block runs and yield its address. 0: any free port.

    Its data stays in the home, so the next start goes on with it. Raises KafkaUnavailable, StackError, JavaMissing.
    """
    from recsys_cli.java import ensure_java
    from recsys_core.settings import KafkaSettings
    from streaming.kafka import plan_broker

    plan = plan_broker(home / "kafka", ensure_java().path, free_port(port), free_port(), settings or KafkaSettings())
    with running("kafka", home, plan.command) as check_alive:
        wait_until(lambda: kafka_answers(plan.bootstrap_servers), "kafka", BROKER_SECONDS, check_alive)
        yield plan.bootstrap_servers


def kafka_answers(address: str) -> bool:
    """Whether a broker takes connections and names itself as the cluster."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    from recsys_core.kafka_config import SILENT

    host, _, port = address.split(",")[0].rpartition(":")
    if not accepts_connections(host, int(port)):
        return False
    try:
        return bool(AdminClient({"bootstrap.servers": address, "log_level": SILENT}).list_topics(timeout=2).brokers)
    except KafkaException:
        return False


@app.command()
def up(
    home: Home = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; the next free one when it is taken.")] = 9092,
    address_file: Annotated[Path | None, typer.Option(help="File that gets the broker's address while it runs.")] = None,
    or_embedded: Annotated[bool, typer.Option("--or-embedded", help="Run the embedded one where Kafka can't be had.")] = False,
) -> None:
    """Run a real single-node Kafka until Ctrl-C, fetched at the first use; its data is in <home>/kafka."""
    import signal
    import threading

    from recsys_core.settings import load_settings

    settings = load_settings(home)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    file = address_file or run_folder(settings.home.absolute()) / "kafka.address"
    with broker_server(settings, port, or_embedded) as address:
        file.write_text(address)
        typer.echo(f"broker at {address}")
        try:
            while not stop.wait(1.0):
                if not accepts_connections(LOOPBACK, int(address.rpartition(":")[2])):
                    raise StackError(f"kafka ended; its output is in {run_folder(settings.home.absolute()) / 'kafka.log'}")
        finally:
            file.unlink(missing_ok=True)


@app.command()
def init(home: Home = None) -> None:
    """Make the topics with their partitions and retention; refuse to change the partitions of one that is there.

    They are made at the broker of the stack that runs in this home, else at kafka.bootstrap_servers.
    """
    from recsys_cli.stack import running_services
    from recsys_core.settings import load_settings

    settings = load_settings(home)
    running = {service.name: service.address() for service in running_services(settings.home.absolute())}
    for topic in _init(settings, running.get("broker") or settings.kafka.bootstrap_servers):
        typer.echo(f"{topic.name}: {topic.partitions} partitions, identity {topic.identity}")


@contextmanager
def broker_server(settings: Settings, port: int = 0, or_embedded: bool = True) -> Iterator[str]:
    """Run a broker with the platform's topics while the block runs and yield its address.

    It is a real Kafka, or the embedded broker where that can't be had and `or_embedded` allows it. Raises StackError.
    """
    from streaming.broker import EmbeddedBroker
    from streaming.kafka import KafkaUnavailable

    with ExitStack() as held:
        try:
            address = held.enter_context(kafka_server(settings.home.absolute(), port, settings.kafka))
        except KafkaUnavailable as error:
            if not or_embedded:
                raise StackError(str(error)) from error
            typer.echo(f"{error}\nThe embedded broker is used instead: it keeps a few megabytes until it ends.", err=True)
            address = held.enter_context(EmbeddedBroker()).bootstrap_servers
        else:
            _init(settings, address)
        yield address


def _init(settings: Settings, address: str) -> list[Topic]:
    from confluent_kafka import KafkaException

    from streaming.topics import TopicError, init_topics

    try:
        return init_topics(settings.kafka.model_copy(update={"bootstrap_servers": address}))
    except TopicError as error:
        raise StackError(str(error)) from error
    except KafkaException as error:
        raise StackError(f"the brokers at {address} say: {error.args[0].str()}") from error
