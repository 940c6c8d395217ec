"""Ray casting of boxes, ellipsoids and cylinders in numpy: geometry at pixel centres, colour with shadows.

World axes: x right, y up, z towards the viewer; the ground is y = 0 and the camera stands at (0, 1.5, 0), looking
along -z and ten degrees down. The camera never moves: then where a thing touches the ground tells how far it is,
and depth can be learnt from one image. Points and directions are component first, (3, n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Colour = tuple[float, float, float]  # red, green, blue in 0..1

CAMERA_HEIGHT_M = 1.5
PITCH = np.deg2rad(10.0)  # below the horizontal
FOCAL = 0.9  # in image widths: 58 degrees across
MAX_DEPTH_M = 20.0

CAMERA = np.array([0.0, CAMERA_HEIGHT_M, 0.0])
# Rows: the camera's right, up and backward axes in the world.
WORLD_TO_CAMERA = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(PITCH), -np.sin(PITCH)], [0.0, np.sin(PITCH), np.cos(PITCH)]])


@dataclass(frozen=True)
class Part:
    """One solid, with its `half` extents in metres, turned by `yaw` about y; a cylinder is upright."""

    kind: Literal["box", "ellipsoid", "cylinder"]
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    texture: str
    colours: tuple[Colour, ...]  # what they paint is the texture's affair
    owner: int  # number of the thing it belongs to; 0: ground and walls

    def local(self, vectors: Floats) -> Floats:
        """World directions (3, ...) in the part's own axes."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([cos * vectors[0] - sin * vectors[2], vectors[1], sin * vectors[0] + cos * vectors[2]])

    def world(self, vectors: Floats) -> Floats:
        """The inverse of `local`."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        return np.stack([cos * vectors[0] + sin * vectors[2], vectors[1], cos * vectors[2] - sin * vectors[0]])


@dataclass(frozen=True)
class Light:
    """A far light: unit direction towards it, its strength, and what reaches the shade."""

    towards: Floats
    strength: float
    ambient: float


def camera_rays(n: int) -> Floats:
    """World directions (3, n, n) through the pixel centres, one metre long along the optical axis: t is z-depth."""
    across = ((np.arange(n) + 0.5) / n - 0.5) / FOCAL
    x, y = np.meshgrid(across, -across)
    return np.einsum("ji,jhw->ihw", WORLD_TO_CAMERA, np.stack([x, y, np.full_like(x, -1.0)]))


def _column(values: tuple[float, float, float] | Floats, ndim: int) -> Floats:
    return np.asarray(values, dtype=np.float64).reshape((3,) + (1,) * (ndim - 1))


def _slab(origin: Floats, ray: Floats) -> tuple[Floats, Floats]:
    """Where a ray enters and leaves -1..1, per axis."""
    ray = np.where(np.abs(ray) < 1e-12, 1e-12, ray)
    a, b = (-1.0 - origin) / ray, (1.0 - origin) / ray
    return np.minimum(a, b), np.maximum(a, b)


def _quadric(origin: Floats, ray: Floats) -> tuple[Floats, Floats]:
    """Where a ray enters and leaves the unit sphere (circle, given two axes); enters at +inf where it misses."""
    a, b = (ray * ray).sum(0) + 1e-18, (ray * origin).sum(0)
    root = b * b - a * ((origin * origin).sum(0) - 1.0)
    missed = root < 0
    root = np.sqrt(np.where(missed, 0.0, root))
    return np.where(missed, np.inf, (-b - root) / a), np.where(missed, -np.inf, (root - b) / a)


def _span(part: Part, origin: Floats, ray: Floats) -> tuple[Floats, Floats]:
    """Where rays in the part's axes, scaled to the unit solid, enter and leave it; a miss enters after it leaves."""
    if part.kind == "ellipsoid":
        return _quadric(origin, ray)
    if part.kind == "box":
        near, far = _slab(origin, ray)
        return near.max(0), far.min(0)
    near, far = _quadric(origin[::2], ray[::2])
    low, high = _slab(origin[1], ray[1])
    return np.maximum(near, low), np.minimum(far, high)


def spans(part: Part, origin: Floats, ray: Floats) -> tuple[Floats, Floats]:
    """Ray parameters at which world rays enter and leave a part, for origins and rays (3, ...) that broadcast.

    Entering is before leaving exactly where the ray's line meets the part.
    """
    half = _column(part.half, ray.ndim)
    return _span(part, part.local(origin - _column(part.centre, ray.ndim)) / half, part.local(ray) / half)


