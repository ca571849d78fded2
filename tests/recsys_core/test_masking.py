"""No output tells a secret: settings that are shown, messages of wrong ones, logs and errors of connections."""

from __future__ import annotations

import io
import json
import logging
import string
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from rich.console import Console

from recsys_cli.config import documented_toml, explain_invalid, settings_table
from recsys_core.log_lines import TextLines
from recsys_core.masking import MASK, masked, masked_text
from recsys_core.release import Releases, StoreAway
from recsys_core.settings import KafkaSettings, RedisSettings, Section, Settings, SparkSettings
from serving.tracing import JsonLines

SECRET = "hush-9f3b7c"
IN_URL = f"scheme://someone:{SECRET}@host.example:1234/path?part=1"
SECRET_NAMES = (
    "sasl.password",
    "sasl.jaas.config",
    "sasl.oauthbearer.client.secret",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
    "spark.hadoop.fs.s3a.secret.key",
    "spark.hadoop.fs.s3a.access.key",
    "spark.hadoop.fs.s3a.session.token",
    "spark.hadoop.fs.azure.account.key.shop.blob.core.windows.net",
    "spark.hadoop.fs.azure.sas.container.shop.blob.core.windows.net",
    "spark.authenticate.secret",
    "spark.redis.auth",
    "javax.jdo.option.ConnectionPassword",
)


def fields() -> Iterator[tuple[str, str, Any]]:
    """Every setting that can hold text: section (empty at the top), name, annotation."""
    for section, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for name, inner in kind.model_fields.items():
                yield section, name, inner.annotation
        else:
            yield "", section, kind


def planted(kind: Any) -> list[Any]:
    """Values of a kind with the secret inside, by every way that the rule knows."""
    if kind is SecretStr:
        return [SECRET]
    if kind in (str, str | None):
        return [IN_URL, f"s3://bucket/lake?token={SECRET}"]
    if kind == list[str]:
        return [[IN_URL]]
    if get_origin(kind) is dict and kind.__args__[1] is str:
        return [dict.fromkeys(SECRET_NAMES, SECRET), {"any.url": IN_URL}]
    return []


def outputs(sections: dict[str, Any]) -> list[str]:
    """All that is told of settings, or of why they are wrong."""
    try:
        settings = Settings(**sections)
    except ValidationError as error:
        return [explain_invalid(error), str(error)]
    shown = io.StringIO()
    Console(file=shown, width=4000).print(settings_table(settings))
    return [shown.getvalue(), documented_toml(settings), repr(masked(settings))]


CASES = [
    pytest.param(section, name, value, id=f"{section}.{name}-{at}")
    for section, name, kind in fields()
    for at, value in enumerate(planted(kind))
]


def test_the_walk_meets_the_settings_that_are_known_to_hold_secrets() -> None:
    met = {(case.values[0], case.values[1]) for case in CASES}
    known = "redis.url redis.password redis.sentinel_password kafka.conf kafka.sasl_password spark.conf mlflow.tracking_uri"
    known += " lake.uri release.uri alerts.webhook_url alerts.smtp_password serving.otlp_endpoint"
    assert {tuple(name.split(".")) for name in known.split()} <= met


@pytest.mark.parametrize(("section", "name", "value"), CASES)
def test_a_secret_in_any_setting_is_in_no_output(section: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    told = outputs({section: {name: value}} if section else {name: value})
    assert len(told) > 1
    assert not [text for text in told if SECRET in text]


def test_a_documented_file_sets_nothing_to_what_is_shown_in_place_of_a_secret() -> None:
    settings = Settings(
        redis=RedisSettings(url=f"redis://app:{SECRET}@host/0"),
        kafka=KafkaSettings(conf={"ssl.key.password": SECRET, "linger.ms": "5"}),
        kubernetes={"resources": {"als_factors": {"cpu": "8"}}},
    )
    read = tomllib.loads(documented_toml(settings))
    assert "url" not in read["redis"]
    assert "conf" not in read["kafka"]
    assert read["kubernetes"]["resources"]["als_factors"]["cpu"] == "8"


@pytest.mark.parametrize(
    "wrong",
    [
        {"redis": {"mode": "cluster", "password": SECRET, "url": IN_URL}},
        {"redis": {"nodes": [IN_URL]}},
        {"redis": {"password": [SECRET]}},
        {"redis": {"timeout_ms": IN_URL}},
        {"alerts": {"webhook_url": {"value": SECRET}}},
        {"kafka": {"conf": {"sasl.password": [SECRET]}}},
        {"kafka": {"sasl_passwort": SECRET}},
    ],
)
def test_a_wrong_setting_is_explained_without_the_secrets_beside_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**wrong)
    assert SECRET not in explain_invalid(caught.value)
    assert SECRET not in str(caught.value), "a traceback shows the error as text"


