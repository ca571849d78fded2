"""Starts a Spark executor in its pod: what it is, Spark's Kubernetes backend says by the pod's variables."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

BACKEND = "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend"
OPTION = "SPARK_JAVA_OPT_"
ARGUMENTS = {
    "--driver-url": "SPARK_DRIVER_URL",
    "--executor-id": "SPARK_EXECUTOR_ID",
    "--cores": "SPARK_EXECUTOR_CORES",
    "--app-id": "SPARK_APPLICATION_ID",
    "--hostname": "SPARK_EXECUTOR_POD_IP",
    "--resourceProfileId": "SPARK_RESOURCE_PROFILE_ID",
    "--podName": "SPARK_EXECUTOR_POD_NAME",
}


def command(said: Mapping[str, str], spark_home: Path) -> list[str]:
    """The Java process of the executor."""
    numbered = sorted((name for name in said if name.startswith(OPTION)), key=lambda name: int(name.removeprefix(OPTION)))
    memory = said["SPARK_EXECUTOR_MEMORY"]
    classes = [said.get("SPARK_CONF_DIR", ""), said.get("SPARK_CLASSPATH", ""), f"{spark_home}/jars/*"]
    java = [Path(said["JAVA_HOME"], "bin", "java").as_posix()] if "JAVA_HOME" in said else ["java"]
    arguments = [word for option, name in ARGUMENTS.items() for word in (option, said[name])]
    options = [said[name] for name in numbered]
    return [*java, *options, f"-Xms{memory}", f"-Xmx{memory}", "-cp", ":".join(filter(None, classes)), BACKEND, *arguments]


if __name__ == "__main__":
    found = importlib.util.find_spec("pyspark")
    assert found is not None
    assert found.origin is not None
    home = Path(found.origin).parent
    os.environ["SPARK_HOME"] = str(home)
    started = command(os.environ, home)
    os.execvp(started[0], started)
