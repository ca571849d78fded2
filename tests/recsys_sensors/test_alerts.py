"""Alerts: told once on every channel, kept while a channel is away."""

import email
import json
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import redis
from certificates import make_certificates
from pydantic import SecretStr

from recsys_assets.resources import Platform
from recsys_cli.processes import free_port
from recsys_cli.stack import redis_server
from recsys_core.alerts import Alert, Mail, NotDelivered, Webhook, channels
from recsys_core.events import MINUTE_MS
from recsys_core.heartbeat import HEARTBEATS_KEY, Heartbeat, forget_heartbeat, read_heartbeats, write_heartbeat
from recsys_core.settings import AlertSettings, Settings
from recsys_sensors.alerting import alerts
from recsys_sensors.stream_health import stream_observed

NOW = 1_800_000_000_000


class Hook(ThreadingHTTPServer):
    """A webhook on loopback: keeps bodies, answers `status` as often as it is told to, refuses bodies with a word for good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.failures = 0
        self.status = 503
        self.unwanted = "\0"
        self.headers: dict[str, str] = {}
        self.may_end = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"

    @property
    def titles(self) -> list[str]:
        return [body["text"].splitlines()[0] for body in self.bodies]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hook: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if hook.failures:
            hook.failures -= 1
            self.send_response(hook.status)
        elif hook.unwanted in body["text"]:
            self.send_response(400)
        else:
            hook.bodies.append(body)
            self.send_response(200)
        for name, value in hook.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if "Content-Length" in hook.headers:
            hook.may_end.wait(10)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def mail_server(tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    """As much of SMTP as a mail needs, by STARTTLS with `tls`. Yields its port and the mails."""
    mails: list[str] = []

    class Session(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 ready\r\n")
            while line := self.rfile.readline().strip().upper():
                if tls and line.startswith(b"EHLO"):
                    self.wfile.write(b"250-here\r\n250 STARTTLS\r\n")
                    continue
                if tls and line == b"STARTTLS":
                    self.wfile.write(b"220 go on\r\n")
                    with suppress(OSError):
                        self.request = tls.wrap_socket(self.request, server_side=True)
                        self.setup()
                    continue
                if line == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = []
                    while (text := self.rfile.readline()) != b".\r\n":
                        lines.append(text.decode())
                    mails.append("".join(lines))
                self.wfile.write(b"221 bye\r\n" if line == b"QUIT" else b"250 ok\r\n")
                if line == b"QUIT":
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], mails
        server.shutdown()


def test_a_webhook_that_fails_for_a_moment_gets_the_alert_once(hook: Hook) -> None:
    hook.failures = 2
    Webhook(AlertSettings(webhook_url=hook.url)).send(Alert("a", "Disk is full", "on host 7"))
    assert [body["text"] for body in hook.bodies] == ["Disk is full\non host 7"]


def test_a_webhook_holds_the_other_alerts_up_neither_by_its_wish_for_a_pause_nor_by_an_answer_without_end(hook: Hook) -> None:
    settings = AlertSettings(webhook_url=hook.url, retries=1, timeout_seconds=120)
    hook.failures, hook.headers = 2, {"Retry-After": "600"}
    begun = time.monotonic()
    with pytest.raises(NotDelivered):
        Webhook(settings).send(Alert("a", "Disk is full"))
    hook.headers = {"Content-Length": "1000"}
    Webhook(settings).send(Alert("a", "Disk is full"))
    assert time.monotonic() - begun < 60
    hook.may_end.set()
    assert hook.titles == ["Disk is full"]


def test_a_webhook_that_stays_away_is_not_delivered_and_its_address_is_not_told(hook: Hook) -> None:
    hook.failures = 100
    with pytest.raises(NotDelivered) as caught:
        Webhook(AlertSettings(webhook_url=hook.url, retries=1)).send(Alert("a", "Disk is full"))
    assert "hook" not in str(caught.value).removeprefix("webhook")
    assert caught.value.__suppress_context__


def test_a_mail_has_the_title_as_its_subject() -> None:
    with mail_server() as (port, mails):
        settings = AlertSettings(smtp_host="127.0.0.1", smtp_port=port, email_to=["ops@shop.test"])
        Mail(settings).send(Alert("a", "Disk is full", "on host 7"))
    assert "Subject: recsys: Disk is full" in mails[0]
    assert "To: ops@shop.test" in mails[0]
    assert "on host 7" in mails[0]


def test_a_mail_server_that_is_away_is_not_delivered() -> None:
    with mail_server() as (port, _):
        pass
    settings = AlertSettings(smtp_host="127.0.0.1", smtp_port=port, email_to=["ops@shop.test"], timeout_seconds=2)
    with pytest.raises(NotDelivered, match="mail by"):
        Mail(settings).send(Alert("a", "Disk is full"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize(("host", "trusted", "delivered"), [("localhost", True, True), ("localhost", False, False)])
def test_a_mail_server_has_to_prove_who_it_is(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, host: str, trusted: bool, delivered: bool
) -> None:
    """The password goes to it; somebody in between would take it."""
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    with mail_server(context) as (port, mails):
        settings = AlertSettings(smtp_host=host, smtp_port=port, smtp_starttls=True, email_to=["ops@shop.test"])
        if delivered:
            Mail(settings).send(Alert("a", "Disk is full"))
        else:
            with pytest.raises(NotDelivered, match="CERTIFICATE_VERIFY_FAILED"):
                Mail(settings).send(Alert("a", "Disk is full"))
    assert bool(mails) == delivered


@pytest.mark.parametrize("title", ["", "two\nlines", "Bcc: x\r\nBcc: y@z", "\0", "ü" * 500])
def test_any_title_makes_a_mail_with_one_subject(title: str) -> None:
    with mail_server() as (port, mails):
        settings = AlertSettings(smtp_host="127.0.0.1", smtp_port=port, email_to=["ops@shop.test"])
        Mail(settings).send(Alert("a", title))
    headers = email.message_from_string(mails[0])
    assert headers["Subject"].startswith("recsys:") or headers["Subject"].startswith("=?utf-8?")
    assert headers["Bcc"] is None


def test_the_channels_are_those_that_the_settings_name() -> None:
    assert list(channels(AlertSettings())) == []
    both = AlertSettings(webhook_url="http://x", smtp_host="x", email_to=["ops@shop.test"])
    assert [channel.name for channel in channels(both)] == ["webhook", "mail"]


# -- the sensor -------------------------------------------------------------------------------------------------


@dg.asset
def table() -> None:
    """Always made."""


@dg.asset_check(asset=table)
def rows_are_whole(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
    rows = context.run.tags.get("rows", "")
    return dg.AssetCheckResult(passed=not rows, metadata={"reason": f"{rows} rows are broken"})


@dg.asset
def breaks() -> None:
    """Never made."""
    raise RuntimeError("out of memory")


DEFINITIONS = dg.Definitions(assets=[table, breaks], asset_checks=[rows_are_whole])


class Ticks:
    """The sensor on an instance, tick after tick."""

    def __init__(self, platform: Platform, instance: dg.DagsterInstance) -> None:
        self.platform, self.instance, self.cursor = platform, instance, None

    def tick(self) -> str | None:
        with dg.build_sensor_context(
            self.instance, cursor=self.cursor, repository_def=DEFINITIONS.get_repository_def()
        ) as context:
            result = alerts(context, self.platform)
        self.cursor = result.cursor
        return result.skip_reason.skip_message if result.skip_reason else None

    def run(self, asset: str, **tags: str) -> None:
        job = DEFINITIONS.resolve_implicit_global_asset_job_def()
        job.execute_in_process(instance=self.instance, asset_selection=[dg.AssetKey(asset)], tags=tags, raise_on_error=False)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def ticks(settings: Settings, hook: Hook, redis_url: str) -> Iterator[Ticks]:
    told = AlertSettings(webhook_url=hook.url, retries=0)
    redis = settings.redis.model_copy(update={"url": redis_url})
    platform = Platform(settings.model_copy(update={"alerts": told, "redis": redis}), lambda: NOW)
    with dg.DagsterInstance.ephemeral() as instance, platform.redis() as client:
        client.flushall()
        yield Ticks(platform, instance)


def test_what_happened_before_the_first_tick_is_not_told(ticks: Ticks, hook: Hook) -> None:
    ticks.run("breaks")
    ticks.run("table", rows="7")
    ticks.tick()
    ticks.tick()
    assert hook.bodies == []


def test_a_failed_run_and_a_failed_check_are_told_once_each(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    ticks.run("breaks")
    ticks.run("table", rows="7")
    for _ in range(3):
        ticks.tick()
    assert sorted(hook.titles) == ["Check failed: table: rows_are_whole", "Run of __ASSET_JOB  failed"]
    assert "7 rows are broken" in "".join(body["text"] for body in hook.bodies)


def test_an_alert_tells_no_secret_also_where_its_text_is_cut(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    ticks.run("table", rows="redis://app:hunter2@host/0")
    ticks.run("table", rows=f"{'x' * 1975} redis://app:hunter2hunter2@host/0")
    ticks.tick()
    told = str(hook.bodies)
    assert "redis://" in told
    assert "hunter" not in told


def test_a_cursor_of_another_version_is_read(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    assert ticks.cursor is not None
    ticks.cursor = json.dumps({**json.loads(ticks.cursor), "added": 1})
    ticks.run("table", rows="7")
    ticks.tick()
    assert hook.titles == ["Check failed: table: rows_are_whole"]


def test_the_same_failure_of_a_check_again_is_no_news_and_another_one_is(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    for rows in ("7", "7", "8"):
        ticks.run("table", rows=rows)
        ticks.tick()
    assert len(hook.bodies) == 2


def test_what_could_not_be_delivered_waits_and_what_was_is_not_told_again(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    ticks.run("breaks")
    ticks.run("table", rows="7")
    hook.failures = 1
    reason = ticks.tick()
    assert reason is not None
    assert "wait for the next tick" in reason
    ticks.run("table", rows="8")
    for _ in range(3):
        ticks.tick()
    assert len(hook.bodies) == 3
    assert len({body["id"] for body in hook.bodies}) == 3


def test_a_silent_stream_worker_is_told_once_and_its_return_as_well(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    with ticks.platform.redis() as client:
        write_heartbeat(client, Heartbeat("w1", NOW - 10 * MINUTE_MS, lag=5))
        ticks.tick()
        ticks.tick()
        assert hook.titles == ["Stream worker w1 is silent"]
        write_heartbeat(client, Heartbeat("w1", NOW, lag=5))
        ticks.tick()
        ticks.tick()
        assert hook.titles[1:] == ["Right again: stream silent: w1"]
        write_heartbeat(client, Heartbeat("w1", NOW, lag=5_000_000))
        ticks.tick()
        assert hook.titles[2:] == ["The stream is 5,000,000 events behind"]
        forget_heartbeat(client, "w1")


def test_a_worker_that_was_killed_and_is_back_by_another_name_is_not_missed(hook: Hook, ticks: Ticks) -> None:
    ticks.tick()
    before = {"events/0": 1_999_990, "events/1": 10}
    with ticks.platform.redis() as client:
        write_heartbeat(client, Heartbeat("host-100", NOW - 10 * MINUTE_MS, 2_000_000, partitions=before))
        ticks.tick()
        assert hook.titles == ["Stream worker host-100 is silent", "The stream is 2,000,000 events behind"]
        write_heartbeat(client, Heartbeat("host-101", NOW, 7, partitions={"events/0": 7}))
        ticks.tick()
        assert hook.titles[2:] == ["Right again: stream lag"], "nobody has the other partition yet"
        write_heartbeat(client, Heartbeat("host-101", NOW, 12, partitions={"events/0": 7, "events/1": 5}))
        ticks.tick()
        assert hook.titles[3:] == ["Right again: stream silent: host-100"]
        assert [(beat.worker, beat.lag) for beat in read_heartbeats(client)] == [("host-101", 12)]
        assert client.hkeys(HEARTBEATS_KEY) == [b"host-101"]
        forget_heartbeat(client, "host-101")


def test_what_is_no_heartbeat_hides_no_other(ticks: Ticks) -> None:
    with ticks.platform.redis() as client:
        junk = {"a": b"{", "b": b"5", "c": b'{"lag": 1}', "d": b'{"at": "soon"}', "e": b'{"at": 1, "partitions": [1]}'}
        client.hset(HEARTBEATS_KEY, mapping={**junk, "w1": b'{"at": 1800000000000, "lag": 3}'})
        assert read_heartbeats(client) == [Heartbeat("w1", NOW, 3)]
        write_heartbeat(client, Heartbeat("w2", NOW, 0))
        assert sorted(client.hkeys(HEARTBEATS_KEY)) == [b"w1", b"w2"]
        client.delete(HEARTBEATS_KEY)


def test_a_worker_that_stood_by_is_missed_only_when_there_is_no_other(hook: Hook, ticks: Ticks) -> None:
    ticks.tick()
    with ticks.platform.redis() as client:
        write_heartbeat(client, Heartbeat("spare", NOW - 10 * MINUTE_MS))
        ticks.tick()
        assert hook.titles == ["Stream worker spare is silent"]
        write_heartbeat(client, Heartbeat("other", NOW, 0, partitions={"events/0": 0}))
        ticks.tick()
        assert hook.titles[1:] == ["Right again: stream silent: spare"]
        forget_heartbeat(client, "other")


def test_a_heartbeat_is_an_observation_of_the_topic(ticks: Ticks) -> None:
    with ticks.platform.redis() as client:
        write_heartbeat(client, Heartbeat("w1", NOW - 3000, lag=5, events=100))
        write_heartbeat(client, Heartbeat("w2", NOW - 1000, lag=7, events=200))
    first = stream_observed(dg.build_sensor_context(ticks.instance), ticks.platform)
    (observation,) = first.asset_events
    found = {name: value.value for name, value in observation.metadata.items()}
    assert observation.asset_key == dg.AssetKey("clickstream_topic")
    assert found == {"workers": 2, "events behind": 12, "events applied": 300, "seconds since the last heartbeat": 1.0}
    again = stream_observed(dg.build_sensor_context(ticks.instance, cursor=first.cursor), ticks.platform)
    assert not again.asset_events


# -- when a part of the platform is away ------------------------------------------------------------------------------


class Silent(socketserver.BaseRequestHandler):
    """Takes a connection and says nothing."""

    def handle(self) -> None:
        while self.request.recv(4096):
            pass


class Refusing(socketserver.BaseRequestHandler):
    """A Redis that answers whatever it is asked with an error."""

    def handle(self) -> None:
        while self.request.recv(4096):
            self.request.sendall(b"-NOAUTH Authentication required.\r\n" * 5)


@contextmanager
def standing_in(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """A server in the place of a part. Yields its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextmanager
def redis_that(how: str, redis_url: str) -> Iterator[str]:
    """The URL of a Redis that is not as it should be."""
    if how in ("hangs", "answers errors"):
        with standing_in(Silent if how == "hangs" else Refusing) as port:
            yield f"redis://127.0.0.1:{port}/0"
    elif how == "refuses":
        yield f"redis://127.0.0.1:{free_port()}/0"
    else:
        with redis.Redis.from_url(redis_url) as client:
            client.set(HEARTBEATS_KEY, "x")
            yield redis_url
            client.delete(HEARTBEATS_KEY)


