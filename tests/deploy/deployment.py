"""Where the files of the deployment are, and how tests read them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import kubernetes_validate
import pytest
import yaml

from recsys_core.settings import Settings, load_settings

PROJECT = Path(__file__).resolve().parents[2]
DEPLOY = PROJECT / "deploy"

IMAGES = {"serving", "streaming", "webserver", "code-location", "mlflow", "spark"}
VERSIONS = ("1.29", "1.33", "1.37")
"""Of Kubernetes, whose schemas the manifests are held against."""
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
    """What a `recsys.toml` of the deployment sets over the defaults. Raises pydantic.ValidationError on an unknown name."""
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


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of the Dockerfile's instructions, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text())).splitlines()
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each build stage, FROM included."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for name, rest in instructions():
        if name == "FROM":
            current = rest.split()[-1]
            found[current] = []
        if current:
            found[current].append((name, rest))
    return found


def label(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def assert_valid(manifest: dict[str, Any]) -> None:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{label(manifest)} for Kubernetes {version}: {list(error.path)}: {error.message}")
