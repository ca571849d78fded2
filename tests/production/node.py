"""Nodes whose pods run as processes of this machine: the kubelet's part of Kubernetes, as far as these tests need it.

Pods come by the API, from the real scheduler. Their containers (container.py) have what images hold (pod_images.py; none is
built or pulled here), variables, files and tokens as the pod says. They are probed, restarted, asked to end and killed as a
kubelet does it. What a pod is and how its containers ended goes into its status.

What is not so: there is no network of pods and no kube-proxy. Each pod has a loopback address. Names of services lead, by the
pod's /etc/hosts, straight to the addresses of the pods that are ready, without a service's own address and translation of
ports. NetworkPolicies do nothing. Nothing limits memory and processor time. Services of type ExternalName lead to where this
machine finds that name. Secrets for pulling images are not looked at.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import requests
from container import Container, Mount, Recipe
from control_plane import ControlPlane
from kube_api import STRATEGIC, Object, Refused
from pod_images import USER, PodImage
from pod_parts import NotYet, PodParts
from probes import ContainerProbes, Prober, asked_by

from recsys_core.errors import UserError

LEASE_SECONDS = 10
RETRY_SECONDS = 0.5
LONGEST_PAUSE = 300.0
PROGRAMS = ("unshare", "nsenter", "setpriv", "chroot", "mount")


class NoNode(UserError):
    """Pods can't be run here; the message says why."""


@dataclass(frozen=True)
class NodeSpec:
    """What the scheduler knows of a node."""

    name: str
    cpu: str = "64"
    memory: str = "256Gi"
    labels: Mapping[str, str] = field(default_factory=dict)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Run:
    """What is known of a container of a pod, over all its runs."""

    def __init__(self, spec: Object) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.state: Object = {"waiting": {"reason": "PodInitializing"}}
        self.last: Object = {}
        self.restarts = 0
        self.container: Container | None = None
        self.probes: ContainerProbes | None = None
        self.code: int | None = None

    @property
    def ready(self) -> bool:
        return "running" in self.state and self.probes is not None and self.probes.ready

    def status(self) -> Object:
        started = "running" in self.state and self.probes is not None and self.probes.started
        return {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": self.spec["image"],
            "ready": self.ready,
            "started": started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }


