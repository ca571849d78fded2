"""Every setting of the platform, read once from `recsys.toml` and the environment, validated, passed on.

Sources, the first that names a setting wins: arguments, `RECSYS_<SECTION>__<NAME>` variables, `<home>/recsys.toml`,
`recsys.toml` in the working directory (or the file that `RECSYS_CONFIG` names), the defaults below.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings import (
    SettingsError as PydanticSettingsError,
)

from recsys_core.errors import UserError
from recsys_core.masking import masked_text

HOME_VARIABLE = "RECSYS_HOME"
CONFIG_VARIABLE = "RECSYS_CONFIG"
DEBUG_VARIABLE = "RECSYS_DEBUG"
DEFAULT_HOME = ".recsys"
FILE = "recsys.toml"
PREFIX, NESTED = "RECSYS_", "__"
OTHER_VARIABLES = {
    HOME_VARIABLE: "folder of the installation",
    CONFIG_VARIABLE: "file that is read in place of recsys.toml in the working directory",
    DEBUG_VARIABLE: "1: commands show the traceback of an unexpected error",
    "RECSYS_TOKEN": "bearer token of `recsys recommend` and the like",
    "RECSYS_CA": "their --ca",
    "RECSYS_CERTIFICATE": "their --certificate",
    "RECSYS_KEY": "their --key",
    "RECSYS_JARS": "folder of fetched jar files",
    "RECSYS_DATA_DIR": "data sets of the benchmarks",
    "RECSYS_VERSION": "tag of the images of deploy/compose.yaml",
}
"""Variables that are no settings. `serving.tokens` may name further ones."""
SERVICE_LINKS = r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)"
"""Variables that Kubernetes gives every pod for each service of its namespace."""


METRICS = ("ndcg", "recall", "hit", "map", "mrr", "coverage", "novelty")
"""What an evaluation measures, at each cut-off."""
PATTERNS = re.compile(r"[*?\[\]{}\\,\n]|%[0-9A-Fa-f]{2}|::")
"""Spark, fsspec and glob take these for patterns or lists of paths, SQLite's URLs for escapes."""


class SettingsError(UserError, ValueError):
    """A file or variable of the settings can't be read."""


