"""A control plane of Kubernetes: etcd, API server, controller manager and scheduler, real ones.

They are one binary, built once of control_plane.go and kept in the cache folder, named by version and source. Go keeps the
modules that it fetches in its own cache. What it compiles is deleted after the build, unless GOCACHE names a folder for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha1
from pathlib import Path
from typing import Any

import requests
import yaml
from certificates import make_certificates
from kube_api import Api

from recsys_cli.processes import accepts_connections, free_port, running, wait_until
from recsys_core.errors import UserError
from recsys_core.jars import cache_folder

VERSION = "1.34.4"
ETCD_VERSION = "3.6.4"
SOURCE = Path(__file__).with_name("control_plane.go")
MODULE = f"k8s.io/kubernetes@v{VERSION}"
FETCH_SECONDS, BUILD_SECONDS, START_SECONDS = 300, 2400, 90
TOKEN = "the-administrator-of-a-test"
SERVICES = "10.96.0.0/16"


class NoControlPlane(UserError):
    """The binary can't be had; the message says why."""


def fetched(module: str) -> Path:
    """The folder of a Go module, of which its `go.mod` and files are part; `name@version`. Raises NoControlPlane."""
    if not shutil.which("go"):
        raise NoControlPlane("there is no Go to build a control plane of Kubernetes with: put it on PATH")
    with tempfile.TemporaryDirectory() as anywhere:
        said = _go(Path(anywhere), FETCH_SECONDS, "mod", "download", "-json", module)
    return Path(json.loads(said)["Dir"])


