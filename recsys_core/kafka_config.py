"""Configuration of every Kafka client, in one place: where the brokers are, how to log in, and how a topic is told apart."""

from __future__ import annotations

from typing import Any

from recsys_core.settings import KafkaSettings

QUIET = 4
"""Syslog level of librdkafka's own messages: warnings and worse."""
SILENT = 0
"""For clients whose errors are all raised."""
ANSWER_MS = 10_000
"""A broker that has not answered by then is not waited for: another one leads its partitions by now."""


def client_config(settings: KafkaSettings, **more: Any) -> dict[str, Any]:
    """librdkafka properties of a client; `more` are those of its kind, with dots written as underscores."""
    conf: dict[str, Any] = {
        "bootstrap.servers": settings.bootstrap_servers,
        "security.protocol": settings.security_protocol,
        "log_level": QUIET,
        "socket.timeout.ms": ANSWER_MS,
    }
    if settings.security_protocol.startswith("SASL"):
        conf["sasl.mechanism"] = settings.sasl_mechanism
        conf["sasl.username"] = settings.sasl_username
        conf["sasl.password"] = settings.sasl_password.get_secret_value()
    files = {
        "ssl.ca.location": settings.ca_file,
        "ssl.certificate.location": settings.cert_file,
        "ssl.key.location": settings.key_file,
    }
    conf |= {name: file for name, file in files.items() if file}
    return {**conf, **{name.replace("_", "."): value for name, value in more.items()}, **settings.conf}


def topic_identity(id_bits: int) -> str:
    """8 hexadecimal digits of a topic's id, from its most significant 64 bits. Another topic of the same name has others."""
    return f"{id_bits & 0xFFFFFFFFFFFFFFFF:016x}"[:8]
