"""Dagster's storage on SQLite that writes the events of a batch in one transaction of each of its databases.

Dagster hands the events of a step's partitions over in batches (`DAGSTER_EVENT_BATCH_SIZE`). Its own SQLite storage then
stores them one by one, each with connections, transactions and look-ups of the schema of its own. The databases and what is in
them are the same, so that either storage opens what the other one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import dagster as dg
from dagster._core.storage.event_log.schema import AssetEventTagsTable, SqlEventLogStorageTable
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

TOGETHER = {
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    dg.DagsterEventType.ASSET_OBSERVATION,
}
"""Events of which there is one for each partition."""


class BatchedSqliteEventLog(SqliteEventLogStorage):
    """The event log, a database for each run and one for all of them."""

    def store_event_batch(self, events: Sequence[dg.EventLogEntry]) -> None:
        """Store events in their order; those of a stretch of partitions together."""
        for (run_id, together), stretch in groupby(events, lambda event: (event.run_id, event.dagster_event_type in TOGETHER)):
            if together:
                self._store_together(run_id, list(stretch))
                continue
            for event in stretch:
                self.store_event(event)

    def _store_together(self, run_id: str, events: Sequence[dg.EventLogEntry]) -> None:
        """Write all events, or none and raise: Dagster then stores them one by one.

        The database of all runs, which others write too, goes first; what went there is taken back where the run's fails.
        Killed in between, a run leaves materializations that its own log lacks.
        """
        rows = [self._event_to_row(event) for event in events]
        insert = SqlEventLogStorageTable.insert()
        with self.index_transaction() as connection:
            returning = insert.returning(SqlEventLogStorageTable.c.id, sort_by_parameter_order=True)
            ids = list(connection.execute(returning, rows).scalars())
            self._store_asset_event_tags(connection, events, ids)
            # What is kept of an asset itself is of its last event of a type.
            last = {
                (event.dagster_event.asset_key, event.dagster_event_type): (event, id_)
                for event, id_ in zip(events, ids, strict=True)
                if event.dagster_event
            }
            for event, id_ in last.values():
                self._store_asset_event(connection, event, id_)
        try:
            with self.run_connection(run_id) as connection:
                connection.execute(insert, rows)
        except Exception:
            with self.index_transaction() as connection:
                for column in (AssetEventTagsTable.c.event_id, SqlEventLogStorageTable.c.id):
                    # One transaction has given the numbers, so they follow each other.
                    connection.execute(column.table.delete().where(column.between(ids[0], ids[-1])))
            raise


class BatchedSqliteStorage(DagsterSqliteStorage):
    """Runs, events and schedules under `base_dir`, as `storage: sqlite` of dagster.yaml has them."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        self._event_log_storage = BatchedSqliteEventLog(self._event_log_storage._base_dir)

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> BatchedSqliteStorage:
        return cls.from_local(inst_data=inst_data, **config_value)
