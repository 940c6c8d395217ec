"""Every kind of input has its documented outcome, and what is stored decodes to exactly what the labelers see."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from dataengine.canonical import Canonical, Limits, Refused, canonicalise, encode_exact
from dataengine.keys import MAX_KEY_BYTES, is_key, make_key
from tests import nasty

CASES = nasty.cases()
ACCEPTED = [c for c in CASES if c.reason is None]


def decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name[:40])
def test_outcome_is_the_documented_one(case: nasty.Case) -> None:
    if case.reason is not None:
        with pytest.raises(Refused) as refusal:
            canonicalise(case.data, Limits())
        assert refusal.value.reason == case.reason
        assert refusal.value.detail
        return
    found = canonicalise(case.data, Limits())
    assert (found.suffix, found.conversions) == (case.suffix, case.conversions)
    assert found.image.dtype == np.uint8
    assert found.image.flags.writeable
    assert case.pixels is not None
    assert found.image.shape == case.pixels.shape
    difference = np.abs(found.image.astype(int) - case.pixels)
    assert difference.mean() <= case.tolerance
    assert (found.encoded == case.data) == case.verbatim
    np.testing.assert_array_equal(decode(found.encoded), found.image)
    assert canonicalise(case.data, Limits()).encoded == found.encoded


def test_what_is_stored_is_canonical() -> None:
    for case in ACCEPTED:
        once = canonicalise(case.data, Limits())
        twice = canonicalise(once.encoded, Limits())
        assert twice.encoded == once.encoded, case.name
        assert twice.conversions == (), case.name


def test_opencv_sees_the_same_pixels() -> None:
    import cv2

    for case in ACCEPTED:
        found = canonicalise(case.data, Limits())
        seen = cv2.imdecode(np.frombuffer(found.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(seen, found.image, err_msg=case.name)


def test_all_orientations_give_the_same_pixels() -> None:
    upright = {c.name: canonicalise(c.data, Limits()).image for c in ACCEPTED if re.match(r"exif-\d\.png", c.name)}
    assert len(upright) == 7
    for name, image in upright.items():
        np.testing.assert_array_equal(image, nasty.picture(), err_msg=name)


def test_broken_exif_is_cut_out_without_touching_the_scan() -> None:
    plain = nasty.jpeg()
    for block in nasty.BROKEN_EXIF.values():
        found = canonicalise(nasty.jpeg(exif=block), Limits())
        assert found.encoded == plain


def test_no_global_state_is_set(tmp_path: Path) -> None:
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    for case in nasty.write(tmp_path):
        with contextlib.suppress(Refused):
            canonicalise((tmp_path / case.name).read_bytes(), Limits())
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_a_refusal_travels_between_processes() -> None:
    refusal = pickle.loads(pickle.dumps(Refused("empty", "zero bytes")))
    assert (refusal.reason, refusal.detail, str(refusal)) == ("empty", "zero bytes", "empty: zero bytes")


def reason(data: bytes, limits: Limits) -> str:
    with pytest.raises(Refused) as refusal:
        canonicalise(data, limits)
    return refusal.value.reason


def test_limits_are_inclusive_and_count_declared_pixels() -> None:
    data = nasty.encode(np.zeros((20, 60, 3), np.uint8), "PNG")
    assert canonicalise(data, Limits(max_pixels=1200, min_side=20, max_aspect=3)).encoded == data
    assert reason(data, Limits(max_pixels=1199)) == "too-many-pixels"
    assert reason(data, Limits(min_side=21)) == "too-small"
    assert reason(data, Limits(max_aspect=2.9)) == "too-elongated"
    # The declared size is judged first: the file ends before any pixel, and that does not matter any more.
    assert reason(data[:40], Limits(max_pixels=1199)) == "too-many-pixels"
    assert reason(data[:40], Limits()) == "truncated"


@pytest.mark.parametrize(("name", "suffix"), [("plain.jpg", "jpg"), ("plain.png", "png"), ("exif-6.png", "png")])
def test_max_side_averages_areas(name: str, suffix: str) -> None:
    case = next(c for c in CASES if c.name == name)
    found = canonicalise(case.data, Limits(max_side=28))
    assert (found.image.shape, found.suffix, found.conversions[-1]) == ((20, 28, 3), suffix, "downscaled")
    halves = nasty.picture().reshape(20, 2, 28, 2, 3).mean((1, 3))
    assert np.abs(found.image - halves).mean() <= (nasty.LOSSY if suffix == "jpg" else 0.6)
    np.testing.assert_array_equal(decode(found.encoded), found.image)
    assert canonicalise(case.data, Limits(max_side=56)).encoded == canonicalise(case.data, Limits()).encoded


def test_exact_images_are_stored_losslessly() -> None:
    image = np.random.default_rng(0).integers(0, 256, (17, 33, 3), dtype=np.uint8)
    found = encode_exact(image)
    np.testing.assert_array_equal(decode(found.encoded), image)
    assert (found.suffix, found.conversions) == ("png", ())
    with pytest.raises(ValueError, match=r"expected uint8 \(h, w, 3\), got float64"):
        encode_exact(image / 255.0)


SMALL = [c.data for c in ACCEPTED if len(c.data) < 20_000]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.sampled_from(SMALL), at=st.floats(0, 1), new=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_hostile_bytes_are_refused_or_whole(data: bytes, at: float, new: bytes, cut: bool) -> None:
    position = int(at * len(data))
    spoiled = data[:position] + new + (b"" if cut else data[position + len(new) :])
    try:
        found: Canonical = canonicalise(spoiled, Limits(max_pixels=100_000, min_side=1))
    except Refused:
        return
    assert found.image.ndim == 3
    np.testing.assert_array_equal(decode_bare(found), found.image)


def decode_bare(found: Canonical) -> np.ndarray:
    return canonicalise(found.encoded, Limits(min_side=1)).image


def test_clean_names_are_keys_as_they_are() -> None:
    assert make_key("00007", "000070012") == "00007--000070012"
    assert make_key("COCO_val2014_000000000042", "jpg") == "COCO_val2014_000000000042--jpg"


def test_other_names_are_sanitised_and_hashed() -> None:
    assert re.fullmatch(r"a-b-[0-9a-f]{16}", make_key("a.b"))
    assert re.fullmatch(r"x-[0-9a-f]{16}", make_key("图片"))
    assert make_key("图片") != make_key("图画")
    assert make_key("a", "b") != make_key("a--b") != make_key("a.b")
    assert make_key("") != make_key("", "")


names = st.text(st.sampled_from("ab-._/ é图0f"), max_size=12) | st.text(max_size=120)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(first=st.lists(names, min_size=1, max_size=3), second=st.lists(names, min_size=1, max_size=3))
def test_keys_are_valid_stable_and_tell_items_apart(first: list[str], second: list[str]) -> None:
    key = make_key(*first)
    assert is_key(key)
    assert len(key) <= MAX_KEY_BYTES
    assert make_key(*first) == key
    assert make_key(key) == key or is_key(make_key(key))
    assert (make_key(*second) == key) == (first == second or "\0".join(first) == "\0".join(second))


def test_a_name_that_looks_hashed_is_hashed_again() -> None:
    hashed = make_key("a.b")
    assert make_key(hashed) != hashed
