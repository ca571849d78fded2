"""Every command, given what can't be: one message of a few lines, an exit code that is not 0, and no traceback."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from recsys_cli import errors
from recsys_cli.main import app
from recsys_core.errors import UserError
from recsys_core.lake import MissingPartition
from recsys_core.readers import IngestError
from recsys_core.release import ReleaseError

NO_REDIS = {"RECSYS_REDIS__URL": "redis://127.0.0.1:1/0", "RECSYS_REDIS__TIMEOUT_MS": "50"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in [name for name in os.environ if name.startswith("RECSYS_")]:
        monkeypatch.delenv(name)


def recsys(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=variables)


def told(result: Result) -> str:
    """The message of a mistake, after it was held against the rule."""
    assert result.exit_code in (1, 2), (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    lines = [line for line in (result.stderr or result.output).splitlines() if line.strip(" ╭─╮╰╯│")]
    assert 1 <= len(lines) <= 5, result.output
    return " ".join(line.strip(" │") for line in lines)


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "a command that is not there": (("recomend", "u1"), "No such command"),
    "an option that is not there": (("check", "--partitions", "x"), "No such option"),
    "check of an unknown asset": (("check", "clicks"), "no checks on 'clicks'"),
    "check of a month that is not": (("check", "clicks_hourly", "--partition", "2026-13-30T02"), "2026-13-30T02"),
    "check of a day that is not": (("check", "clicks_hourly", "--partition", "2026-02-30T00"), "2026-02-30T00"),
    "check of words": (("check", "clicks_hourly", "--partition", "yesterday"), "yesterday"),
    "check of what was never made": (("check", "als_factors"), "never made"),
    "check of a partition of everything": (("check", "--partition", "2026-01-01"), "needs an asset"),
    "check of nothing at all": (("check",), "Nothing is made"),
    "accepting what can't be": (("check", "als_factors", "--accept"), "never made"),
    "backfill of an unknown asset": (("backfill", "clicks", "2026-01-01", "2026-01-02"), "no asset 'clicks'"),
    "backfill from late to early": (("backfill", "clicks_hourly", "2026-01-07T00", "2026-01-01T00"), "later than the last"),
    "backfill of a day that is not": (("backfill", "clicks_hourly", "2026-02-30T00", "2026-03-01T00"), "2026-02-30T00"),
    "backfill of days for hours": (("backfill", "clicks_hourly", "2026-01-01", "2026-01-02"), "no partition '2026-01-01'"),
    "a user without an id": (("forget", " "), "an id is not empty"),
    "a file without a name": (("ingest", "", "--user", "u", "--item", "i", "--time", "t"), "name the file or folder"),
    "replay of words": (("replay", "--day", "yesterday"), "'yesterday'"),
    "replay of an hour": (("replay", "--day", "2026-01-01T00"), "no day"),
    "replay of a day that is not": (("replay", "--day", "2026-02-30"), "2026-02-30"),
    "replay without data": (("replay", "--day", "2027-01-01"), "no hour of clicks"),
    "show of an unknown release": (("release", "show", "nothing"), "no release 'nothing'"),
    "show of no champion": (("release", "show"), "no release has been promoted"),
    "diff of unknown releases": (("release", "diff", "a", "b"), "no release 'a'"),
    "promotion of an unknown release": (("release", "promote", "nothing"), "no release 'nothing'"),
    "rollback of nothing": (("release", "rollback"), "no earlier champion"),
    "rebuild since words": (("stream", "rebuild", "--since", "tuesday"), "tuesday"),
    "rebuild since no digit": (("stream", "rebuild", "--since", "²h"), "neither all, an age"),
    "a broker on no port": (("kafka", "up", "--port", "99999"), "--port"),
    "rebuild from nowhere": (("stream", "rebuild", "--from", "heaven"), "heaven"),
    "ingest of an absent file": (("ingest", "absent.csv", "--mapping", "globo"), "absent.csv"),
    "ingest by an unknown mapping": (("ingest", "recsys.toml", "--mapping", "globe"), "globe"),
    "simulate of no users": (("simulate", "--users", "0"), "--users"),
    "live demo without a demo": (("demo", "--live", "--home", "nothing"), "holds no demo"),
    "demo of absent data": (("demo", "--data", "absent"), "absent"),
    "a key without its certificate": (("recommend", "u1", "--key", "k.pem"), "go together"),
    "recommend without a server": (("recommend", "u1", "--address", "127.0.0.1:1"), "UNAVAILABLE"),
    "similar without a server": (("similar", "i1", "--address", "127.0.0.1:1"), "UNAVAILABLE"),
    "forgetting what is no text": (("forget", "a\udcffb"), "no text in UTF-8"),
    "recommending to what is no text": (("recommend", "a\udcffb", "--address", "127.0.0.1:1"), "no text in UTF-8"),
    "status without a stack": (("status",), "recsys up"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_few_lines(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "recsys.toml").write_text("")
    arguments, wanted = MISTAKES[mistake]
    assert wanted in told(recsys(*arguments))


@pytest.mark.parametrize("topic", ["_events", ".events"])
def test_a_topic_whose_archive_nobody_would_read_is_refused(topic: str) -> None:
    assert "copies under way" in told(recsys("stream", RECSYS_KAFKA__TOPIC=topic))


def test_the_record_of_a_bug_takes_any_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["recsys", "a\udcffb"])
    monkeypatch.setenv("RECSYS_HOME", str(tmp_path))
    assert str(tmp_path / "run" / "error.log") in errors.explain_bug(ValueError("\udcff"))
    assert "udcff" in (tmp_path / "run" / "error.log").read_text()


COMMANDS = {
    "up": ("up",),
    "status": ("status",),
    "config": ("config",),
    "broker": ("broker",),
    "serve": ("serve",),
    "prune": ("prune",),
    "simulate": ("simulate",),
    "ingest": ("ingest", "x"),
    "check": ("check",),
    "backfill": ("backfill", "clicks_hourly", "2026-01-01T00", "2026-01-01T01"),
    "replay": ("replay", "--day", "2026-01-01"),
    "forget": ("forget", "u1"),
    "recommend": ("recommend", "u1"),
    "similar": ("similar", "i1"),
    "inspect": ("inspect",),
    "kafka init": ("kafka", "init"),
    "kafka up": ("kafka", "up"),
    "stream": ("stream",),
    "stream rebuild": ("stream", "rebuild"),
    "release list": ("release", "list"),
    "release show": ("release", "show"),
    "release diff": ("release", "diff", "a"),
    "release promote": ("release", "promote", "a"),
    "release rollback": ("release", "rollback"),
}
BROKEN: dict[str, tuple[str, dict[str, str], str]] = {
    "a file that is no TOML": ("[gate\nals_weight = 1,5\n", {}, "recsys.toml"),
    "a setting that is not there": ("[als]\nrnak = 3\n", {}, "recsys.toml: als.rnak"),
    "a section that is not there": ("[asl]\nrank = 3\n", {}, "recsys.toml: asl"),
    "a value that can't be": ("[als]\nrank = 0\n", {}, "recsys.toml: als.rank"),
    "a section misspelt in a variable": ("", {"RECSYS_ALSS__RANK": "5"}, "RECSYS_ALSS__RANK"),
    "a setting misspelt in a variable": ("", {"RECSYS_ALS__RNAK": "5"}, "RECSYS_ALS__RNAK"),
    "one underscore instead of two": ("", {"RECSYS_ALS_RANK": "5"}, "RECSYS_ALS_RANK"),
    "a value that can't be in a variable": ("", {"RECSYS_ALS__RANK": "many"}, "RECSYS_ALS__RANK"),
    "a section given as a value": ("", {"RECSYS_CACHE": "/tmp"}, "cache"),
    "a file that is not there": ("", {"RECSYS_CONFIG": "absent.toml"}, "absent.toml"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", BROKEN)
def test_every_command_names_what_is_wrong_with_the_settings_and_where(fault: str, command: str, tmp_path: Path) -> None:
    text, variables, wanted = BROKEN[fault]
    (tmp_path / "recsys.toml").write_text(text)
    assert wanted in told(recsys(*COMMANDS[command], **variables))


WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "a number that is infinite": ("[ranking]\nals_weight = inf\n", {}, "recsys.toml: ranking.als_weight"),
    "a number in a list that is none": ("[ranking]\ntrend_mix = [1.0, nan, 0.0]\n", {}, "recsys.toml: ranking.trend_mix"),
    "a weight that is infinite": ("[events]\nweights = { view = inf }\n", {}, "recsys.toml: events.weights"),
    "shares without their half-lives": ("[ranking]\ntrend_mix = [1.0, 0.5]\n", {}, "trends.half_lives_hours 3"),
    "cut-offs below one": ("[evaluation]\nks = [0]\n", {}, "recsys.toml: evaluation.ks"),
    "cut-offs without ten": ("[evaluation]\nks = [5, 20]\n", {}, "10 has to be among them"),
    "a metric that is misspelt": ("[gate]\nmetric = 'ndgc@10'\n", {}, "'ndgc@10', which no evaluation measures"),
    "a metric at another cut-off": ("", {"RECSYS_GATE__METRIC": "ndcg@5"}, "'ndcg@5', which no evaluation measures"),
    "layers without a neuron": ("[two_tower]\nhidden = [64, 0]\n", {}, "recsys.toml: two_tower.hidden"),
    "partitions that end before they start": (
        "[partitions]\nstart = 2026-05-01\nend = 2026-01-01\n",
        {},
        "2026-01-01 is not after start, 2026-05-01",
    ),
    "a Redis that is a page": ("[redis]\nurl = 'http://127.0.0.1'\n", {}, "recsys.toml: redis.url"),
    "a Redis on no port": ("", {"RECSYS_REDIS__URL": "redis://127.0.0.1:99999/0"}, "RECSYS_REDIS__URL: redis.url"),
    "a home that is a pattern": ("", {"RECSYS_HOME": "[demo]"}, "name a folder without"),
    "a lake that is a pattern": ("[lake]\nuri = '/data/v?/lake'\n", {}, "recsys.toml: lake.uri"),
    "releases in a list": ("[release]\nuri = 's3://bucket/{a,b}'\n", {}, "recsys.toml: release.uri"),
    "a home that is two URLs": ("", {"RECSYS_HOME": "a::b"}, "name a folder without"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_setting_that_no_part_could_work_with_is_refused_at_the_start(fault: str, tmp_path: Path) -> None:
    text, variables, wanted = WRONG[fault]
    (tmp_path / "recsys.toml").write_text(text)
    assert wanted in told(recsys("config", **variables))


@pytest.mark.parametrize("command", ["check", "release list", "prune", "ingest"])
@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "gs://bucket/x"])
def test_a_store_without_a_client_is_told(command: str, uri: str, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,ts\nu,i,1767225600000\n")
    arguments = {"ingest": ["e.csv", "--user", "user", "--item", "item", "--time", "ts"]}.get(command, [])
    (tmp_path / "recsys.toml").write_text(f"[lake]\nuri = '{uri}'\n[release]\nuri = '{uri}'\n")
    assert f"{uri} can't be used as a store" in told(recsys(*command.split(), *arguments, **NO_REDIS))


def test_forget_without_redis_says_that_redis_was_not_searched() -> None:
    done = recsys("forget", "u1", **NO_REDIS)
    assert done.exit_code == 1
    assert "Redis was not searched" in done.output
    assert "Traceback" not in done.output


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


def test_a_page_whose_port_is_taken_is_one_message(taken_port: int) -> None:
    assert f"127.0.0.1:{taken_port}" in told(recsys("inspect", "--address", "127.0.0.1:1", "--port", str(taken_port)))


def test_brokers_that_are_away_are_one_message() -> None:
    away = {"RECSYS_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1", "RECSYS_KAFKA__CONF": '{"socket.timeout.ms":"500"}'}
    assert "127.0.0.1:1" in told(recsys("kafka", "init", **away))


def test_the_version_is_told() -> None:
    assert recsys("--version").output.startswith("recsys ")


# -- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserError, MissingPartition, IngestError, ReleaseError])
def test_whatever_users_can_mend_is_told_in_its_own_words(kind: type[Exception]) -> None:
    assert errors.explain(kind("the reason")) == "the reason"


OS_ERRORS: dict[str, tuple[OSError, str]] = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/lake/x"), "the disk is full at /lake/x"),
    "a full disk of unknown place": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    "a read-only disk": (OSError(errno.EROFS, "Read-only file system", "/lake"), "Read-only file system: /lake"),
    "a port that is taken": (OSError(errno.EADDRINUSE, "Address already in use"), "Address already in use"),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "x.pem"), "Is a directory: x.pem"),
    "a lost connection": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
    "without a number": (FileNotFoundError("lake/x"), "lake/x"),
}


@pytest.mark.parametrize("case", OS_ERRORS)
def test_what_the_system_refuses_is_told_with_its_place(case: str) -> None:
    error, wanted = OS_ERRORS[case]
    assert wanted in str(errors.explain(error))


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_full_disk_during_ingest_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e.csv").write_text("user,item,ts\nu,i,1767225600000\n")
    full = OSError(errno.ENOSPC, "No space left on device", "landing/x.parquet")
    monkeypatch.setattr("recsys_core.landing.Landing.write_events", raising(full))
    monkeypatch.setattr("recsys_core.lake.write_atomically", raising(full))
    monkeypatch.setattr("pyarrow.parquet.write_table", raising(full))
    message = told(recsys("ingest", "e.csv", "--user", "user", "--item", "item", "--time", "ts"))
    assert "the disk is full" in message


def test_a_bug_is_one_line_that_says_where_its_traceback_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_cli.stack.status", raising(ZeroDivisionError("division by zero")))
    (tmp_path / ".recsys").mkdir()
    result = recsys("status")
    assert result.exit_code == 1
    assert told(result).startswith("unexpected ZeroDivisionError: division by zero")
    kept = tmp_path / ".recsys" / "run" / "error.log"
    assert str(Path(".recsys/run/error.log")) in result.stderr
    assert "Traceback" in kept.read_text()
    assert "ZeroDivisionError" in kept.read_text()


@pytest.mark.parametrize("home", [True, False])
@pytest.mark.parametrize("before", [0, 150])
def test_a_bug_tells_no_secret_neither_here_nor_in_the_file(
    home: bool, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = "hunter2" * 10
    error = RuntimeError(f"{'x' * before} redis://user:{secret}@host/0 says no")
    monkeypatch.setattr("recsys_cli.stack.status", raising(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RECSYS_DEBUG", "1")
    other = tmp_path / "not ours"
    (tmp_path / "error.log").symlink_to(other)
    if home:
        (tmp_path / ".recsys").mkdir()
    result = recsys("status")
    logs = [path.read_text() for path in tmp_path.glob("**/*error.log") if not path.is_symlink()]
    assert len(logs) == 1
    assert "RuntimeError" in logs[0]
    assert not other.exists(), "a link that somebody put among what is temporary was followed"
    assert "hunter2" not in "".join((result.output, result.stderr, *capfd.readouterr(), *logs))


def test_a_bug_shows_its_traceback_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recsys_cli.stack.status", raising(ZeroDivisionError("division by zero")))
    monkeypatch.setenv("RECSYS_DEBUG", "1")
    result = recsys("status")
    assert "Traceback" in result.stderr + capfd.readouterr().err


@pytest.mark.parametrize("said", ['{"pi', "{}", '{"pid": 1, "services": [{"name": "redis", "added": 1}]}'])
@pytest.mark.parametrize("command", ["status", "recommend u1"])
def test_a_stack_of_another_version_is_told(command: str, said: str, tmp_path: Path) -> None:
    (tmp_path / ".recsys" / "run").mkdir(parents=True)
    (tmp_path / ".recsys" / "run" / "stack.json").write_text(said)
    assert "does not say what runs here" in told(recsys(*command.split()))


def test_one_damaged_table_does_not_keep_the_others_from_being_checked(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user,item,ts\nu,i,1767225600000\n")
    assert recsys("ingest", "e.csv", "--user", "user", "--item", "item", "--time", "ts").exit_code == 0
    pointer = tmp_path / ".recsys" / "lake" / "item_catalog" / "_current" / "current.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text("{half")
    found = recsys("check")
    assert found.exit_code == 1
    assert "landed_rows_are_events" in found.output
    assert "FAILED all of them of item_catalog: could not be judged" in found.output
    assert "item_catalog/_current/current.json is damaged" in found.output


@pytest.mark.parametrize("command", ["status", "check", "release list"])
def test_a_folder_whose_name_looks_like_markup_is_told_as_it_is_called(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys_core.settings.PATTERNS", re.compile("never so"))
    home = tmp_path / "[bold]a[/b]"
    assert str(home) in recsys(*command.split(), RECSYS_HOME=str(home)).output
