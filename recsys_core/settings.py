"""Every setting of the platform, read once from `recsys.toml` and the environment, validated, passed on.

Sources, the first that names a setting wins: arguments, `RECSYS_<SECTION>__<NAME>` variables, `<home>/recsys.toml`,
`recsys.toml` in the working directory (or the file that `RECSYS_CONFIG` names), the defaults below.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

HOME_VARIABLE = "RECSYS_HOME"
CONFIG_VARIABLE = "RECSYS_CONFIG"
DEFAULT_HOME = ".recsys"


class Section(BaseModel):
    """A table of `recsys.toml`; a name it does not know is an error, not a silent no-op."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LakeSettings(Section):
    uri: str = Field("", description="root of all tables, a path or an fsspec URI; empty: <home>/lake")
    keep_versions: int = Field(2, ge=1, description="versions of a partition that stay readable after a replacement")


class PartitionSettings(Section):
    start: date = Field(date(2026, 1, 1), description="first day of the hourly and daily partitions (UTC)")
    end: date | None = Field(None, description="day after the last partition; unset: partitions grow with the clock")


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
    shuffle_partitions: int = Field(4, ge=1, description="spark.sql.shuffle.partitions; raise it on a cluster")


class InteractionSettings(Section):
    window_days: int = Field(90, ge=1, description="length of the sliding window")
    half_life_days: float = Field(30.0, gt=0, description="age at which an event counts half")


class AlsSettings(Section):
    engine: Literal["auto", "spark", "implicit"] = Field(
        "auto", description="auto: `implicit` when spark.master is local, else Spark MLlib"
    )
    rank: int = Field(64, ge=1, description="number of factors")
    iterations: int = Field(10, ge=1, description="alternating sweeps")
    alpha: float = Field(2.0, gt=0, description="confidence of an interaction of weight w is 1 + alpha·w")
    regularization: float = Field(
        2.0, ge=0, description="λ for each observation, as MLlib scales it; `implicit` gets λ × mean observations"
    )
    seed: int = Field(7, description="of the start values")
    min_user_interactions: int = Field(1, ge=1, description="users with fewer items get no factors (fold-in serves them)")
    min_item_interactions: int = Field(1, ge=1, description="items with fewer users get no factors")


class TwoTowerSettings(Section):
    dimension: int = Field(128, ge=2, le=1024, description="length of user and item vectors, and of the embeddings of ids")
    hidden: tuple[int, ...] = Field(
        (256, 128), description="hidden layers of both towers; empty: vectors are the sums of the embeddings alone"
    )
    user_ids: bool = Field(True, description="give users an embedding of their own beside their history and context")
    history: int = Field(50, ge=1, le=1000, description="newest items of a user that count")
    recent: int = Field(3, ge=0, description="newest items that are averaged once more by themselves; 0: none")
    min_user_examples: int = Field(5, ge=1, description="users with fewer examples share the embedding of unknown users")
    user_buckets: int = Field(1_000_000, ge=1, description="most rows of the user embedding; more users share rows")
    item_buckets: int = Field(1_000_000, ge=1, description="most rows of the item embedding; more items share rows")
    id_dropout: float = Field(0.1, ge=0, lt=1, description="share of ids that training hides, so that unknown ones are learned")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout of the hidden layers")
    loss: Literal["softmax", "binary", "contrastive"] = Field(
        "softmax",
        description="softmax: sampled, with logQ correction; binary: cross-entropy of pairs; contrastive: that of SimpleX",
    )
    temperature: float = Field(0.1, gt=0, description="cosines are divided by it in the losses softmax and binary")
    margin: float = Field(0.4, ge=-1, le=1, description="cosine below which a negative costs nothing (contrastive)")
    negative_weight: float = Field(100.0, gt=0, description="weight of the negatives' mean cost (contrastive)")
    in_batch: bool = Field(True, description="the items of the other examples of a batch are negatives")
    negatives: int = Field(256, ge=0, description="further negatives for each batch, drawn uniformly from all items")
    mask_history: bool = Field(True, description="an item of the user's history is never a negative")
    batch_size: int = Field(1024, ge=2, description="examples of a step on one device")
    learning_rate: float = Field(0.002, gt=0, description="of Adam, at the start")
    final_learning_rate: float = Field(0.1, gt=0, le=1, description="share of it after `epochs`; it falls along a cosine")
    l2: float = Field(0.0, ge=0, description="weight of the squared embeddings that a step touches")
    epochs: int = Field(3, ge=1, description="most passes over the examples")
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
    half_life_hours: float = Field(1.0, gt=0, description="age at which an event counts half in `trending_items`")
    window_hours: int = Field(24, ge=1, description="events of so many hours count for `trending_items`")
    top: int = Field(500, ge=1, description="items kept")


