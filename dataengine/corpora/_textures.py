"""Procedural textures of rendered scenes: functions of a point in a part's own axes, in metres."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dataengine.corpora._raycast import Floats, Part

Texture = Callable[[Part, Floats, Floats], Floats]
"""(part, points (3, n) in its axes from its centre, width of a pixel there (n,), all in metres) -> colours (3, n)."""


def cell_noise(x: Floats, y: Floats, salt: int = 0) -> Floats:
    """A random number in 0..1 for every unit cell of the plane: the same one everywhere in the cell, at any time."""
    # A cell index is exact in 32 bits, and unsigned arrays wrap around, as a hash wants.
    h = np.floor(x).astype(np.int64).astype(np.uint32) * np.uint32(374761393)
    h += np.floor(y).astype(np.int64).astype(np.uint32) * np.uint32(668265263) + np.uint32(salt * 69069 + 1)
    h ^= h >> np.uint32(13)
    h *= np.uint32(1274126177)
    h ^= h >> np.uint32(16)
    return (h & np.uint32(0xFFFF)) / 65535.0


def smooth_noise(x: Floats, y: Floats, salt: int = 0) -> Floats:
    """Cell noise interpolated smoothly between the cells."""
    fx, fy = x - np.floor(x), y - np.floor(y)
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = cell_noise(x, y, salt) * (1 - fx) + cell_noise(x + 1, y, salt) * fx
    high = cell_noise(x, y + 1, salt) * (1 - fx) + cell_noise(x + 1, y + 1, salt) * fx
    return low * (1 - fy) + high * fy


def _grain(x: Floats, y: Floats, cell: float, footprint: Floats, salt: int = 0) -> Floats:
    """Cell noise in -1..1 that fades where a pixel covers more than a cell, so that far ground does not sparkle."""
    return (2.0 * cell_noise(x / cell, y / cell, salt) - 1.0) * cell / (cell + footprint)


def _tint(part: Part, factor: Floats, colour: int = 0) -> Floats:
    return np.outer(part.colours[colour], factor)


def _choose(part: Part, second: np.ndarray, factor: Floats | float = 1.0) -> Floats:
    """The second colour of the part where `second`, else the first, times a factor."""
    first, other = np.array(part.colours[0])[:, None], np.array(part.colours[1])[:, None]
    return np.where(second, other, first) * factor


def plain(part: Part, q: Floats, footprint: Floats) -> Floats:
    """One colour."""
    return _tint(part, np.ones(q.shape[1]))


def grass(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Blades and larger patches."""
    patches = smooth_noise(q[0] / 0.9, q[2] / 0.9, 3) - 0.5
    return _tint(part, 0.95 + 0.45 * _grain(q[0], q[2], 0.06, footprint) + 0.35 * patches)


def sand(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Wind ripples and grains."""
    bend = smooth_noise(q[0] / 1.5, q[2] / 1.5, 5)
    ripples = np.sin(18.0 * (q[2] + 0.5 * bend)) * 0.1 / (0.1 + 2.0 * footprint)
    return _tint(part, 0.93 + 0.07 * ripples + 0.12 * _grain(q[0], q[2], 0.04, footprint))


def road(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Asphalt with a dashed line that runs away from the camera (0.15 m wide, three metres every six)."""
    line = (np.abs(q[0]) < 0.075) & (np.mod(q[2], 3.0) < 1.5)
    return _choose(part, line, 0.95 + 0.25 * _grain(q[0], q[2], 0.05, footprint))


def checker(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Square tiles of 0.6 m in two colours."""
    return _choose(part, np.mod(np.floor(q[0] / 0.6) + np.floor(q[2] / 0.6), 2.0) > 0)


def _boards(part: Part, across: Floats, along: Floats, width: float, footprint: Floats) -> Floats:
    row = np.floor(across / width)
    shifted = along / 1.8 + 0.37 * row
    tone = 0.9 + 0.35 * (cell_noise(row, shifted) - 0.5)
    seam = np.mod(across / width, 1.0) < 0.08
    return _tint(part, tone * (1.0 - 0.45 * seam * width / (width + 4.0 * footprint)))


def floor_boards(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Boards that run away from the camera."""
    return _boards(part, q[0], q[2], 0.22, footprint)


def wall_boards(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Upright boards."""
    return _boards(part, q[0], q[1], 0.3, footprint)


def brick(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Bricks of 0.4 by 0.16 m (large ones: they must be seen in small images) in the second colour's mortar."""
    row = np.floor(q[1] / 0.16)
    along = q[0] / 0.4 + 0.5 * np.mod(row, 2.0)
    mortar = (np.mod(q[1] / 0.16, 1.0) < 0.14) | (np.mod(along, 1.0) < 0.07)
    return _choose(part, mortar, 0.85 + 0.3 * cell_noise(along, row))


def paint(part: Part, q: Floats, footprint: Floats) -> Floats:
    """A painted wall with a skirting board of 0.25 m in the second colour."""
    return _choose(part, q[1] < 0.25 - part.half[1])


def ribs(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Upright grooves, as on a hard suitcase."""
    groove = np.mod((q[0] + q[2]) / 0.12, 1.0) < 0.25
    return _tint(part, 1.0 - 0.3 * groove)


def two_doors(part: Part, q: Floats, footprint: Floats) -> Floats:
    """A dark gap two thirds up and an upright handle on the front and back."""
    height = q[1] / part.half[1]
    handle = (np.abs(q[0] / part.half[0] - 0.7) < 0.07) & (np.abs(height - 0.3) > 0.12) & (np.abs(height) < 0.75)
    dark = (np.abs(height - 0.3) < 0.025) | (handle & (np.abs(q[2]) > 0.99 * part.half[2]))
    return _choose(part, dark)


def glass(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Windows (second colour) between pillars and under a roof."""
    x, y, z = np.abs(q / np.array(part.half)[:, None])
    pillar = ((x > 0.9) & (z > 0.9)) | ((x < 0.05) & (z > 0.9)) | (y > 0.85)
    return _choose(part, ~pillar)


def hub(part: Part, q: Floats, footprint: Floats) -> Floats:
    """A tyre with a hub in the second colour, the axle along the part's z."""
    return _choose(part, np.hypot(q[0], q[1]) < 0.45 * part.half[0])


def sectors(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Eight alternating panels about a tilted axis, as on a beach ball."""
    angle = np.arctan2(q[0] + 0.3 * q[1], q[2])
    return _choose(part, np.mod(np.floor(angle / (np.pi / 4.0)), 2.0) > 0)


def leaves(part: Part, q: Floats, footprint: Floats) -> Floats:
    """Dark and bright clumps."""
    return _tint(part, 0.9 + 0.6 * (cell_noise((q[0] + q[2]) / 0.07, (q[1] + 0.5 * q[2]) / 0.07) - 0.5))


TEXTURES: dict[str, Texture] = {
    "plain": plain,
    "grass": grass,
    "sand": sand,
    "road": road,
    "checker": checker,
    "floor_boards": floor_boards,
    "wall_boards": wall_boards,
    "brick": brick,
    "paint": paint,
    "ribs": ribs,
    "two_doors": two_doors,
    "glass": glass,
    "hub": hub,
    "sectors": sectors,
    "leaves": leaves,
}
