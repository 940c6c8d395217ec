"""Edges of instance masks."""

from __future__ import annotations

from dataengine.modalities._edges import Edges


class SamEdge(Edges):
    """Edges of instance masks: uint8 (h, w) of 0 and 255."""
