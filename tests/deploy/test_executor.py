"""How the image of Spark's executors starts one."""

from __future__ import annotations

import os
import subprocess
import sys

from deployment import DEPLOY

SAID = {
    "SPARK_DRIVER_URL": "spark://CoarseGrainedScheduler@127.0.0.1:1",
    "SPARK_EXECUTOR_ID": "1",
    "SPARK_EXECUTOR_CORES": "1",
    "SPARK_EXECUTOR_MEMORY": "300m",
    "SPARK_APPLICATION_ID": "spark-1",
    "SPARK_EXECUTOR_POD_IP": "127.0.0.1",
    "SPARK_RESOURCE_PROFILE_ID": "0",
    "SPARK_EXECUTOR_POD_NAME": "executor-1",
    "SPARK_JAVA_OPT_0": "-Dspark.driver.port=1",
    "SPARK_JAVA_OPT_10": "-Drecsys.option=last",
    "SPARK_JAVA_OPT_9": "-XX:+UseSerialGC",
}
"""What Spark's backend puts into an executor's pod, with a driver that is not there."""


def test_spark_takes_what_it_says_of_an_executor_itself_and_looks_for_the_driver() -> None:
    environment = {**{name: os.environ[name] for name in ("PATH", "JAVA_HOME") if name in os.environ}, **SAID}
    command = [sys.executable, str(DEPLOY / "executor.py"), "executor"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert "Unrecognized options" not in said
    assert "Failed to connect to /127.0.0.1:1" in said, said[-2000:]
