"""How Spark reaches a lake in S3: Hadoop's filesystem of it, at the place and by the login that s3fs takes as well."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from recsys_core.jars import JarsUnavailable, Module, fetch_jars

S3 = ("s3://", "s3a://")
CREDENTIALS = "software.amazon.awssdk.auth.credentials.DefaultCredentialsProvider"
"""The chain of the AWS SDK: variables, a web identity, a profile, the container's or the machine's role."""
AWS_SDK = "2.35.4"
AWS_PARTS = ("s3", "sts", "s3-transfer-manager", "apache-client", "netty-nio-client")
ANALYTICS = Module("software.amazon.s3.analyticsaccelerator", "analyticsaccelerator-s3", "1.3.1", alone=True)


def s3_conf(lake_uri: str) -> dict[str, str]:
    """How Spark reaches a lake in S3: where and by the same login as s3fs does, the AWS variables and their chain."""
    if not lake_uri.startswith(S3):
        return {}
    conf = {
        "spark.hadoop.fs.s3a.aws.credentials.provider": CREDENTIALS,
        # A rename there is a copy: once a file instead of twice. Nobody reads what is staged before its job has ended well.
        "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
    }
    if jars := s3_jars():
        conf["spark.jars"] = ",".join(str(jar) for jar in jars)
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        conf |= {
            "spark.hadoop.fs.s3a.endpoint": endpoint,
            "spark.hadoop.fs.s3a.path.style.access": "true",
            "spark.hadoop.fs.s3a.connection.ssl.enabled": str(endpoint.startswith("https://")).lower(),
        }
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        conf["spark.hadoop.fs.s3a.endpoint.region"] = region
    return conf


def s3_jars() -> list[Path]:
    """The jar files for S3 that PySpark lacks, fetched at the first use. None where its folder has them."""
    if list(_own_jars().glob("hadoop-aws-*.jar")):
        return []
    brought = {_artifact(jar) for jar in _own_jars().glob("*.jar")}
    return [jar for jar in sorted(fetch_jars(_java_home(), *_modules()).glob("*.jar")) if _artifact(jar) not in brought]


def _modules() -> list[Module]:
    """Hadoop's filesystem of S3 in the version of the Hadoop that PySpark brings, and what it needs of the AWS SDK.

    Its own list has all of the SDK in one file of 686 MB.
    """
    client = next(_own_jars().glob("hadoop-client-api-*.jar"))
    hadoop = Module("org.apache.hadoop", "hadoop-aws", client.stem.rpartition("-")[2], alone=True)
    return [hadoop, ANALYTICS, *(Module("software.amazon.awssdk", name, AWS_SDK) for name in AWS_PARTS)]


def _own_jars() -> Path:
    import pyspark

    return Path(pyspark.__file__).parent / "jars"


def _artifact(jar: Path) -> str:
    """The name of a jar file without its version: Spark's own version of it is the one that is used."""
    return re.sub(r"-\d.*", "", jar.stem)


def _java_home() -> Path:
    if home := os.environ.get("JAVA_HOME"):
        return Path(home)
    java = shutil.which("java")
    if java is None:
        raise JarsUnavailable("there is no Java to fetch Hadoop's filesystem of S3 with: set JAVA_HOME")
    return Path(java).resolve().parents[1]