def _go(folder: Path, seconds: int, *words: str) -> str:
    """What a command of Go prints. Raises NoControlPlane."""
    own = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    environment = {"GOCACHE": str(folder / "compiled"), **os.environ, **own}
    done = subprocess.run(["go", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise NoControlPlane(f"the control plane can't be built: go {words[0]}: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


def kube() -> Path:
    """The binary, built at the first use. Raises NoControlPlane."""
    digest = sha1(SOURCE.read_bytes() + ETCD_VERSION.encode(), usedforsecurity=False).hexdigest()[:12]
    binary = cache_folder() / f"kube-{VERSION}-{digest}"
    binary.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{binary}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _build(binary)
    return binary


def _build(binary: Path) -> None:
    print("building the control plane of Kubernetes, which takes some minutes", flush=True)
    of_kubernetes = fetched(MODULE)
    with tempfile.TemporaryDirectory(prefix="kube-", dir=binary.parent) as made:
        folder = Path(made)
        shutil.copy(SOURCE, folder / "main.go")
        (folder / "go.mod").write_text(_go_mod((of_kubernetes / "go.mod").read_text()))
        stamp = "k8s.io/component-base/version.git"
        major, minor, _ = VERSION.split(".")
        versions = {"Version": f"v{VERSION}", "Major": major, "Minor": minor}
        flags = " ".join(["-s", "-w", *(f"-X {stamp}{name}={value}" for name, value in versions.items())])
        _go(folder, BUILD_SECONDS, "build", "-p", "2", "-trimpath", "-ldflags", flags, "-o", "kube", ".")
        (folder / "kube").chmod(0o755)
        (folder / "kube").rename(binary)


def _go_mod(of_kubernetes: str) -> str:
    """What a module needs that is made of Kubernetes' commands: all that Kubernetes' own `go.mod` says.

    There the modules of Kubernetes itself are of no version, but folders beside it; here they are published ones.
    """
    staged = re.findall(r"^\t(k8s\.io/[\w-]+) v0\.0\.0$", of_kubernetes, re.MULTILINE)
    version = f"v0.{VERSION.partition('.')[2]}"
    text = re.sub(r"^replace \(.*?^\)\n", "", of_kubernetes, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^module .*$", "module kube", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^(\tk8s\.io/[\w-]+) v0\.0\.0$", rf"\1 {version}", text, flags=re.MULTILINE)
    wanted = [f"go.etcd.io/etcd/server/v3 v{ETCD_VERSION}", f"k8s.io/kubernetes v{VERSION}"]
    replaced = [f"{module} => {module} {version}" for module in staged]
    return text + "".join(f"require {line}\n" for line in wanted) + "".join(f"replace {line}\n" for line in replaced)


class ControlPlane:
    """A running control plane without any node. All of it listens on one loopback address of its own.

    Attributes:
        network: the first two bytes of its addresses: the API server is at `<network>.0.1`, pods may be at any other.
        host, port: of the API server; 443 where this is root, as Spark's settings on Kubernetes have it.
        ca: file of the authority that signed its certificate.
        kubeconfig: file of an administrator.
        api: its API, as an administrator.
    """

    def __init__(self, home: Path, binary: Path, started: ExitStack) -> None:
        """Whatever it starts ends with `started`."""
        self._home = home
        self.binary = binary
        self.network = _free_network()
        self.host = f"{self.network}.0.1"
        self.port = 443 if os.geteuid() == 0 else free_port(host=self.host)
        make_certificates(home, f"IP:{self.host},DNS:kubernetes.default.svc,DNS:kubernetes.default")
        self.ca = home / "ca.pem"
        self.kubeconfig = home / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(self.config_of(TOKEN)))
        (home / "tokens.csv").write_text(f"{TOKEN},administrator,administrator,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", str(home / "accounts.key"), "2048"], check=True, capture_output=True)
        self.api = Api(self.url, self.ca, TOKEN)
        self._start(started)

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    def config_of(self, token: str) -> dict[str, Any]:
        """A kubeconfig of whoever has a token."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
            "users": [{"name": "me", "user": {"token": token}}],
        }

    def as_account(self, namespace: str, name: str) -> Api:
        """The API with a token of a service account, such as its pods get."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        made = self.api.post(path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
        return Api(self.url, self.ca, made["status"]["token"])

    def kubectl(self, *words: str, stdin: str | None = None, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """A command of kubectl as an administrator, run to its end."""
        command = [str(self.binary), "kubectl", "--kubeconfig", str(self.kubeconfig), *words]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=seconds)

    def _start(self, started: ExitStack) -> None:
        def start(part: str, **flags: object) -> None:
            words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
            started.enter_context(running(part, self._home, [str(self.binary), part, *words]))

        ports = {name: free_port(host=self.host) for name in ("etcd", "peers", "controllers", "scheduler")}
        store, peers = (f"http://{self.host}:{ports[name]}" for name in ("etcd", "peers"))
        start(
            "etcd",
            data_dir=self._home / "etcd",
            listen_client_urls=store,
            advertise_client_urls=store,
            listen_peer_urls=peers,
            initial_advertise_peer_urls=peers,
            initial_cluster=f"default={peers}",
            unsafe_no_fsync="true",
            log_level="warn",
        )
        accounts = self._home / "accounts.key"
        start(
            "kube-apiserver",
            etcd_servers=store,
            bind_address=self.host,
            advertise_address=self.host,
            secure_port=self.port,
            # Kubernetes refuses an endpoint on loopback, also of its own service.
            endpoint_reconciler_type="none",
            service_cluster_ip_range=SERVICES,
            service_account_issuer="https://kubernetes.default.svc",
            service_account_signing_key_file=accounts,
            service_account_key_file=accounts,
            authorization_mode="RBAC",
            token_auth_file=self._home / "tokens.csv",
            tls_cert_file=self._home / "server.pem",
            tls_private_key_file=self._home / "server.key",
            cert_dir=self._home / "apiserver",
        )
        wait_until(self._is_ready, "the API server", START_SECONDS, lambda: None)
        common = {"kubeconfig": self.kubeconfig, "leader_elect": "false", "bind_address": self.host}
        start(
            "kube-controller-manager",
            **common,
            secure_port=ports["controllers"],
            cert_dir=self._home / "controllers",
            root_ca_file=self.ca,
            service_account_private_key_file=accounts,
            # Without metrics it only holds the least number of replicas; the tests wait for that.
            horizontal_pod_autoscaler_sync_period="2s",
        )
        start("kube-scheduler", **common, secure_port=ports["scheduler"], cert_dir=self._home / "scheduler")
        ready = "/api/v1/namespaces/default/serviceaccounts/default"
        wait_until(lambda: self.api.found(ready) is not None, "the controllers", START_SECONDS, lambda: None)

    def _is_ready(self) -> bool:
        try:
            return self.api.is_ready()
        except requests.ConnectionError:
            return False


def _free_network() -> str:
    """Two first bytes of loopback addresses that nobody uses."""
    while True:
        network = f"127.{random.randint(16, 250)}"
        if not accepts_connections(f"{network}.0.1", 443):
            return network


@contextmanager
def control_plane(home: Path) -> Iterator[ControlPlane]:
    """A running control plane; its files and logs are in `home`. Raises NoControlPlane where it can't be had."""
    with ExitStack() as started:
        yield ControlPlane(home, kube(), started)