class _Pod:
    """A pod on a node, from its start until it is gone."""

    def __init__(self, nodes: Nodes, pod: Object, address: str) -> None:
        self.pod = pod
        self.address = address
        self.leaving = False
        self._nodes = nodes
        self._api = nodes.plane.api
        meta = pod["metadata"]
        self._path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self.folder = nodes.home / "pods" / f"{meta['name']}-{meta['uid'][:8]}"
        self.folder.mkdir(parents=True)
        self.hosts = self.folder / "hosts"
        self.hosts.touch()
        self._began = now()
        self._init = [_Run(spec) for spec in pod["spec"].get("initContainers", ())]
        self.runs = [_Run(spec) for spec in pod["spec"]["containers"]]
        self.all_runs = [*self._init, *self.runs]
        self._parts = PodParts(self._api, pod, address, nodes.plane.host, self.folder / "volumes")
        self._lock = threading.RLock()
        self._ready_before = False

    # -- its life --------------------------------------------------------------------------------------------------

    def live(self) -> None:
        """Run its containers to their end."""
        self._report()
        for run in self._init:
            while not self.leaving and not self._one_run(run):
                if self.pod["spec"]["restartPolicy"] == "Never":
                    self._report("Failed")
                    return
        threads = [threading.Thread(target=self._work, args=(run,), daemon=True, name=run.name) for run in self.runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def leave(self, grace_seconds: float) -> None:
        """End its containers, and then be gone."""
        self.leaving = True
        self._nodes.resolve()
        self.end(grace_seconds)
        with suppress(Refused):
            self._report(self._outcome())
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.pod["metadata"]["uid"]}}
            self._api.delete(self._path, {"kind": "DeleteOptions", "apiVersion": "v1", **options})

    def end(self, grace_seconds: float) -> None:
        self.leaving = True
        running = [run.container for run in self.all_runs if run.container is not None and "running" in run.state]
        threads = [threading.Thread(target=container.end, args=(grace_seconds,)) for container in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for container in running:
            container.wait()

    def _work(self, run: _Run) -> None:
        """Run a container, again and again where the pod's policy says so."""
        pauses = itertools.chain([0.0], (10.0 * 2**at for at in itertools.count()))
        while not self.leaving:
            good = self._one_run(run)
            if self.leaving or not self._starts_again(good):
                return
            pause = min(next(pauses), LONGEST_PAUSE)
            if pause:
                run.state = {"waiting": {"reason": "CrashLoopBackOff", "message": f"back-off {pause:.0f}s"}}
                self._report()
                time.sleep(pause)
            run.restarts += 1

    def _starts_again(self, good: bool) -> bool:
        """Whether a container that ended so is to be started again."""
        policy = self.pod["spec"]["restartPolicy"]
        return bool(policy == "Always" or (policy == "OnFailure" and not good))

    def _one_run(self, run: _Run) -> bool:
        """Start a container as soon as it can be, and wait for its end. Whether it ended well."""
        began = None
        while run.container is None or began is None:
            if self.leaving:
                return False
            try:
                recipe = self._recipe(run.spec)
                began = now()
                with self._lock:
                    if self.leaving:
                        return False
                    run.container = Container(recipe, self.folder / run.name / str(run.restarts))
            except NotYet as reason:
                self._waits(run, reason.reason, str(reason))
                time.sleep(RETRY_SECONDS)
        container = run.container
        ports = {port["name"]: port["containerPort"] for port in run.spec.get("ports", ()) if "name" in port}
        ask = asked_by(self._nodes.prober, container, self.address, ports)
        grace = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        run.state = {"running": {"startedAt": began}}
        run.probes = ContainerProbes(run.spec, ask, self._report, lambda why: self._unfit(run, container, why, grace))
        self._report()
        run.code = container.wait()
        run.probes.end()
        ended: Object = {"exitCode": run.code, "reason": "Completed" if run.code == 0 else "Error"}
        ended |= {"startedAt": began, "finishedAt": now(), "containerID": f"process://{run.name}/{run.restarts}"}
        run.state, run.last = {"terminated": ended}, {"terminated": ended}
        run.container = None
        self._report()
        return run.code == 0

    def _unfit(self, run: _Run, container: Container, why: str, grace_seconds: float) -> None:
        self._nodes.killed.append(f"{self.pod['metadata']['name']}/{run.name}: {why}")
        container.end(grace_seconds)

    def _waits(self, run: _Run, reason: str, message: str) -> None:
        waiting = {"waiting": {"reason": reason, "message": message}}
        if run.state != waiting:
            run.state = waiting
            self._report()

    def _recipe(self, spec: Object) -> Recipe:
        """How a container is started. Raises NotYet."""
        image = self._nodes.image(spec["image"])
        of_pod, own = self.pod["spec"].get("securityContext", {}), spec.get("securityContext", {})
        both = {**of_pod, **own}
        user = both.get("runAsUser", USER)
        if both.get("runAsNonRoot") and user == 0:
            raise NotYet("CreateContainerConfigError", "container has runAsNonRoot and image will run as root")
        cluster = {"KUBERNETES_SERVICE_HOST": self._nodes.plane.host, "KUBERNETES_SERVICE_PORT": str(self._nodes.plane.port)}
        variables = self._parts.variables(spec, image.variables, cluster)
        said = [*spec.get("command", image.entrypoint), *spec.get("args", () if "command" in spec else image.command)]
        mounts = [*self._nodes.held_by(image, self.hosts), *self._parts.mounts(spec)]
        return Recipe(
            [self._parts.here(word) for word in said],
            variables,
            spec.get("workingDir", image.workdir),
            user,
            both.get("runAsGroup", USER),
            of_pod.get("fsGroup"),
            own.get("readOnlyRootFilesystem", False),
            mounts,
        )

    # -- its status ------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return not self.leaving and all(run.ready for run in self.runs)

    def _phase(self) -> str:
        if all("terminated" in run.state and not self._starts_again(run.code == 0) for run in self.runs):
            return self._outcome()
        return "Pending" if any("waiting" in run.state and not run.restarts for run in self.runs) else "Running"

    def _outcome(self) -> str:
        return "Succeeded" if all(run.code == 0 for run in self.runs) else "Failed"

    def _report(self, phase: str = "") -> None:
        with self._lock:
            ready = all(run.ready for run in self.runs)
            initialized = all(run.code == 0 for run in self._init)
            conditions = {
                "PodReadyToStartContainers": True,
                "Initialized": initialized,
                "ContainersReady": ready,
                "Ready": ready,
            }
            status: Object = {
                "phase": phase or self._phase(),
                "podIP": self.address,
                "podIPs": [{"ip": self.address}],
                "hostIP": self._nodes.plane.host,
                "startTime": self._began,
                "containerStatuses": [run.status() for run in self.runs],
                "conditions": [
                    {"type": name, "status": str(holds), "lastTransitionTime": now()} for name, holds in conditions.items()
                ],
            }
            if self._init:
                status["initContainerStatuses"] = [run.status() for run in self._init]
            uid = {"uid": self.pod["metadata"]["uid"]}
            try:
                self._api.patch(f"{self._path}/status", {"metadata": uid, "status": status}, STRATEGIC)
            except Refused as error:
                # Gone in the meantime, or replaced by another of its name.
                if error.code not in (404, 409):
                    raise
            changed, self._ready_before = ready != self._ready_before, ready
        if changed:
            self._nodes.resolve()


class Nodes:
    """Running nodes.

    Attributes:
        killed: containers that were ended because of a probe, and why.
    """

    def __init__(self, plane: ControlPlane, specs: Sequence[NodeSpec], images: Mapping[str, PodImage], home: Path) -> None:
        """`home` must be open to every user of this machine."""
        self.plane = plane
        self.home = home
        self.killed: list[str] = []
        self.prober = Prober(plane.binary)
        self._images = images
        self._specs = specs
        self._pods: dict[str, _Pod] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._addresses = (f"{plane.network}.{high}.{low}" for high in range(1, 255) for low in range(1, 255))
        for spec in specs:
            self._register(spec)
        for work in (self._keep_leases, self._watch):
            threading.Thread(target=work, daemon=True, name="nodes").start()

    def image(self, name: str) -> PodImage:
        """What is in an image. Raises NotYet for one that there is not."""
        known = self._images.get(name.rpartition("/")[2].partition(":")[0])
        if known is None:
            raise NotYet("ErrImagePull", f"there is no image {name}")
        return known

    def held_by(self, image: PodImage, hosts: Path) -> list[Mount]:
        """What of this machine lies in an image's root."""
        inside = [Mount(source, path, True) for path, source in image.holds.items()]
        return [*inside, Mount(hosts, "/etc/hosts", True)]

    def addresses(self, **labels: str) -> list[str]:
        """Of the ready pods that have some labels."""
        with self._lock:
            pods = list(self._pods.values())
        return [pod.address for pod in pods if pod.ready and labels.items() <= pod.pod["metadata"].get("labels", {}).items()]

    def log(self, pod: str) -> str:
        """All that the containers of a pod have printed, over all their runs."""
        with self._lock:
            found = [one for one in self._pods.values() if one.pod["metadata"]["name"] == pod]
        texts = []
        for folder in [one.folder / run.name for one in found for run in one.all_runs]:
            logs = sorted(folder.glob("*/log"), key=lambda log: int(log.parent.name))
            texts += [log.read_text(errors="replace") for log in logs]
        return "".join(texts)

    def signal(self, pod: str, number: int) -> None:
        """Send a signal to the first process of a pod's first container."""
        self._running(pod).signal(number)

    def run(self, pod: str, command: Sequence[str], seconds: float) -> bool:
        """Whether a command in a pod's first container ends well in time, as by `kubectl exec`."""
        return self._running(pod).run(command, seconds)

    def _running(self, pod: str) -> Container:
        with self._lock:
            (found,) = [one for one in self._pods.values() if one.pod["metadata"]["name"] == pod and not one.leaving]
        container = found.runs[0].container
        assert container is not None
        return container

    def close(self) -> None:
        self._over.set()
        with self._lock:
            pods = list(self._pods.values())
        for pod in pods:
            pod.end(0)
        self.prober.close()

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _register(self, spec: NodeSpec) -> None:
        labels = {"kubernetes.io/hostname": spec.name, "kubernetes.io/os": "linux", **spec.labels}
        self.plane.api.post(
            "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": spec.name, "labels": labels}}
        )
        room = {"cpu": spec.cpu, "memory": spec.memory, "pods": "110", "ephemeral-storage": "1Ti"}
        moment = now()
        condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "it runs processes"}
        condition |= {"lastHeartbeatTime": moment, "lastTransitionTime": moment}
        addresses = [{"type": "InternalIP", "address": self.plane.host}, {"type": "Hostname", "address": spec.name}]
        status = {"capacity": room, "allocatable": room, "conditions": [condition], "addresses": addresses}
        self.plane.api.patch(f"/api/v1/nodes/{spec.name}/status", {"status": status}, STRATEGIC)

    def _keep_leases(self) -> None:
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        made = False
        while not self._over.is_set():
            moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            for spec in self._specs:
                lease = {"holderIdentity": spec.name, "leaseDurationSeconds": 40, "renewTime": moment}
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": spec.name}, "spec": lease}
                with suppress(Refused, requests.RequestException):
                    self.plane.api.patch(f"{leases}/{spec.name}", body) if made else self.plane.api.post(leases, body)
            made = True
            self._over.wait(LEASE_SECONDS)

    # -- pods ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        names = {spec.name for spec in self._specs}
        while not self._over.is_set():
            try:
                for kind, pod in self.plane.api.watch("/api/v1/pods"):
                    if self._over.is_set():
                        return
                    if pod["spec"].get("nodeName") in names:
                        self._take(kind, pod)
            except requests.RequestException:
                self._over.wait(RETRY_SECONDS)

    def _take(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            known = self._pods.get(uid)
            is_over = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
            if known is None and kind != "DELETED" and not is_over:
                known = self._pods[uid] = _Pod(self, pod, next(self._addresses))
                threading.Thread(target=known.live, daemon=True, name=pod["metadata"]["name"]).start()
        if known is None or known.leaving:
            return
        if kind == "DELETED":
            threading.Thread(target=known.end, args=(0,), daemon=True).start()
        elif "deletionTimestamp" in pod["metadata"]:
            known.leaving = True
            grace = pod["metadata"].get("deletionGracePeriodSeconds", 30)
            threading.Thread(target=known.leave, args=(grace,), daemon=True).start()

    # -- names -----------------------------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Write into every pod's /etc/hosts where services and their pods are now."""
        services = self.plane.api.items("/api/v1/services")
        with self._lock:
            pods = [pod for pod in self._pods.values() if not pod.leaving]
            lines = [f"{self.plane.host} kubernetes.default kubernetes.default.svc kubernetes.default.svc.cluster.local"]
            for service in services:
                lines += [f"{address} {' '.join(names)}" for address, names in _resolved(service, pods, self.plane.host)]
            for pod in pods:
                meta = pod.pod["metadata"]
                _replace(pod.hosts, "\n".join([f"{pod.address} localhost {meta['name']}", *lines, ""]))


def _resolved(service: Object, pods: Sequence[_Pod], nowhere: str) -> Iterator[tuple[str, list[str]]]:
    """(address, names) of what a service leads to; `nowhere`, where nobody listens, while it has an address but no pod."""
    name, namespace, spec = service["metadata"]["name"], service["metadata"]["namespace"], service["spec"]
    names = [name, f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local"]
    if spec["type"] == "ExternalName":
        with suppress(OSError):
            yield socket.gethostbyname(spec["externalName"]), names
    elif "selector" in spec:
        found = False
        for pod in pods:
            meta = pod.pod["metadata"]
            chosen = meta["namespace"] == namespace and spec["selector"].items() <= meta.get("labels", {}).items()
            if chosen and (pod.ready or spec.get("publishNotReadyAddresses", False)):
                found = True
                own = f"{pod.pod['spec'].get('hostname', '')}."
                yield pod.address, [*names, *(own + one for one in names if pod.pod["spec"].get("subdomain") == name)]
        if not found and spec["clusterIP"] != "None":
            yield nowhere, names


def _replace(file: Path, text: str) -> None:
    """Replace what a file that is mounted elsewhere holds, by one write."""
    with open(file, "r+b") as opened:
        old = os.fstat(opened.fileno()).st_size
        os.write(opened.fileno(), text.encode().ljust(old, b"\n"))


@contextmanager
def nodes(plane: ControlPlane, specs: Sequence[NodeSpec], images: Mapping[str, PodImage], home: Path) -> Iterator[Nodes]:
    """Nodes that run pods while the block lasts. Raises NoNode where there is no right to."""
    if os.geteuid() != 0:
        raise NoNode("pods run as other users in mount namespaces of their own, which only root may make: run this as root")
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        raise NoNode(f"pods can't be run without {', '.join(missing)}")
    running = Nodes(plane, specs, images, home)
    try:
        yield running
    finally:
        running.close()
