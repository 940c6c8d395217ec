"""What stands where in a rendered scene: grounds, walls, skies and things, drawn from a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dataengine.corpora._raycast import MAX_DEPTH_M, Colour, Floats, Light, Part
from dataengine.corpora._textures import smooth_noise

Shape = Literal["box", "ellipsoid", "cylinder"]
Triple = tuple[float, float, float]  # x y z, or red green blue

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.95, 0.5, 0.08),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.12, 0.6, 0.2),
    "blue": (0.12, 0.3, 0.85),
    "purple": (0.5, 0.2, 0.65),
    "pink": (0.95, 0.5, 0.7),
    "white": (0.93, 0.93, 0.93),
    "black": (0.1, 0.1, 0.12),
}
SKIN: tuple[Colour, ...] = ((0.95, 0.77, 0.64), (0.82, 0.6, 0.44), (0.58, 0.4, 0.28), (0.4, 0.26, 0.18))
HAIR: tuple[Colour, ...] = ((0.1, 0.08, 0.07), (0.35, 0.2, 0.1), (0.75, 0.6, 0.3), (0.55, 0.25, 0.12))
DARK: Colour = (0.08, 0.08, 0.1)
WINDOW: Colour = (0.15, 0.22, 0.3)


@dataclass(frozen=True)
class Surface:
    """A ground or a wall: its COCO panoptic name, texture and colours."""

    class_name: str
    texture: str
    colours: tuple[Colour, ...]
    outdoors: bool = False


GROUNDS = (
    Surface("grass-merged", "grass", ((0.3, 0.55, 0.16),), outdoors=True),
    Surface("road", "road", ((0.36, 0.36, 0.39), (0.92, 0.92, 0.85)), outdoors=True),
    Surface("sand", "sand", ((0.86, 0.76, 0.52),), outdoors=True),
    Surface("floor-wood", "floor_boards", ((0.66, 0.44, 0.25),)),
    Surface("floor-other-merged", "checker", ((0.82, 0.8, 0.76), (0.45, 0.5, 0.56))),
)
WALLS = (
    Surface("wall-brick", "brick", ((0.62, 0.28, 0.2), (0.78, 0.74, 0.68)), outdoors=True),
    Surface("wall-wood", "wall_boards", ((0.5, 0.36, 0.22),), outdoors=True),
    Surface("wall-other-merged", "paint", ((0.8, 0.8, 0.72), (0.95, 0.95, 0.93))),
)
PAINTS: tuple[Colour, ...] = ((0.84, 0.8, 0.7), (0.66, 0.76, 0.84), (0.72, 0.82, 0.7), (0.86, 0.7, 0.68))
# Colours low and high in the sky.
SKIES: dict[str, tuple[Colour, Colour]] = {
    "clear": ((0.78, 0.88, 0.97), (0.25, 0.5, 0.9)),
    "cloudy": ((0.78, 0.87, 0.95), (0.35, 0.56, 0.88)),
    "grey": ((0.8, 0.81, 0.83), (0.62, 0.65, 0.7)),
    "evening": ((1.0, 0.68, 0.36), (0.4, 0.32, 0.6)),
}


@dataclass(frozen=True)
class Solid:
    """A part of a thing in the thing's own axes: y = 0 is the ground under its middle; metres."""

    kind: Shape
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    texture: str
    colours: tuple[Colour, ...]


@dataclass(frozen=True)
class Thing:
    """An object before it is placed; `colour` names its first solid, `radius` (metres) bounds it from above."""

    class_name: str
    colour: str
    solids: tuple[Solid, ...]
    radius: float


@dataclass(frozen=True)
class World:
    """Everything there is to see. Part owners: 0 for surfaces, i + 1 for `things[i]`; sky "" where walls hide it."""

    parts: list[Part]
    class_names: list[str]  # of every part
    things: list[Thing]
    light: Light
    sky: str
    phase: float  # shifts the clouds


def _pick(rng: np.random.Generator, names: str) -> tuple[str, Colour]:
    options = names.split()
    name = options[rng.integers(len(options))]
    red, green, blue = np.clip(np.array(COLOURS[name]) + rng.uniform(-0.03, 0.03, 3), 0.03, 1.0)
    return name, (float(red), float(green), float(blue))