def _window(part: Part, n: int) -> tuple[slice, slice]:
    """Rows and columns of an n x n image outside of which the part cannot be seen."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8)
    corners = part.world(signs * _column(part.half, 2)) + _column(part.centre, 2) - _column(CAMERA, 2)
    x, y, z = WORLD_TO_CAMERA @ corners
    if z.max() > -0.05:  # reaches behind the image plane: its projection is not bounded by its corners
        return slice(0, n), slice(0, n)
    columns, rows = (x / -z * FOCAL + 0.5) * n, (0.5 - y / -z * FOCAL) * n
    low = np.clip(np.floor([rows.min(), columns.min()]) - 1, 0, n).astype(int)
    high = np.clip(np.ceil([rows.max(), columns.max()]) + 1, 0, n).astype(int)
    return slice(low[0], high[0]), slice(low[1], high[1])


def trace(parts: list[Part], rays: Floats) -> tuple[Floats, NDArray[np.int16]]:
    """z-depth (n, n) in metres and the index (n, n) of the part seen first; -1 and MAX_DEPTH_M where none is."""
    n = rays.shape[-1]
    depth, seen = np.full((n, n), MAX_DEPTH_M), np.full((n, n), -1, dtype=np.int16)
    for index, part in enumerate(parts):
        window = _window(part, n)
        near, far = spans(part, _column(CAMERA, 3), rays[:, *window])
        nearer = (near < far) & (near > 0.0) & (near < depth[window])
        depth[window][nearer] = near[nearer]
        seen[window][nearer] = index
    return depth, seen


def _pixels(seen: NDArray[np.int16], num_parts: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Flat pixel indices of every visible part."""
    flat = seen.ravel()
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(num_parts + 1))
    for index in range(num_parts):
        if starts[index] < starts[index + 1]:
            yield index, order[starts[index] : starts[index + 1]]


def _normal(part: Part, local: Floats) -> Floats:
    """Outward unit normals (3, n), in the world, at points of the surface given in the part's axes in metres."""
    half = _column(part.half, 2)
    unit = local / half
    if part.kind == "box":
        face = np.abs(unit).argmax(0)
        unit = np.where(face == np.arange(3)[:, None], np.sign(unit), 0.0)
    elif part.kind == "cylinder":
        cap = np.abs(unit[1]) > np.hypot(unit[0], unit[2])
        unit = np.where(cap, np.stack([0 * unit[0], np.sign(unit[1]), 0 * unit[2]]), unit * [[1.0], [0.0], [1.0]])
    normal = part.world(unit / half)
    return normal / np.linalg.norm(normal, axis=0)


def normals(parts: list[Part], rays: Floats, depth: Floats, seen: NDArray[np.int16]) -> Floats:
    """Unit normals (n, n, 3) in camera axes (x right, y up, z towards the camera); (0, 0, 1) where nothing is seen."""
    flat_rays, flat_depth = rays.reshape(3, -1), depth.ravel()
    out = np.zeros_like(flat_rays)
    out[2] = 1.0
    for index, pixels in _pixels(seen, len(parts)):
        part = parts[index]
        offset = _column(CAMERA, 2) + flat_depth[pixels] * flat_rays[:, pixels] - _column(part.centre, 2)
        out[:, pixels] = WORLD_TO_CAMERA @ _normal(part, part.local(offset))
    return out.T.reshape(*depth.shape, 3)


def shade(
    parts: list[Part],
    light: Light,
    rays: Floats,
    background: Floats,
    textures: dict[str, Callable[[Part, Floats, Floats], Floats]],
) -> Floats:
    """Colours (3, n, n) in 0..1: textures under Lambert's law, hard shadows, and `background` (3, n, n) behind."""
    depth, seen = trace(parts, rays)
    flat_rays, flat_depth = rays.reshape(3, -1), depth.ravel()
    points = _column(CAMERA, 2) + flat_depth * flat_rays
    colour = background.reshape(3, -1).copy()
    normal = np.zeros_like(points)
    for index, pixels in _pixels(seen, len(parts)):
        part = parts[index]
        local = part.local(points[:, pixels] - _column(part.centre, 2))
        normal[:, pixels] = _normal(part, local)
        colour[:, pixels] = textures[part.texture](part, local, flat_depth[pixels] / (FOCAL * rays.shape[-1]))
    facing = np.clip(light.towards @ normal, 0.0, None)
    lit = np.flatnonzero(facing)
    facing[lit[_in_shadow(parts, light, (points + 1e-3 * normal)[:, lit])]] = 0.0
    solid = seen.ravel() >= 0
    brightness = light.ambient * (1.0 + 0.25 * normal[1]) + light.strength * facing
    haze = np.where(solid, 0.25 * (flat_depth / MAX_DEPTH_M) ** 2, 0.0)
    lit_colour = colour * np.where(solid, brightness, 1.0)
    return np.clip(lit_colour * (1.0 - haze) + 0.8 * haze, 0.0, 1.0).reshape(rays.shape)


def _in_shadow(parts: list[Part], light: Light, points: Floats) -> NDArray[np.bool_]:
    """Whether a thing stands between each point (3, n) and the light; the ground and the walls throw no shadow."""
    shadow = np.zeros(points.shape[1], dtype=bool)
    along = light.towards @ points
    squared = (points * points).sum(0)
    for part in parts:
        if part.owner == 0:
            continue
        centre, radius = np.asarray(part.centre), np.linalg.norm(part.half)
        # Squared distance of the part's centre from the ray, and a ray that leaves the part behind is no candidate.
        ahead = light.towards @ centre - along
        off_axis = squared - 2.0 * (centre @ points) + centre @ centre - ahead * ahead
        near = np.flatnonzero((off_axis < radius * radius) & (ahead > -radius) & ~shadow)
        if near.size:
            enter, leave = spans(part, points[:, near], _column(light.towards, 2))
            shadow[near] = (enter < leave) & (leave > 0.0)
    return shadow
