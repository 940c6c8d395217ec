"""Outlines of the SAM instances."""

from __future__ import annotations

from dataengine.modalities._maps import EdgeMap


class SamEdge(EdgeMap):
    """uint8 (h, w), 0 and 255."""
