"""The stream's heartbeat and lag: observations on `clickstream_topic`, and alerts while it is silent or behind."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg

from recsys_assets.resources import Platform
from recsys_core.alerts import Alert
from recsys_core.heartbeat import Heartbeat, read_heartbeats
from recsys_core.masking import masked_text

TOPIC = dg.AssetKey("clickstream_topic")
LOOK_SECONDS = 2.0
"""What Redis gets for an answer: a tick must end also while it hangs."""


class Unseen(Exception):
    """The heartbeats can't be read; the message says why."""


def stream_observed(context: dg.SensorEvaluationContext, platform: Platform) -> dg.SensorResult:
    """An observation of the topic whenever a worker said something new."""
    try:
        beats = _beats(platform)
    except Unseen as error:
        return dg.SensorResult(skip_reason=str(error), cursor=context.cursor)
    newest = max((beat.at for beat in beats), default=0)
    if str(newest) == (context.cursor or "0"):
        return dg.SensorResult(skip_reason="no worker said anything new", cursor=str(newest))
    known = [beat.lag for beat in beats if beat.lag >= 0]
    observation = dg.AssetObservation(
        TOPIC,
        metadata={
            "workers": len(beats),
            "events behind": sum(known) if known else "unknown",
            "events applied": sum(beat.events for beat in beats),
            "seconds since the last heartbeat": round((platform.now_ms() - newest) / 1000, 1),
        },
    )
    return dg.SensorResult(asset_events=[observation], cursor=str(newest))


def stream_alerts(platform: Platform) -> Iterator[Alert]:
    """What is wrong with the stream now. A stack that never had a worker has no stream to be missed. Raises Unseen."""
    settings = platform.settings.alerts
    beats = _beats(platform)
    for beat in beats:
        silent = (platform.now_ms() - beat.at) / 1000
        if silent > settings.silent_seconds:
            text = f"Its last heartbeat was {silent:.0f} s ago: live features and trends stand still."
            yield Alert(f"stream silent: {beat.worker}", f"Stream worker {beat.worker} is silent", text)
    lag = sum(beat.lag for beat in beats if beat.lag >= 0)
    if lag > settings.max_lag_events:
        yield Alert("stream lag", f"The stream is {lag:,} events behind", f"The limit is {settings.max_lag_events:,}.")


def _beats(platform: Platform) -> list[Heartbeat]:
    try:
        with platform.redis(socket_timeout=LOOK_SECONDS) as redis:
            return read_heartbeats(redis)
    except Exception as error:
        raise Unseen(f"the stream's heartbeats can't be read: {masked_text(f'{type(error).__name__}: {error}')}") from error
