"""Dagster's web server, asked over its GraphQL API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import requests
from waiting import eventually

LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on PipelineNotFoundError { message } } }"""
STATUS = "query($run: ID!) { runOrError(runId: $run) { ... on Run { status } } }"
EVENTS = """query($run: ID!) { logsForRun(runId: $run, limit: 5000) { ... on EventConnection { events { __typename
  ... on MessageEvent { message stepKey }
  ... on ExecutionStepFailureEvent { error { message stack } }
  ... on EngineEvent { error { message } } } } } }"""
LOADED = "{ repositoriesOrError { __typename ... on RepositoryConnection { nodes { name } } } }"
PARTITION = "dagster/partition"
OVER = ("SUCCESS", "FAILURE", "CANCELED")


class DagsterApi:
    """Of one code location."""

    def __init__(self, url: str, location: str) -> None:
        self._url = f"{url}/graphql"
        self._location = location

    def launch(self, job: str, partition: str = "", span: tuple[str, str] | None = None, assets: Sequence[str] = ()) -> str:
        """Put a run into the queue, of a partition or of a span of them, for all assets of a job or some. Its id."""
        selector: dict[str, Any] = {"repositoryLocationName": self._location, "repositoryName": "__repository__"}
        selector["pipelineName"] = job
        if assets:
            selector["assetSelection"] = [{"path": [asset]} for asset in assets]
        values = {PARTITION: partition} if partition else {}
        if span:
            values |= {f"dagster/asset_partition_range_{end}": key for end, key in zip(("start", "end"), span, strict=True)}
        tags = [{"key": key, "value": value} for key, value in values.items()]
        params = {"selector": selector, "mode": "default", "executionMetadata": {"tags": tags}, "runConfigData": {}}
        launched = self._asked(LAUNCH, params=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def is_loaded(self) -> bool:
        """Whether the code location has answered."""
        return bool(self._asked(LOADED)["repositoriesOrError"].get("nodes"))

    def status(self, run: str) -> str:
        return str(self._asked(STATUS, run=run)["runOrError"]["status"])

    def events(self, run: str) -> list[dict[str, Any]]:
        """All events of a run so far, oldest first."""
        found: list[dict[str, Any]] = self._asked(EVENTS, run=run)["logsForRun"]["events"]
        return found

    def succeeds(self, run: str, seconds: float) -> None:
        """Wait for the end of a run, and show why where it is not a success."""
        eventually(lambda: self.status(run) in OVER, seconds)
        assert self.status(run) == "SUCCESS", self.told(run)

    def told(self, run: str) -> str:
        """What went wrong, for a test that fails."""
        wrong = [event for event in self.events(run) if event.get("error") or "Failure" in event["__typename"]]
        return "\n".join(f"{event.get('stepKey')}: {event.get('message')}\n{event.get('error')}" for event in wrong)[-6000:]

    def _asked(self, query: str, **variables: object) -> Any:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.post(self._url, json={"query": query, "variables": variables}, timeout=60)
        answer.raise_for_status()
        assert "errors" not in answer.json(), answer.json()["errors"]
        return answer.json()["data"]
