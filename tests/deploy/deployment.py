"""Where the files of the deployment are, and how tests read them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from recsys_core.settings import Settings, load_settings

PROJECT = Path(__file__).resolve().parents[2]
DEPLOY = PROJECT / "deploy"

KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "here",
    "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:6443"}}],
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    "users": [{"name": "me", "user": {"token": "none"}}],
}


def read_yaml(*parts: str) -> Any:
    """The one document of a file below deploy/."""
    return yaml.safe_load(DEPLOY.joinpath(*parts).read_text())


def program(name: str) -> str | None:
    """A program beside this Python or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def settings_of(file: Path, patch: pytest.MonkeyPatch) -> Settings:
    """What `recsys.toml` of a deployment sets over the defaults. Raises pydantic.ValidationError on an unknown name."""
    for name in [name for name in os.environ if name.startswith("RECSYS_")]:
        patch.delenv(name)
    patch.setenv("RECSYS_CONFIG", str(file))
    return load_settings()


def is_setting(variable: str) -> bool:
    """Whether a variable `RECSYS_<SECTION>__<NAME>` names a setting."""
    section, _, name = variable.removeprefix("RECSYS_").lower().partition("__")
    model = Settings.model_fields.get(section)
    if model is None:
        return section == "config"
    return not name or name in getattr(model.annotation, "model_fields", {})


def instance_at(folder: Path, config: dict[str, Any]) -> dg.DagsterInstance:
    """The instance of a dagster.yaml, outside of a cluster."""
    folder.mkdir()
    if "run_launcher" in config:
        (folder / "kubeconfig").write_text(yaml.safe_dump(KUBECONFIG))
        config["run_launcher"]["config"] |= {"load_incluster_config": False, "kubeconfig_file": str(folder / "kubeconfig")}
    if config["compute_logs"]["class"] == "LocalComputeLogManager":
        config["compute_logs"]["config"]["base_dir"] = str(folder / "logs")
    (folder / "dagster.yaml").write_text(yaml.safe_dump(config))
    return dg.DagsterInstance.from_config(str(folder))
