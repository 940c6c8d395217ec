"""Rendered scenes against closed forms, and against each other: image, maps, masks, boxes and words tell one story."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from dataengine import corpora, modalities
from dataengine.corpora import Split, scenes
from dataengine.corpora import _raycast as raycast
from dataengine.corpora._raycast import FOCAL, MAX_DEPTH_M, PITCH, WORLD_TO_CAMERA, Light, Part
from dataengine.corpora._world import COLOURS, GROUNDS, build
from dataengine.corpora.scenes import CLASS_IDS, NAMED_SHARE, NOUNS, NUMBERS, Scene, Scenes, render
from dataengine.sample import Sample
from labelers.sam_edge import SamEdge

SIZE = 48
GROUND_IDS = [CLASS_IDS[ground.class_name] for ground in GROUNDS]
WALL_IDS = [CLASS_IDS[name] for name in ("wall-brick", "wall-wood", "wall-other-merged")]
FORWARD = -WORLD_TO_CAMERA[2]


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [render(seed, SIZE) for seed in range(60)]


def solid(kind: str, centre: np.ndarray, half: tuple[float, float, float], yaw: float = 0.0) -> Part:
    return Part(kind, tuple(centre), half, yaw, "plain", ((1.0, 1.0, 1.0),), 1)  # type: ignore[arg-type]


def camera_points(depth: np.ndarray) -> np.ndarray:
    """(s, s, 3) points in camera axes, written down apart from the renderer's rays."""
    size = depth.shape[0]
    offset = ((np.arange(size) + 0.5) / size - 0.5) / FOCAL
    return depth[..., None] * np.stack(np.broadcast_arrays(offset, -offset[:, None], -1.0), axis=-1)


def test_dtypes_shapes_and_ranges(many: list[Scene]) -> None:
    for scene in many:
        assert scene.rgb.dtype == np.uint8
        assert scene.rgb.shape == (SIZE, SIZE, 3)
        assert scene.depth.dtype == np.float32
        assert scene.depth.shape == (SIZE, SIZE)
        assert np.all(scene.depth > 0.5)
        assert np.all(scene.depth <= MAX_DEPTH_M)
        assert scene.normal.dtype == np.float32
        assert scene.normal.shape == (SIZE, SIZE, 3)
        np.testing.assert_allclose(np.linalg.norm(scene.normal, axis=-1), 1.0, atol=1e-5)
        assert scene.semseg.dtype == np.uint8
        assert scene.semseg.shape == (SIZE, SIZE)
        assert scene.instance.dtype == np.int32
        assert scene.edges.dtype == np.uint8


def test_class_ids_are_coco_panoptic_and_all_occur(many: list[Scene]) -> None:
    # Things are 0..79 in the 133 contiguous classes; the ids of floor-wood, road, sand are detectron2's.
    assert all(CLASS_IDS[name] < 80 for name in NOUNS)
    assert all(80 <= i <= 132 for name, i in CLASS_IDS.items() if name not in NOUNS)
    assert (CLASS_IDS["floor-wood"], CLASS_IDS["road"], CLASS_IDS["sand"], CLASS_IDS["grass-merged"]) == (
        87,
        100,
        102,
        125,
    )
    assert set(np.unique([scene.semseg for scene in many])) == set(CLASS_IDS.values())


def test_ground_has_the_depth_and_normal_of_a_plane_1500_mm_below(many: list[Scene]) -> None:
    row = (0.5 - (np.arange(SIZE) + 0.5) / SIZE) / FOCAL
    below = np.sin(PITCH) - row * np.cos(PITCH)  # metres down for each metre along the optical axis
    expected = np.repeat((1.5 / np.where(below > 0, below, np.nan))[:, None], SIZE, axis=1)
    for scene in many:
        ground = np.isin(scene.semseg, GROUND_IDS)
        assert ground.mean() > 0.1
        np.testing.assert_allclose(scene.depth[ground], expected[ground], rtol=1e-5)
        np.testing.assert_allclose(scene.normal[ground] - [0, np.cos(PITCH), np.sin(PITCH)], 0.0, atol=1e-6)


def test_back_wall_is_a_plane_that_leans_with_the_camera(many: list[Scene]) -> None:
    seen = 0
    for scene in many:
        facing = np.isin(scene.semseg, WALL_IDS) & (np.abs(scene.normal[..., 0]) < 0.5)
        if not facing.any():
            continue
        seen += 1
        towards = np.array([0.0, -np.sin(PITCH), np.cos(PITCH)])
        upward = scene.normal[..., 1] > 0.5  # the top of a low wall is never seen from 1.5 m
        assert not np.any(facing & upward)
        np.testing.assert_allclose(scene.normal[facing] - towards, 0.0, atol=1e-6)
        distance = -(camera_points(scene.depth)[facing] @ towards)
        assert np.ptp(distance) < 1e-4
        assert 6 <= distance.mean() <= 14
    assert seen > 10


