"""What a pod says of a container's variables and files, looked up in the API: the kubelet's part in starting one."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from container import Mount
from kube_api import Api, Refused

UNITS = {
    "Ki": 1 << 10,
    "Mi": 1 << 20,
    "Gi": 1 << 30,
    "Ti": 1 << 40,
    "k": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "m": Decimal("0.001"),
}
ANY_ADDRESS = "0.0.0.0"


class NotYet(Exception):
    """A container can't start until something else is there.

    Attributes:
        reason: as the container's state says it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity as a number: of cores, bytes or things."""
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return Decimal(number) * (UNITS[unit] if unit else 1)


class PodParts:
    """Of one pod."""

    def __init__(self, api: Api, pod: Mapping[str, Any], address: str, node_address: str, folder: Path) -> None:
        """Files that are mounted lie in `folder`. Where the pod says 0.0.0.0, its address is meant."""
        self._api = api
        self._pod = pod
        self._address = address
        self._node_address = node_address
        self._folder = folder
        self._namespace = f"/api/v1/namespaces/{pod['metadata']['namespace']}"
        self._made: dict[str, Path] = {}

    def here(self, text: str) -> str:
        """The text with the pod's own address for any address."""
        return text.replace(ANY_ADDRESS, self._address)

    def variables(self, container: Mapping[str, Any], image: Mapping[str, str], cluster: Mapping[str, str]) -> dict[str, str]:
        """What a container's processes have, over those of the image and the addresses of services. Raises NotYet."""
        found = {**image, "HOSTNAME": self._pod["metadata"]["name"][:63], **cluster}
        if self._pod["spec"].get("enableServiceLinks", True):
            found |= self._service_links()
        for source in container.get("envFrom", ()):
            kind, named = next((kind, source[kind]) for kind in ("secretRef", "configMapRef") if kind in source)
            data = self._data(kind, named["name"], named.get("optional", False))
            found |= {source.get("prefix", "") + name: value.decode() for name, value in data.items()}
        for variable in container.get("env", ()):
            value = (
                variable.get("value", "") if "valueFrom" not in variable else self._looked_up(variable["valueFrom"], container)
            )
            if value is not None:
                found[variable["name"]] = filled(value, found)
        return {name: self.here(value) for name, value in found.items()}

    def _looked_up(self, source: Mapping[str, Any], container: Mapping[str, Any]) -> str | None:
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            wanted = source["resourceFieldRef"]
            group, _, name = wanted["resource"].partition(".")
            value = quantity(container["resources"][group][name]) / quantity(wanted.get("divisor", "1"))
            return str(int(value.to_integral_value(rounding="ROUND_CEILING")))
        kind, named = next((kind, source[f"{kind}KeyRef"]) for kind in ("secret", "configMap") if f"{kind}KeyRef" in source)
        data = self._data(f"{kind}Ref", named["name"], named.get("optional", False))
        if named["key"] not in data and not named.get("optional", False):
            raise NotYet("CreateContainerConfigError", f"couldn't find key {named['key']} in {kind} {named['name']}")
        return data[named["key"]].decode() if named["key"] in data else None

    def _field(self, path: str) -> str:
        meta, spec = self._pod["metadata"], self._pod["spec"]
        if inner := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return str(meta.get(inner[1], {}).get(inner[2], ""))
        fields = {
            "metadata.name": meta["name"],
            "metadata.namespace": meta["namespace"],
            "metadata.uid": meta["uid"],
            "spec.nodeName": spec["nodeName"],
            "spec.serviceAccountName": spec["serviceAccountName"],
            "status.podIP": self._address,
            "status.podIPs": self._address,
            "status.hostIP": self._node_address,
        }
        return str(fields[path])

    def _service_links(self) -> dict[str, str]:
        """The variables of the services that have an address when the container starts."""
        found: dict[str, str] = {}
        for service in self._api.items(f"{self._namespace}/services"):
            spec = service["spec"]
            if spec.get("clusterIP", "None") == "None" or spec["type"] == "ExternalName":
                continue
            name, host = service["metadata"]["name"].upper().replace("-", "_"), spec["clusterIP"]
            found[f"{name}_SERVICE_HOST"] = host
            for at, port in enumerate(spec["ports"]):
                number, protocol = str(port["port"]), port["protocol"]
                address = f"{protocol.lower()}://{host}:{number}"
                if at == 0:
                    found |= {f"{name}_SERVICE_PORT": number, f"{name}_PORT": address}
                if "name" in port:
                    found[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = number
                link = f"{name}_PORT_{number}_{protocol}"
                found |= {link: address, f"{link}_PROTO": protocol.lower(), f"{link}_PORT": number, f"{link}_ADDR": host}
        return found

    def mounts(self, container: Mapping[str, Any]) -> list[Mount]:
        """What a container sees of the pod's volumes. Raises NotYet."""
        volumes = {volume["name"]: volume for volume in self._pod["spec"].get("volumes", ())}
        found = []
        for mount in container.get("volumeMounts", ()):
            volume = volumes[mount["name"]]
            source = self._volume(volume)
            if inner := mount.get("subPath"):
                source = source / inner
            fixed = mount.get("readOnly", False) or "emptyDir" not in volume
            found.append(Mount(source, mount["mountPath"].rstrip("/"), fixed))
        return found

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        """A volume's folder, made at its first use."""
        name = volume["name"]
        if name in self._made:
            return self._made[name]
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            folder.chmod(0o777)
            if (group := self._pod["spec"].get("securityContext", {}).get("fsGroup")) is not None:
                os.chown(folder, -1, group)
        else:
            for source in volume["projected"]["sources"] if "projected" in volume else [volume]:
                for file, content in self._files(source).items():
                    place = folder / file
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(content)
                    place.chmod(0o644)
        self._made[name] = folder
        return folder

    def _files(self, source: Mapping[str, Any]) -> dict[str, bytes]:
        if token := source.get("serviceAccountToken"):
            return {token["path"]: self._token(token).encode()}
        if fields := source.get("downwardAPI"):
            return {item["path"]: self._field(item["fieldRef"]["fieldPath"]).encode() for item in fields["items"]}
        kind = "secret" if "secret" in source else "configMap"
        named = source[kind]
        data = self._data(f"{kind}Ref", named.get("secretName") or named["name"], named.get("optional", False), "FailedMount")
        if "items" in named:
            data = {item["path"]: data[item["key"]] for item in named["items"]}
        return {name: self.here(value.decode()).encode() for name, value in data.items()} if kind == "configMap" else data

    def _token(self, wanted: Mapping[str, Any]) -> str:
        spec: dict[str, Any] = {"expirationSeconds": wanted.get("expirationSeconds", 3600)}
        spec["boundObjectRef"] = {
            "kind": "Pod",
            "apiVersion": "v1",
            "name": self._pod["metadata"]["name"],
            "uid": self._pod["metadata"]["uid"],
        }
        if "audience" in wanted:
            spec["audiences"] = [wanted["audience"]]
        path = f"{self._namespace}/serviceaccounts/{self._pod['spec']['serviceAccountName']}/token"
        made = self._api.post(path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
        return str(made["status"]["token"])

    def _data(self, kind: str, name: str, optional: bool, reason: str = "CreateContainerConfigError") -> dict[str, bytes]:
        """What a Secret or ConfigMap holds."""
        what = "secrets" if kind == "secretRef" else "configmaps"
        try:
            found = self._api.get(f"{self._namespace}/{what}/{name}").get("data") or {}
        except Refused as error:
            if error.code == 404 and optional:
                return {}
            raise NotYet(reason, error.message) from error
        return {key: base64.b64decode(value) if what == "secrets" else value.encode() for key, value in found.items()}


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with $(NAME) replaced, where there is such a variable; $$ is a dollar."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] is None else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([\w.-]+)\)", value, text)
