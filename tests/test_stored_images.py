"""Images packed as they are stored: the pixels that columns of pixels have, in patches too, and nothing is believed."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dataengine import codecs, packed
from dataengine.geometry import Crop, crop_map, crop_settings, crops_of
from dataengine.packed import Column, Packed
from dataengine.stored_images import StoredImage, bare, check, decoded
from model.batches import spec_of

RGB = Column(name="rgb@32", kind="images", max_tokens=1024, side=32)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), float(rng.uniform(0.5, 6)))
    return cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX)


def file(image: np.ndarray, form: str = "JPEG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form, **settings)
    return stream.getvalue()


def tiles(image: np.ndarray, size: int) -> np.ndarray:
    count = len(image) // size
    return image.reshape(count, size, count, size, 3).swapaxes(1, 2).reshape(count**2, -1)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_decode_as_everywhere_else(subsampling: int, progressive: bool) -> None:
    rng = np.random.default_rng(subsampling)
    for quality in (1, 60, 75, 90, 95, 100):
        height, width = map(int, rng.integers(1, 200, 2))
        settings = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        data = file(picture(rng, height, width), restart_marker_blocks=quality % 3, **settings)
        assert np.array_equal(decoded(data), codecs.decode_rgb(data))


def test_other_images_decode_as_everywhere_else() -> None:
    rng = np.random.default_rng(0)
    image = picture(rng, 33, 50)
    rgba = Image.fromarray(np.dstack([image, image[:, :, :1]]), "RGBA")
    stream = io.BytesIO()
    rgba.save(stream, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned, which the pixels of stored images have been already
    for data in (
        file(image, "PNG"),
        file(image[:, :, 0], "PNG"),
        file(image[:, :, 0]),
        file(image, exif=exif),
        file(image, keep_rgb=True),
        file(np.dstack([image, image[:, :, :1]])[:, :, :3], quality=20),
        stream.getvalue(),
    ):
        assert np.array_equal(decoded(data), codecs.decode_rgb(data))
        assert np.array_equal(decoded(bare(data)), codecs.decode_rgb(data))
    cmyk = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(cmyk, "JPEG")
    assert np.array_equal(decoded(cmyk.getvalue()), codecs.decode_rgb(cmyk.getvalue()))
    assert b"Exif" in file(image, exif=exif)
    assert b"Exif" not in bare(file(image, exif=exif))


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [
        (384, 512, Crop(0, 64, 384, 384)),
        (384, 512, Crop(7, 100, 351, 377, True)),
        (300, 280, Crop(3, 1, 225, 279, True)),
        (500, 460, Crop(2, 3, 448, 448, True)),  # by whole numbers: no weights
        (500, 460, Crop(2, 3, 448, 300)),
        (224, 300, Crop(0, 5, 224, 224, True)),  # nothing to resize
        (150, 200, Crop(0, 5, 150, 150, True)),  # grows
        (260, 200, Crop(0, 0, 260, 200)),  # grows in one direction
        (300, 300, Crop(-10, 40, 290, 270, True)),  # beyond the image
        (1100, 1200, Crop(0, 100, 1100, 1040)),
    ],
)
def test_crops_and_patches_are_those_of_pixels(height: int, width: int, crop: Crop) -> None:
    rng = np.random.default_rng(height)
    data = file(picture(rng, height, width), quality=85)
    image = StoredImage(data, crop, 224)
    expected = crop_map(codecs.decode_rgb(data), crop, 224, nearest=False)
    assert (image.shape, image.dtype) == (expected.shape, expected.dtype)
    assert np.array_equal(image.pixels(), expected)
    assert np.array_equal(np.asarray(image), expected)
    assert np.asarray(image, np.float32).dtype == np.float32
    for size in (14, 16, 32):
        order = rng.permutation((224 // size) ** 2)
        for count in (0, 1, 12, len(order)):
            found = image.patches(size, order[:count])
            assert found.dtype == np.uint8
            assert np.array_equal(found, tiles(expected, size)[order[:count]])


def example(count: int = 3, num_crops: int = 2) -> tuple[list[Any], list[np.ndarray]]:
    rng = np.random.default_rng(5)
    values, images = [], []
    for _ in range(count):
        height, width = map(int, rng.integers(40, 90, 2))
        data = file(picture(rng, height, width))
        values.append((data, crop_settings(rng, height, width, num_crops, 0.5)))
        images.append(codecs.decode_rgb(data))
    return values, images


def test_rows_are_the_pixels_of_their_crops(tmp_path: Path) -> None:
    values, images = example()
    path = tmp_path / "shard.arrow"
    path.write_bytes(packed.write([RGB], 2, ["a", "b", "c", "d"], {"rgb@32": [values[0], None, *values[1:]]}))
    shard, rng = pickle.loads(pickle.dumps(Packed(path))), np.random.default_rng(0)
    assert packed.check(path.read_bytes()) == ("a", "b", "c", "d")
    assert shard.present(["rgb@32"]).tolist() == [[True], [False], [True], [True]]
    assert shard.lengths(["rgb@32"]).tolist() == [[1024], [0], [1024], [1024]]
    assert shard.row(1, rng, ["rgb@32"]) == {"rgb@32": None}
    for index, (_, crops), image in zip((0, 2, 3), values, images, strict=True):
        for number, crop in enumerate(crops_of(crops)):
            found = shard.row(index, rng, ["rgb@32"], number)["rgb@32"]
            assert np.array_equal(found, crop_map(image, crop, 32, nearest=False))
            assert pickle.loads(pickle.dumps(found)) == found
    assert spec_of(shard.columns["rgb@32"], 16) == spec_of(Column(**{**vars(RGB), "kind": "pixels"}), 16)


def test_equal_images_are_equal_bytes_and_nothing_is_stored_twice() -> None:
    values, _ = example()
    data = packed.write([RGB], 2, ["a", "b", "c"], {"rgb@32": values})
    assert data == packed.write([RGB], 2, ["a", "b", "c"], {"rgb@32": example()[0]})
    assert sum(data.count(image) for image, _ in values) == 3
    assert len(data) < sum(len(image) for image, _ in values) + 4096


def test_values_that_are_no_crops_are_refused_when_they_are_written() -> None:
    (image, crops), *_ = example()[0]
    for bad in (crops[:1], crops[:, :4], crops + 2**31, crops + 0.5):
        with pytest.raises(ValueError, match=r"(?s)rgb@32 of a: crops .*expected int32 \(2, 5\)"):
            packed.write([RGB], 2, ["a"], {"rgb@32": [(image, bad)]})
    with pytest.raises(ValueError, match="zip"):
        packed.write([RGB], 2, ["a", "b"], {"rgb@32": [(image, crops)]})


def with_size(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    start = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return data[: start + 5] + size + data[start + 9 :]


def test_bombs_and_damaged_images_are_refused() -> None:
    rng = np.random.default_rng(0)
    image = picture(rng, 40, 60)
    jpeg, png = file(image), file(image, "PNG")
    scans = file(image, progressive=True)
    start = scans.index(b"\xff\xda")
    end = scans.index(b"\xff", start + 14)
    many = scans[:start] + scans[start:end] * 200 + scans[start:]
    wide = png[:16] + (60000).to_bytes(4, "big") * 2 + png[24:]
    for data, said in (
        (with_size(jpeg, 65500, 65500), "65500 x 65500 pixels, at most"),
        (wide, "60000 x 60000 pixels, at most"),
        (many, "2.. scans, at most 100"),
        (jpeg[:-40], "truncated"),
        (png[: len(png) // 2], "ends before the PNG end chunk"),
        (jpeg[:60], "ends within the JPEG header"),
        (b"", "expected a PNG"),
        (b"GIF89a" + jpeg, "expected a PNG"),
        (b"\x89PNG\r\n\x1a\n", "ends within the PNG header"),
    ):
        with pytest.raises(ValueError, match=f"no readable image.*{said}"):
            decoded(data)
        with pytest.raises(ValueError, match="no readable image"):
            StoredImage(data, Crop(0, 0, 40, 40), 32).patches(16, np.arange(2))
    for data in (b"", b"GIF89a" + jpeg, jpeg[:60], wide, with_size(jpeg, 65500, 65500), many):
        with pytest.raises(ValueError, match="no readable image"):
            bare(data)


def test_what_others_have_packed_is_held_to_the_format(tmp_path: Path) -> None:
    (image, crops), *_ = example()[0]
    height = len(codecs.decode_rgb(image))
    for row, said in (
        ([0, 0, 0, 9, 0], "expected top, left, height, width"),
        ([0, 0, 9, -1, 0], "expected top, left, height, width"),
        ([0, 0, 9, 9, 2], "expected top, left, height, width"),
        ([0, 0, 2**30, 2**30, 0], "expected top, left, height, width"),
        ([height, 0, 9, 9, 0], "lies outside"),
        ([0, -9, 9, 9, 0], "lies outside"),
    ):
        bad = np.array([crops[0], row])
        data = packed.write([RGB], 2, ["k"], {"rgb@32": [(image, bad)]})
        with pytest.raises(ValueError, match=f"rgb@32 of k: .*{said}"):
            packed.check(data)
        path = tmp_path / "bad.arrow"
        path.write_bytes(data)
        shard, rng = Packed(path), np.random.default_rng(0)
        assert np.asarray(shard.row(0, rng, ["rgb@32"], 0)["rgb@32"]).shape == (32, 32, 3)
        with pytest.raises(ValueError, match=said):
            np.asarray(shard.row(0, rng, ["rgb@32"], 1)["rgb@32"])
    check(image, crops)
    for bad_image in (b"", image[:100], b"words"):
        data = packed.write([RGB], 2, ["k"], {"rgb@32": [(bad_image, crops)]})
        with pytest.raises(ValueError, match="rgb@32 of k: no readable image"):
            packed.check(data)
    with pytest.raises(ValueError, match="side 0"):
        Column(name="rgb", kind="images", max_tokens=4)
