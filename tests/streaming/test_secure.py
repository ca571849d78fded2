"""A worker over SASL and TLS: a real Kafka that asks for a password and a certificate, a real Redis behind a TLS terminator."""

from __future__ import annotations

import asyncio
import random
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from certificates import make_certificates
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from stream_world import SECONDS, World

from recsys_cli.java import ensure_java
from recsys_cli.kafka import kafka_answers
from recsys_cli.processes import LOOPBACK, free_port, running, wait_until
from recsys_cli.stack import redis_server
from recsys_core.kafka_config import SILENT, client_config
from recsys_core.redis_client import client
from recsys_core.settings import KafkaSettings, RedisSettings
from streaming.kafka import KafkaUnavailable, plan_broker

USER, PASSWORD = "worker", "a secret, with = and ;"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def own_files(folder: Path, name: str) -> dict[str, str]:
    files = {"cert_file": f"{name}.pem", "key_file": f"{name}.key", "ca_file": "ca.pem"}
    return {setting: str(folder / file) for setting, file in files.items()}


@contextmanager
def secure_redis(home: Path, folder: Path) -> Iterator[str]:
    """A Redis whose clients need a certificate; yields its URL."""
    with redis_server(home) as url, tls_in_front_of(int(url.split(":")[2].partition("/")[0]), folder) as port:
        yield f"rediss://{LOOPBACK}:{port}/0"


@contextmanager
def tls_in_front_of(port: int, folder: Path) -> Iterator[int]:
    """A port that speaks TLS for a plain one, as the redis-server of the tests cannot, and asks for a certificate of the CA."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.pem"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    loop = asyncio.new_event_loop()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, out = await asyncio.open_connection(LOOPBACK, port)
        await asyncio.gather(pump(reader, out), pump(behind, writer))

    server = loop.run_until_complete(asyncio.start_server(serve, LOOPBACK, 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@contextmanager
def secure_kafka(home: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """A broker whose second listener takes clients with a certificate and a SCRAM password only, who may do all that no ACL
    forbids; yields the addresses of the first listener and of that.

    Skips the test where Kafka can't be had.
    """
    plain, secure, controller = free_port(), free_port(), free_port()
    try:
        plan = plan_broker(home / "kafka", ensure_java().path, plain, controller, KafkaSettings())
    except KafkaUnavailable as error:
        pytest.skip(str(error))
    properties = plan.folder / "server.properties"
    store = home / "broker.pem"
    store.write_text((folder / "server.key").read_text() + (folder / "server.pem").read_text())
    listeners = f"PLAINTEXT://{LOOPBACK}:{plain},SECURE://{LOOPBACK}:{secure}"
    more = {
        "listeners": f"{listeners},CONTROLLER://{LOOPBACK}:{controller}",
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.secure.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": store,
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": folder / "ca.pem",
        "listener.name.secure.ssl.client.auth": "required",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        "super.users": "User:ANONYMOUS",
    }
    kept = [line for line in properties.read_text().splitlines() if line.partition("=")[0] not in more]
    properties.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in more.items()), ""]))
    with running("kafka", home, plan.command) as check:
        wait_until(lambda: kafka_answers(plan.bootstrap_servers), "kafka", 60, check)
        admin = AdminClient({"bootstrap.servers": plan.bootstrap_servers, "log_level": SILENT})
        password = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        made = admin.alter_user_scram_credentials([UserScramCredentialUpsertion(USER, password, PASSWORD.encode())])
        made[USER].result(30)
        yield plan.bootstrap_servers, f"{LOOPBACK}:{secure}"


def refusal(address: str, **login: Any) -> int | None:
    """The code of the error that a client who logs in like this gets; None when it gets an answer.

    A server that wants another certificate says so after the handshake (TLS 1.3): the client sees its connections end.
    """
    settings = KafkaSettings(bootstrap_servers=address, conf={"log_level": str(SILENT)}, **login)
    codes: list[int] = []
    admin = AdminClient({**client_config(settings), "error_cb": lambda error: codes.append(error.code())})
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if admin.list_topics(timeout=0.2).brokers:
                return None
        except KafkaException:
            admin.poll(0)
        refused = [code for code in codes if code in (KafkaError._AUTHENTICATION, KafkaError._SSL)]
        if refused or codes.count(KafkaError._TRANSPORT) >= 5:
            return [*refused, KafkaError._TRANSPORT][0]
    raise AssertionError(f"neither answered nor refused: {codes}")


def forbid_writing(address: str) -> None:
    """The user of the second listener may read alone."""
    rules = [
        (ResourceType.TOPIC, "*", AclOperation.WRITE, AclPermissionType.DENY),
        (ResourceType.BROKER, "kafka-cluster", AclOperation.IDEMPOTENT_WRITE, AclPermissionType.DENY),
        (ResourceType.TOPIC, "*", AclOperation.READ, AclPermissionType.ALLOW),
    ]
    acls = [AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", *rule) for kind, name, *rule in rules]
    admin = AdminClient({"bootstrap.servers": address, "log_level": SILENT})
    for made in admin.create_acls(acls).values():
        made.result(30)


def test_a_worker_over_sasl_and_tls_does_what_it_does_over_plain_lines(tmp_path: Path, certificates: Path) -> None:
    login = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": USER}
    own = own_files(certificates, "client")
    right = {**login, "sasl_password": PASSWORD, **own}
    with secure_redis(tmp_path, certificates) as url, secure_kafka(tmp_path, certificates) as (plain, address):
        assert refusal(address, **right) is None
        assert refusal(address, **{**right, "sasl_password": "another"}) == KafkaError._AUTHENTICATION
        assert refusal(address, **{**right, **own_files(certificates, "stranger")}) == KafkaError._TRANSPORT
        assert refusal(address, **{**right, "ca_file": str(certificates / "other.pem")}) == KafkaError._SSL
        one = World.make(address, url, tmp_path, kafka=right, redis=own)
        one.redis = client(one.settings.redis)
        chance = random.Random(1)
        one.start()
        for _ in range(20):
            one.send(*(one.event(chance) for _ in range(chance.randrange(1, 30))))
        one.send(*(one.event(chance) for _ in range(3000)))
        one.send_raw(b"junk", b"k")
        one.settle()
        one.prove()
        assert [letter.value() for letter in one.messages(one.settings.kafka.dead_letter_topic)] == [b"junk"]
        one.kill(one.workers[0], signal.SIGTERM)
        forbid_writing(plain)
        one.producer = Producer({"bootstrap.servers": plain})
        one.start()
        one.send_raw(b"junk that is no dead letter", b"k")
        one.send(*(one.event(chance) for _ in range(300)))
        one.settle()
        one.prove()
        one.close()


def test_a_redis_over_tls_takes_nobody_without_a_certificate_and_is_not_taken_without_one(
    tmp_path: Path, certificates: Path
) -> None:
    own = own_files(certificates, "client")
    other_ca = str(certificates / "other.pem")
    with secure_redis(tmp_path, certificates) as url:
        with client(RedisSettings(url=url, **own)) as good:
            assert good.ping()
        for files in (own_files(certificates, "stranger"), {"ca_file": own["ca_file"]}, {**own, "ca_file": other_ca}):
            with client(RedisSettings(url=url, **files), socket_timeout=5) as bad, pytest.raises(redis.RedisError):
                bad.ping()