def _person(rng: np.random.Generator) -> Thing:
    name, shirt = _pick(rng, "red orange yellow green blue purple pink white black")
    _, trousers = _pick(rng, "blue black white green")
    skin, hair = SKIN[rng.integers(len(SKIN))], HAIR[rng.integers(len(HAIR))]
    k, stride, swing = rng.uniform(0.85, 1.1), rng.uniform(0.0, 0.14), rng.uniform(-0.1, 0.1)
    shapes: list[tuple[Shape, Triple, Triple, Triple]] = [
        ("ellipsoid", (0, 1.13, 0), (0.23, 0.36, 0.15), shirt),
        ("cylinder", (-0.1, 0.43, stride), (0.095, 0.43, 0.095), trousers),
        ("cylinder", (0.1, 0.43, -stride), (0.095, 0.43, 0.095), trousers),
        ("ellipsoid", (-0.27, 1.1, swing), (0.07, 0.33, 0.08), shirt),
        ("ellipsoid", (0.27, 1.1, -swing), (0.07, 0.33, 0.08), shirt),
        ("ellipsoid", (0, 1.6, 0), (0.125, 0.16, 0.135), skin),
        ("ellipsoid", (0, 1.65, -0.03), (0.13, 0.14, 0.135), hair),
    ]
    solids = (Solid(kind, _scaled(at, k), _scaled(half, k), "plain", (c,)) for kind, at, half, c in shapes)
    return Thing("person", name, tuple(solids), 0.4)


def _scaled(values: tuple[float, float, float], k: float) -> tuple[float, float, float]:
    return values[0] * k, values[1] * k, values[2] * k


