"""Metrics through Ray: each node's agent serves them to Prometheus under their names with the prefix `ray_`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol


class Definition(Protocol):
    """What is said of a metric once. `kind` is `counter` or `gauge`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


class Meters:
    """Ray's metrics of these definitions, kept at the values they are given."""

    def __init__(self, definitions: Sequence[Definition]) -> None:
        # Not at the top: whoever looks at a run without Ray must not wait seconds for its import.
        from ray.util.metrics import Counter, Gauge

        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge}
        self._kinds = {d.name: d.kind for d in definitions}
        self._meters = {d.name: kinds[d.kind](d.name, d.description, tag_keys=d.labels) for d in definitions}
        self._seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def update(self, values: Iterable[tuple[str, Mapping[str, str], float]]) -> None:
        """Set gauges, and add to counters what their totals have grown by. A gauge that is no longer given becomes 0.

        KeyError for a name that is in no definition; ValueError for labels other than the defined ones.
        """
        given: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
        for name, labels, value in values:
            key = (name, tuple(sorted(labels.items())))
            given.add(key)
            if self._kinds[name] == "gauge":
                self._meters[name].set(float(value), tags=dict(labels))
            elif value > self._seen.get(key, 0.0):
                self._meters[name].inc(float(value) - self._seen.get(key, 0.0), tags=dict(labels))
            self._seen[key] = value
        for name, labels_of in [k for k in self._seen if k not in given and self._kinds[k[0]] == "gauge"]:
            # Prometheus would show the last value of a node that is gone for as long as the run lasts.
            self._meters[name].set(0.0, tags=dict(labels_of))
            del self._seen[name, labels_of]


def make_meters(definitions: Sequence[Definition]) -> Meters:
    """Meters that tell the Ray cluster this process is connected to, or connects to later."""
    return Meters(definitions)
