"""An S3 server for tests: moto's, a process of its own that is spoken to over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from s3fs import S3FileSystem

from recsys_cli.processes import free_port, wait_until

LOGIN = {"AWS_ACCESS_KEY_ID": "recsys", "AWS_SECRET_ACCESS_KEY": "only-for-tests", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "recsys"


class S3Server:
    """A server with an empty bucket named BUCKET, that can be frozen and killed. What it holds is gone with it."""

    def __init__(self, folder: Path) -> None:
        """The server's log is in `folder`."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with open(folder / "s3.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "--port", str(port)], stdout=log, stderr=log, env={**os.environ, **LOGIN}
            )
        try:
            wait_until(self._answers, "the S3 server", 60, lambda: None)
            requests.put(f"{self.url}/{BUCKET}", timeout=10).raise_for_status()
        except BaseException:
            self.kill()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a process finds it."""
        return {**LOGIN, "AWS_ENDPOINT_URL": self.url}

    def freeze(self) -> None:
        """From now on it takes connections and answers nothing, until `thaw`."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/moto-api/", timeout=1).ok
        except requests.RequestException:
            return False


def use_here(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process find the server in the place of any other."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """A server of its own for as long as the block lasts."""
    server = S3Server(folder)
    try:
        yield server
    finally:
        server.kill()