class Section(BaseModel):
    """A table of `recsys.toml`. A name that it does not know is an error, not a silent no-op; no number is infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


def _without_patterns(path: str) -> str:
    """Raises ValueError for a path that Spark or a store would read as another."""
    if found := PATTERNS.search(path):
        raise ValueError(f"{found[0]!r} in a path means something else to Spark, SQLite or the stores: name a folder without")
    return path


PlainPath = Annotated[str, AfterValidator(_without_patterns)]


class LakeSettings(Section):
    uri: PlainPath = Field("", description="root of all tables, a path or an fsspec URI; empty: <home>/lake")
    keep_versions: int = Field(2, ge=1, description="versions of a partition that stay readable after a replacement")


class PartitionSettings(Section):
    start: date = Field(date(2026, 1, 1), description="first day of the hourly and daily partitions (UTC)")
    end: date | None = Field(None, description="day after the last partition; unset: partitions grow with the clock")

    @model_validator(mode="after")
    def _has_days(self) -> PartitionSettings:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end is the day after the last partition, and {self.end} is not after start, {self.start}")
        return self


class EventSettings(Section):
    weights: dict[str, float] = Field(
        default_factory=lambda: {
            "view": 1.0,
            "click": 1.0,
            "like": 3.0,
            "comment": 4.0,
            "follow": 4.0,
            "bookmark": 4.0,
            "rating": 2.0,
            "fav": 3.0,
            "cart": 4.0,
            "purchase": 8.0,
        },
        description="the event types that are accepted and the weight of each in `interactions`",
    )
    session_gap_minutes: int = Field(30, ge=1, description="inactivity that ends a session")
    lookback_hours: int = Field(
        12, ge=1, description="how far before an hour events are read to continue sessions and drop late duplicates"
    )
    max_future_minutes: int = Field(60, ge=0, description="an event later than the clock by more is quarantined")
    max_id_bytes: int = Field(256, ge=8, description="a longer user, item, event or session id is quarantined")

    @field_validator("weights")
    @classmethod
    def _weights_are_positive(cls, weights: dict[str, float]) -> dict[str, float]:
        bad = {name: weight for name, weight in weights.items() if not weight > 0}
        if bad or not weights:
            raise ValueError(f"every event type needs a weight above 0, got {bad or 'none'}")
        return weights


class SparkSettings(Section):
    master: str = Field("local[*]", description="spark.master: local[*], spark://…, k8s://…, yarn")
    app_name: str = Field("recsys", description="name of the Spark application")
    conf: dict[str, str] = Field(default_factory=dict, description="any further Spark property")
    driver_memory: str = Field("3g", description="spark.driver.memory; locally, the whole of Spark")
    shuffle_partitions: int = Field(0, ge=0, description="spark.sql.shuffle.partitions; 0: 4 locally, 200 on a cluster")


class InteractionSettings(Section):
    window_days: int = Field(90, ge=1, description="length of the sliding window")
    half_life_days: float = Field(30.0, gt=0, description="age at which an event counts half")


class FeatureSettings(Section):
    history: int = Field(
        50, ge=1, le=1000, description="distinct items of a user's history, newest first: in tables, records and evaluation"
    )
    max_examples: int = Field(
        10_000_000,
        ge=1000,
        description="training examples of a day's window; of more events a sample is taken by a hash of their id",
    )
    checked_examples: int = Field(200, ge=1, description="examples of a day that are made again from the clicks by the check")


class AlsSettings(Section):
    engine: Literal["auto", "spark", "numpy", "implicit"] = Field(
        "auto", description="auto: `numpy` when spark.master is local, else Spark MLlib; `implicit`: approximate, one machine"
    )
    rank: int = Field(64, ge=1, description="number of factors")
    iterations: int = Field(10, ge=1, description="alternating sweeps")
    alpha: float = Field(
        2.0, gt=0, description="confidence of an interaction of weight w, beyond the 1 of all pairs, is alpha·w"
    )
    base_preference: float = Field(
        0.0,
        ge=0,
        le=1,
        description="preference of an interaction in that 1 of all pairs (`numpy`): 0 as Rendle et al. 2022, 1 as Hu et al. "
        "2008 and the other engines",
    )
    regularization: float = Field(
        2.0,
        gt=0,
        description="λ for each observation, as MLlib scales it; on one machine λ × mean observations is the mean. Of `numpy` "
        "where `relative_regularizations` is empty",
    )
    frequency_scaling: float = Field(
        1.0, ge=0, le=1, description="share of that ridge in proportion to a row's frequency (`numpy`); 0: equal for all rows"
    )
    propensity_power: float = Field(
        0.5,
        ge=0,
        le=1,
        description="an interaction weighs inverse to its item's propensity n^power, n its interactions; 0: all alike",
    )
    half_lives_days: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0, 16.0, 4.0, 1.0, 0.25, 0.0625),
        min_length=1,
        description="days after its last event in which half of an interaction fades away, beside the decay of its events; "
        "0: nothing does. Of several that one is taken that foretells the window's last days best",
    )
    relative_regularizations: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.25, 1.0, 2.0),
        description="λ of `numpy` in units of the one with which users who are all alike give items vectors as long as theirs; "
        "of several one is taken together with the half-life",
    )
    seed: int = Field(7, ge=0, description="of the start values")
    min_user_interactions: int = Field(1, ge=1, description="users with fewer items get no factors (fold-in serves them)")
    min_item_interactions: int = Field(1, ge=1, description="items with fewer users get no factors")


class TwoTowerSettings(Section):
    dimension: int = Field(128, ge=2, le=1024, description="length of user and item vectors, and of the embeddings of ids")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (256, 128), description="hidden layers of both towers; empty: vectors are the sums of the embeddings alone"
    )
    item_bias: bool = Field(
        False, description="the last component of an item's vector is its bias: how often it is chosen, whoever asks"
    )
    user_ids: bool = Field(True, description="give users an embedding of their own beside their history and context")
    history: int = Field(
        50, ge=1, le=1000, description="newest items of a user that count, of those that features.history keeps"
    )
    recent: int = Field(3, ge=0, description="newest items that are averaged once more by themselves; 0: none")
    min_user_examples: int = Field(5, ge=1, description="users with fewer examples share the embedding of unknown users")
    user_buckets: int = Field(1_000_000, ge=1, description="most rows of the user embedding; more users share rows")
    item_buckets: int = Field(1_000_000, ge=1, description="most rows of the item embedding; more items share rows")
    id_dropout: float = Field(0.1, ge=0, lt=1, description="share of ids that training hides, so that unknown ones are learned")
    history_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the history's items that training leaves out, others in each step"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the hidden layers")
    loss: Literal["softmax", "binary", "contrastive"] = Field(
        "softmax",
        description="softmax: sampled, with logQ correction; binary: cross-entropy of pairs; contrastive: that of SimpleX",
    )
    temperature: float = Field(0.1, gt=0, description="scores are divided by it in the losses softmax and binary")
    propensity_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="an item's propensity n^power, n its examples, is left out of what the loss softmax learns; 0: nothing is",
    )
    margin: float = Field(0.4, ge=-1, le=1, description="score below which a negative costs nothing (contrastive)")
    negative_weight: float = Field(100.0, gt=0, description="weight of the negatives' mean cost (contrastive)")
    in_batch: bool = Field(True, description="the items of the other examples of a batch are negatives")
    negatives: int = Field(256, ge=0, description="further negatives for each batch, drawn uniformly from all items")
    repeats: bool = Field(
        False, description="learn from actions on items of the user's history too; answers leave out what a user had"
    )
    mask_history: bool = Field(True, description="an item of the user's history is never a negative")
    batch_size: int = Field(1024, ge=2, description="examples of a step on one device")
    learning_rate: float = Field(0.002, gt=0, description="of Adam, at the start")
    final_learning_rate: float = Field(0.1, gt=0, le=1, description="share of it after `epochs`; it falls along a cosine")
    l2: float = Field(0.0, ge=0, description="weight of the squared embeddings that a step touches")
    max_examples: int = Field(0, ge=0, description="most examples that are read, the newest ones; 0: all of the window")
    epochs: int = Field(1, ge=1, description="most passes over the examples; news overfit in a second one, shops gain")
    patience: int = Field(1, ge=1, description="epochs without a lower validation loss before training stops")
    validation_share: float = Field(
        0.1, ge=0, lt=1, description="newest part of the examples that decides when to stop; 0: none"
    )
    validation_rows: int = Field(50_000, ge=1, description="most of its examples that are looked at")
    learn_validation: bool = Field(True, description="end with one pass over the validation part")
    shuffle_rows: int = Field(
        262_144, ge=2, description="examples shuffled in memory at a time; all are spread at random before"
    )
    checkpoint_steps: int = Field(5_000, ge=0, description="steps between checkpoints inside an epoch; 0: after epochs only")
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = Field("float32", description="of the dense layers")
    devices: int = Field(1, ge=0, description="devices to train on, each with its batch; 0: every GPU")
    seed: int = Field(7, ge=0, description="of start values, shuffling, dropout and negatives")


class IndexSettings(Section):
    m: int = Field(32, ge=4, description="HNSW links of a node")
    ef_construction: int = Field(200, ge=8, description="HNSW build-time search width")
    recall_target: float = Field(0.99, gt=0, le=1, description="recall@50 that efSearch is tuned to")
    tuning_queries: int = Field(500, ge=10, description="sampled queries of the tuning")
    max_ef_search: int = Field(1024, ge=16, description="largest efSearch that the tuning tries")


class TrendSettings(Section):
    half_lives_hours: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 0.25, 24.0),
        min_length=1,
        description="ages at which an event counts half; the first one's scores are shown as the trend",
    )
    window_hours: int = Field(24, ge=1, description="events of so many hours count for `trending_items`")
    top: int = Field(500, ge=1, description="items kept")


class RankingSettings(Section):
    als_weight: float = Field(0.7, ge=0, description="blend weight of ALS")
    two_tower_weight: float = Field(0.3, ge=0, description="blend weight of the two-tower model, when a release has one")
    session_weight: float = Field(0.5, ge=0, description="boost by similarity to the last items of the user")
    trend_weight: float = Field(0.5, ge=0, description="boost by the trend of the last hours")
    popular_weight: float = Field(0.1, ge=0, description="weight of the window's popularity")
    trend_mix: tuple[float, ...] = Field(
        (1.0, 0.0, 0.0), description="share of each of trends.half_lives_hours in the trend; below 0: it counts against an item"
    )
    tune: bool = Field(True, description="releases carry the weights that `evaluation` found, else the ones above")
    candidates: int = Field(200, ge=10, description="nearest neighbours drawn from the index for a user")
    session_neighbours: int = Field(20, ge=1, le=50, description="similar items drawn for each of the last items of a user")
    session_decay: float = Field(0.8, gt=0, le=1, description="weight of the n-th last item is decay^n")
    trending: int = Field(100, ge=0, description="trending items among the candidates")
    popular: int = Field(100, ge=0, description="popular items among the candidates")
    exclude_consumed: bool = Field(True, description="leave out what the user had already")
    last_items: int = Field(5, ge=1, le=100, description="last items of a user that an answer takes into account")
    max_consumed: int = Field(10_000, ge=0, description="most recent items of a user that are left out; six bytes each")


class EvaluationSettings(Section):
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((10, 20, 50), description="cut-offs of the metrics, 10 among them")
    max_users: int = Field(5000, ge=1, description="users that are ranked for, sampled by a hash of their id")
    horizon_hours: int = Field(6, ge=1, le=24, description="weights are tuned to what users do in so many hours from a moment")
    tuning_users: int = Field(3000, ge=1, description="users of all moments together that the weights are tuned on")
    cold_user_items: int = Field(3, ge=1, description="a user with at most so many items in the window is cold")
    cold_item_users: int = Field(5, ge=1, description="an item with at most so many users in the window is cold")
    bootstrap: int = Field(1000, ge=10, description="resamples of the users for the 95 % intervals")

    @field_validator("ks")
    @classmethod
    def _has_ten(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if 10 not in ks:
            raise ValueError("10 has to be among them: the gate and the web UI look at it")
        return ks


class ReleaseSettings(Section):
    uri: PlainPath = Field("", description="root of the releases; empty: <home>/releases")


class GateSettings(Section):
    metric: str = Field("ndcg@10", description="metric of the served ranking that a challenger must hold")
    tolerance: float = Field(0.03, ge=0, lt=1, description="share of the champion's value that it may be worse by")
    min_coverage: float = Field(0.001, ge=0, le=1, description="least share of the items among anyone's first ten")
    max_latency_ms: float = Field(20.0, gt=0, description="most milliseconds (median) to rank for one user")
    max_segment_drop: float = Field(0.3, ge=0, le=1, description="share of the champion's value that a segment may lose")
    min_segment_users: int = Field(500, ge=1, description="users that a segment needs to be judged; fewer say little")


class MlflowSettings(Section):
    tracking_uri: str = Field("", description="MLflow's server or database; empty: sqlite in <home>/mlflow.db")
    artifact_uri: str = Field("", description="where runs keep files; empty: <home>/mlflow, or what the server says")
    experiment: str = Field("recsys", description="experiment of the runs")
    model: str = Field("recsys", description="registered model whose versions are the releases")
    timeout_seconds: int = Field(10, ge=1, description="deadline of one call to a server")


class CacheSettings(Section):
    items: int = Field(50, ge=1, le=1000, description="items kept for a user")
    fresh_seconds: int = Field(3600, ge=1, description="older answers are served as STALE_CACHE")
    ttl_seconds: int = Field(24 * 3600, ge=1, description="Redis TTL of an answer")
    feature_ttl_seconds: int = Field(7 * 24 * 3600, ge=1, description="Redis TTL of a user's record")
    active_hours: int = Field(24, ge=1, description="users active in so many hours get a cached answer")
    batch_users: int = Field(2048, ge=1, description="users ranked and written at a time")
    shards: int = Field(8, ge=1, description="parts of the active users; a run that broke off goes on with those not done")
    parallel_steps: int = Field(
        1, ge=1, description="steps that share the shards; in parallel under the executors multiprocess and k8s"
    )


class QualitySettings(Section):
    sample_rows: int = Field(200_000, ge=100, description="rows that a check holds in memory of an hour or a table")
    weeks: int = Field(4, ge=1, description="past weeks whose same hour says what is usual")
    min_events: int = Field(100, ge=1, description="fewer usual events of an hour (or of 24 hours) are not judged")
    min_priced: int = Field(30, ge=1, description="fewer events with a value are not judged by their median")
    min_category_events: int = Field(40, ge=1, description="fewer usual events of a category are not missed")
    max_repeated: float = Field(0.2, gt=0, le=1, description="largest share of events that occur twice, or as a day before")
    min_known_items: float = Field(0.9, ge=0, le=1, description="least share of events of items in the catalogue (a warning)")
    min_shift_gain: float = Field(0.15, gt=0, description="correlation that a shift in time must win to count as one")


class RetentionSettings(Section):
    """What stays. Ages are counted from the newest event, so that a history that ended long ago is not old."""

    landing_days: int = Field(0, ge=0, description="days that landing files stay, the only copy of what arrived; 0: for ever")
    quarantine_days: int = Field(90, ge=0, description="days that quarantined rows stay; 0: for ever")
    hourly_days: int = Field(180, ge=0, description="days that hourly partitions stay; 0: for ever")
    daily_days: int = Field(120, ge=0, description="days that daily partitions stay; 0: for ever")
    releases: int = Field(14, ge=0, description="newest releases that stay, the champion besides; 0: all")
    champions: int = Field(5, ge=1, description="earlier champions that stay besides, for `recsys release rollback`")
    run_days: int = Field(30, ge=0, description="days that Dagster's runs stay which made nothing that is kept; 0: for ever")


class RedisSettings(Section):
    mode: Literal["standalone", "sentinel", "cluster"] = Field("standalone", description="kind of the installation")
    url: str = Field("redis://127.0.0.1:6379/0", description="redis:// or rediss:// URL of a standalone Redis")
    nodes: list[str] = Field(default_factory=list, description="host:port of the sentinels, or of some nodes of the cluster")
    service: str = Field("recsys", description="name of the master that the sentinels watch")
    username: str = Field("", description="ACL user; empty: the default user, or the one in the URL")
    password: SecretStr = Field(SecretStr(""), description="its password; better given as RECSYS_REDIS__PASSWORD")
    sentinel_password: SecretStr = Field(SecretStr(""), description="password of the sentinels themselves, if they have one")
    tls: bool = Field(False, description="TLS to sentinels and cluster nodes; a standalone Redis says it by rediss://")
    ca_file: str = Field("", description="PEM file of the authority that signed the servers' certificates; empty: the system's")
    cert_file: str = Field("", description="PEM file of this client's certificate, where the servers ask for one")
    key_file: str = Field("", description="PEM file of its key")
    read_replicas: bool = Field(False, description="online reads go to replicas as well; they may be a moment behind")
    wait_replicas: int = Field(0, ge=0, description="replicas that must have a batch of the speed layer before it counts")
    timeout_ms: int = Field(20, ge=1, description="deadline of one online read of a user, from when it is sent")

    @field_validator("url")
    @classmethod
    def _names_a_redis(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            named = parts.scheme == "unix" or (parts.scheme in ("redis", "rediss") and (parts.port or 0) >= 0)
        except ValueError:  # its port
            named = False
        if not named:
            raise ValueError(
                "it is redis://host:port/number, rediss://… for TLS or unix:///path; ports end at 65535, and / ? # @ of a "
                "password are written %2F %3F %23 %40"
            )
        return url

    @model_validator(mode="after")
    def _has_nodes(self) -> RedisSettings:
        wrong = [node for node in self.nodes if not node.rpartition(":")[2].isdecimal() or not node.rpartition(":")[0]]
        if wrong:
            raise ValueError(f"every node is host:port, got {', '.join(map(masked_text, wrong))}")
        if self.mode != "standalone" and not self.nodes:
            raise ValueError(f"mode {self.mode} needs the host:port of at least one node in `nodes`")
        if self.mode == "cluster" and self.wait_replicas:
            raise ValueError(
                "wait_replicas is for a single master: in mode cluster a batch goes to many masters, and none can say what the "
                "replicas of another one have. Set it to 0, and min-replicas-to-write in the servers' own configuration"
            )
        return self


class KafkaSettings(Section):
    bootstrap_servers: str = Field("127.0.0.1:9092", description="host:port of brokers, separated by commas")
    topic: str = Field("clickstream.events", description="topic of the events, keyed by user_id")
    dead_letter_topic: str = Field("clickstream.dead-letter", description="topic of what is no event, with the reason")
    partitions: int = Field(4, ge=1, description="partitions of the topic that `recsys kafka init` makes")
    replication: int = Field(1, ge=1, description="copies of each partition")
    retention_hours: int = Field(7 * 24, ge=1, description="how long the topics keep a message")
    max_message_bytes: int = Field(
        1 << 20, ge=1024, description="largest message of the topics; a larger event is a dead letter"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how clients connect"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"] = Field(
        "SCRAM-SHA-512", description="of the SASL protocols"
    )
    sasl_username: str = Field("", description="SASL user")
    sasl_password: SecretStr = Field(SecretStr(""), description="its password; better given as RECSYS_KAFKA__SASL_PASSWORD")
    ca_file: str = Field("", description="PEM file of the authority that signed the brokers' certificates; empty: the system's")
    cert_file: str = Field("", description="PEM file of this client's certificate, where the brokers ask for one")
    key_file: str = Field("", description="PEM file of its key")
    conf: dict[str, str] = Field(default_factory=dict, description="any further librdkafka property, given to every client")

    @field_validator("topic")
    @classmethod
    def _topic_has_a_folder(cls, topic: str) -> str:
        if topic.startswith(("_", ".")):
            raise ValueError(f"{topic!r} begins with {topic[0]!r}: the landing zone leaves such names out as copies under way")
        return topic


class StreamSettings(Section):
    group: str = Field("recsys-stream", description="consumer group of the workers")
    instance_id: str = Field("", description="static member of the group: a restart within its session moves no partition")
    session_timeout_seconds: float = Field(30.0, gt=0, description="a worker silent for so long loses its partitions")
    batch_events: int = Field(50_000, ge=1, description="most events of a batch; one that has caught up takes what is there")
    batch_megabytes: int = Field(64, ge=1, description="most bytes of a batch, and of what is fetched ahead of it")
    archive: bool = Field(True, description="archive the topic into the landing zone")
    archive_rows: int = Field(100_000, ge=1, description="an archive file ends where the offset is a multiple of this")
    archive_seconds: int = Field(60, ge=1, description="and where the broker's time enters another interval of this length")
    bucket_minutes: int = Field(5, ge=1, le=60, description="length of a bucket of the live trends")
    trend_hours: int = Field(24, ge=1, description="how long a bucket of the live trends is kept")
    metrics_host: str = Field("127.0.0.1", description="address that the Prometheus metrics listen on")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus metrics; 0: none")
    heartbeat_seconds: float = Field(5.0, gt=0, description="how often a worker writes its heartbeat and lag to Redis")


class ServingSettings(Section):
    host: str = Field("127.0.0.1", description="address that the gRPC server listens on")
    port: int = Field(50051, ge=0, le=65535, description="its port; 0: any free one")
    max_items: int = Field(500, ge=1, description="largest `count` of a request")
    max_batch: int = Field(10_000, ge=1, description="most users of a RecommendBatch")
    rank_timeout_ms: int = Field(250, ge=1, description="deadline of one computed answer; a lower tier answers after it")
    batch_timeout_ms: int = Field(10_000, ge=1, description="the same for a part of a RecommendBatch")
    pointer_poll_seconds: float = Field(1.0, gt=0, description="how often the champion pointer is looked at")
    reflection: bool | None = Field(
        None, description="offer gRPC server reflection, to callers without a token too; unset: where no tokens are set"
    )
    processes: int = Field(1, ge=0, le=256, description="serving processes on the one port; 0: one a usable core")
    max_concurrent: int = Field(256, ge=1, description="calls under way in a process; more are refused as RESOURCE_EXHAUSTED")
    drain_seconds: float = Field(5.0, ge=0, description="what calls under way get to finish after SIGTERM")
    linger_seconds: float = Field(0.0, ge=0, description="time between saying NOT_SERVING and refusing calls, for balancers")
    tls_certificate: str = Field("", description="PEM file with the server's certificate chain; empty: no TLS")
    tls_key: str = Field("", description="PEM file with its key")
    tls_client_ca: str = Field("", description="PEM file with the CA of client certificates, which are then required")
    tokens: dict[str, list[str]] = Field(
        default_factory=dict,
        description="variable that holds a bearer token -> methods that it opens, `*` for all; empty: no tokens",
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="port of Prometheus metrics at /metrics; 0: none")
    health_port: int = Field(
        0, ge=0, le=65535, description="further port for the health service alone, without TLS, for probes; 0: none"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the lines on stderr")
    log_sample: float = Field(0.0, ge=0, le=1, description="share of the calls that are logged; failed ones a hundredfold")
    otlp_endpoint: str = Field("", description="OpenTelemetry collector such as http://127.0.0.1:4317; empty: no traces")
    trace_ratio: float = Field(0.01, ge=0, le=1, description="share of calls traced, unless the caller's trace decides")

    @model_validator(mode="after")
    def _has_both_files_of_tls(self) -> ServingSettings:
        if bool(self.tls_certificate) != bool(self.tls_key):
            there, absent = ("tls_certificate", "tls_key") if self.tls_certificate else ("tls_key", "tls_certificate")
            raise ValueError(f"{there} is set and {absent} is not: a certificate and its key go together")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca asks for certificates of clients, which needs TLS: set tls_certificate and tls_key")
        return self


class TensorFlowServingSettings(Section):
    address: str = Field(
        "", description="host:port of a TensorFlow Serving that computes user vectors; empty: this process does"
    )
    model: str = Field("two_tower", description="name of the model")
    version: int = Field(0, ge=0, description="its version; 0: the newest that is served")
    label: str = Field("", description="its version label, instead of a version")
    signature: str = Field("serving_default", description="the signature that is called")
    timeout_ms: int = Field(20, ge=1, description="deadline of a call; without an answer the tier is REALTIME_ALS_ONLY")


class DagsterSettings(Section):
    host: str = Field("127.0.0.1", description="address of the web UI")
    port: int = Field(3000, ge=0, le=65535, description="its port; the next free one when it is taken")
    automation: bool = Field(False, description="start schedules and sensors by themselves after a deploy")
    executor: Literal["in_process", "multiprocess", "k8s"] = Field(
        "in_process",
        description="where the steps of a run work: in its own process; multiprocess: each in another; k8s: each in a pod",
    )
    max_processes: int = Field(0, ge=0, description="processes of a run at a time under multiprocess; 0: one a usable core")
    hourly_pool: str = Field(
        "spark", description="pool of the hourly Spark assets; any other name gives them a session beside the nightly one's"
    )
    catch_up_hours: int = Field(48, ge=1, description="missed hours and late events are made up for as far back")
    hours_per_tick: int = Field(6, ge=1, description="missed hours that are asked for at a time")
    attempts: int = Field(3, ge=1, description="how often a missed hour or night is asked for")


class PodResources(Section):
    """What the pod of a step asks for, as Kubernetes quantities; memory is also its limit."""

    cpu: str = Field("500m", pattern=r"^\d+(\.\d+|m)?$", description="cores, or thousandths by `m`")
    memory: str = Field("2Gi", pattern=r"^\d+(Mi|Gi)$", description="bytes")
    gpu: int = Field(0, ge=0, description="whole GPUs")
    nodes: dict[str, str] = Field(default_factory=dict, description="labels of the nodes that it may run on; empty: any")


class KubernetesSettings(Section):
    resources: dict[str, PodResources] = Field(
        default_factory=dict,
        description='pods of assets or steps, in place of those in recsys_assets/isolation.py: { als_factors = { cpu = "8" } }',
    )
    cpu_limits: bool = Field(
        False, description="the CPU that a step asks for is its limit too, as a quota of the namespace may want it"
    )
    gpu_resource: str = Field("nvidia.com/gpu", description="name of the GPU resource of the cluster's device plugin")
    step_account: str = Field("recsys-step", description="service account of steps; it may do nothing")
    spark_account: str = Field("recsys-spark", description="service account of Spark drivers; it may start executor pods")


class AlertSettings(Section):
    webhook_url: SecretStr = Field(
        SecretStr(""), description="Slack-compatible webhook, a secret; better given as RECSYS_ALERTS__WEBHOOK_URL"
    )
    email_to: list[str] = Field(default_factory=list, description="addresses that get alerts by mail")
    email_from: str = Field("recsys@localhost", description="sender of the mails")
    smtp_host: str = Field("", description="mail server; empty: no mail")
    smtp_port: int = Field(25, ge=1, le=65535, description="its port")
    smtp_starttls: bool = Field(False, description="encrypt the connection to it, whose certificate is then verified")
    smtp_user: str = Field("", description="user at the mail server, when it wants one")
    smtp_password: SecretStr = Field(SecretStr(""), description="given as RECSYS_ALERTS__SMTP_PASSWORD")
    timeout_seconds: float = Field(5.0, gt=0, description="of one attempt to deliver")
    retries: int = Field(3, ge=0, description="further attempts at once; what can't be delivered waits for the next tick")
    silent_seconds: int = Field(120, ge=1, description="a stream worker without a heartbeat for so long is an alert")
    max_lag_events: int = Field(1_000_000, ge=1, description="a stream that is further behind is an alert")


TimeUnit = Literal["s", "ms", "us", "ns", "iso", "dmy", "mdy"]


class SourceMapping(Section):
    """Which column of a foreign file is which field of an event or of a catalogue item. `recsys ingest` uses it."""

    kind: Literal["events", "catalog"] = "events"
    user_id: str | None = None
    item_id: str = ""
    event_type: str | None = Field(None, description="column; without one every row is `default_event_type`")
    default_event_type: str = "view"
    event_types: dict[str, str] = Field(default_factory=dict, description="source value -> event type of [events.weights]")
    ts: str | None = None
    ts_unit: TimeUnit = Field("ms", description="of numbers; iso, dmy, mdy: a date that begins with the year, day or month")
    event_id: str | None = None
    session_id: str | None = None
    device: str | None = None
    country: str | None = None
    value: str | None = None
    recommendation_id: str | None = None
    title: str | None = None
    category: str | None = None
    category_separator: str = Field("/", min_length=1, description="between the levels of a category; stored as `/`")
    category_list_separator: str | None = Field(
        None, min_length=1, description="between several categories in one text; JSON and Parquet lists need none"
    )
    price: str | None = None
    available: str | None = None
    attributes: list[str] = Field(default_factory=list, description="further catalogue columns; `*`: all the others")
    catalog_from_events: bool = Field(False, description="the event rows also describe their items")
    optional: list[str] = Field(default_factory=list, description="columns named above that a file may lack")
    decimal: Literal[".", ","] = Field(
        ".", description="sign before the fraction where a number leaves it open: 1,299 or 1.299"
    )
    delimiter: str | None = Field(
        None, min_length=1, description="of text files; unset: what the first lines show. A `.tsv` file always has tabs"
    )
    header: list[str] = Field(default_factory=list, description="column names of a file that has none")

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> SourceMapping:
        needed: dict[str, str | None] = {"item_id": self.item_id}
        if self.kind == "events":
            needed |= {"user_id": self.user_id, "ts": self.ts}
        missing = [name for name, column in needed.items() if not column]
        if missing:
            raise ValueError(f"a mapping of kind {self.kind!r} must name the column of: {', '.join(missing)}")
        return self


class Settings(BaseSettings):
    """All sections. Build it with `load_settings`, which finds the home and the configuration files."""

    model_config = SettingsConfigDict(
        env_prefix="RECSYS_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    home: Path = Field(Path(DEFAULT_HOME), description="folder of everything this installation writes")
    lake: LakeSettings = LakeSettings()
    partitions: PartitionSettings = PartitionSettings()
    events: EventSettings = EventSettings()
    spark: SparkSettings = SparkSettings()
    interactions: InteractionSettings = InteractionSettings()
    features: FeatureSettings = FeatureSettings()
    als: AlsSettings = AlsSettings()
    two_tower: TwoTowerSettings = TwoTowerSettings()
    index: IndexSettings = IndexSettings()
    trends: TrendSettings = TrendSettings()
    ranking: RankingSettings = RankingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    release: ReleaseSettings = ReleaseSettings()
    gate: GateSettings = GateSettings()
    mlflow: MlflowSettings = MlflowSettings()
    cache: CacheSettings = CacheSettings()
    quality: QualitySettings = QualitySettings()
    retention: RetentionSettings = RetentionSettings()
    redis: RedisSettings = RedisSettings()
    kafka: KafkaSettings = KafkaSettings()
    stream: StreamSettings = StreamSettings()
    serving: ServingSettings = ServingSettings()
    tensorflow_serving: TensorFlowServingSettings = TensorFlowServingSettings()
    dagster: DagsterSettings = DagsterSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    alerts: AlertSettings = AlertSettings()
    mappings: dict[str, SourceMapping] = Field(default_factory=dict, description="own mappings of `recsys ingest`, by name")

    @field_validator("home")
    @classmethod
    def _is_no_pattern(cls, home: Path) -> Path:
        _without_patterns(str(home.absolute()))
        return home

    @model_validator(mode="after")
    def _has_a_share_for_each_half_life(self) -> Settings:
        mix, lives = self.ranking.trend_mix, self.trends.half_lives_hours
        if len(mix) != len(lives) and mix != RankingSettings().trend_mix:
            raise ValueError(
                f"ranking.trend_mix has {len(mix)} shares, trends.half_lives_hours {len(lives)}: each half-life needs its share"
            )
        return self

    @model_validator(mode="after")
    def _has_the_metric_of_the_gate(self) -> Settings:
        name, _, k = self.gate.metric.partition("@")
        if name not in METRICS or k not in map(str, self.evaluation.ks):
            measured = f"{', '.join(METRICS)} at {', '.join(map(str, self.evaluation.ks))} (evaluation.ks)"
            given = masked_text(self.gate.metric)
            raise ValueError(f"gate.metric is {given!r}, which no evaluation measures: it measures {measured}")
        return self

    @property
    def lake_uri(self) -> str:
        return self.lake.uri or str(self.home.absolute() / "lake")

    @property
    def releases_uri(self) -> str:
        return self.release.uri or str(self.home.absolute() / "releases")

    @property
    def tracking_uri(self) -> str:
        return self.mlflow.tracking_uri or f"sqlite:///{self.home.absolute() / 'mlflow.db'}"

    @property
    def run_artifacts_uri(self) -> str | None:
        """None: MLflow's server decides."""
        own = None if self.mlflow.tracking_uri else (self.home.absolute() / "mlflow").as_uri()
        return self.mlflow.artifact_uri or own

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        home = init_settings().get("home") or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME
        return (init_settings, env_settings, *(_TomlSource(settings_cls, f) for f in _files(home)))


