from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    CACHE: _ClassVar[Tier]
    REALTIME: _ClassVar[Tier]
    REALTIME_ALS_ONLY: _ClassVar[Tier]
    STALE_CACHE: _ClassVar[Tier]
    POPULAR: _ClassVar[Tier]
TIER_UNSPECIFIED: Tier
CACHE: Tier
REALTIME: Tier
REALTIME_ALS_ONLY: Tier
STALE_CACHE: Tier
POPULAR: Tier

class Context(_message.Message):
    __slots__ = ("device", "ts_ms", "current_item_id", "country")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TS_MS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    device: str
    ts_ms: int
    current_item_id: str
    country: str
    def __init__(self, device: _Optional[str] = ..., ts_ms: _Optional[int] = ..., current_item_id: _Optional[str] = ..., country: _Optional[str] = ...) -> None: ...

class AttributeFilter(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[str]] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("min_price", "max_price", "attributes", "include_unavailable")
    MIN_PRICE_FIELD_NUMBER: _ClassVar[int]
    MAX_PRICE_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    min_price: float
    max_price: float
    attributes: _containers.RepeatedCompositeFieldContainer[AttributeFilter]
    include_unavailable: bool
    def __init__(self, min_price: _Optional[float] = ..., max_price: _Optional[float] = ..., attributes: _Optional[_Iterable[_Union[AttributeFilter, _Mapping]]] = ..., include_unavailable: _Optional[bool] = ...) -> None: ...

class Diversity(_message.Message):
    __slots__ = ("relevance", "max_per_category")
    RELEVANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_PER_CATEGORY_FIELD_NUMBER: _ClassVar[int]
    relevance: float
    max_per_category: int
    def __init__(self, relevance: _Optional[float] = ..., max_per_category: _Optional[int] = ...) -> None: ...