def test_what_is_no_secret_stays_readable() -> None:
    kafka = KafkaSettings(conf={"ssl.key.location": "/etc/key.pem", "linger.ms": "5"}, bootstrap_servers="b1:9092,b2:9092")
    shown = masked(kafka)
    assert shown["conf"] == {"ssl.key.location": "/etc/key.pem", "linger.ms": "5"}
    assert shown["bootstrap_servers"] == "b1:9092,b2:9092"
    provider = {"spark.hadoop.fs.s3a.aws.credentials.provider": "org.example.Provider"}
    assert masked(SparkSettings(conf=provider))["conf"] == provider
    for text in ("redis://127.0.0.1:6379/0", "abfss://lake@shop.dfs.core.windows.net/recsys", "http://127.0.0.1:3000/a?b=1"):
        assert masked_text(text) == text
    assert masked(RedisSettings(url=f"rediss://app:{SECRET}@r.example:6380/2"))["url"] == f"rediss://{MASK}@r.example:6380/2"


passwords = st.text(string.ascii_letters + string.digits + ":@/?#%&=+!$*()[]~^|\\,;", min_size=6, max_size=30)


@given(
    st.sampled_from(["redis", "rediss", "postgresql+psycopg2", "https", "s3", "mysql"]), st.sampled_from(["", "app"]), passwords
)
def test_no_password_of_a_url_is_left_whatever_is_in_it(scheme: str, user: str, password: str) -> None:
    url = f"{scheme}://{user}:{password}@db.example:5432/name"
    assume(password not in "db.example:5432/name://")
    assert password not in masked_text(f"can't connect to {url} (refused), again in 5 s")
    assert masked_text(url).endswith("@db.example:5432/name")


@given(
    st.sampled_from(["password", "token", "api_key", "sig", "AWS_SECRET_ACCESS_KEY"]), st.text(string.ascii_letters, min_size=8)
)
def test_no_value_of_a_parameter_that_is_named_as_a_secret_is_left(name: str, value: str) -> None:
    assume(value not in name)
    for text in (f"https://h/p?{name}={value}&x=1", f"{name}='{value}'", f'{{"{name}": "{value}"}}', f"--{name}={value}"):
        assert value not in masked_text(text)


@pytest.fixture(params=[TextLines("%(levelname)s %(name)s: %(message)s"), JsonLines(), TextLines()])
def written(request: pytest.FixtureRequest) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(request.param)
    log = logging.getLogger("test.masking")
    log.propagate = False
    log.addHandler(handler)
    yield log, out
    log.removeHandler(handler)
    log.propagate = True


def test_a_log_tells_no_password_neither_in_a_message_nor_in_a_traceback(written: tuple[logging.Logger, io.StringIO]) -> None:
    log, out = written
    log.warning("%s does not answer", IN_URL)
    try:
        raise ConnectionError(f"no route to {IN_URL}, sasl.password={SECRET}")
    except ConnectionError:
        log.exception("it failed")
    assert "does not answer" in out.getvalue()
    assert "ConnectionError" in out.getvalue()
    assert SECRET not in out.getvalue()


def test_no_text_from_outside_looks_like_a_line_of_its_own(written: tuple[logging.Logger, io.StringIO]) -> None:
    log, out = written
    log.warning("Redis key %s can't be read", "user:{a\nCRITICAL serving: all is lost\r\u2028x}")
    [line] = out.getvalue().splitlines()
    assert "all is lost" in line


def test_a_store_that_is_away_is_told_without_its_keys(tmp_path: Path) -> None:
    releases = Releases(str(tmp_path))
    releases.uri = f"s3://KEY:{SECRET}@bucket/releases"
    with pytest.raises(StoreAway) as caught, releases.reached("champion.json"):
        raise RuntimeError(f"could not connect to https://KEY:{SECRET}@s3.example")
    assert SECRET not in str(caught.value)
    assert "champion.json" in str(caught.value)


def test_json_lines_stay_json() -> None:
    record = logging.LogRecord("a", logging.INFO, "a.py", 1, "to %s", (IN_URL,), None)
    assert json.loads(JsonLines().format(record))["message"].startswith(f"to scheme://{MASK}@host.example")


SPARK = """
import os, sys
from pathlib import Path
from recsys_core.settings import load_settings
from recsys_cli.java import ensure_java
from recsys_core.spark import session, stop_session

os.environ["JAVA_HOME"] = str(ensure_java().path)
conf = {"spark.hadoop.fs.s3a.secret.key": sys.argv[1], "spark.hadoop.planted": "told"}
made = session(load_settings(Path(sys.argv[2]), spark={"master": "local[1]", "driver_memory": "512m", "conf": conf}))
lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if f"\\nPPid:\\t{os.getpid()}\\n" in
         (path.parent / "status").read_text()]
print(len(lines), sum(b"told" in line for line in lines), sum(sys.argv[1].encode() in line for line in lines))
print(made.sparkContext._jsc.hadoopConfiguration().get("fs.s3a.secret.key") == sys.argv[1])
stop_session()
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_arguments_of_sparks_jvm_tell_no_secret_and_spark_has_it(tmp_path: Path) -> None:
    secret = "plan" + "ted-" + "secret"
    command = [sys.executable, "-c", SPARK.replace("sys.argv[1]", repr(secret)), "-", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "0", "True"], done.stdout + done.stderr
