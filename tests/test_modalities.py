"""The contract of every modality, found by itself; then what is particular to some."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataengine import coco, codecs, modalities
from dataengine.geometry import Crop
from dataengine.modalities import Modality, TextLike

NAMES = [*modalities.names(), "tok_depth@224", "tok_dinov2_global"]
SIZES = [(48, 48), (40, 56), (57, 33)]
SQUARE = (48, 48)
RESIZABLE = ("rgb", "depth", "normal", "semseg", "canny_edge", "sam_edge")


@pytest.fixture(params=NAMES)
def modality(request: pytest.FixtureRequest) -> Modality:
    return modalities.load(request.param)


def example(modality: Modality, size: tuple[int, int] = SQUARE, seed: int = 0) -> Any:
    return modality.example(np.random.default_rng(seed), size)


def assert_same(found: Any, expected: Any, tolerance: float = 0.0) -> None:
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.astype(np.float64), expected.astype(np.float64), rtol=0, atol=tolerance)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name], tolerance)
    else:
        assert found == expected


def with_instance(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first, *others = value["crops"]
    return {**value, "crops": [[{**first[0], **changes}, *first[1:]], *others]}


def test_all_modalities_are_there() -> None:
    wanted = "rgb caption crop_settings depth normal semseg canny_edge sam_edge sam_instance det metadata color_palette"
    assert {*wanted.split(), "CLIP-B16", "DINOv2-B14", "DINOv2-B14-global"} <= set(modalities.names())


@pytest.mark.parametrize("size", SIZES)
def test_round_trip(modality: Modality, size: tuple[int, int]) -> None:
    value = example(modality, size)
    back = modality.decode(modality.encode(value))
    tolerance = {"rgb": 3.0, "depth": 0.5 / 65535 + 1e-7, "normal": 0.007}.get(modality.name, 0.0)
    assert modality.lossless == (tolerance == 0)
    assert_same(back, value, tolerance)
    modality.check(back, size)


def test_the_same_value_gives_the_same_bytes(modality: Modality) -> None:
    first, again = example(modality), example(modality)
    if isinstance(again, dict):
        again = dict(reversed(again.items()))
    if isinstance(again, np.ndarray):
        again = np.asfortranarray(again)
    assert modality.encode(first) == modality.encode(again)
    assert modality.encode(first) != modality.encode(example(modality, seed=1))


@pytest.mark.parametrize("size", SIZES)
def test_check_accepts_examples_and_placeholders(modality: Modality, size: tuple[int, int]) -> None:
    for value in (example(modality, size), modality.placeholder(size)):
        modality.check(value, size)
        modality.check(modality.decode(modality.encode(modality.placeholder(size))), size)


def test_check_rejects_other_types(modality: Modality) -> None:
    for wrong in (None, "text", 3.0, object()):
        with pytest.raises(ValueError, match=modality.name):
            modality.check(wrong, SQUARE)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(example(modalities.load(n)), np.ndarray)])
def test_check_of_arrays_names_dtype_and_shape(name: str) -> None:
    modality = modalities.load(name)
    value = example(modality)
    with pytest.raises(ValueError, match=rf"{modality.name}: expected {value.dtype}.*got float64"):
        modality.check(value.astype(np.float64), SQUARE)
    with pytest.raises(ValueError, match=rf"{modality.name}: expected {value.dtype}.*got {value.dtype} \(1, "):
        modality.check(value[None], SQUARE)
    with pytest.raises(ValueError, match=modality.name):
        modality.check(value[:0], SQUARE)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00", b"{", b"\xff\xd8\xff"])
def test_damaged_bytes_are_a_value_error(modality: Modality, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        modality.decode(data)


def test_truncated_bytes_are_a_value_error(modality: Modality) -> None:
    data = modality.encode(example(modality))
    with pytest.raises(ValueError, match=r"."):
        modality.decode(data[: len(data) // 2])


def test_the_crop_of_everything_is_the_value(modality: Modality) -> None:
    value = example(modality)
    whole = modality.crop(value, Crop(0, 0, *SQUARE), SQUARE, SQUARE[0])
    assert_same(whole, value, 1e-6)


def test_mirroring_twice_is_nothing(modality: Modality) -> None:
    value = example(modality)
    mirror = Crop(0, 0, *SQUARE, hflip=True)
    once = modality.crop(value, mirror, SQUARE, SQUARE[0])
    twice = modality.crop(once, mirror, SQUARE, SQUARE[0])
    if modality.name == "det":
        boxes, expected = ([i["boxes"] for i in v["instances"]] for v in (twice, value))
        np.testing.assert_allclose(boxes, expected, atol=1e-12)
    else:
        assert_same(twice, value, 1e-6)
    if modality.kind in ("map", "instances"):
        modality.check(once, SQUARE)
        assert modality.encode(once) != modality.encode(value)
    else:
        assert once is value


@pytest.mark.parametrize("side", [24, 31, 64])
@pytest.mark.parametrize("name", RESIZABLE)
def test_cropped_maps_are_valid_squares(name: str, side: int) -> None:
    modality = modalities.load(name)
    for crop in (Crop(3, 5, 37, 30, hflip=True), Crop(0, 0, 40, 20), Crop(8, 8, 16, 40)):
        modality.check(modality.crop(example(modality, (40, 56)), crop, (40, 56), side), (side, side))


@pytest.mark.parametrize("size", [*SIZES, (300, 400)])
def test_pictures_are_images_or_words(modality: Modality, size: tuple[int, int]) -> None:
    rgb = example(modalities.load("rgb"), size)
    before = rgb.copy()
    value = example(modality, size)
    kept = copy.deepcopy(value)
    for shown in (value, modality.placeholder(size)):
        picture = modality.picture(shown, rgb)
        if picture.image is not None:
            assert picture.image.dtype == np.uint8
            assert picture.image.ndim == 3
            assert picture.image.shape[2] == 3
            assert picture.image.size
        for name, colour in picture.legend:
            assert name
            assert all(isinstance(level, int) and 0 <= level <= 255 for level in colour)
    picture = modality.picture(value, rgb)
    assert picture.image is not None or picture.text or picture.table
    assert_same(modality.picture(value, rgb).image, picture.image)
    assert_same(rgb, before)
    assert_same(value, kept)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("depth", lambda v: v + 1, r"in 0\.\.1, got"),
        ("depth", lambda v: v * np.float32("nan"), "finite"),
        ("normal", lambda v: v * np.float32(1.5), "length 1, got 1.5"),
        (
            "normal",
            lambda v: np.where(np.arange(v.size).reshape(v.shape) == v.size // 2, np.float32("nan"), v),
            "got 1 ",
        ),
        ("semseg", lambda v: np.full_like(v, 133), r"0\.\.132 or 255, got \[133\]"),
        ("canny_edge", lambda v: v // 2, r"0 and 255, got \[127\]"),
        ("sam_edge", lambda v: v // 255, r"0 and 255, got \[1\]"),
        ("CLIP-B16", lambda v: v * np.float16("inf"), "finite"),
        ("DINOv2-B14-global", lambda v: v * np.float16("nan"), "finite"),
        ("crop_settings", lambda v: np.add(v, (0, 0, 0, 0, 2)), "hflip 0 or 1"),
        ("crop_settings", lambda v: np.add(v, (40, 0, 0, 0, 0)), "within 48 x 48"),
        ("crop_settings", lambda v: np.subtract(v, (0, 0, 1, 0, 0)), "row 0"),
        ("tok_depth@224", lambda v: v + np.uint16(32768), r"0\.\.32767"),
        ("caption", lambda v: [*v, 3], "strings"),
        ("caption", lambda v: [*v, "\ud800"], "surrogates"),
        ("metadata", lambda v: {**v, "brightnes": 3.0}, "did you mean 'brightness'"),
        ("metadata", lambda v: {**v, "n_humans": 3.0}, "an int for n_humans, got 3.0"),
        ("metadata", lambda v: {**v, "entropy": float("nan")}, "finite number for entropy"),
        ("color_palette", lambda v: [{**v[0], "7": v[0]["6"]}], "7 colours in palette 7"),
        ("color_palette", lambda v: [{**v[0], "1": [[0, 0, 256]]}], r"0\.\.255"),
        ("color_palette", lambda v: [{k: v[0][k] for k in "1234"}], "dict with 1, 2, 3, 4, 5, 6, 7"),
        ("human_poses_tokens", lambda v: {k: v[k] for k in v if k != "pose_tokenized"}, "dict with .*pose_tokenized"),
        ("human_poses_tokens", lambda v: {**v, "pose_tokenized": [[1024] * 8] * 2}, r"ids 0\.\.1023, got \[\[1024"),
        ("human_poses_tokens", lambda v: {**v, "pose_tokenized_mirrored": [[0.5] * 8] * 2}, r"ids 0\.\.1023"),
        ("human_poses_tokens", lambda v: {**v, "bbox_xyxy": 3}, "list of boxes, got int"),
        ("human_poses_tokens", lambda v: {**v, "pose_tokenized": [[1] * 8]}, "for 2 persons"),
        ("sam_instance_tokens", lambda v: {**v, "side": 256}, r"side of 1\.\.255 pixels, got 256"),
        ("sam_instance_tokens", lambda v: {**v, "crops": [3]}, "list of instances for each crop"),
        ("sam_instance_tokens", lambda v: {**v, "side": 3}, r"whole \[x, y\] in 0\.\.3"),
        ("sam_instance_tokens", lambda v: with_instance(v, polygon=[[1, 2.0]]), "whole"),
        ("sam_instance_tokens", lambda v: with_instance(v, polygon=((1, 2),)), "list of corners, got tuple"),
        ("sam_instance_tokens", lambda v: with_instance(v, bbox=[3, 0, 2, 9]), "ymin, xmin, ymax, xmax"),
        ("sam_instance_tokens", lambda v: with_instance(v, tokens=[0] * 15), r"16 numbers in 0\.\.1023"),
        ("sam_instance_tokens", lambda v: with_instance(v, tokens=[0.0] * 16), "expected ints"),
    ],
)
def test_check_rejects_other_ranges(name: str, change: Any, message: str) -> None:
    modality = modalities.load(name)
    with pytest.raises(ValueError, match=message) as raised:
        modality.check(change(example(modality)), SQUARE)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [0.5, 0.1, 0.4, 0.2]}, "x0 < x1"),
        ({"boxes": [0.1, 0.1, 0.4, 1.2]}, r"4 numbers in 0\.\.1"),
        ({"boxes": [0.1, 0.1, 0.4]}, "4 numbers"),
        ({"class_name": "motorbike"}, "COCO class name, got 'motorbike'"),
        ({"score": 1.5}, "score"),
        ({"score": float("nan")}, "score"),
    ],
)
def test_check_of_det(change: dict[str, Any], message: str) -> None:
    instance = {"boxes": [0.1, 0.1, 0.2, 0.3], "class_name": "dog", "score": 0.9}
    det = modalities.load("det")
    det.check({"instances": [{**instance, "score_raw": -3.2}]}, SQUARE)
    with pytest.raises(ValueError, match=message):
        det.check({"instances": [{**instance, **change}]}, SQUARE)


@pytest.mark.parametrize(
    ("change", "message"), [({"size": [9, 9]}, "size"), ({"area": 3}, "area"), ({"bbox": [1]}, "bbox")]
)
def test_check_of_masks(change: dict[str, Any], message: str) -> None:
    sam = modalities.load("sam_instance")
    with pytest.raises(ValueError, match=message):
        sam.check([{**example(sam)[0], **change}], SQUARE)


def test_rgb_decodes_both_formats_and_ignores_orientation() -> None:
    rgb = modalities.load("rgb")
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert_same(rgb.decode(codecs.encode_png(image)), image)
    sink, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(sink, "JPEG", exif=exif)
    assert rgb.decode(sink.getvalue()).shape == (5, 7, 3)
    sink = io.BytesIO()
    Image.fromarray(image[..., 0]).save(sink, "PNG")
    assert_same(rgb.decode(sink.getvalue()), np.repeat(image[..., :1], 3, axis=2))


def test_stored_maps_are_what_other_readers_expect() -> None:
    depth = np.array([[0, 0.25], [0.5, 1]], dtype=np.float32)
    with Image.open(io.BytesIO(modalities.load("depth").encode(depth))) as stored:
        assert stored.mode == "I;16"
        assert np.asarray(stored).tolist() == [[0, 16384], [32768, 65535]]
    normal = np.array([[[1, 0, 0], [0, 0, 1]]], dtype=np.float32)
    with Image.open(io.BytesIO(modalities.load("normal").encode(normal))) as stored:
        assert stored.mode == "RGB"
        assert np.asarray(stored).tolist() == [[[255, 128, 128], [128, 128, 255]]]
    ids = np.array([[0, 132, 255]], dtype=np.uint8)
    with Image.open(io.BytesIO(modalities.load("semseg").encode(ids))) as stored:
        assert stored.mode == "L"
        assert np.asarray(stored).tolist() == ids.tolist()
    tokens = np.load(io.BytesIO(modalities.load("tok_rgb@448").encode(np.array([[7, 16383]], dtype=np.uint16))))
    assert tokens.dtype == np.int16
    assert tokens.tolist() == [[7, 16383]]


def test_a_png_of_another_kind_is_refused() -> None:
    wide = codecs.encode_png(np.zeros((4, 4), dtype=np.uint16))
    with pytest.raises(ValueError, match="expected a uint8 PNG with 1 channels, got uint16"):
        modalities.load("semseg").decode(wide)
    with pytest.raises(ValueError, match="got uint8"):
        modalities.load("depth").decode(codecs.encode_png(np.zeros((4, 4), dtype=np.uint8)))


def test_pickles_are_never_loaded() -> None:
    sink = io.BytesIO()
    np.save(sink, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        codecs.decode_npy(sink.getvalue())


def test_json_is_compact_sorted_and_finite() -> None:
    assert codecs.encode_json({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'.encode()
    for value in (float("nan"), np.float32(1), object()):
        with pytest.raises(ValueError, match="JSON"):
            codecs.encode_json([value])
    for data in (b"[NaN]", b"[" * 100_000):
        with pytest.raises(ValueError, match="JSON"):
            codecs.decode_json(data)


def test_a_mirrored_normal_points_to_the_other_side() -> None:
    value = np.broadcast_to(np.array([0.6, 0, 0.8], dtype=np.float32), (8, 8, 3)).copy()
    out = modalities.load("normal").crop(value, Crop(0, 0, 8, 8, hflip=True), (8, 8), 4)
    np.testing.assert_allclose(out, np.broadcast_to([-0.6, 0, 0.8], (4, 4, 3)), atol=1e-6)


def test_averaged_normals_keep_their_length() -> None:
    value = np.zeros((4, 4, 3), dtype=np.float32)
    value[:, ::2] = (1, 0, 0)
    value[:, 1::2] = (0, 0, 1)
    out = modalities.load("normal").crop(value, Crop(0, 0, 4, 4), (4, 4), 2)
    np.testing.assert_allclose(out, np.broadcast_to([0.5**0.5, 0, 0.5**0.5], (2, 2, 3)), atol=1e-6)
    value[:, 1::2] = (-1, 0, 0)
    out = modalities.load("normal").crop(value, Crop(0, 0, 4, 4), (4, 4), 2)
    assert_same(out, np.broadcast_to(np.array([0, 0, -1], dtype=np.float32), (2, 2, 3)))


@pytest.mark.parametrize("side", [64, 100, 128, 200, 224, 256, 320])
def test_thin_edges_survive_any_crop(side: int) -> None:
    edges = modalities.load("canny_edge")
    for k in range(30, 226, 7):
        value = np.zeros((256, 256), dtype=np.uint8)
        value[k] = 255
        value[:, 255 - k] = 255
        out = edges.crop(value, Crop(0, 0, 256, 256), (256, 256), side)
        assert out.any(axis=0).all()
        assert out.any(axis=1).all()
        thickness = max(2, round(side / 256) + 1)
        assert np.median(out.astype(bool).sum(axis=0)) <= thickness
    value = np.eye(256, dtype=np.uint8) * np.uint8(255)
    out = edges.crop(value, Crop(0, 0, 256, 256), (256, 256), side)
    assert out.any(axis=0).all()
    assert out.any(axis=1).all()


def test_a_crop_beyond_the_image_is_unlabelled() -> None:
    out = modalities.load("semseg").crop(np.full((4, 4), 7, np.uint8), Crop(-2, 0, 4, 4), (4, 4), 4)
    assert out.tolist() == [[255] * 4] * 2 + [[7] * 4] * 2


def test_masks_are_cropped_with_their_boxes() -> None:
    from dataengine.modalities.sam_instance import pixels, record

    mask = np.zeros((20, 30), dtype=bool)
    mask[4:8, 10:16] = True
    gone = np.zeros((20, 30), dtype=bool)
    gone[0, 0] = True
    sam = modalities.load("sam_instance")
    value = [{**record(mask), "predicted_iou": 0.9, "point": [12.0, 6.0]}, record(gone)]
    (out,) = sam.crop(value, Crop(4, 10, 8, 8), (20, 30), 16)
    assert (out["size"], out["bbox"], out["area"], out["predicted_iou"]) == ([16, 16], [0, 0, 12, 8], 96, 0.9)
    assert out["point"] == [4.0, 4.0]
    assert pixels(out)[:8, :12].all()
    (out,) = sam.crop(value, Crop(4, 10, 8, 8, hflip=True), (20, 30), 16)
    assert (out["bbox"], out["point"]) == ([4, 0, 12, 8], [12.0, 4.0])
    sam.check([out], (16, 16))


def test_boxes_are_cropped_and_mirrored() -> None:
    det = modalities.load("det")
    value = {
        "instances": [
            {"boxes": [0.25, 0.25, 0.5, 1.0], "class_name": "dog", "score": 0.2, "score_raw": 1},
            {"boxes": [0.0, 0.0, 0.1, 0.1], "class_name": "cat", "score": 0.9},
        ]
    }
    out = det.crop(value, Crop(10, 20, 80, 60, hflip=True), (100, 200), 64)
    (dog,) = out["instances"]
    np.testing.assert_allclose(dog["boxes"], [0.0, 0.1875, 0.5, 1.0])
    assert (dog["class_name"], dog["score"], dog["score_raw"]) == ("dog", 0.2, 1)
    assert det.crop(det.placeholder((9, 9)), Crop(0, 0, 9, 9), (9, 9), 9) == {"instances": []}


def test_token_names() -> None:
    assert modalities.load("tok_canny_edge@224").name == "tok_canny_edge@224"
    assert modalities.load("tok_imagebind_global").suffix == "npy"
    for name in ("tok", "tok_depth", "tok_@224", "tok_depth@0"):
        with pytest.raises(ValueError, match=r"tok"):
            modalities.load(name)
    sink = codecs.encode_npy(np.array([[-1]], dtype=np.int16))
    with pytest.raises(ValueError, match=r"0\.\.32767"):
        modalities.load("tok_depth@224").decode(sink)


def test_near_is_warm_and_far_is_blue() -> None:
    depth = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    picture = modalities.load("depth").picture(depth, np.zeros((8, 8, 3), np.uint8))
    assert picture.image is not None
    near, far = picture.image[0, 4].astype(int), picture.image[7, 3].astype(int)
    assert near[0] > near[2]
    assert far[2] > far[0]
    assert "0.000" in picture.text
    assert "1.000" in picture.text


def test_the_legend_of_classes_is_by_area() -> None:
    ids = np.array([[0, 119, 119], [119, 255, 255]], dtype=np.uint8)
    picture = modalities.load("semseg").picture(ids, np.zeros((2, 3, 3), np.uint8))
    assert [name for name, _ in picture.legend] == ["sky-other 50 %", "unlabelled 33 %", "person 17 %"]
    assert picture.legend[0][1] == (70, 130, 180)
    assert picture.image is not None
    assert picture.image[0, 0].tolist() == [220, 20, 60]


def test_principal_axes_do_not_depend_on_a_sign() -> None:
    clip = modalities.load("CLIP-B16")
    value = example(clip)
    rgb = np.zeros((4, 4, 3), np.uint8)
    image = clip.picture(value, rgb).image
    assert image is not None
    assert image.min() == 0
    assert image.max() == 255
    constant = clip.picture(np.ones((1, 2, 4), np.float16), rgb).image
    assert constant is not None
    assert (constant == constant[0, 0]).all()


def test_text_modalities_declare_ml4m_reading() -> None:
    found = {
        name: (m.choice, m.shuffle, m.chunked, m.max_tokens)
        for name in modalities.names()
        if isinstance(m := modalities.load(name), TextLike)
    }
    assert found == {
        "caption": ("any", False, False, 256),
        "det": ("crop", False, False, 256),
        "metadata": ("any", True, True, 40),
        "color_palette": ("any", False, False, 23),
        "human_poses_tokens": ("crop", False, False, 275),
        "sam_instance_tokens": ("crop", False, False, 290),
    }


def test_coco_ids() -> None:
    assert (len(coco.NAMES), len(coco.THINGS), len(set(coco.NAMES))) == (133, 80, 133)
    assert (coco.THINGS[0], coco.THINGS[79], coco.NAMES[80]) == ("person", "toothbrush", "banner")
    walkable = (87, 90, 97, 100, 102, 105, 106, 122, 123, 125, 126, 132)
    words = "floor-wood gravel playingfield road sand snow stairs floor-other pavement grass dirt rug".split()
    assert [coco.NAMES[i].removesuffix("-merged") for i in walkable] == words
    assert coco.name(119) == "sky-other-merged"
    assert coco.name(255) == "unlabelled"
    assert coco.colour(255) == (0, 0, 0)
    assert len({coco.colour(i) for i in range(133)}) == 133


@pytest.mark.parametrize("shape", [(5, 7), (301, 257, 3)])
def test_rounding_in_pieces_is_rounding_at_once(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1, 1, shape[0] * 2), (np.arange(256) + 0.5) / 127.5 - 1])
    values = np.resize(values, shape).astype(np.float32)
    exact = np.clip(np.rint((values.astype(np.float64) + 1) * 127.5), 0, 255).astype(np.uint8)
    assert np.array_equal(codecs.rounded(values, 127.5, np.uint8, offset=1.0), exact)
    assert np.array_equal(codecs.rounded(np.asfortranarray(values), 127.5, np.uint8, offset=1.0), exact)


def test_normals_that_are_too_long_or_short_are_refused() -> None:
    normal = modalities.load("normal")
    for length in (0.98, 1.02):
        value = example(normal)
        value[3, 4] *= length
        with pytest.raises(ValueError, match="length 1"):
            normal.check(value, SQUARE)