class RankingSettings(Section):
    als_weight: float = Field(0.7, ge=0, description="blend weight of ALS")
    two_tower_weight: float = Field(0.3, ge=0, description="blend weight of the two-tower model, when a release has one")
    session_weight: float = Field(0.5, ge=0, description="boost by similarity to the last items of the user")
    trend_weight: float = Field(0.5, ge=0, description="boost by the trend of the last hours")
    popular_weight: float = Field(0.1, ge=0, description="weight of the window's popularity")
    candidates: int = Field(200, ge=10, description="nearest neighbours drawn from the index for a user")
    session_neighbours: int = Field(20, ge=1, le=50, description="similar items drawn for each of the last items of a user")
    session_decay: float = Field(0.8, gt=0, le=1, description="weight of the n-th last item is decay^n")
    trending: int = Field(100, ge=0, description="trending items among the candidates")
    popular: int = Field(100, ge=0, description="popular items among the candidates")
    exclude_consumed: bool = Field(True, description="leave out what the user had already")
    last_items: int = Field(5, ge=1, le=100, description="last actions kept for a user")
    max_consumed: int = Field(200, ge=0, description="most recent items of a user that are left out")


class EvaluationSettings(Section):
    ks: tuple[int, ...] = Field((10, 20, 50), description="cut-offs of the metrics")
    max_users: int = Field(5000, ge=1, description="users that are ranked for, sampled by a hash of their id")


class ReleaseSettings(Section):
    uri: str = Field("", description="root of the releases; empty: <home>/releases")


class CacheSettings(Section):
    items: int = Field(50, ge=1, le=1000, description="items kept for a user")
    fresh_seconds: int = Field(3600, ge=1, description="older answers are served as STALE_CACHE")
    ttl_seconds: int = Field(24 * 3600, ge=1, description="Redis TTL of an answer")
    feature_ttl_seconds: int = Field(7 * 24 * 3600, ge=1, description="Redis TTL of a user's record")
    active_hours: int = Field(24, ge=1, description="users active in so many hours get a cached answer")
    batch_users: int = Field(2048, ge=1, description="users ranked and written at a time")


class RedisSettings(Section):
    url: str = Field("redis://127.0.0.1:6379/0", description="redis:// or rediss:// URL")
    timeout_ms: int = Field(20, ge=1, description="deadline of one online read")


class KafkaSettings(Section):
    bootstrap_servers: str = Field("127.0.0.1:9092", description="host:port of brokers, separated by commas")
    topic: str = Field("clickstream.events", description="topic of the events, keyed by user_id")


class ServingSettings(Section):
    host: str = Field("127.0.0.1", description="address that the gRPC server listens on")
    port: int = Field(50051, ge=0, le=65535, description="its port; 0: any free one")
    max_items: int = Field(500, ge=1, description="largest `count` of a request")
    max_batch: int = Field(10_000, ge=1, description="most users of a RecommendBatch")
    pointer_poll_seconds: float = Field(1.0, gt=0, description="how often the champion pointer is looked at")
    reflection: bool = Field(True, description="offer gRPC server reflection")