class RecommendRequest(_message.Message):
    __slots__ = ("user_id", "count", "context", "categories", "exclude_item_ids", "explain", "filter", "diversity", "include_consumed")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_CONSUMED_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    count: int
    context: Context
    categories: _containers.RepeatedScalarFieldContainer[str]
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    explain: bool
    filter: Filter
    diversity: Diversity
    include_consumed: bool
    def __init__(self, user_id: _Optional[str] = ..., count: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., categories: _Optional[_Iterable[str]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., explain: _Optional[bool] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., diversity: _Optional[_Union[Diversity, _Mapping]] = ..., include_consumed: _Optional[bool] = ...) -> None: ...

class Parts(_message.Message):
    __slots__ = ("als", "two_tower", "session", "trend", "popular", "others")
    class OthersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ALS_FIELD_NUMBER: _ClassVar[int]
    TWO_TOWER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TREND_FIELD_NUMBER: _ClassVar[int]
    POPULAR_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    als: float
    two_tower: float
    session: float
    trend: float
    popular: float
    others: _containers.ScalarMap[str, float]
    def __init__(self, als: _Optional[float] = ..., two_tower: _Optional[float] = ..., session: _Optional[float] = ..., trend: _Optional[float] = ..., popular: _Optional[float] = ..., others: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Influence(_message.Message):
    __slots__ = ("item_id", "event_type", "ts_ms", "strength", "title")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    TS_MS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    event_type: str
    ts_ms: int
    strength: float
    title: str
    def __init__(self, item_id: _Optional[str] = ..., event_type: _Optional[str] = ..., ts_ms: _Optional[int] = ..., strength: _Optional[float] = ..., title: _Optional[str] = ...) -> None: ...

class ScoredItem(_message.Message):
    __slots__ = ("item_id", "score", "parts", "title", "category", "sources", "moved_by")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    MOVED_BY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    score: float
    parts: Parts
    title: str
    category: str
    sources: _containers.RepeatedScalarFieldContainer[str]
    moved_by: _containers.RepeatedCompositeFieldContainer[Influence]
    def __init__(self, item_id: _Optional[str] = ..., score: _Optional[float] = ..., parts: _Optional[_Union[Parts, _Mapping]] = ..., title: _Optional[str] = ..., category: _Optional[str] = ..., sources: _Optional[_Iterable[str]] = ..., moved_by: _Optional[_Iterable[_Union[Influence, _Mapping]]] = ...) -> None: ...

class AssetVersion(_message.Message):
    __slots__ = ("asset", "partition", "data_version")
    ASSET_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    DATA_VERSION_FIELD_NUMBER: _ClassVar[int]
    asset: str
    partition: str
    data_version: str
    def __init__(self, asset: _Optional[str] = ..., partition: _Optional[str] = ..., data_version: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("weights", "sources", "last_actions")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    LAST_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    weights: Parts
    sources: _containers.RepeatedCompositeFieldContainer[AssetVersion]
    last_actions: _containers.RepeatedCompositeFieldContainer[Influence]
    def __init__(self, weights: _Optional[_Union[Parts, _Mapping]] = ..., sources: _Optional[_Iterable[_Union[AssetVersion, _Mapping]]] = ..., last_actions: _Optional[_Iterable[_Union[Influence, _Mapping]]] = ...) -> None: ...

class RecommendResponse(_message.Message):
    __slots__ = ("items", "tier", "release_id", "computed_at_ms", "explanation")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ScoredItem]
    tier: Tier
    release_id: str
    computed_at_ms: int
    explanation: Explanation
    def __init__(self, items: _Optional[_Iterable[_Union[ScoredItem, _Mapping]]] = ..., tier: _Optional[_Union[Tier, str]] = ..., release_id: _Optional[str] = ..., computed_at_ms: _Optional[int] = ..., explanation: _Optional[_Union[Explanation, _Mapping]] = ...) -> None: ...

class RecommendBatchRequest(_message.Message):
    __slots__ = ("user_ids", "count", "context", "categories", "exclude_item_ids", "explain", "filter", "diversity", "include_consumed")
    USER_IDS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    DIVERSITY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_CONSUMED_FIELD_NUMBER: _ClassVar[int]
    user_ids: _containers.RepeatedScalarFieldContainer[str]
    count: int
    context: Context
    categories: _containers.RepeatedScalarFieldContainer[str]
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    explain: bool
    filter: Filter
    diversity: Diversity
    include_consumed: bool
    def __init__(self, user_ids: _Optional[_Iterable[str]] = ..., count: _Optional[int] = ..., context: _Optional[_Union[Context, _Mapping]] = ..., categories: _Optional[_Iterable[str]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., explain: _Optional[bool] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., diversity: _Optional[_Union[Diversity, _Mapping]] = ..., include_consumed: _Optional[bool] = ...) -> None: ...

class RecommendBatchResponse(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[RecommendResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[RecommendResponse, _Mapping]]] = ...) -> None: ...

class SimilarItemsRequest(_message.Message):
    __slots__ = ("item_id", "count", "categories", "exclude_item_ids", "filter", "same_category")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    SAME_CATEGORY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    count: int
    categories: _containers.RepeatedScalarFieldContainer[str]
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    filter: Filter
    same_category: bool
    def __init__(self, item_id: _Optional[str] = ..., count: _Optional[int] = ..., categories: _Optional[_Iterable[str]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., same_category: _Optional[bool] = ...) -> None: ...

class SimilarItem(_message.Message):
    __slots__ = ("item_id", "similarity", "title", "category")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    similarity: float
    title: str
    category: str
    def __init__(self, item_id: _Optional[str] = ..., similarity: _Optional[float] = ..., title: _Optional[str] = ..., category: _Optional[str] = ...) -> None: ...

class SimilarItemsResponse(_message.Message):
    __slots__ = ("items", "release_id")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SimilarItem]
    release_id: str
    def __init__(self, items: _Optional[_Iterable[_Union[SimilarItem, _Mapping]]] = ..., release_id: _Optional[str] = ...) -> None: ...

class TrendingRequest(_message.Message):
    __slots__ = ("count", "categories", "exclude_item_ids", "filter")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    count: int
    categories: _containers.RepeatedScalarFieldContainer[str]
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    filter: Filter
    def __init__(self, count: _Optional[int] = ..., categories: _Optional[_Iterable[str]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ...) -> None: ...

class TrendingItem(_message.Message):
    __slots__ = ("item_id", "trend", "title", "category")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TREND_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    trend: float
    title: str
    category: str
    def __init__(self, item_id: _Optional[str] = ..., trend: _Optional[float] = ..., title: _Optional[str] = ..., category: _Optional[str] = ...) -> None: ...

class TrendingResponse(_message.Message):
    __slots__ = ("items", "release_id", "computed_at_ms")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[TrendingItem]
    release_id: str
    computed_at_ms: int
    def __init__(self, items: _Optional[_Iterable[_Union[TrendingItem, _Mapping]]] = ..., release_id: _Optional[str] = ..., computed_at_ms: _Optional[int] = ...) -> None: ...

class GetReleaseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "present", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    present: bool
    version: str
    def __init__(self, name: _Optional[str] = ..., present: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class RefusedRelease(_message.Message):
    __slots__ = ("release_id", "reason", "refused_at_ms")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REFUSED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    reason: str
    refused_at_ms: int
    def __init__(self, release_id: _Optional[str] = ..., reason: _Optional[str] = ..., refused_at_ms: _Optional[int] = ...) -> None: ...

class GetReleaseResponse(_message.Message):
    __slots__ = ("release_id", "day", "created_at_ms", "promoted_at_ms", "loaded_at_ms", "models", "metrics", "sources", "item_count", "last_refused")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    DAY_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    ITEM_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSED_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    day: str
    created_at_ms: int
    promoted_at_ms: int
    loaded_at_ms: int
    models: _containers.RepeatedCompositeFieldContainer[Model]
    metrics: _containers.ScalarMap[str, float]
    sources: _containers.RepeatedCompositeFieldContainer[AssetVersion]
    item_count: int
    last_refused: RefusedRelease
    def __init__(self, release_id: _Optional[str] = ..., day: _Optional[str] = ..., created_at_ms: _Optional[int] = ..., promoted_at_ms: _Optional[int] = ..., loaded_at_ms: _Optional[int] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., sources: _Optional[_Iterable[_Union[AssetVersion, _Mapping]]] = ..., item_count: _Optional[int] = ..., last_refused: _Optional[_Union[RefusedRelease, _Mapping]] = ...) -> None: ...
