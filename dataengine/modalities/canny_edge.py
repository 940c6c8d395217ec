"""Canny edges of the image."""

from __future__ import annotations

from dataengine.modalities._maps import EdgeMap


class CannyEdge(EdgeMap):
    """uint8 (h, w), 0 and 255."""
