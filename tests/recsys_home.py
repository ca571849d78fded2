"""Settings of an installation in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recsys_core.settings import Settings, load_settings

QUICK_SPARK = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1",
}
"""Compiling plans, and the JVM its own code, costs more than running them on the few rows of a test."""
QUICK_SPARK_VARIABLE = {"RECSYS_SPARK__CONF": json.dumps(QUICK_SPARK)}
"""The same for a process of its own."""


def default_settings(home: Path, **sections: Any) -> Settings:
    """The defaults, whatever `recsys.toml` and RECSYS_CONFIG there are where the tests run."""
    home.mkdir(parents=True, exist_ok=True)
    nothing = home / "empty.toml"
    nothing.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECSYS_CONFIG", str(nothing))
        return load_settings(home=home, **sections)
