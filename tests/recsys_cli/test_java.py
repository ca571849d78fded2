"""Finding a Java for Spark."""

from __future__ import annotations

from pathlib import Path

import pytest

from recsys_cli import java
from recsys_cli.java import JavaMissing, ensure_java, find_java


def fake_java(home: Path, version: int, modules: tuple[str, ...]) -> Path:
    """A `java` that lists the modules it is given."""
    binary = home / "bin" / "java"
    binary.parent.mkdir(parents=True)
    lines = " ".join(f"'{module}@{version}.0.1'" for module in ("java.base", *modules))
    binary.write_text(f"#!/bin/sh\nprintf '%s\\n' {lines}\n")
    binary.chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def no_java_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java, "_named_homes", lambda which=java._named_homes: (home for home in which() if "tmp" in str(home)))
    monkeypatch.setattr(java, "_installed_homes", list)
    monkeypatch.setattr(java, "_install", lambda: False)


def test_java_home_with_the_vector_module_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "tmp", 17, (java.MODULE,))))
    assert find_java() == java.JavaHome(tmp_path / "tmp", 17)


def test_java_without_the_vector_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "tmp", 21, ("java.sql",))))
    with pytest.raises(JavaMissing, match=rf"Java 21 without the module {java.MODULE}"):
        find_java()


def test_an_old_java_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "tmp", 11, ())))
    with pytest.raises(JavaMissing, match="Java 11"):
        find_java()


def test_an_unusable_java_home_does_not_hide_an_installed_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "tmp", 11, ())))
    good = [fake_java(tmp_path / str(version), version, (java.MODULE,)) for version in (25, 17, 21)]
    monkeypatch.setattr(java, "_installed_homes", lambda: good)
    assert find_java().version == 17


def test_where_java_is_missing_the_message_says_what_to_do() -> None:
    with pytest.raises(JavaMissing, match="none is installed") as caught:
        ensure_java()
    assert "nstall" in str(caught.value).splitlines()[-1]
