"""The sensors of the code location, all started by themselves when the settings say so."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg

from recsys_assets.resources import Platform, PlatformResource
from recsys_sensors.alerting import alerts
from recsys_sensors.automation import AUTOMATED
from recsys_sensors.catch_up import missed_hours, missed_nights
from recsys_sensors.jobs import caches_job, hourly_job, late_job, nightly_job
from recsys_sensors.late_data import late_hours
from recsys_sensors.promotion import champion_promoted
from recsys_sensors.stream_health import stream_observed

Evaluation = Callable[[dg.SensorEvaluationContext, Platform], dg.SensorResult]
SECONDS = 60
"""Between two looks, unless said otherwise."""


def sensors(running: bool) -> list[dg.SensorDefinition]:
    """The sensors, started by themselves when `running` ([dagster] automation)."""
    status = dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
    return [
        _sensor(missed_hours, status, job=hourly_job),
        _sensor(missed_nights, status, 5 * SECONDS, job=nightly_job),
        _sensor(late_hours, status, 15 * SECONDS, job=late_job),
        _sensor(champion_promoted, status, 15, job=caches_job),
        _sensor(stream_observed, status),
        _sensor(alerts, status, 30),
        dg.AutomationConditionSensorDefinition("automation", target=AUTOMATED, default_status=status),
    ]


def _sensor(
    evaluate: Evaluation,
    status: dg.DefaultSensorStatus,
    seconds: int = SECONDS,
    job: dg.UnresolvedAssetJobDefinition | None = None,
) -> dg.SensorDefinition:
    @dg.sensor(
        name=evaluate.__name__,
        description=(evaluate.__doc__ or "").strip().splitlines()[0],
        job=job,
        default_status=status,
        minimum_interval_seconds=seconds,
    )
    def sensor(context: dg.SensorEvaluationContext, platform: PlatformResource) -> dg.SensorResult:
        return evaluate(context, platform)

    return sensor
