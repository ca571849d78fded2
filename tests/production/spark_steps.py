"""Every step of the platform that Spark makes, one after the other, on what lies in the landing zone of the settings' lake.

The last line that it prints is a JSON object of the partitions that were made and their data versions, in the order of making.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from recsys_core.als import fit_als
from recsys_core.events import DAY_MS, hour_keys, key_start_ms
from recsys_core.feature_tables import build_item_features, build_training_examples, build_user_features
from recsys_core.lake import Lake, Partition
from recsys_core.landing import Landing
from recsys_core.settings import load_settings
from recsys_core.spark import session, stop_session
from recsys_core.tables import (
    INTERACTIONS,
    build_active_users,
    build_clicks_hourly,
    build_interactions,
    build_online_features,
)

FACTORS = "als_factors"


def main() -> None:
    settings = load_settings()
    lake = Lake(settings.lake_uri)
    landing = Landing(lake)
    day = landing.last_busy_day()
    assert day is not None
    hours = hour_keys(key_start_ms(day), key_start_ms(day) + DAY_MS)
    made: dict[str, str] = {}

    def note(parts: Iterable[Partition]) -> None:
        for part in parts:
            made[f"{part.table}/{part.key}"] = part.data_version
            print(part.table, part.key, part.rows, flush=True)

    spark = session(settings)
    note(build_clicks_hourly(spark, lake, landing, hours, settings.events))
    note(build_interactions(spark, lake, [day], settings.events, settings.interactions))
    note(build_user_features(spark, lake, [day], settings))
    note(build_item_features(spark, lake, [day], settings))
    note(build_training_examples(spark, lake, [day], settings))
    report = fit_als(lake, lake.files(INTERACTIONS, [day]), FACTORS, day, settings.als, lambda: spark, "spark")
    print(report, flush=True)
    note([build_online_features(spark, lake, day, f"{FACTORS}_users")])
    note([build_active_users(spark, lake, hours[-1], settings.cache.active_hours)])
    stop_session()
    print(json.dumps(made))


if __name__ == "__main__":
    main()
