"""What is made by the state of the graph rather than by the clock, as automation conditions.

`trending_items` of a recent hour again: late events change `clicks_hourly` of an hour, and with it the trends of that
hour and of the hours whose window it is in. Only the last hours are of use to anyone, so the condition looks at those.

    in_latest_time_window        the trends of the last hours only: a backfill of the past asks for nothing
    newly_updated of a parent    an hour of the window was made (again) since the last look
    ~ executed_with_root_target  but not in the run that made these trends as well, which the hourly job is
    ~ missing                    the hourly job and `missed_hours` make what was never there
    ~ in_progress                nor while either is being made

A condition that only asked whether the parents are newer would ask again after every failed run; this one asks once for
each change.
"""

from __future__ import annotations

from datetime import timedelta

import dagster as dg

RECENT = timedelta(hours=3)
AUTOMATED = dg.AssetSelection.assets("trending_items")

trends_again = (
    dg.AutomationCondition.in_latest_time_window(RECENT)
    & dg.AutomationCondition.any_deps_match(
        dg.AutomationCondition.newly_updated() & ~dg.AutomationCondition.executed_with_root_target()
    )
    & ~dg.AutomationCondition.missing()
    & ~dg.AutomationCondition.in_progress()
    & ~dg.AutomationCondition.any_deps_in_progress()
).with_label("trends again after late events")

CONDITIONS = {"trending_items": trends_again}


def automated(spec: dg.AssetSpec) -> dg.AssetSpec:
    """The asset with its automation condition, when it has one."""
    condition = CONDITIONS.get(spec.key.to_user_string())
    return spec.replace_attributes(automation_condition=condition) if condition else spec
