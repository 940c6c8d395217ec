"""Rendered scenes whose depth, normals, classes, masks and captions are exact: ground truth without a download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from pycocotools import mask as coco_mask

from dataengine.corpora import Corpus, RawSample, Split
from dataengine.corpora._raycast import MAX_DEPTH_M, camera_rays, normals, shade, trace
from dataengine.corpora._textures import TEXTURES
from dataengine.corpora._world import Thing, World, build, sky_colours

# detectron2's contiguous COCO panoptic ids: 80 things, then 53 stuff classes.
CLASS_IDS: dict[str, int] = {
    "person": 0,
    "car": 2,
    "suitcase": 28,
    "sports ball": 32,
    "potted plant": 58,
    "refrigerator": 72,
    "floor-wood": 87,
    "road": 100,
    "sand": 102,
    "wall-brick": 109,
    "wall-wood": 112,
    "sky-other-merged": 119,
    "floor-other-merged": 122,
    "grass-merged": 125,
    "wall-other-merged": 131,
}
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "person": (("person", "people"),),
    "car": (("car", "cars"),),
    "suitcase": (("suitcase", "suitcases"),),
    "sports ball": (("ball", "balls"), ("sports ball", "sports balls")),
    "potted plant": (("potted plant", "potted plants"),),
    "refrigerator": (("refrigerator", "refrigerators"), ("fridge", "fridges")),
}
ON_GROUND: dict[str, tuple[str, ...]] = {
    "grass-merged": ("on grass", "on a green lawn"),
    "road": ("on a road", "on grey asphalt"),
    "sand": ("on sand", "on a sandy beach"),
    "floor-wood": ("on a wooden floor", "on wooden boards"),
    "floor-other-merged": ("on a tiled floor", "on a checkered floor"),
}
BY_WALL: dict[str, str] = {
    "wall-brick": "a brick wall",
    "wall-wood": "a wooden wall",
    "wall-other-merged": "a painted wall",
}
UNDER_SKY: dict[str, tuple[str, ...]] = {
    "clear": ("under a clear sky", "under a blue sky"),
    "cloudy": ("under a cloudy sky", "beneath white clouds"),
    "grey": ("under a grey sky", "on an overcast day"),
    "evening": ("under an evening sky", "at sunset"),
}
OPENCV_AXES = np.array([1, -1, -1], np.float32)
"""From y up and z towards the camera, as a scene has it, to y down and z forward, as the modality is stored."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SALT = 0x5CE7E5  # keeps scene n apart from whatever else is drawn from seed n
MIN_SIZE = 8
NAMED_SHARE = 0.002
"""A caption names exactly the things that cover at least this share of the image."""


@dataclass(frozen=True)
class Scene:
    """A rendered image of s x s pixels and everything that is true of it, all at pixel centres but for `rgb`.

    The camera is the same in every scene (1.5 m up, 10 degrees down, 58 degrees across). `normal` of the sky is
    (0, 0, 1), its `depth` MAX_DEPTH_M. `boxes` are ml-4m's instances: corners normalised to 0..1 that just hold the
    visible pixels, in the order of the ids in `instance`. `edges` marks the outermost pixels of each thing: those
    beside (not at a corner of) a pixel of something else.
    """

    rgb: np.ndarray  # uint8 (s, s, 3)
    depth: np.ndarray  # float32 (s, s), metres along the optical axis, in (0, MAX_DEPTH_M]
    normal: np.ndarray  # float32 (s, s, 3), unit, x right, y up, z towards the camera
    semseg: np.ndarray  # uint8 (s, s), COCO panoptic ids 0..132
    instance: np.ndarray  # int32 (s, s), 0: no thing, 1..n
    boxes: list[dict[str, Any]]
    edges: np.ndarray  # uint8 (s, s), 0 or 255
    caption: str


