"""Drawing on RGB images uint8 (h, w, 3): every function returns a new image."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

Colour = tuple[int, int, int]
_LEAST = 256  # pixels: below it, names and outlines would be unreadable


def canvas(rgb: np.ndarray) -> tuple[np.ndarray, int]:
    """The image to draw on, enlarged by a whole factor when it is small, and the factor."""
    factor = max(1, -(-_LEAST // max(rgb.shape[:2])))
    return enlarged(rgb, factor), factor


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel as a square of `factor` pixels a side."""
    return np.ascontiguousarray(np.repeat(np.repeat(image, factor, axis=0), factor, axis=1))


def distinct(index: int) -> Colour:
    """A bright colour for an index; neighbouring indices are far apart in hue."""
    hue = (0.58 + index * 0.6180339887498949) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[index % 3], (1.0, 0.85)[index // 3 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def rectangle(image: np.ndarray, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> np.ndarray:
    """A box in pixels; a dark rim keeps it apart from an image of its colour."""
    out = image.copy()
    height, width = out.shape[:2]
    thick = max(2, round(max(height, width) / 200))
    corner = (min(round(x1), width - 1), min(round(y1), height - 1))
    cv2.rectangle(out, (round(x0), round(y0)), corner, (0, 0, 0), thick + 2)
    cv2.rectangle(out, (round(x0), round(y0)), corner, colour, thick)
    return out


def tag(image: np.ndarray, label: str, x: float, y: float, colour: Colour) -> np.ndarray:
    """A label on a plate of the colour, its top left corner at (x, y) or as near as the image allows."""
    out = image.copy()
    height, width = out.shape[:2]
    scale = max(0.38, max(height, width) / 1400)
    (w, h), below = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    left, top = max(0, min(round(x), width - w - 4)), max(0, min(round(y), height - h - below - 2))
    cv2.rectangle(out, (left, top), (left + w + 4, top + h + below + 2), colour, -1)
    ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
    cv2.putText(out, label, (left + 2, top + h + 1), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA)
    return out


def overlay(image: np.ndarray, mask: np.ndarray, colour: Colour, alpha: float = 0.5) -> np.ndarray:
    """A translucent mask bool (h, w) with an outline in the full colour, one pixel wide and inside the mask."""
    out = image.copy()
    out[mask] = np.rint((1 - alpha) * image[mask] + alpha * np.array(colour)).astype(np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    out[mask & (inner == 0)] = colour
    return out


def principal(features: np.ndarray) -> np.ndarray:
    """uint8 (rows, cols, 3): a grid (rows, cols, c) along its three principal axes, each stretched to 0..255.

    An axis is turned so that its largest component is positive: the decomposition alone leaves the sign open.
    """
    rows, cols, channels = features.shape
    flat = features.reshape(-1, channels).astype(np.float64)
    _, _, axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    axes = axes[:3] * np.sign(axes[np.arange(len(axes[:3])), np.abs(axes[:3]).argmax(axis=1)])[:, None]
    out = np.zeros((len(flat), 3))
    out[:, : len(axes)] = (flat - flat.mean(axis=0)) @ axes.T
    low, extent = out.min(axis=0), np.ptp(out, axis=0)
    stretched = np.where(extent > 1e-6, (out - low) / np.maximum(extent, 1e-6), 0.5)
    return np.rint(255 * stretched).astype(np.uint8).reshape(rows, cols, 3)
