"""Edges of the image (Canny 1986)."""

from __future__ import annotations

from dataengine.modalities._edges import Edges


class CannyEdge(Edges):
    """Edges of the image (Canny 1986): uint8 (h, w) of 0 and 255."""