def test_sky_is_at_the_largest_depth_and_faces_the_camera(many: list[Scene]) -> None:
    for scene in many:
        sky = scene.semseg == CLASS_IDS["sky-other-merged"]
        assert np.array_equal(sky, scene.depth == MAX_DEPTH_M)
        assert np.all(scene.normal[sky] == [0, 0, 1])


def test_a_ball_on_the_optical_axis() -> None:
    centre = raycast.CAMERA + 5.0 * FORWARD
    parts, rays = [solid("ellipsoid", centre, (1.0, 1.0, 1.0))], raycast.camera_rays(65)
    depth, seen = raycast.trace(parts, rays)
    normal = raycast.normals(parts, rays, depth, seen)
    assert depth[32, 32] == pytest.approx(4.0)
    np.testing.assert_allclose(normal[32, 32], [0, 0, 1], atol=1e-12)
    # Every hit lies on the sphere, and its normal is its offset from the centre.
    offset = camera_points(depth)[seen == 0] - [0, 0, -5]
    np.testing.assert_allclose(normal[seen == 0], offset, atol=1e-9)
    # The outline is where the viewing angle's sine is radius over distance.
    angle = np.tan(np.arcsin(1 / 5))
    ray = camera_points(np.ones((65, 65)))
    assert np.array_equal(seen == 0, np.hypot(ray[..., 0], ray[..., 1]) < angle)


@pytest.mark.parametrize("kind", ["box", "ellipsoid", "cylinder"])
def test_hits_lie_on_the_surface_and_are_the_first(kind: str) -> None:
    rng = np.random.default_rng(0)
    rays = raycast.camera_rays(40)
    for _ in range(20):
        centre = np.array([rng.uniform(-2, 2), rng.uniform(0.3, 2), rng.uniform(-9, -4)])
        part = solid(kind, centre, tuple(rng.uniform(0.2, 1.5, 3)), rng.uniform(-3, 3))
        depth, seen = raycast.trace([part], rays)
        assert (seen == 0).any()
        ray = rays[:, seen == 0]
        local = (
            part.local(raycast.CAMERA[:, None] + depth[seen == 0] * ray - centre[:, None])
            / np.array(part.half)[:, None]
        )
        size = {
            "box": np.abs(local).max(axis=0),
            "ellipsoid": np.linalg.norm(local, axis=0),
            "cylinder": np.maximum(np.hypot(local[0], local[2]), np.abs(local[1])),
        }[kind]
        np.testing.assert_allclose(size, 1.0, atol=1e-9)
        normal = raycast.normals([part], rays, depth, seen)[seen == 0]
        # What is seen first faces the camera; and the window a part is sought in loses none of it.
        assert np.all((normal * camera_points(depth)[seen == 0]).sum(axis=1) < 1e-9)
        near, far = raycast.spans(part, raycast.CAMERA[:, None, None], rays)
        assert np.array_equal(seen == 0, (near < far) & (near > 0) & (near < MAX_DEPTH_M))


def test_normals_are_the_slope_of_depth(many: list[Scene]) -> None:
    angles = []
    for seed in range(12):
        scene = render(seed, 128)
        points = camera_points(scene.depth.astype(np.float64))
        across = points[1:-1, 2:] - points[1:-1, :-2]
        up = points[:-2, 1:-1] - points[2:, 1:-1]
        slope = np.cross(across, up)
        slope /= np.linalg.norm(slope, axis=-1, keepdims=True)
        inner = scene.normal[1:-1, 1:-1]
        smooth = scene.semseg[1:-1, 1:-1] != CLASS_IDS["sky-other-merged"]
        for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
            near = (slice(rows, 126 + rows), slice(columns, 126 + columns))
            smooth &= (scene.semseg[near] == scene.semseg[1:-1, 1:-1]) & ((scene.normal[near] * inner).sum(-1) > 0.99)
        angles.append(np.degrees(np.arccos(np.clip((slope * inner).sum(-1)[smooth], -1, 1))))
    joined = np.concatenate(angles)
    assert joined.size > 12 * 5000
    # A few pixels straddle two parts of one class that happen to face the same way.
    assert np.quantile(joined, 0.99) < 1.5
    assert np.mean(joined > 5) < 0.005