class DagsterSettings(Section):
    host: str = Field("127.0.0.1", description="address of the web UI")
    port: int = Field(3000, ge=0, le=65535, description="its port; the next free one when it is taken")
    automation: bool = Field(False, description="start schedules and sensors by themselves after a deploy")


class SourceMapping(Section):
    """Which column of a foreign file is which field of an event or of a catalogue item. `recsys ingest` uses it."""

    kind: Literal["events", "catalog"] = "events"
    user_id: str | None = None
    item_id: str = ""
    event_type: str | None = Field(None, description="column; without one every row is `default_event_type`")
    default_event_type: str = "view"
    event_types: dict[str, str] = Field(default_factory=dict, description="source value -> event type of [events.weights]")
    ts: str | None = None
    ts_unit: Literal["s", "ms", "us", "ns", "iso"] = "ms"
    event_id: str | None = None
    session_id: str | None = None
    device: str | None = None
    country: str | None = None
    value: str | None = None
    recommendation_id: str | None = None
    title: str | None = None
    category: str | None = None
    category_separator: str = Field("/", min_length=1, description="between the levels of a category; stored as `/`")
    price: str | None = None
    available: str | None = None
    attributes: list[str] = Field(default_factory=list, description="further catalogue columns; `*`: all the others")
    catalog_from_events: bool = Field(False, description="the event rows also describe their items")
    optional: list[str] = Field(default_factory=list, description="columns named above that a file may lack")
    delimiter: str = Field(",", min_length=1, max_length=1, description="of text files; a `.tsv` file always has tabs")
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
        env_prefix="RECSYS_", env_nested_delimiter="__", extra="forbid", frozen=True, nested_model_default_partial_update=True
    )

    home: Path = Field(Path(DEFAULT_HOME), description="folder of everything this installation writes")
    lake: LakeSettings = LakeSettings()
    partitions: PartitionSettings = PartitionSettings()
    events: EventSettings = EventSettings()
    spark: SparkSettings = SparkSettings()
    interactions: InteractionSettings = InteractionSettings()
    als: AlsSettings = AlsSettings()
    two_tower: TwoTowerSettings = TwoTowerSettings()
    index: IndexSettings = IndexSettings()
    trends: TrendSettings = TrendSettings()
    ranking: RankingSettings = RankingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    release: ReleaseSettings = ReleaseSettings()
    cache: CacheSettings = CacheSettings()
    redis: RedisSettings = RedisSettings()
    kafka: KafkaSettings = KafkaSettings()
    serving: ServingSettings = ServingSettings()
    dagster: DagsterSettings = DagsterSettings()
    mappings: dict[str, SourceMapping] = Field(default_factory=dict, description="own mappings of `recsys ingest`, by name")

    @property
    def lake_uri(self) -> str:
        return self.lake.uri or str(self.home.absolute() / "lake")

    @property
    def releases_uri(self) -> str:
        return self.release.uri or str(self.home.absolute() / "releases")

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
        files = [Path(home) / "recsys.toml", Path(os.environ.get(CONFIG_VARIABLE) or "recsys.toml")]
        tomls = tuple(TomlConfigSettingsSource(settings_cls, toml_file=f) for f in files if f.is_file())
        return (init_settings, env_settings, *tomls)


def load_settings(home: str | Path | None = None, **sections: Any) -> Settings:
    """Read the settings of the installation at `home` (default: `RECSYS_HOME`, else `.recsys`).

    Raises FileNotFoundError when `RECSYS_CONFIG` names a file that is not there, pydantic.ValidationError when a
    setting has a wrong name or value.
    """
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        raise FileNotFoundError(f"{CONFIG_VARIABLE} names {config}, which is not a file")
    if home is not None:
        sections["home"] = Path(home)
    return Settings(**sections)
