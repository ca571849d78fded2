"""Spark's executors outside of this process: they get this package, and are asked whether they can run it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from hashlib import sha1
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from recsys_core.errors import UserError
from recsys_core.masking import masked_text
from recsys_core.stores import open_filesystem, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession


class ExecutorsUnfit(UserError):
    """Spark's executors can't run what this package gives them; the message says what they lack and what to do."""


def equip_executors(spark: SparkSession, folder: Path) -> None:
    """Send this package to the executors, by an archive in `folder`, and have one of them import it and what it needs.

    One that can't says so before any work is done. Raises ExecutorsUnfit.
    """
    from pyspark.errors import PySparkException

    spark.sparkContext.addPyFile(str(_archive(folder)))
    try:
        spark.range(1, numPartitions=1).mapInArrow(_importing, "id long").collect()
    except PySparkException as error:
        lines = [line for line in str(error).splitlines() if "Error" in line]
        said = masked_text((lines or [str(error)])[-1].strip())
        raise ExecutorsUnfit(
            f"Spark's executors can't run what this platform gives them: {said}\n"
            "They need the Python of the driver and the packages of deploy/requirements/executors.txt: install both where "
            'executors run, and say where by "spark.pyspark.python" in [spark.conf]'
        ) from error


def _importing(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Import what functions of this package come from that Spark runs; the rows stay as they are."""
    import_module("recsys_core.feature_tables")
    yield from batches


def _archive(folder: Path) -> Path:
    """This package as an archive for executors, named by its content, so that they run what the driver runs."""
    source = Path(__file__).parent
    files = sorted(source.glob("*.py"))
    digest = sha1(b"".join(file.read_bytes() for file in files), usedforsecurity=False).hexdigest()[:12]
    path = folder / f"{source.name}-{digest}.zip"
    if not path.exists():
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, f"{source.name}/{file.name}")
        fs, inside = open_filesystem(str(path))
        write_atomically(fs, inside, content.getvalue())
    return path
