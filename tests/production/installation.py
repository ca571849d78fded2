"""An installation on Kubernetes, made as docs/deploy.md says: Secrets, an overlay of its own, and Dagster by its chart."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from control_plane import ControlPlane
from deployment import DEPLOY
from helm_chart import manifests_of
from kube_api import Object
from node import Nodes
from waiting import eventually

NAMESPACE = "recsys"
SECRETS = ("recsys-secrets", "recsys-stream-secrets", "recsys-serving-secrets", "recsys-store-secrets")
ROLLOUT_SECONDS = 240

Patch = Mapping[str, Any]


class Installation:
    """The namespace, with what was applied to it so far."""

    def __init__(self, plane: ControlPlane, nodes: Nodes, folder: Path) -> None:
        """`folder` takes the copy of the manifests."""
        self.plane = plane
        self.nodes = nodes
        self._manifests = folder / "k8s"
        shutil.copytree(DEPLOY / "k8s", self._manifests)

    def kubectl(self, *words: str, stdin: str | None = None, seconds: float = ROLLOUT_SECONDS) -> str:
        """What a command prints that ends well."""
        done = self.plane.kubectl("--namespace", NAMESPACE, *words, stdin=stdin, seconds=seconds)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def prepare(self, variables: Mapping[str, str], **further: Mapping[str, str]) -> None:
        """The namespace, and its Secrets: `variables` in each, `further` by the name of a Secret with _ for -."""
        self.kubectl("apply", "-f", str(self._manifests / "base" / "namespace.yaml"))
        self.kubectl("wait", "--for=create", "serviceaccount/default")
        contents = dict.fromkeys(SECRETS, variables) | {name.replace("_", "-"): values for name, values in further.items()}
        for name, values in contents.items():
            own = {**variables, **values} if name in SECRETS else values
            literals = [f"--from-literal={key}={value}" for key, value in own.items()]
            self.kubectl("create", "secret", "generic", name, *literals)

    def apply(self, overlay: str, patches: Sequence[Patch], settings: Mapping[str, str] | None = None) -> None:
        """Copy an overlay, patch it, and apply it. `settings` replaces texts of recsys.toml by others."""
        own = self._manifests / "overlays" / "mine"
        shutil.copytree(self._manifests / "overlays" / overlay, own)
        written = yaml.safe_load((own / "kustomization.yaml").read_text())
        for number, patch in enumerate(patches):
            (own / f"patch-{number}.yaml").write_text(yaml.safe_dump(patch))
            written["patches"].append({"path": f"patch-{number}.yaml"})
        if settings:
            text = (self._manifests / "base" / "recsys.toml").read_text()
            for old, new in settings.items():
                assert old in text, old
                text = text.replace(old, new)
            (own / "recsys.toml").write_text(text)
            options = {"disableNameSuffixHash": True}
            merged = {"name": "recsys-config", "behavior": "merge", "files": ["recsys.toml"], "options": options}
            written["configMapGenerator"] = [merged]
        (own / "kustomization.yaml").write_text(yaml.safe_dump(written))
        self.kubectl("apply", "--validate=strict", "-k", str(own))

    def install_dagster(self, values: Mapping[str, Any]) -> None:
        """What `helm install` does with some values, and wait until all of it is ready."""
        self.kubectl("apply", "--validate=strict", "-f", "-", stdin=yaml.safe_dump_all(manifests_of(values)))
        for deployment in self.items("deployments", "apis/apps/v1"):
            if deployment["metadata"]["name"].startswith("dagster"):
                self.rolled_out(f"deployment/{deployment['metadata']['name']}")

    def rolled_out(self, what: str) -> str:
        """Wait for the end of a rollout, as a person does. What kubectl says of it."""
        words = ["--namespace", NAMESPACE, "rollout", "status", what, f"--timeout={ROLLOUT_SECONDS}s"]
        done = self.plane.kubectl(*words, seconds=ROLLOUT_SECONDS + 30)
        assert done.returncode == 0, done.stdout + done.stderr + self.told(self.items("pods"))
        return done.stdout

    def items(self, kind: str, group: str = "api/v1", **query: object) -> list[Object]:
        return self.plane.api.items(f"/{group}/namespaces/{NAMESPACE}/{kind}", **query)

    def of_workload(self, name: str) -> list[Object]:
        """The pods of a workload of the manifests."""
        found = self.items("pods", labelSelector=f"app.kubernetes.io/name={name}")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def has_container(self, name: str, **state: Any) -> bool:
        """Whether all containers of a workload's pods, of which there is one, have fields of their status."""
        pods = self.of_workload(name)
        statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", ())]
        return bool(pods) and len(statuses) == len(pods) and all(state.items() <= status.items() for status in statuses)

    def told(self, pods: Sequence[Object]) -> str:
        """What pods have printed, for a test that fails."""
        return "\n".join(f"--- {pod['metadata']['name']}\n{self.nodes.log(pod['metadata']['name'])[-3000:]}" for pod in pods)

    def wait_for(self, holds: Any, seconds: float, name: str = "serving") -> None:
        """Wait; shows what the pods of a workload have printed where it does not come true."""
        try:
            eventually(holds, seconds)
        except AssertionError:
            raise AssertionError(self.told(self.of_workload(name))) from None
