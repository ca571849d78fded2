"""MLflow: every training is a run, every release a version of one registered model, `challenger` and `champion` its aliases.

The pointer file of the releases is the truth of what is served; the aliases follow it. MLflow is for people: when it can't be
reached, a training goes on and its run says why nothing was recorded.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recsys_core.errors import UserError
from recsys_core.masking import masked_text
from recsys_core.release import Manifest, Releases
from recsys_core.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
CHAMPION = "champion"

RELEASE_ID, DAY, RELEASE_URI = "release_id", "day", "release_uri"
"""Tags of a model version."""

RUN_TAG, ASSET_TAG, PARTITION_TAG = "dagster.run_id", "dagster.asset", "dagster.partition"
"""Tags of a training's run."""

T = TypeVar("T")

_LONGEST_PARAM = 6000
_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_LONGEST_DIGEST = 36
_LONGEST_MESSAGE = 400


class RegistryError(UserError):
    """MLflow can't be reached or refused; the message says where and why."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model: one release."""

    version: str
    release_id: str
    day: str
    run_id: str
    aliases: tuple[str, ...] = ()


@dataclass
class RegistryRun:
    """A run in the making. Nothing in here raises for MLflow's sake: the first failure is `trouble` and ends the recording.

    Attributes:
        run_id: None when MLflow did not take the run.
        artifact_uri: where its files go.
    """

    registry: Registry
    run_id: str | None = None
    artifact_uri: str = ""
    experiment_id: str = ""
    trouble: str = ""
    _closed: bool = field(default=False, repr=False)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings of a training; nested mappings get dotted names."""
        from mlflow.entities import Param

        made = [Param(_name(key), str(value)[:_LONGEST_PARAM]) for key, value in _flat(params)]
        for some in _parts(made, _PARAMS_AT_ONCE):
            self._record(partial(_log_batch, params=some))

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Numbers, of epoch `step`; nested mappings get dotted names, what is no number is left out."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        numbers = [(key, value) for key, value in _flat(metrics) if isinstance(value, int | float)]
        made = [Metric(_name(key), float(value), now, step) for key, value in numbers]
        for some in _parts(made, _METRICS_AT_ONCE):
            self._record(partial(_log_batch, metrics=some))

    def log_inputs(self, sources: Mapping[str, Mapping[str, str]], uri: str) -> None:
        """Datasets of the run: `sources` by table with `partition` and `data_version`, under the lake `uri`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs, uri = [], masked_text(uri)
        for table, source in sources.items():
            partition, version = source.get("partition", ""), source["data_version"]
            dataset = Dataset(f"{table}/{partition}", version[:_LONGEST_DIGEST], "uri", f"{uri}/{table}/{partition}")
            tags = [InputTag("partition", partition), InputTag("data_version", version)]
            inputs.append(DatasetInput(dataset, tags))
        if inputs:
            self._record(lambda client, run_id: client.log_inputs(run_id, inputs))

    def log_text(self, name: str, content: str) -> None:
        """A small file of the run."""
        self._record(lambda client, run_id: client.log_text(run_id, content, name))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._record(partial(_log_batch, tags=[RunTag(key, str(value)) for key, value in tags.items()]))

    def close(self, status: str = "FINISHED") -> None:
        """End the run, once."""
        if not self._closed:
            self._closed = True
            self._record(lambda client, run_id: client.set_terminated(run_id, status))

    def link(self) -> dict[str, str]:
        """What the metadata of an asset says of this run."""
        told = {"MLflow run": self.registry.run_url(self.experiment_id, self.run_id)} if self.run_id else {}
        return {**told, "MLflow trouble": self.trouble} if self.trouble else told

    def _record(self, work: Callable[[MlflowClient, str], Any]) -> None:
        run_id = self.run_id
        if run_id is None or self.trouble:
            return
        try:
            self.registry.call(lambda client: work(client, run_id))
        except RegistryError as error:
            self.trouble = str(error)