@pytest.mark.parametrize("seed", range(5))
def test_every_size_samples_the_same_world(seed: int) -> None:
    # Each pixel centre at 32 is the centre of the middle one of 3 x 3 pixels at 96.
    small, large = render(seed, 32), render(seed, 96)
    np.testing.assert_allclose(small.depth, large.depth[1::3, 1::3], rtol=1e-6)
    np.testing.assert_allclose(small.normal, large.normal[1::3, 1::3], atol=1e-6)
    assert np.array_equal(small.semseg, large.semseg[1::3, 1::3])


def test_the_same_seed_gives_the_same_bytes_and_another_another() -> None:
    once, again, other = render(3, SIZE), render(3, SIZE), render(4, SIZE)
    for field in fields(Scene):
        a, b = getattr(once, field.name), getattr(again, field.name)
        assert a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else a == b
    assert not np.array_equal(once.rgb, other.rgb)


def test_boxes_just_hold_the_pixels_of_their_instance(many: list[Scene]) -> None:
    assert sum(len(scene.boxes) for scene in many) > 60
    for scene in many:
        assert set(np.unique(scene.instance)) - {0} == set(range(1, len(scene.boxes) + 1))
        assert np.array_equal(scene.instance > 0, scene.semseg < 80)
        for number, box in enumerate(scene.boxes, start=1):
            mask = scene.instance == number
            assert set(scene.semseg[mask]) == {CLASS_IDS[box["class_name"]]}
            x0, y0, x1, y1 = (round(v * SIZE) for v in box["boxes"])
            inside = np.zeros_like(mask)
            inside[y0:y1, x0:x1] = True
            assert not np.any(mask & ~inside)
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()
            assert mask[:, x1 - 1].any()
            assert box["score"] == 1.0


def test_edges_are_where_the_instance_map_changes(many: list[Scene]) -> None:
    for scene in many[:8]:
        expected = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for y, x in np.argwhere(scene.instance > 0):
            beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            values = [scene.instance[p] for p in beside if min(p) >= 0 and max(p) < SIZE]
            expected[y, x] = 255 if any(v != scene.instance[y, x] for v in values) else 0
        assert np.array_equal(scene.edges, expected)


# pycocotools 2.0 speaks numpy 1 when it decodes.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_edges_are_what_the_labeler_makes_of_the_masks() -> None:
    corpus = Scenes("8?size=48")
    label = SamEdge(mode="gradient").load("cpu")
    for raw in corpus.read(corpus.splits(8)[0]):
        assert np.array_equal(label([Sample(raw.key, raw.values)])[0]["sam_edge"], raw.values["sam_edge"])


COUNT = r"\b(an?|two|three|four|five|six) "
COLOUR = "(" + "|".join(COLOURS) + ")"


def spoken(caption: str) -> Counter[str]:
    """How many of each class a caption names."""
    found: Counter[str] = Counter()
    for name, nouns in NOUNS.items():
        words = "|".join(sorted((word for pair in nouns for word in pair), key=len, reverse=True))
        for match in re.finditer(rf"{COUNT}(?:{COLOUR} )?(?:{words})\b", caption):
            found[name] += 1 if match[1] in ("a", "an") else NUMBERS.index(match[1])
    return found


def test_captions_count_the_things_that_show() -> None:
    said = set()
    for seed in range(150):
        scene = render(seed, SIZE)
        shown: Counter[str] = Counter()
        for number, box in enumerate(scene.boxes, start=1):
            shown[box["class_name"]] += bool(np.count_nonzero(scene.instance == number) >= NAMED_SHARE * SIZE**2)
        assert spoken(scene.caption) == +shown, scene.caption
        said.add(scene.caption)
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", scene.caption), scene.caption
        assert not re.search(r"\b(left|right)\b", scene.caption)  # must survive a mirrored image
    assert len(said) > 140


def test_captions_name_colours_grounds_and_backgrounds_that_are_there() -> None:
    for seed in range(150):
        scene, world = render(seed, 32), build(np.random.default_rng([seed, scenes.SALT]))
        on = next(name for name, words in scenes.ON_GROUND.items() if any(w in scene.caption for w in words))
        assert (scene.semseg == CLASS_IDS[on]).any()
        for name, words in scenes.BY_WALL.items():
            assert words not in scene.caption or (scene.semseg == CLASS_IDS[name]).any()
        for sky, phrases in scenes.UNDER_SKY.items():
            told = any(words in scene.caption for words in phrases)
            assert not told or (world.sky == sky and (scene.semseg == CLASS_IDS["sky-other-merged"]).any())
        colours = [(match[1], match[2]) for match in re.finditer(rf"{COLOUR} ([a-z]+(?: ball)?)", scene.caption)]
        nouns = {word: name for name, pairs in NOUNS.items() for pair in pairs for word in pair}
        nouns |= {"shirt": "person", "shirts": "person", "pot": "potted plant", "pots": "potted plant"}
        for colour, noun in colours:
            if noun in nouns:
                assert (nouns[noun], colour) in {(thing.class_name, thing.colour) for thing in world.things}


