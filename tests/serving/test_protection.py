"""Tokens, TLS, limits, an orderly end, and what is seen from outside of every call."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from certificates import make_certificates
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from snapshots import make_snapshot
from typer.testing import CliRunner, Result
from worlds import RedisServer, World, eventually

from recsys_cli.main import app
from recsys_cli.processes import free_port
from recsys_cli.stack import serving_health
from recsys_core.online import UserRecord
from recsys_core.settings import ServingSettings, Settings
from serving import recsys_pb2 as pb
from serving.client import ClientOptions, Diversity, RecsysClient, RecsysError, Tls
from serving.ladder import Call, Ladder
from serving.metrics import registry
from serving.ranker import Batch, Computed
from serving.security import MissingSecret, Tokens, server_credentials

HEALTH_SCRIPT = Path(__file__).parents[2] / "deploy" / "health.py"

SECRET = "kR8-very-secret"


def with_serving(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"serving": settings.serving.model_copy(update=changes)})


@pytest.fixture
def make_world(serving_settings: Settings, redis_server: RedisServer) -> Iterator:
    """Makes a running world with other settings of [serving]."""
    made: list[World] = []

    def make(**changes: object) -> World:
        world = World(with_serving(serving_settings, **changes), redis_server)
        made.append(world)
        world.promote(make_snapshot())
        world.start(insecure=not changes.get("tls_certificate"))
        return world

    yield make
    for world in made:
        world.stop()


class TestTokens:
    @pytest.fixture
    def guarded(self, make_world, monkeypatch: pytest.MonkeyPatch) -> World:
        monkeypatch.setenv("APP_TOKEN", SECRET)
        monkeypatch.setenv("OPS_TOKEN", "ops")
        return make_world(tokens={"APP_TOKEN": ["Recommend", "RecommendStream"], "OPS_TOKEN": ["*"]})

    def test_without_a_token_no_method_is_open(self, guarded: World, caplog: pytest.LogCaptureFixture) -> None:
        for token in ("", "wrong", SECRET[:-1]):
            with RecsysClient(guarded.address, options=ClientOptions(timeout=60, token=token)) as client:
                for call in (lambda c=client: c.recommend("ann"), lambda c=client: list(c.recommend_stream(["ann"]))):
                    with pytest.raises(RecsysError, match="UNAUTHENTICATED"):
                        call()
        assert SECRET not in caplog.text

    def test_a_token_opens_its_methods_and_no_other(self, guarded: World) -> None:
        with RecsysClient(guarded.address, options=ClientOptions(timeout=60, token=SECRET)) as client:
            assert len(client.recommend("ann")) == 10
            assert len(list(client.recommend_stream(["ann", "bob"]))) == 2
            with pytest.raises(RecsysError, match="PERMISSION_DENIED: this token does not open GetRelease"):
                client.get_release()
        with RecsysClient(guarded.address, options=ClientOptions(timeout=60, token="ops")) as client:
            assert client.get_release().item_count == 500

    def test_health_needs_no_token(self, guarded: World) -> None:
        stub = health_pb2_grpc.HealthStub(guarded.client._channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status == health_pb2.HealthCheckResponse.SERVING

    @pytest.mark.parametrize("padding", ["\n", "\r\n", " \t"])
    def test_white_space_around_a_token_of_the_environment_is_no_part_of_it(
        self, make_world, monkeypatch: pytest.MonkeyPatch, padding: str
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", padding + SECRET + padding)
        world = make_world(tokens={"APP_TOKEN": ["*"]})
        with RecsysClient(world.address, options=ClientOptions(timeout=60, token=SECRET)) as client:
            assert len(client.recommend("ann")) == 10

    @pytest.mark.parametrize("token", ["\n", "  ", ""])
    def test_a_token_that_is_blank_is_none(self, token: str) -> None:
        with pytest.raises(MissingSecret, match=r"serving\.tokens names A, which the environment does not set"):
            Tokens({"A": ["*"]}, {"A": token})

    @pytest.mark.parametrize("token", ["a\nb", "schlüssel", "a\0b"])
    def test_a_token_that_no_call_could_present_is_refused_at_the_start(self, token: str) -> None:
        with pytest.raises(MissingSecret, match="the token in A has characters that no header can carry") as caught:
            Tokens({"A": ["*"]}, {"A": token})
        assert token not in str(caught.value)

    @pytest.mark.parametrize(("wanted", "offered"), [(None, False), (True, True), (False, False)])
    def test_reflection_is_off_with_tokens_unless_it_is_asked_for(
        self, make_world, monkeypatch: pytest.MonkeyPatch, wanted: bool | None, offered: bool
    ) -> None:
        monkeypatch.setenv("APP_TOKEN", SECRET)
        world = make_world(tokens={"APP_TOKEN": ["*"]}, reflection=wanted)
        assert reflects(world.address) == offered

    def test_a_token_that_the_environment_lacks_is_named_and_its_value_never_is(self) -> None:
        with pytest.raises(MissingSecret, match=r"serving\.tokens names B, which the environment does not set"):
            Tokens({"A": ["*"], "B": ["*"]}, {"A": SECRET})
        assert SECRET not in repr(ClientOptions(token=SECRET))


def reflects(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            return bool(ProtoReflectionDescriptorDatabase(channel).get_services())
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def probe(port: int, service: str) -> int:
    """What the kubelet asks: the standard check, without TLS."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
    return int(answer.status)


