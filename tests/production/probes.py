"""Probes of containers, asked as the kubelet asks them: its own code for gRPC, HTTP and TCP, a process inside for commands."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from container import Container

ANSWER_SECONDS = 30
"""After its own deadline, what an answer gets to come in at all on a busy machine."""


class Prober:
    """The process that asks; many probes share it."""

    def __init__(self, binary: Path) -> None:
        # What fails is said in the answers; its own log says it again.
        self._process = subprocess.Popen(
            [str(binary), "prober"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lock = threading.Lock()
        self._asked: dict[int, Future[tuple[bool, str]]] = {}
        self._count = 0
        threading.Thread(target=self._read, daemon=True, name="prober").start()

    def ask(self, probe: Mapping[str, Any], host: str, ports: Mapping[str, int]) -> tuple[bool, str]:
        """Whether a gRPC, HTTP or TCP probe succeeds at a pod, and what was said."""
        question: dict[str, Any] = {"Host": host, "Seconds": probe.get("timeoutSeconds", 1)}
        if "grpc" in probe:
            question |= {"Kind": "grpc", "Port": probe["grpc"]["port"], "Service": probe["grpc"].get("service") or ""}
        else:
            kind, action = ("http", probe["httpGet"]) if "httpGet" in probe else ("tcp", probe["tcpSocket"])
            port = action["port"]
            question |= {"Kind": kind, "Port": port if isinstance(port, int) else ports[port]}
            question |= {"Scheme": action.get("scheme", "HTTP").lower(), "Path": action.get("path", "/")}
        with self._lock:
            self._count += 1
            answer: Future[tuple[bool, str]] = Future()
            self._asked[self._count] = answer
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"ID": self._count, **question}) + "\n")
            self._process.stdin.flush()
        return answer.result(question["Seconds"] + ANSWER_SECONDS)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self._asked.pop(said["ID"]).set_result((said["Success"], said["Said"]))


class ContainerProbes:
    """The probes of one run of a container, each in a thread of its own until it ends.

    Attributes:
        started: whether its startup probe has succeeded once; true without one.
        ready: what its readiness probe says; without one, whether it has started.
        last: what each kind of probe said last.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        ask: Callable[[Mapping[str, Any]], tuple[bool, str]],
        changed: Callable[[], None],
        unfit: Callable[[str], None],
    ) -> None:
        """`changed()` is called when `started` or `ready` has changed, `unfit(why)` when the container is to be ended."""
        self._ask = ask
        self._changed = changed
        self._unfit = unfit
        self._over = threading.Event()
        self.started = "startupProbe" not in spec
        self._has_readiness = "readinessProbe" in spec
        self._passes = False
        self.last: dict[str, str] = {}
        for kind in ("startup", "readiness", "liveness"):
            if f"{kind}Probe" in spec:
                probe = spec[f"{kind}Probe"]
                threading.Thread(target=self._work, args=(kind, probe), daemon=True, name=f"{kind} probe").start()

    @property
    def ready(self) -> bool:
        return self.started and (self._passes or not self._has_readiness)

    def end(self) -> None:
        self._over.set()

    def _work(self, kind: str, probe: Mapping[str, Any]) -> None:
        passed = failed = 0
        if self._over.wait(probe.get("initialDelaySeconds", 0)):
            return
        while not self._over.is_set():
            began = time.monotonic()
            if kind == "startup" or self.started:
                success, self.last[kind] = self._ask(probe)
                passed, failed = (passed + 1, 0) if success else (0, failed + 1)
                if self._over.is_set():
                    return
                if passed >= probe.get("successThreshold", 1):
                    self._note(kind, True)
                    if kind == "startup":
                        return
                if failed >= probe.get("failureThreshold", 3):
                    self._note(kind, False)
                    if kind != "readiness":
                        self._unfit(f"{kind} probe failed: {self.last[kind]}")
                        return
            self._over.wait(max(0.0, probe.get("periodSeconds", 10) - (time.monotonic() - began)))

    def _note(self, kind: str, good: bool) -> None:
        before = self.started, self.ready
        if kind == "startup":
            self.started = good
        elif kind == "readiness":
            self._passes = good
        if (self.started, self.ready) != before:
            self._changed()


def asked_by(prober: Prober, container: Container, host: str, ports: Mapping[str, int]) -> Callable[[Mapping[str, Any]], Any]:
    """How the probes of a container are asked."""

    def ask(probe: Mapping[str, Any]) -> tuple[bool, str]:
        if "exec" in probe:
            success = container.run(probe["exec"]["command"], probe.get("timeoutSeconds", 1))
            return success, "the command ended well" if success else "the command failed"
        return prober.ask(probe, host, ports)

    return ask