class Scenes(Corpus):
    """`scenes:COUNT?size=64&seed=0`: COUNT rendered images of size x size pixels (128), one a seed from `seed` (0) on.

    `depth` is the z-depth over MAX_DEPTH_M (20 m), so the sky is 1.
    """

    emits = ("depth", "normal", "semseg", "det", "sam_instance", "sam_edge")

    def __init__(self, location: str) -> None:
        super().__init__(location)
        count, _, query = location.partition("?")
        settings = {"size": "128", "seed": "0", "count": count}
        given = parse_qsl(query, keep_blank_values=True)
        if not {name for name, _ in given} <= {"size", "seed"}:
            raise ValueError(f"scenes:{location}: expected settings size and seed, got {query!r}")
        settings.update(given)
        if not all(value.isdecimal() for value in settings.values()):
            raise ValueError(f"scenes:{location}: expected whole numbers as in scenes:1000?size=64&seed=0")
        self.count, self.size, self.seed = (int(settings[name]) for name in ("count", "size", "seed"))
        if self.size < MIN_SIZE:
            raise ValueError(f"scenes:{location}: expected a size of at least {MIN_SIZE} pixels, got {self.size}")

    def splits(self, shard_size: int) -> list[Split]:
        """Ranges of seeds."""
        if shard_size < 1:
            raise ValueError(f"scenes: expected a shard size of at least 1, got {shard_size}")
        end = self.seed + self.count
        return [Split("seeds", i, min(i + shard_size, end)) for i in range(self.seed, end, shard_size)]

    def read(self, split: Split) -> Iterator[RawSample]:
        """Render one split."""
        for seed in range(split.start, split.stop):
            scene = render(seed, self.size)
            values = {
                "rgb": scene.rgb,
                "depth": scene.depth / np.float32(MAX_DEPTH_M),
                "normal": scene.normal * OPENCV_AXES,
                "semseg": scene.semseg,
                "det": {"instances": scene.boxes},
                "sam_instance": _masks(scene.instance),
                "sam_edge": scene.edges,
            }
            yield RawSample(
                key=f"scene{seed:08d}", source=f"seed {seed}, {self.size} px", captions=(scene.caption,), values=values
            )

    @classmethod
    def example(cls, folder: str) -> Scenes:
        """Six small scenes; nothing is written."""
        return cls("6?size=32")