class Registry:
    """The runs and versions of an installation. MLflow is imported and its database made at the first use."""

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.tracking_uri
        self._artifacts = settings.run_artifacts_uri
        self._settings = settings.mlflow
        self._made: MlflowClient | None = None

    # -- runs ---------------------------------------------------------------------------------------------------

    @contextmanager
    def run(self, name: str, tags: Mapping[str, str]) -> Iterator[RegistryRun]:
        """A run that ends with the block: FINISHED, or FAILED when the block raises."""
        run = self._start(name, tags)
        try:
            yield run
        except BaseException:
            run.close("FAILED")
            raise
        run.close()

    def _start(self, name: str, tags: Mapping[str, str]) -> RegistryRun:
        try:
            made: Run = self.call(lambda client: client.create_run(self._experiment(client), tags=dict(tags), run_name=name))
        except RegistryError as error:
            return RegistryRun(self, trouble=str(error))
        return RegistryRun(self, made.info.run_id, made.info.artifact_uri, made.info.experiment_id)

    def _experiment(self, client: MlflowClient) -> str:
        name = self._settings.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            _unless_it_exists(lambda: client.create_experiment(name, self._artifacts))
            found = client.get_experiment_by_name(name)
        assert found is not None
        return str(found.experiment_id)

    def run_url(self, experiment_id: str, run_id: str) -> str:
        """The run's page where a server shows it, else its id and the database."""
        if self.uri.startswith(("http://", "https://")):
            return f"{masked_text(self.uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{run_id} in {masked_text(self.uri)}"

    # -- versions and aliases -----------------------------------------------------------------------------------

    def register(self, manifest: Manifest, release_uri: str, run: RegistryRun) -> Version:
        """The version of a release, made where there is none, as `challenger`. Raises RegistryError."""
        if run.run_id is None or run.trouble:
            raise RegistryError(run.trouble or "the run of the release was not recorded")
        source = f"{run.artifact_uri}/release"
        version = self.find(manifest.release_id) or self._create(manifest, release_uri, source, run.run_id)
        self._set_alias(CHALLENGER, version)
        return version

    def promote(self, manifest: Manifest, release_uri: str) -> Version:
        """Move the alias `champion` to the version of a release, and drop `challenger` where it is the same version.

        A release that was made while MLflow was away is registered first, without a run. Raises RegistryError.
        """
        version = self.find(manifest.release_id) or self._create(manifest, release_uri, masked_text(release_uri), None)
        self._set_alias(CHAMPION, version)
        challenger = self.resolve(CHALLENGER)
        if challenger is not None and challenger.version == version.version:
            self.call(lambda client: client.delete_registered_model_alias(self._settings.model, CHALLENGER))
        return version

    def follow(self, releases: Releases) -> Version | None:
        """Let the alias `champion` name what the pointer file names, also when that changes meanwhile.

        Returns the version, None when there is no champion. Raises RegistryError, ReleaseError.
        """
        version, followed = None, None
        while (pointer := releases.champion()) is not None and pointer != followed:
            uri = f"{releases.uri}/{pointer.release_id}"
            version, followed = self.promote(releases.manifest(pointer.release_id), uri), pointer
        return version

    def resolve(self, alias: str) -> Version | None:
        """The version that an alias names at this moment; work with the version from then on. Raises RegistryError."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def find(self, release_id: str) -> Version | None:
        """The version of a release. Raises RegistryError."""
        found = self._search(f"name = '{self._settings.model}' AND tags.{RELEASE_ID} = '{release_id}'")
        return found[0] if found else None

    def versions(self) -> list[Version]:
        """All versions, newest first. Raises RegistryError."""
        return self._search(f"name = '{self._settings.model}'")

    def _search(self, filter_string: str) -> list[Version]:
        aliases = self._aliases()
        found: list[ModelVersion] = []
        token: str | None = ""
        while token is not None:
            page = self.call(partial(_search_page, filter_string=filter_string, token=token))
            found += page
            token = page.token or None
        versions = [_version(version, aliases) for version in found]
        return sorted(versions, key=lambda v: int(v.version), reverse=True)

    def _aliases(self) -> dict[str, str]:
        """Version by alias."""
        from mlflow.exceptions import MlflowException

        def read(client: MlflowClient) -> dict[str, str]:
            try:
                return dict(client.get_registered_model(self._settings.model).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

        return self.call(read)

    def _create(self, manifest: Manifest, release_uri: str, source: str, run_id: str | None) -> Version:
        model = self._settings.model
        tags = {RELEASE_ID: manifest.release_id, DAY: manifest.day, RELEASE_URI: masked_text(release_uri)}

        def create(client: MlflowClient) -> ModelVersion:
            _unless_it_exists(lambda: client.create_registered_model(model))
            return client.create_model_version(model, source, run_id, tags=tags, await_creation_for=0)

        return _version(self.call(create), {})

    def _set_alias(self, alias: str, version: Version) -> None:
        self.call(lambda client: client.set_registered_model_alias(self._settings.model, alias, version.version))

    # -- all that was recorded ----------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether anything can be recorded here: looking at a database that nobody made does not make it."""
        return not self.uri.startswith("sqlite:///") or os.path.exists(self.uri.removeprefix("sqlite:///"))

    def runs(self) -> Iterator[Run]:
        """All runs of all experiments, deleted ones as well. Raises RegistryError."""
        from mlflow.entities import ViewType

        if not self.exists():
            return
        experiments = self.call(lambda client: client.search_experiments(ViewType.ALL))
        token: str | None = ""
        while token is not None and experiments:
            page = self.call(
                partial(_runs_page, experiments=[e.experiment_id for e in experiments], view=ViewType.ALL, token=token)
            )
            yield from page
            token = page.token or None

    def files(self, run: Run, folder: str = "") -> Iterator[str]:
        """Paths of a run's files. Raises RegistryError."""
        for entry in self.call(lambda client: client.list_artifacts(run.info.run_id, folder or None)):
            if entry.is_dir:
                yield from self.files(run, entry.path)
            else:
                yield entry.path

    def read_file(self, run: Run, path: str) -> bytes:
        """Raises RegistryError."""
        with tempfile.TemporaryDirectory() as folder:
            found = self.call(lambda client: client.download_artifacts(run.info.run_id, path, folder))
            return Path(found).read_bytes()

    def remove_files(self, run: Run, path: str | None = None) -> None:
        """Delete one file of a run, or all of them. Raises RegistryError."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.call(lambda _: get_artifact_repository(run.info.artifact_uri, tracking_uri=self.uri).delete_artifacts(path))

    def remove_run(self, run: Run) -> None:
        """Delete a run and its files. Raises RegistryError."""
        self.remove_files(run)
        self.call(lambda client: client.delete_run(run.info.run_id))

    def remove_version(self, version: Version) -> None:
        """Delete a version of the registered model. Raises RegistryError."""
        self.call(lambda client: client.delete_model_version(self._settings.model, version.version))

    def remove_tag(self, run: Run, name: str) -> None:
        """Raises RegistryError."""
        self.call(lambda client: client.delete_tag(run.info.run_id, name))

    # -- MLflow -------------------------------------------------------------------------------------------------

    def call(self, work: Callable[[MlflowClient], T]) -> T:
        """Do something with the client. Raises RegistryError for everything that MLflow, its database or its network raise."""
        client_type, failures = self._mlflow()
        try:
            if self._made is None:
                self._made = client_type(tracking_uri=self.uri, registry_uri=self.uri)
            return work(self._made)
        except failures as error:
            first_line = masked_text(str(error).strip().split("\n", 1)[0])[:_LONGEST_MESSAGE]
            raise RegistryError(masked_text(f"MLflow at {self.uri}: {type(error).__name__}: {first_line}")) from error

    def _mlflow(self) -> tuple[type[MlflowClient], tuple[type[Exception], ...]]:
        """The client's class and what it raises. A server that is away is given up after a second call, not after minutes."""
        defaults = {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(self._settings.timeout_seconds),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        }
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        return MlflowClient, (MlflowException, SQLAlchemyError, OSError)


def _unless_it_exists(create: Callable[[], Any]) -> None:
    """Two processes may make the same thing at once: the second takes what the first made."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _search_page(client: MlflowClient, filter_string: str, token: str) -> Any:
    return client.search_model_versions(filter_string, page_token=token or None)


def _runs_page(client: MlflowClient, experiments: list[str], view: int, token: str) -> Any:
    return client.search_runs(experiments, run_view_type=view, page_token=token or None)


def _log_batch(client: MlflowClient, run_id: str, **content: Any) -> None:
    client.log_batch(run_id, **content)


def _parts(values: list[T], size: int) -> Iterator[list[T]]:
    for at in range(0, len(values), size):
        yield values[at : at + size]


def _version(found: ModelVersion, aliases: Mapping[str, str]) -> Version:
    names = tuple(sorted(alias for alias, version in aliases.items() if str(version) == str(found.version)))
    tags = found.tags
    return Version(str(found.version), tags.get(RELEASE_ID, ""), tags.get(DAY, ""), found.run_id or "", names)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _name(key: str) -> str:
    """MLflow's names hold letters, digits, `_ - . / :` and spaces."""
    return re.sub(r"[^\w\-./: ]", "_", key.replace("@", " at "))