def test_the_nearer_of_two_is_told() -> None:
    told = 0
    for seed in range(300):
        scene = render(seed, 32)
        match = re.search(rf"{COUNT}(.+) (?:and, farther away,|some way behind) an? (.+?) on ", scene.caption)
        if match is None:
            continue
        told += 1
        depths = [
            (float(scene.depth[scene.instance == n].mean()), box["class_name"]) for n, box in enumerate(scene.boxes, 1)
        ]
        first, second = (next(iter(spoken(f"a {text}"))) for text in (match[2], match[3]))
        near, far = (second, first) if "behind" in scene.caption else (first, second)
        shown = [(d, name) for d, name in sorted(depths) if name in (near, far)]
        assert min(d for d, name in shown if name == near) < max(d for d, name in shown if name == far)
    assert told > 10


def test_shadow_falls_away_from_the_light() -> None:
    ball = solid("ellipsoid", np.array([0.0, 2.0, -5.0]), (0.5, 0.5, 0.5))
    light = Light(np.array([0.6, 0.8, 0.0]), 1.0, 0.3)
    x = np.linspace(-4, 4, 801)
    ground = np.stack([x, np.zeros_like(x), np.full_like(x, -5.0)])
    # The centre's shadow is at x = -2 * 0.6 / 0.8, its half width along x the radius over the sine of the elevation.
    expected = np.abs(x + 1.5) < 0.5 / 0.8
    assert np.array_equal(raycast._in_shadow([ball], light, ground), expected)


def test_things_stand_apart_and_on_the_ground() -> None:
    for seed in range(40):
        world = build(np.random.default_rng(seed))
        feet = [min(p.centre[1] - p.half[1] for p in world.parts if p.owner == i + 1) for i in range(len(world.things))]
        np.testing.assert_allclose(feet, 0.0, atol=0.02)
        assert 1 <= len(world.things) <= 6


def test_corpus_gives_every_seed_once_with_its_exact_values() -> None:
    corpus = corpora.load("scenes:7?size=32&seed=5")
    splits = corpus.splits(3)
    assert [(s.start, s.stop) for s in splits] == [(5, 8), (8, 11), (11, 12)]
    assert splits == corpus.splits(3)
    samples = [sample for split in splits for sample in corpus.read(split)]
    assert [s.key for s in samples] == [f"scene{i:08d}" for i in range(5, 12)]
    for seed, sample in enumerate(samples, start=5):
        scene = render(seed, 32)
        assert sample.captions == (scene.caption,)
        assert set(sample.values) == {"rgb", *corpus.emits}
        np.testing.assert_allclose(sample.values["depth"] * MAX_DEPTH_M, scene.depth, rtol=1e-6)
        assert np.array_equal(sample.values["rgb"], scene.rgb)
        assert len(sample.values["sam_instance"]) == len(scene.boxes) == len(sample.values["det"]["instances"])
        areas = [mask["area"] for mask in sample.values["sam_instance"]]
        assert areas == sorted(areas, reverse=True)
        assert sum(areas) == np.count_nonzero(scene.instance)


@pytest.mark.parametrize("location", ["", "many", "-3", "10?size=big", "10?size=4", "10?colour=1", "10?size"])
def test_a_bad_location_is_refused(location: str) -> None:
    with pytest.raises(ValueError, match="scenes:"):
        Scenes(location)


def test_a_bad_seed_or_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        render(-1, 32)
    with pytest.raises(ValueError, match="4"):
        render(0, 4)


def test_stored_normals_have_opencv_axes() -> None:
    for sample in corpora.load("scenes:8?size=64").read(Split("seeds", 0, 8)):
        normal, semseg = sample.values["normal"], sample.values["semseg"]
        ground = np.isin(semseg, [CLASS_IDS[name] for name in ("grass-merged", "road", "sand", "floor-wood")])
        assert (normal[ground][:, 1] < -0.9).all()
        assert (normal[semseg == CLASS_IDS["sky-other-merged"]] == [0, 0, -1]).all()
        modalities.load("normal").check(normal, (64, 64))