def _car(rng: np.random.Generator) -> Thing:
    name, body = _pick(rng, "red yellow blue white black green")
    long, wide, high = rng.uniform(1.75, 2.15), rng.uniform(0.8, 0.9), rng.uniform(0.27, 0.33)
    middle = 0.25 + high
    roof = rng.uniform(0.24, 0.3)
    cabin = rng.uniform(-0.35, 0.0)
    wheels = [
        Solid(
            "ellipsoid", (x * 0.62 * long, 0.34, z * (wide - 0.04)), (0.34, 0.34, 0.13), "hub", (DARK, (0.6, 0.6, 0.62))
        )
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    lamps = [
        Solid("box", (x * long, middle + 0.08, z * 0.7 * wide), (0.03, 0.08, 0.14), "plain", (colour,))
        for x, colour in ((1, (1.0, 0.97, 0.8)), (-1, (0.7, 0.05, 0.05)))
        for z in (-1, 1)
    ]
    return Thing(
        "car",
        name,
        (
            Solid("box", (0, middle, 0), (long, high, wide), "plain", (body,)),
            Solid("box", (cabin, middle + high + roof, 0), (0.55 * long, roof, 0.88 * wide), "glass", (body, WINDOW)),
            *wheels,
            *lamps,
        ),
        float(np.hypot(long, wide)),
    )


def _suitcase(rng: np.random.Generator) -> Thing:
    name, shell = _pick(rng, "red orange yellow green blue purple pink black")
    x, y, z = rng.uniform(0.25, 0.36), rng.uniform(0.36, 0.5), rng.uniform(0.14, 0.2)
    rods = [
        Solid("box", (s * 0.5 * x, 2 * y + 0.2, -0.4 * z), (0.025, 0.16, 0.025), "plain", ((0.3, 0.3, 0.32),))
        for s in (-1, 1)
    ]
    grip = Solid("box", (0, 2 * y + 0.38, -0.4 * z), (0.5 * x + 0.025, 0.03, 0.03), "plain", (DARK,))
    wheels = [Solid("ellipsoid", (s * 0.8 * x, 0.05, 0), (0.05, 0.05, 0.05), "plain", (DARK,)) for s in (-1, 1)]
    shell_solid = Solid("box", (0, y + 0.06, 0), (x, y, z), "ribs", (shell,))
    return Thing("suitcase", name, (shell_solid, *rods, grip, *wheels), float(np.hypot(x, z)))


def _refrigerator(rng: np.random.Generator) -> Thing:
    name, shell = _pick(rng, "white white black red")
    x, y, z = rng.uniform(0.34, 0.46), rng.uniform(0.8, 1.0), rng.uniform(0.32, 0.4)
    seam = (0.5, 0.5, 0.52) if name == "black" else (0.25, 0.25, 0.28)
    solid = Solid("box", (0, y, 0), (x, y, z), "two_doors", (shell, seam))
    return Thing("refrigerator", name, (solid,), float(np.hypot(x, z)))


def _ball(rng: np.random.Generator) -> Thing:
    name, skin = _pick(rng, "red orange yellow green blue purple pink")
    radius = rng.uniform(0.22, 0.42)
    solid = Solid("ellipsoid", (0, radius, 0), (radius,) * 3, "sectors", (skin, (0.95, 0.95, 0.95)))
    return Thing("sports ball", name, (solid,), float(radius))


def _plant(rng: np.random.Generator) -> Thing:
    name, pot = _pick(rng, "orange white blue red black")
    radius, high = rng.uniform(0.2, 0.32), rng.uniform(0.2, 0.3)
    green: Colour = (0.1 + 0.1 * rng.random(), 0.42 + 0.15 * rng.random(), 0.12)
    crown = rng.uniform(0.35, 0.55)
    leaves = [
        Solid(
            "ellipsoid",
            (dx * radius, 2 * high + dy * crown, 0),
            (s * crown, 1.2 * s * crown, s * crown),
            "leaves",
            (green,),
        )
        for dx, dy, s in ((0.0, 1.15, 0.8), (-1.1, 0.75, 0.55), (1.1, 0.85, 0.55))
    ]
    pot_solid = Solid("cylinder", (0, high, 0), (radius, high, radius), "plain", (pot,))
    return Thing("potted plant", name, (pot_solid, *leaves), max(radius, 1.1 * radius + 0.55 * crown))


# How often each kind of thing appears out of doors and indoors.
THINGS: tuple[tuple[Callable[[np.random.Generator], Thing], float, float], ...] = (
    (_person, 3.0, 3.0),
    (_car, 2.5, 0.0),
    (_suitcase, 1.5, 2.0),
    (_refrigerator, 0.5, 2.0),
    (_ball, 2.0, 1.5),
    (_plant, 1.0, 2.0),
)


def _surfaces(rng: np.random.Generator) -> tuple[list[tuple[Surface, Part]], float, float]:
    """Ground and walls, the distance of the back wall, and the x of the side wall (0 when there is none)."""
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    shift = float(rng.uniform(-2.5, 2.5))
    floor = Part("box", (shift, -0.5, 0.0), (100.0, 0.5, 100.0), 0.0, ground.texture, ground.colours, 0)
    found = [(ground, floor)]
    if ground.outdoors and rng.random() < 0.6:
        return found, MAX_DEPTH_M, 0.0
    walls = [w for w in WALLS if w.outdoors or not ground.outdoors]
    wall = walls[rng.integers(len(walls))]
    high = float(rng.uniform(1.0, 1.7)) if ground.outdoors else 4.0  # half the height; indoors it fills the view
    first = wall.colours[0] if wall.outdoors else PAINTS[rng.integers(len(PAINTS))]
    colours = (first, *wall.colours[1:])
    back = float(rng.uniform(6.0, 14.0))
    found.append((wall, Part("box", (0.0, high, -back - 0.1), (30.0, high, 0.1), 0.0, wall.texture, colours, 0)))
    side = float(rng.uniform(2.2, 4.5)) * float(rng.choice([-1.0, 1.0])) if rng.random() < 0.5 else 0.0
    if side:
        at = (side + 0.1 * np.sign(side), high, 0.0)
        # A quarter turn: the texture's own x then runs along the wall.
        found.append((wall, Part("box", at, (back, high, 0.1), np.pi / 2, wall.texture, colours, 0)))
    return found, back, side


def _place(
    rng: np.random.Generator, radius: float, taken: list[tuple[float, float, float]], back: float, side: float
) -> tuple[float, float] | None:
    """An x and z in view on the ground, clear of walls and of the (x, z, radius) taken; None if none is found."""
    # Small things stay near, or they would be a few pixels in a small image.
    nearest, farthest = 2.6 + 1.5 * radius, min(back - radius - 0.1, 5.5 + 5.0 * radius, 14.0)
    for _ in range(20):
        distance = nearest + (farthest - nearest) * rng.random() ** 1.5
        x, z = float(rng.uniform(-0.44, 0.44) * distance), float(-distance)
        hits_wall = side != 0.0 and np.sign(side) * x > abs(side) - radius - 0.1
        if not hits_wall and all(np.hypot(x - tx, z - tz) > radius + tr + 0.1 for tx, tz, tr in taken):
            return x, z
    return None


def _light(rng: np.random.Generator, sky: str, side: float, walled: bool) -> Light:
    """From the camera's side where there are walls, so that no wall ought to throw a shadow into the scene."""
    azimuth = np.deg2rad(rng.uniform(10, 65) if walled else rng.uniform(5, 110))
    left = side > 0 if side else rng.random() < 0.5
    height = np.deg2rad(rng.uniform(18, 35) if sky == "evening" else rng.uniform(35, 65))
    flat = np.cos(height) * np.array([-np.sin(azimuth) if left else np.sin(azimuth), np.cos(azimuth)])
    strength, ambient = (0.35, 0.52) if sky == "grey" else (0.68, 0.32)
    return Light(np.array([flat[0], np.sin(height), flat[1]]), strength, ambient)


def build(rng: np.random.Generator) -> World:
    """A random world: one ground, perhaps walls, a sky or none, and one to six things that do not touch each other."""
    surfaces, back, side = _surfaces(rng)
    outdoors = surfaces[0][0].outdoors
    sky = str(rng.choice(list(SKIES), p=[0.4, 0.25, 0.2, 0.15])) if outdoors else ""
    parts, names = [part for _, part in surfaces], [surface.class_name for surface, _ in surfaces]
    weights = np.array([entry[1 if outdoors else 2] for entry in THINGS])
    things: list[Thing] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(int(rng.choice(6, p=[0.15, 0.2, 0.2, 0.2, 0.15, 0.1])) + 1):
        thing = THINGS[rng.choice(len(THINGS), p=weights / weights.sum())][0](rng)
        spot = _place(rng, thing.radius, taken, back, side)
        if spot is None:
            continue
        things.append(thing)
        taken.append((*spot, thing.radius))
        parts += _placed(thing, spot, float(rng.uniform(-np.pi, np.pi)), len(things))
        names += [thing.class_name] * len(thing.solids)
    return World(parts, names, things, _light(rng, sky, side, back < MAX_DEPTH_M), sky, float(rng.uniform(0, 100)))


def _placed(thing: Thing, spot: tuple[float, float], yaw: float, owner: int) -> list[Part]:
    cos, sin = np.cos(yaw), np.sin(yaw)
    parts = []
    for solid in thing.solids:
        x, y, z = solid.centre
        centre = (float(spot[0] + cos * x + sin * z), float(y), float(spot[1] + cos * z - sin * x))
        parts.append(Part(solid.kind, centre, solid.half, yaw, solid.texture, solid.colours, owner))
    return parts


def sky_colours(world: World, rays: Floats) -> Floats:
    """The colour (3, n, n) of the sky along each ray; black in a world without one."""
    if not world.sky:
        return np.zeros_like(rays)
    low, high = (np.array(c)[:, None, None] for c in SKIES[world.sky])
    slope = np.clip(rays[1] / np.hypot(rays[0], rays[2]), 0.0, None)
    mix = np.sqrt(np.clip(slope / 0.4, 0.0, 1.0))
    colour: Floats = low + (high - low) * mix
    if world.sky == "cloudy":
        x, z = rays[0] / (slope + 0.12) + world.phase, -rays[2] / (slope + 0.12)
        cover = 0.65 * smooth_noise(1.3 * x, z, 7) + 0.35 * smooth_noise(3.1 * x, 2.4 * z, 8)
        amount = np.clip((cover - 0.45) * 5.0, 0.0, 1.0) * np.clip(slope / 0.05, 0.0, 1.0)
        colour += (0.97 - colour) * amount
    return colour
