"""What a value looks like as network input, per kind, and back: the ranges and losses a tokenizer is trained with.

A domain is its settings; they are saved with the tokenizer. B batch, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from model.domains._base import CRITERIA, Domain, Map
from model.domains._maps import Depth, Edges, Normal, Rgb, SamMask, Semseg
from model.domains._vectors import Features, Poses, Vector

__all__ = [
    "CRITERIA", "Depth", "Domain", "Edges", "Features", "Map", "Normal", "Poses", "Rgb", "SamMask", "Semseg", "Vector",
    "named",
]  # fmt: skip

_DOMAINS: dict[str, type[Domain]] = {
    d.name: d for d in (Rgb, Normal, Depth, Semseg, Edges, SamMask, Features, Vector, Poses)
}


def named(name: str, settings: dict[str, Any] | None = None) -> Domain:
    """The domain of that name with the given settings; ValueError for a name or a setting it does not have."""
    if name not in _DOMAINS:
        raise ValueError(f"domain {name!r}, expected one of {', '.join(_DOMAINS)}")
    unknown = set(settings or {}) - {f.name for f in fields(_DOMAINS[name])}
    if unknown:
        raise ValueError(f"domain {name}: unknown settings {sorted(unknown)}")
    return _DOMAINS[name](**(settings or {}))
