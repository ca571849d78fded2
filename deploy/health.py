"""Exits with 0 when a process answers, for HEALTHCHECK of the images.

health.py grpc HOST:PORT [SERVICE]
health.py http URL
"""

from __future__ import annotations

import sys
import urllib.request

SECONDS = 3.0


def grpc_serves(address: str, service: str = "") -> bool:
    """Whether the standard gRPC health check says SERVING of a service; the empty name is the whole server."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def http_answers(url: str) -> bool:
    """Whether a URL is answered with 200, without a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=SECONDS) as answer:
        return bool(answer.status == 200)


if __name__ == "__main__":
    kind, *where = sys.argv[1:]
    answers = {"grpc": grpc_serves, "http": http_answers}[kind]
    sys.exit(0 if answers(*where) else 1)