def _masks(instance: np.ndarray) -> list[dict[str, Any]]:
    """COCO-RLE of every thing, largest first, with its box [x, y, width, height] in pixels and a point inside it."""
    masks = []
    for number in range(1, int(instance.max()) + 1):
        inside = np.argwhere(instance == number)
        y, x = inside[((inside - inside.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        encoded = coco_mask.encode(np.asfortranarray(instance == number, dtype=np.uint8))
        masks.append(
            {
                "size": list(instance.shape),
                "counts": encoded["counts"].decode(),
                "bbox": [float(v) for v in coco_mask.toBbox(encoded)],
                "area": int(coco_mask.area(encoded)),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "point": [int(x), int(y)],
            }
        )
    return sorted(masks, key=lambda mask: -mask["area"])


def render(seed: int, size: int) -> Scene:
    """The scene of a seed at size x size pixels; another size shows the same world through the same camera."""
    if seed < 0 or size < MIN_SIZE:
        raise ValueError(f"a scene needs a seed of 0 or more and {MIN_SIZE} pixels or more, got {seed} and {size}")
    rng = np.random.default_rng([seed, SALT])
    world = build(rng)
    rays = camera_rays(size)
    depth, seen = trace(world.parts, rays)
    # Index -1 (nothing seen) picks the last entry of each table.
    owner = np.array([part.owner for part in world.parts] + [0])[seen]
    class_id = np.array([CLASS_IDS[name] for name in [*world.class_names, "sky-other-merged"]], dtype=np.uint8)
    visible = np.unique(owner[owner > 0])
    instance = np.where(owner > 0, np.searchsorted(visible, owner) + 1, 0).astype(np.int32)
    things = [world.things[i - 1] for i in visible]
    return Scene(
        rgb=_rgb(world, size),
        depth=depth.astype(np.float32),
        normal=normals(world.parts, rays, depth, seen).astype(np.float32),
        semseg=class_id[seen],
        instance=instance,
        boxes=_boxes(instance, things),
        edges=_edges(instance),
        caption=_caption(rng, world, seen, depth, owner),
    )


def _rgb(world: World, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the mean of two by two samples a pixel."""
    rays = camera_rays(2 * size)
    colour = shade(world.parts, world.light, rays, sky_colours(world, rays), TEXTURES)
    mean = colour.reshape(3, size, 2, size, 2).mean(axis=(2, 4))
    return np.round(255.0 * mean.transpose(1, 2, 0)).astype(np.uint8)


def _boxes(instance: np.ndarray, things: list[Thing]) -> list[dict[str, Any]]:
    size = instance.shape[0]
    boxes = []
    for number, thing in enumerate(things, start=1):
        rows, columns = np.nonzero(instance == number)
        corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        boxes.append({"boxes": [float(c) / size for c in corners], "class_name": thing.class_name, "score": 1.0})
    return boxes


def _edges(instance: np.ndarray) -> np.ndarray:
    changes = np.zeros(instance.shape, dtype=bool)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        differ = instance[a] != instance[b]
        changes[a] |= differ
        changes[b] |= differ
    return np.where(changes & (instance > 0), 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class _Named:
    """A thing that a caption names: its mean depth in metres, and whether enough shows of what its colour names."""

    thing: Thing
    depth: float
    coloured: bool


def _caption(rng: np.random.Generator, world: World, seen: np.ndarray, depth: np.ndarray, owner: np.ndarray) -> str:
    """One sentence that holds: it counts all things large enough to see, and names colours that show.

    It says nothing of left and right, so it stays true of a mirrored image.
    """
    enough = NAMED_SHARE * seen.size
    named: list[_Named] = []
    for number, thing in enumerate(world.things, start=1):
        pixels = owner == number
        if np.count_nonzero(pixels) >= enough:
            first = next(i for i, part in enumerate(world.parts) if part.owner == number)
            named.append(_Named(thing, float(depth[pixels].mean()), bool(np.count_nonzero(seen == first) >= enough)))
    ground, place = _surroundings(rng, world, seen, enough)
    if len(named) == 2 and rng.random() < 0.7 and abs(named[0].depth - named[1].depth) > 1.5:
        near, far = (_phrase(rng, [entry]) for entry in sorted(named, key=lambda entry: entry.depth))
        text = f"{near} and, farther away, {far}" if rng.random() < 0.5 else f"{far} some way behind {near}"
    else:
        text = _listing(rng, named)
    if not text:
        return " ".join(filter(None, ["an empty place", ground, place]))
    verb = "is" if text.startswith(("a ", "an ")) else "are"
    forms = ["{0} {1} {2}", "{0} {1} {2}", "a picture of {0} {1} {2}", f"there {verb} {{0}} {{1}} {{2}}"]
    if place:
        forms.append("{2}, {0} {1}")
    return " ".join(forms[rng.integers(len(forms))].format(text, ground, place).split())


def _listing(rng: np.random.Generator, named: list[_Named]) -> str:
    groups: dict[str, list[_Named]] = {}
    for entry in named:
        groups.setdefault(entry.thing.class_name, []).append(entry)
    phrases = [_phrase(rng, groups[str(name)]) for name in rng.permutation(sorted(groups))]
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))


def _phrase(rng: np.random.Generator, group: list[_Named]) -> str:
    """The things of one class with their number, and the colour where all have it and show it."""
    name = group[0].thing.class_name
    nouns = NOUNS[name]
    noun = nouns[rng.integers(len(nouns))][len(group) > 1]
    colours = {entry.thing.colour for entry in group}
    if len(colours) == 1 and all(entry.coloured for entry in group):
        colour = colours.pop()
        worn = {"person": "shirt", "potted plant": "pot"}.get(name)
        if worn is None:
            noun = f"{colour} {noun}"
        elif len(group) == 1:
            noun = f"{noun} in {_article(colour)} {worn}"
        else:
            noun = f"{noun} in {colour} {worn}s"
    return _article(noun) if len(group) == 1 else f"{NUMBERS[len(group)]} {noun}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _surroundings(rng: np.random.Generator, world: World, seen: np.ndarray, enough: float) -> tuple[str, str]:
    """Phrases for the ground and for what is behind, of what is seen; "" for the rest."""
    # The surfaces come first: the ground, then perhaps walls of one class.
    surfaces = world.class_names[: sum(part.owner == 0 for part in world.parts)]
    ground = str(rng.choice(ON_GROUND[surfaces[0]])) if np.count_nonzero(seen == 0) >= enough else ""
    walls = np.count_nonzero((seen > 0) & (seen < len(surfaces)))
    places = [f"in front of {BY_WALL[surfaces[1]]}"] if walls >= 10 * enough else []
    if world.sky and np.count_nonzero(seen < 0) >= 10 * enough:
        places.append(str(rng.choice(UNDER_SKY[world.sky])))
    return ground, places[rng.integers(len(places))] if places else ""
