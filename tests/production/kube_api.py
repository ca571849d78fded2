"""The API of Kubernetes as JSON over HTTP, with the warnings that it gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
SECONDS = 30

Object = dict[str, Any]


class Refused(Exception):
    """The API server refused what was asked.

    Attributes:
        code: of HTTP.
        message: what it says.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Api:
    """The API as whoever has a token. Each call is a request of its own, so that threads may share it."""

    def __init__(self, url: str, ca: Path, token: str) -> None:
        self._url = url
        self._ca = str(ca)
        self._headers = {"Authorization": f"Bearer {token}"}

    def get(self, path: str, **query: object) -> Object:
        """Raises Refused."""
        return self._asked("GET", path, query=query)

    def found(self, path: str) -> Object | None:
        """What lies at a path, None when there is nothing."""
        try:
            return self.get(path)
        except Refused as error:
            if error.code == 404:
                return None
            raise

    def items(self, path: str, **query: object) -> list[Object]:
        found: list[Object] = self.get(path, **query)["items"]
        return found

    def post(self, path: str, body: Object, **query: object) -> Object:
        """Raises Refused."""
        return self._asked("POST", path, body, query)

    def patch(self, path: str, body: Object, kind: str = MERGE) -> Object:
        """Raises Refused."""
        return self._asked("PATCH", path, body, {}, kind)

    def delete(self, path: str, body: Object | None = None) -> Object:
        """Raises Refused."""
        return self._asked("DELETE", path, body)

    def watch(self, path: str, **query: object) -> Iterator[tuple[str, Object]]:
        """(ADDED, MODIFIED or DELETED, object) of what is there and of what happens to it, until the server ends it."""
        with self._request("GET", path, None, {"watch": 1, **query}, "", (SECONDS, None), stream=True) as answer:
            for line in answer.iter_lines(chunk_size=None):
                event = json.loads(line)
                yield event["type"], event["object"]

    def is_ready(self) -> bool:
        return self._request("GET", "/readyz", None, {}, "", SECONDS).ok

    def _asked(
        self, method: str, path: str, body: Object | None = None, query: Object | None = None, kind: str = "application/json"
    ) -> Object:
        answer = self._request(method, path, body, query or {}, kind, SECONDS)
        found: Object = answer.json()
        if not answer.ok:
            raise Refused(answer.status_code, found.get("message", answer.text))
        return found

    def _request(
        self, method: str, path: str, body: Object | None, query: Object, kind: str, timeout: Any, stream: bool = False
    ) -> requests.Response:
        headers = {**self._headers, **({"Content-Type": kind} if body is not None else {})}
        data = None if body is None else json.dumps(body)
        with requests.Session() as session:
            # Neither a proxy nor a .netrc of this machine.
            session.trust_env = False
            return session.request(
                method,
                self._url + path,
                params=query,
                data=data,
                headers=headers,
                verify=self._ca,
                timeout=timeout,
                stream=stream,
            )