def with_redis(ticks: Ticks, url: str) -> None:
    settings = ticks.platform.settings
    other = settings.redis.model_copy(update={"url": url})
    ticks.platform.settings = settings.model_copy(update={"redis": other})


@pytest.mark.parametrize("how", ["refuses", "hangs", "answers errors", "holds another type"])
def test_redis_away_is_told_and_silences_nothing(
    ticks: Ticks, hook: Hook, redis_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("recsys_sensors.stream_health.LOOK_SECONDS", 0.1)
    ticks.tick()
    with redis_that(how, redis_url) as url:
        with_redis(ticks, url)
        ticks.run("breaks")
        ticks.run("table", rows="7")
        for _ in range(2):
            ticks.tick()
        told = ["Alerts can't look at the stream's health", "Check failed: table: rows_are_whole", "Run of __ASSET_JOB  failed"]
        assert sorted(hook.titles) == told
        observed = stream_observed(dg.build_sensor_context(ticks.instance, cursor="7"), ticks.platform)
        assert observed.skip_reason is not None
        assert "can't be read" in str(observed.skip_reason.skip_message)
        assert observed.cursor == "7"
    with_redis(ticks, redis_url)
    ticks.tick()
    assert hook.titles[3:] == ["Right again: unseen: the stream's health"]


def test_what_can_not_be_looked_at_is_not_right_again(ticks: Ticks, hook: Hook, redis_url: str) -> None:
    ticks.tick()
    with ticks.platform.redis() as client:
        write_heartbeat(client, Heartbeat("w1", NOW - 10 * MINUTE_MS))
    ticks.tick()
    with_redis(ticks, f"redis://127.0.0.1:{free_port()}/0")
    ticks.tick()
    with_redis(ticks, redis_url)
    ticks.tick()
    assert hook.titles == [
        "Stream worker w1 is silent",
        "Alerts can't look at the stream's health",
        "Right again: unseen: the stream's health",
    ]


def test_a_worker_that_is_silent_again_is_told_again(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    with ticks.platform.redis() as client:
        for at in (NOW - 10 * MINUTE_MS, NOW, NOW - 10 * MINUTE_MS, NOW):
            write_heartbeat(client, Heartbeat("w1", at))
            ticks.tick()
    assert hook.titles == ["Stream worker w1 is silent", "Right again: stream silent: w1"] * 2


@pytest.mark.parametrize("part", ["fetch_run_status_changes", "get_run_by_id", "get_freshness_state_records"])
def test_a_part_of_dagsters_store_that_fails_is_told_and_what_it_held_is_told_later(
    ticks: Ticks, hook: Hook, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def away(*_: object, **__: object) -> None:
        raise RuntimeError("connection of the pool postgresql://u:hush@db timed out")

    ticks.tick()
    ticks.run("breaks")
    ticks.run("table", rows="7")
    with monkeypatch.context() as patch:
        patch.setattr(dg.DagsterInstance, part, away)
        patch.setattr(dg.DagsterInstance, "freshness_enabled", True)
        ticks.tick()
        ticks.tick()
        assert "Check failed: table: rows_are_whole" in hook.titles
        assert len([title for title in hook.titles if title.startswith("Alerts can't look at")]) == 1
    ticks.tick()
    assert sorted(title for title in hook.titles if "lerts can't" not in title and "Right again" not in title) == [
        "Check failed: table: rows_are_whole",
        "Run of __ASSET_JOB  failed",
    ]
    assert "hush" not in json.dumps(hook.bodies)


def with_channels(ticks: Ticks, **settings: object) -> None:
    told = ticks.platform.settings.alerts.model_copy(update=settings)
    ticks.platform.settings = ticks.platform.settings.model_copy(update={"alerts": told})


@pytest.mark.parametrize("how", ["refuses", "hangs", "answers errors"])
def test_a_channel_that_is_away_silences_no_other_and_gets_its_alerts_later(ticks: Ticks, hook: Hook, how: str) -> None:
    ticks.tick()
    with mail_server() as (port, mails), standing_in(Silent) as hanging:
        mail = {"smtp_host": "127.0.0.1", "smtp_port": port, "email_to": ["ops@shop.test"], "timeout_seconds": 0.2}
        away = {
            "refuses": f"http://127.0.0.1:{free_port()}/hook",
            "hangs": f"http://127.0.0.1:{hanging}/hook",
            "answers errors": hook.url,
        }[how]
        hook.failures, hook.status = (1 << 30 if how == "answers errors" else 0), 404
        with_channels(ticks, webhook_url=SecretStr(away), **mail)
        for asset in ("breaks", "breaks", "table"):
            ticks.run(asset, **({"rows": "7"} if asset == "table" else {}))
            reason = ticks.tick()
            assert reason is not None
            assert "wait for the next tick: webhook" in reason
        assert len(mails) == 3
        assert hook.bodies == []
        hook.failures = 0
        with_channels(ticks, webhook_url=SecretStr(hook.url))
        ticks.tick()
        ticks.tick()
        assert [title.split()[0] for title in hook.titles] == ["Run", "Run", "Check"]
        assert len(mails) == 3


def test_a_mail_server_that_is_away_silences_no_webhook(ticks: Ticks, hook: Hook) -> None:
    with_channels(ticks, smtp_host="127.0.0.1", smtp_port=free_port(), email_to=["ops@shop.test"])
    ticks.tick()
    ticks.run("breaks")
    assert "wait for the next tick: mail by" in str(ticks.tick())
    assert len(hook.bodies) == 1


def test_an_alert_that_a_channel_refuses_for_good_holds_up_no_other(ticks: Ticks, hook: Hook) -> None:
    ticks.tick()
    hook.unwanted = "Run of"
    ticks.run("breaks")
    ticks.run("table", rows="7")
    ticks.tick()
    assert hook.titles == ["Check failed: table: rows_are_whole"]


def test_of_what_waits_for_long_the_newest_is_kept_and_the_rest_is_counted(
    ticks: Ticks, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_sensors.alerting.WAITING", 3)
    ticks.tick()
    hook.failures = 1 << 30
    for rows in range(7):
        ticks.run("table", rows=str(rows + 1))
        ticks.tick()
    hook.failures = 0
    ticks.tick()
    texts = [body["text"] for body in hook.bodies]
    assert texts[0] == "So many older alerts could not be delivered here\n5"
    assert [text.splitlines()[1] for text in texts[1:]] == ["6 rows are broken", "7 rows are broken"]