class _TomlSource(TomlConfigSettingsSource):
    """A file of settings; one that is no TOML is told by its name."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        try:
            return super()._read_file(file_path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{file_path} is no TOML: {error}") from error


def _files(home: str | Path) -> list[Path]:
    """The files of settings that are there, the first that names a setting wins."""
    files = [Path(home) / FILE, Path(os.environ.get(CONFIG_VARIABLE) or FILE)]
    return [file for file in files if file.is_file()]


def load_settings(home: str | Path | None = None, **sections: Any) -> Settings:
    """Read the settings of the installation at `home` (default: `RECSYS_HOME`, else `.recsys`).

    Raises SettingsError when `RECSYS_CONFIG` names a file that is not there, a file is no TOML or a variable names no setting,
    and pydantic.ValidationError when a setting has a wrong name or value; its notes say where each was set.
    """
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        raise SettingsError(f"{CONFIG_VARIABLE} names {config}, which is not a file")
    if home is not None:
        sections["home"] = Path(home)
    try:
        settings = Settings(**sections)
    except ValidationError as error:
        for problem in error.errors():
            error.add_note(_origin(problem["loc"], sections, home))
        raise
    except PydanticSettingsError as error:
        raise SettingsError(f"{error}: a section is set by {PREFIX}<SECTION>{NESTED}<NAME>") from error
    _refuse_unknown_variables(settings)
    return settings


def _origin(place: tuple[int | str, ...], sections: Mapping[str, Any], home: str | Path | None) -> str:
    """Which argument, variable or file set what stands at `place`; empty where none did."""
    names = [str(part) for part in place]
    variables = [PREFIX + NESTED.join(names[:n]).upper() for n in range(len(names), 0, -1)]
    if names and names[0] in sections:
        return ""
    for variable in variables:
        if found := next((given for given in os.environ if given.upper() == variable), ""):
            return found
    for file in _files(home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME):
        value: Any = tomllib.loads(file.read_text())
        depth = 0
        while depth < len(names) and isinstance(value, dict) and names[depth] in value:
            value, depth = value[names[depth]], depth + 1
        if depth and (depth == len(names) or not isinstance(value, dict)):
            return str(file)
    return ""


def _refuse_unknown_variables(settings: Settings) -> None:
    """Raises SettingsError for a variable that looks like a setting and is none: it would change nothing, silently."""
    sections = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    known = {*OTHER_VARIABLES, *settings.serving.tokens}
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ
    unknown = [
        name
        for name in sorted(os.environ)
        if name.upper().startswith(PREFIX)
        and name not in known
        and name.upper().split(NESTED)[0] not in sections
        and not (in_kubernetes and re.fullmatch(SERVICE_LINKS, name))
    ]
    if unknown:
        named = ", ".join(unknown)
        raise SettingsError(
            f"{named}: there is no such setting (a setting is {PREFIX}<SECTION>{NESTED}<NAME>; `recsys config`)"
        )