def tls_client(world: World, folder: Path, name: str = "") -> RecsysClient:
    own = {"certificate": str(folder / f"{name}.pem"), "key": str(folder / f"{name}.key")} if name else {}
    tls = Tls(ca=str(folder / "ca.pem"), **own)
    return RecsysClient(world.address, options=ClientOptions(timeout=5, attempts=1, tls=tls))


class TestTls:
    def test_the_channel_is_encrypted_and_a_plain_one_is_refused(self, make_world, certificates: Path) -> None:
        world = make_world(tls_certificate=str(certificates / "server.pem"), tls_key=str(certificates / "server.key"))
        with tls_client(world, certificates) as client:
            client.wait_until_ready(60)
            assert len(client.recommend("ann")) == 10
        with RecsysClient(world.address, options=ClientOptions(timeout=5, attempts=1)) as plain:
            with pytest.raises(RecsysError, match="UNAVAILABLE"):
                plain.recommend("ann")

    def test_only_clients_with_a_certificate_of_the_ca_get_in(self, make_world, certificates: Path) -> None:
        files = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
        world = make_world(**{name: str(certificates / file) for name, file in files.items()})
        with tls_client(world, certificates, "client") as client:
            client.wait_until_ready(60)
            assert len(client.recommend("ann")) == 10
        for name in ("", "stranger"):
            with tls_client(world, certificates, name) as client, pytest.raises(RecsysError, match="UNAVAILABLE"):
                client.recommend("ann")

    def test_probes_reach_the_health_service_and_nothing_else_without_tls(self, make_world, certificates: Path) -> None:
        files = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
        port = free_port(0)
        world = make_world(health_port=port, **{name: str(certificates / file) for name, file in files.items()})
        for service in ("", "live"):
            assert probe(port, service) == health_pb2.HealthCheckResponse.SERVING
        assert serving_health(f"127.0.0.1:{port}") == "SERVING"
        command = [sys.executable, str(HEALTH_SCRIPT), "grpc", f"127.0.0.1:{port}", "live"]
        assert subprocess.run(command, timeout=30, check=False).returncode == 0
        with RecsysClient(f"127.0.0.1:{port}", options=ClientOptions(timeout=5, attempts=1)) as plain:
            with pytest.raises(RecsysError, match="UNIMPLEMENTED"):
                plain.recommend("ann")
        world.stop_later().result(60)
        with pytest.raises(grpc.RpcError):
            probe(port, "live")

    @pytest.mark.parametrize("wrong", ["absent.pem", "", "server.key"])
    @pytest.mark.parametrize("name", ["tls_certificate", "tls_key", "tls_client_ca"])
    def test_a_file_of_tls_that_is_none_is_told_by_its_setting(self, certificates: Path, name: str, wrong: str) -> None:
        files = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
        files[name] = "ca.pem" if (name, wrong) == ("tls_key", "server.key") else wrong
        settings = ServingSettings.model_construct(**{key: str(certificates / file) for key, file in files.items()})
        with pytest.raises(OSError, match=rf"serving\.{name} names .*, which (can't be read|holds no)"):
            server_credentials(settings)

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"tls_certificate": "a.pem"}, "tls_certificate is set and tls_key is not"),
            ({"tls_key": "a.key"}, "tls_key is set and tls_certificate is not"),
            ({"tls_client_ca": "ca.pem"}, "tls_client_ca asks for certificates of clients"),
        ],
    )
    def test_half_a_pair_is_one_red_line(self, given: dict, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RECSYS_HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        for name, value in given.items():
            monkeypatch.setenv(f"RECSYS_SERVING__{name.upper()}", value)
        answer = CliRunner().invoke(app, ["serve"])
        assert answer.exit_code == 2
        assert told in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1

    def test_the_command_line_calls_by_tls_and_with_a_token_of_the_environment(
        self, make_world, certificates: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPS_TOKEN", SECRET)
        files = {"tls_certificate": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
        world = make_world(tokens={"OPS_TOKEN": ["*"]}, **{name: str(certificates / file) for name, file in files.items()})
        with tls_client(world, certificates, "client") as client:
            client.wait_until_ready(60)
        own = [
            "--ca",
            certificates / "ca.pem",
            "--certificate",
            certificates / "client.pem",
            "--key",
            certificates / "client.key",
        ]

        def ask(*arguments: object) -> Result:
            return CliRunner().invoke(app, [*map(str, arguments), "--address", world.address])

        assert "UNAVAILABLE" in ask("recommend", "ann").stderr
        assert "UNAUTHENTICATED" in ask("recommend", "ann", *own).stderr
        monkeypatch.setenv("RECSYS_TOKEN", SECRET)
        for question in (("recommend", "ann"), ("recommend", "-12331441315645001"), ("similar", "item-1")):
            answer = ask(*question, *own)
            assert answer.exit_code == 0, answer.stderr
            assert "item-" in answer.stdout
        assert ask("recommend", "ann", *own[:4]).exit_code == 2


class TestLimits:
    def test_more_calls_than_allowed_are_refused_and_the_others_answered(
        self, make_world, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = make_world(max_concurrent=4)
        go_on = threading.Event()
        monkeypatch.setattr("serving.ladder.is_known", lambda *_: True)
        monkeypatch.setattr("serving.ladder.rank", lambda *_: go_on.wait(60))
        with (
            RecsysClient(world.address, options=ClientOptions(timeout=60, attempts=1)) as client,
            ThreadPoolExecutor(20) as pool,
        ):
            calls = [pool.submit(client.recommend, f"user-{i}") for i in range(20)]
            eventually(lambda: sum(call.done() for call in calls) == 16)
            go_on.set()
            statuses = [getattr(call.exception(), "status", "OK") for call in calls]
        assert sorted(set(statuses)) == ["OK", "RESOURCE_EXHAUSTED"]
        assert statuses.count("OK") == 4
        assert world.server.metrics.events["shed"] == 16
        assert world.client.recommend("ann").tier == "POPULAR"

    def test_a_request_that_is_too_large_is_refused(self, world: World) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            world.client._channel.unary_unary("/recsys.v1.Recommender/Recommend")(b"\x0a" * (5 << 20), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    @pytest.mark.parametrize(
        ("asked", "most", "named"),
        [
            ({}, 1_000_000, ""),
            ({"explain": True}, 10_000, " with explain"),
            ({"diversity": Diversity(0.5)}, 100_000, " with diversity"),
            ({"diversity": Diversity(max_per_category=3)}, 100_000, " with diversity"),
        ],
    )
    def test_a_batch_may_be_as_large_as_its_items_are_cheap(self, world: World, asked: dict, most: int, named: str) -> None:
        users = [f"user-{i}" for i in range(most // 500 + 1)]
        message = f"user_ids × count is {len(users) * 500} items; it may be {most} at most{named}$"
        with pytest.raises(RecsysError, match=f"INVALID_ARGUMENT: {message}"):
            world.client.recommend_batch(users, 500, **asked)
        if most <= 10_000:
            assert len(world.client.recommend_batch(users[:-1], 500, **asked)) == most // 500

    @pytest.mark.parametrize("user", ["known", "nobody"])
    @pytest.mark.parametrize("asked", [{"explain": True}, {"diversity": Diversity(0.5, 3)}], ids=["explain", "diversity"])
    def test_costly_answers_are_made_in_small_parts_off_the_event_loop(
        self, world: World, monkeypatch: pytest.MonkeyPatch, user: str, asked: dict
    ) -> None:
        made: list[tuple[str, int]] = []
        ranked = world.server.ladder.costly._work

        popular = Ladder._popular

        def noted(batch: Batch) -> list[Computed]:
            made.append((threading.current_thread().name, len(batch.records) * batch.options.count))
            return ranked(batch)

        def noted_popular(ladder: Ladder, call: Call, record: UserRecord, with_time: bool) -> bytes:
            made.append((threading.current_thread().name, 1000))
            return popular(ladder, call, record, with_time)

        world.server.ladder.costly._work = noted
        monkeypatch.setattr(Ladder, "_popular", noted_popular)
        for at in range(10):
            world.put_known_user(f"known-{at}", taste=at)
        answers = world.client.recommend_batch([f"{user}-{at % 10}" for at in range(40)], 250, **asked)
        assert {answer.tier for answer in answers} == {"POPULAR" if user == "nobody" else "REALTIME_ALS_ONLY"}
        assert len(made) == (40 if user == "nobody" else 10)
        assert {items for _, items in made} == {1000}
        assert all(name.startswith("rank-costly") for name, _ in made)

    def test_others_are_answered_while_the_largest_explained_batch_is_made(self, world: World) -> None:
        for at in range(20):
            world.put_known_user(f"known-{at}", taste=at)
        world.put_cached_user("ann")
        users, took = [f"known-{at}" for at in range(20)], []
        with RecsysClient(world.address, timeout=60) as other, ThreadPoolExecutor(1) as pool:
            batch = pool.submit(lambda: [other.recommend_batch(users, 500, explain=True) for _ in range(5)])
            while not batch.done():
                took.append(world.client.recommend("ann").milliseconds)
            assert all(item.parts for answers in batch.result() for answer in answers for item in answer)
        assert len(took) > 50
        assert np.percentile(took, 90) < 50

    def test_a_call_that_its_caller_gives_up_is_not_ranked(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, go_on, ranked = threading.Event(), threading.Event(), []

        def slow(*arguments: object) -> None:
            ranked.append(len(arguments[2]))
            begun.set()
            go_on.wait(60)
            raise ValueError("enough")

        monkeypatch.setattr("serving.ladder.rank", slow)
        world.put_known_user("ann")
        first = world.client._stub.Recommend.future(pb.RecommendRequest(user_id="ann"), timeout=60)
        assert begun.wait(60)
        queued = [world.client._stub.Recommend.future(pb.RecommendRequest(user_id="ann"), timeout=60) for _ in range(5)]
        eventually(lambda: world.server.metrics.gauges["calls_under_way"]() == 6)
        for call in queued:
            call.cancel()
        eventually(lambda: world.server.metrics.gauges["calls_under_way"]() == 1)
        go_on.set()
        assert first.result().tier == pb.POPULAR
        assert ranked == [1]

    def test_an_answer_comes_before_the_callers_deadline(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        go_on = threading.Event()
        monkeypatch.setattr("serving.ladder.rank", lambda *_: go_on.wait(60))
        world.put_known_user("ann")
        with RecsysClient(world.address, options=ClientOptions(timeout=5, attempts=1)) as client:
            assert client.recommend("ann").tier == "POPULAR", "a lower tier in time instead of a better one too late"
        go_on.set()


def connected(address: str, first: bytes = b"") -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=60)
    made.sendall(first)
    return made


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of HTTP/2 says first: the preface and its settings."""


class TestConnections:
    @pytest.mark.parametrize("first", [b"", PREFACE[:10], PREFACE], ids=["silent", "half", "idle"])
    def test_one_that_says_nothing_is_closed_and_one_that_calls_is_not(
        self, make_world, monkeypatch: pytest.MonkeyPatch, first: bytes
    ) -> None:
        monkeypatch.setattr("serving.server.HANDSHAKE_MS", 500)
        monkeypatch.setattr("serving.server.IDLE_MS", 500)
        world = make_world()
        with connected(world.address, first) as silent:
            while silent.recv(4096):
                assert world.client.recommend("ann").tier
        assert world.client.recommend("ann").tier, "the caller's connection is still there"

    def test_clients_do_not_notice_that_an_old_one_is_made_anew(self, make_world, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serving.server.AGE_MS", 200)
        world = make_world()
        until = time.monotonic() + 2.0

        def call(at: int) -> None:
            with RecsysClient(world.address, options=ClientOptions(timeout=60, attempts=1)) as client:
                while time.monotonic() < until:
                    client.recommend(f"user-{at}")

        def users() -> Iterator[str]:
            while time.monotonic() < until:
                yield "ann"
                time.sleep(0.02)

        def stream() -> int:
            with RecsysClient(world.address, options=ClientOptions(timeout=60, attempts=1)) as client:
                return len(list(client.recommend_stream(users())))

        seen: set[int] = set()
        with ThreadPoolExecutor(5) as pool:
            calling, streamed = [pool.submit(call, at) for at in range(4)], pool.submit(stream)
            while not all(one.done() for one in calling):
                seen |= peers(world)
        for one in calling:
            one.result()
        assert streamed.result() > 10
        assert len(seen) > 5, "connections to one address are shared, and were made anew some times"


def peers(world: World) -> set[int]:
    """The ports of those who are connected to the server now."""
    port = int(world.address.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    return {c.raddr.port for c in connections if c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port}


class TestTheEnd:
    def test_health_says_it_first_and_calls_under_way_are_answered(self, make_world, monkeypatch: pytest.MonkeyPatch) -> None:
        world = make_world(drain_seconds=60.0, linger_seconds=0.5)
        begun, go_on = threading.Event(), threading.Event()

        def slow(*_: object) -> None:
            begun.set()
            go_on.wait(60)
            raise ValueError("enough")

        monkeypatch.setattr("serving.ladder.rank", slow)
        world.put_known_user("ann")
        call = world.client._stub.Recommend.future(pb.RecommendRequest(user_id="ann"), timeout=60)
        assert begun.wait(60)
        stub = health_pb2_grpc.HealthStub(world.client._channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        ending = world.stop_later()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not call.done()
        watch.cancel()
        go_on.set()
        assert call.result().tier == pb.POPULAR
        ending.result(60)


class TestSeen:
    def test_request_id_and_trace_context_come_back(self, world: World) -> None:
        sent = (("x-request-id", "r-17"), ("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("other", "x"))
        _, call = world.client._stub.Recommend.with_call(pb.RecommendRequest(user_id="ann"), timeout=60, metadata=sent)
        assert dict(call.trailing_metadata()) == dict(sent[:2])

    def test_calls_tiers_and_times_are_counted(self, world: World) -> None:
        from prometheus_client import generate_latest

        world.put_cached_user("ann")
        for _ in range(3):
            world.client.recommend("ann")
        world.client.recommend("nobody")
        with pytest.raises(RecsysError):
            world.client.recommend("", 5)
        text = generate_latest(registry(lambda: [world.server.metrics.snapshot()] * 2)).decode()
        for line in (
            'recsys_requests_total{method="Recommend",status="OK"} 8.0',
            'recsys_requests_total{method="Recommend",status="INVALID_ARGUMENT"} 2.0',
            'recsys_answers_total{tier="CACHE"} 6.0',
            'recsys_answers_total{tier="POPULAR"} 2.0',
            'recsys_request_seconds_count{method="Recommend"} 10.0',
            'recsys_request_seconds_bucket{le="+Inf",method="Recommend"} 10.0',
            "recsys_redis_circuit_open 0.0",
            "recsys_processes 2.0",
            'recsys_release_info{release_id="2026-01-01.a"} 1.0',
        ):
            assert line in text.splitlines(), text
        assert "recsys_release_age_seconds" in text

    def test_spans_go_to_the_collector_as_children_of_the_callers(self, make_world) -> None:
        received: list[bytes] = []

        def export(data: bytes, _: grpc.ServicerContext) -> bytes:
            received.append(data)
            return b""

        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        collector = grpc.server(ThreadPoolExecutor(2))
        handler = grpc.unary_unary_rpc_method_handler(export)
        collector.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": handler}),))
        port = collector.add_insecure_port("127.0.0.1:0")
        collector.start()
        world = make_world(otlp_endpoint=f"http://127.0.0.1:{port}", trace_ratio=0.0)
        parent = ("traceparent", "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01")
        world.client._stub.Recommend(pb.RecommendRequest(user_id="ann"), timeout=60, metadata=(parent,))
        world.client.recommend("bob")
        world.server._tracing.close()
        collector.stop(None)
        exported = b"".join(received)
        assert exported.count(b"recsys.v1.Recommender/Recommend") == 1, "only the call whose caller traces it"
        assert bytes.fromhex("ab" * 16) in exported
        assert bytes.fromhex("cd" * 8) in exported

    def test_a_share_of_the_calls_is_logged_with_its_request_id(self, make_world, caplog: pytest.LogCaptureFixture) -> None:
        world = make_world(log_sample=1.0)
        with caplog.at_level("INFO", "serving.calls"):
            world.client.recommend("ann", request_id="r-18")
            eventually(lambda: [r for r in caplog.records if r.name == "serving.calls"])
        [record] = [r for r in caplog.records if r.name == "serving.calls"]
        fields = record.fields
        assert (fields["method"], fields["status"], fields["x-request-id"]) == ("Recommend", "OK", "r-18")
        assert "ann" not in str(fields), "whom an answer is for is not logged"
