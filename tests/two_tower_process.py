"""A training in a process of its own, for tests that kill it or need other devices.

    python two_tower_process.py HOME '{"epochs": 3}' ['kill=epoch 2 of:STEP'] [cpus=2]

Prints `trained` at the end. `kill` ends the process by SIGKILL at that step of the pass whose name has these words.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from examples import DAY
from recsys_home import default_settings

from recsys_core import progress
from recsys_core.lake import Lake
from recsys_core.two_tower import fit_two_tower


class KillingBar:
    """Progress of a task that ends the process at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> KillingBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, completed: float, total: float | None = None) -> None:  # noqa: ARG002
        if completed == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    home, options = Path(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[3:])
    if "cpus" in options:
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(options["cpus"]))
    words, step = options.get("kill", "never:0").split(":")
    settings = default_settings(home, two_tower=json.loads(sys.argv[2]))
    with progress.reporting_to(lambda name, _: KillingBar(int(step) if words in name else -1)):
        fit_two_tower(Lake(str(home / "lake")), DAY, settings)
    print("trained")


if __name__ == "__main__":
    main()
