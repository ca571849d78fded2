"""Traces and sampled logs of calls: what a call's metadata says of its trace goes on, spans are exported by config."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from recsys_core.log_lines import TextLines
from recsys_core.masking import masked_text
from recsys_core.settings import ServingSettings
from serving.background_log import BackgroundHandler

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
PASSED_ON = frozenset((REQUEST_ID, TRACEPARENT, TRACESTATE))
"""Metadata that goes back to the caller, so that both ends can name the call."""

call_log = logging.getLogger("serving.calls")


def passed_on(metadata: Sequence[tuple[str, Any]]) -> tuple[tuple[str, str], ...]:
    """The request id and trace context of a call's metadata, of sizes that are sensible."""
    return tuple((key, value) for key, value in metadata if key in PASSED_ON and isinstance(value, str) and len(value) <= 512)


class Tracing:
    """Spans through OpenTelemetry when `serving.otlp_endpoint` names a collector; else nothing is made."""

    def __init__(self, settings: ServingSettings) -> None:
        """Raises ImportError when an endpoint is set and the extra `otel` is not installed."""
        self._sample = settings.log_sample
        self._tracer: Any = None
        self._provider: Any = None
        if settings.otlp_endpoint:
            self._start(settings)

    def _start(self, settings: ServingSettings) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        sampler = ParentBased(TraceIdRatioBased(settings.trace_ratio))
        self._provider = TracerProvider(resource=Resource.create({"service.name": "recsys-serving"}), sampler=sampler)
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=settings.otlp_endpoint.startswith("http:"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("recsys.serving")
        self._propagator = TraceContextTextMapPropagator()

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    @contextmanager
    def call(self, method: str, metadata: Sequence[tuple[str, Any]]) -> Iterator[Any]:
        """The span of a call, a child of the caller's when its metadata names one."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract({key: value for key, value in metadata if isinstance(value, str)})
        with self._tracer.start_as_current_span(
            f"recsys.v1.Recommender/{method}", context=parent, kind=SpanKind.SERVER
        ) as span:
            yield span

    def log(self, method: str, status: str, seconds: float, metadata: Sequence[tuple[str, Any]]) -> None:
        """One line for a share `serving.log_sample` of the calls; failed ones count a hundredfold."""
        share = self._sample if status == "OK" else min(1.0, self._sample * 100)
        if share and random.random() < share:
            fields = {"method": method, "status": status, "ms": round(seconds * 1000, 3), **dict(passed_on(metadata))}
            call_log.info("call", extra={"fields": fields})

    def close(self) -> None:
        """Export what is left."""
        if self._provider is not None:
            self._provider.shutdown()


class JsonLines(logging.Formatter):
    """A record as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": masked_text(record.getMessage()),
        }
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line |= fields
        if record.exc_info:
            line["exception"] = masked_text(self.formatException(record.exc_info))
        return json.dumps(line)


def set_up_logging(settings: ServingSettings) -> None:
    """Logs of this process go to stderr as `serving.log_format` says."""
    handler = BackgroundHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
