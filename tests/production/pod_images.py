"""What the images of the Dockerfile hold, found on this machine, where none can be built.

`serving`, `streaming`, `webserver` and `mlflow` have the files that the Dockerfile copies, and of packages those of their list.
`code-location` has this environment and this checkout. `spark` has an environment of the executors' list. Variables, user and
command are the Dockerfile's.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import py4j
import pyspark
from deployment import PROJECT, stages
from image import LISTS, Image
from spark_cluster import executor_python

from recsys_cli.java import ensure_java
from recsys_core.spark_s3 import s3_conf

SYSTEM_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
USER = 10001
OWNED = ("/var/lib/recsys", "/opt/dagster/dagster_home", "/home/recsys")
"""Folders that the Dockerfile gives to its user."""


@dataclass(frozen=True)
class PodImage:
    """An image as a node needs it.

    Attributes:
        entrypoint, command: that a pod may replace.
        variables: of every process.
        workdir: where its processes start.
        holds: where in the image something of this machine lies.
    """

    entrypoint: Sequence[str]
    command: Sequence[str]
    variables: Mapping[str, str]
    workdir: str
    holds: Mapping[str, Path]


def pod_images(folder: Path) -> dict[str, PodImage]:
    """The images by the last part of their names; `folder` takes what is made for them."""
    base = {"PATH": f"/opt/recsys/bin:{SYSTEM_PATH}", **_variables("python"), "HOME": "/home/recsys"}
    java = {"JAVA_HOME": str(ensure_java().path)}
    found = {name: _thin(name, folder, base) for name in LISTS}
    found["code-location"] = _image(
        "code-location",
        {**base, **java, "PYTHONPATH": str(PROJECT), "RECSYS_JARS": "/opt/jars"},
        {"/opt/recsys": Path(sys.prefix), "/opt/jars": _jars(folder / "jars"), **_copied("code-location", folder)},
    )
    with_spark = folder / "pyspark"
    with_spark.mkdir()
    for package in (pyspark, py4j):
        (with_spark / package.__name__).symlink_to(Path(package.__file__).parent)
    found["spark"] = _image(
        "spark",
        {**base, **java, "PYTHONPATH": "/opt/pyspark"},
        {"/opt/recsys": executor_python().parents[1], "/opt/pyspark": with_spark, **_copied("spark", folder)},
    )
    return found


def _jars(folder: Path) -> Path:
    """Those of S3, which the image has among Spark's own, as this machine has fetched them, for every user."""
    fetched = Path(s3_conf("s3://any")["spark.jars"].partition(",")[0]).parent
    shutil.copytree(fetched, folder / fetched.name)
    (folder / fetched.name).chmod(0o755)
    return folder


def _thin(target: str, folder: Path, base: Mapping[str, str]) -> PodImage:
    image = Image(target, folder)
    # Programs name each other by where they were made.
    return _image(target, base, {"/opt/recsys/bin": image.programs, str(image.programs): image.programs, "/app": image.folder})


def _image(target: str, variables: Mapping[str, str], holds: Mapping[str, Path]) -> PodImage:
    said = {name: rest for name, rest in stages()[target] if name in ("ENTRYPOINT", "CMD")}
    entrypoint, command = (json.loads(said.get(name, "[]")) for name in ("ENTRYPOINT", "CMD"))
    workdir = [rest for name, rest in stages()[target] if name == "WORKDIR"][-1]
    return PodImage(entrypoint, command, {**variables, **_variables(target)}, workdir, holds)


def _variables(target: str) -> dict[str, str]:
    """What the Dockerfile's stage sets, but for PATH."""
    words = [word for name, rest in stages()[target] if name == "ENV" for word in shlex.split(rest)]
    return {name: value for name, value in (word.split("=", 1) for word in words) if name != "PATH"}


def _copied(target: str, folder: Path) -> dict[str, Path]:
    """Where the files are that an image copies beside its packages."""
    app = folder / target
    app.mkdir()
    for name, rest in stages()[target]:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                (app / Path(source).name).write_bytes((PROJECT / source).read_bytes())
    return {"/app": app}
