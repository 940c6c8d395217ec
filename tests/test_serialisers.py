"""Serialisers against ml-4m's own, label for label and draw for draw."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dataengine import modalities
from dataengine.geometry import Crop
from dataengine.modalities import _lattice
from dataengine.modalities.human_poses import mirrored
from dataengine.modalities.human_poses_tokens import HumanPosesTokens
from dataengine.modalities.sam_instance_tokens import SamInstanceTokens
from model.tokenizers.text import TextTokenizer
from tests.serialised import GOLDEN, TEXTS, Words, labels, load, maker, said, small

TRAINED = os.environ.get("ML4M_TEXT_TOKENIZER", "")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "serialisers.json").read_text())
    return found


@pytest.fixture
def faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HumanPosesTokens, "faithful", True)


@pytest.mark.usefixtures("faithful")
@pytest.mark.parametrize("name", TEXTS)
def test_strings_are_ml4ms(name: str, golden: dict[str, Any]) -> None:
    codec, words = load(name), Words()
    strings = [words.decode(said(codec, label, words)) for label in labels(name)]
    assert strings[maker.IN_CLEAR] == golden[name]["strings"]
    assert maker.digest(strings) == golden[name]["sha256"]


def test_embeddings_are_ml4ms(golden: dict[str, Any]) -> None:
    codec: Any = modalities.load("t5_caption")
    rows = [codec.rows(codec.decode(codec.encode(label.value)))[label.row] for label in labels("t5_caption")]
    assert {len(row) for row in rows} >= {0, 1, 76, 77}
    assert max(len(row) for row in rows) == 77
    assert all(row.dtype == np.float16 for row in rows)
    sums = [hashlib.sha256(row.astype("<f4").tobytes()).hexdigest() for row in rows]
    assert maker.digest(sums) == golden["t5_caption"]["sha256"]


@pytest.mark.usefixtures("faithful")
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.skipif(not TRAINED, reason="ML4M_TEXT_TOKENIZER: the path of text_tokenizer_4m_wordpiece_30k.json")
def test_ids_are_ml4ms(name: str, golden: dict[str, Any]) -> None:
    codec, tokenizer = load(name), TextTokenizer.load(Path(TRAINED))
    ids = [said(codec, label, tokenizer) for label in labels(name)]
    assert maker.digest(ids) == golden[name]["ids_sha256"]


@pytest.mark.usefixtures("faithful")
@pytest.mark.parametrize("name", TEXTS)
def test_ids_of_pieces_are_those_of_the_string(name: str) -> None:
    codec, words = load(name), Words()
    assert len(small().encode("polygon")) == 2
    for label in labels(name)[::20]:
        assert said(codec, label, small()) == small().encode(words.decode(said(codec, label, words)))


def test_poses_differ_from_ml4m_only_where_it_errs(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, words = load("human_poses_tokens"), Words()
    ours, theirs = [], []
    for label in labels("human_poses_tokens"):
        monkeypatch.setattr(HumanPosesTokens, "faithful", False)
        ours.append(words.decode(said(codec, label, words)))
        monkeypatch.setattr(HumanPosesTokens, "faithful", True)
        theirs.append(words.decode(said(codec, label, words)))
    clipped = [re.sub(r"v0=\d{4,}", "v0=999", re.sub(r"v0=-\d+", "v0=0", text)) for text in theirs]
    beyond = [text != fixed for text, fixed in zip(theirs, clipped, strict=True)]
    touching = [_touches(label) for label in labels("human_poses_tokens")]
    flipped = [label.crop.hflip for label in labels("human_poses_tokens")]
    assert min(sum(beyond), sum(touching), sum(flipped)) > 50
    plain = [not (f or t) for f, t in zip(flipped, touching, strict=True)]
    same = [a == b for a, b, p in zip(ours, clipped, plain, strict=True) if p]
    assert len(same) > 200
    assert all(same)
    assert all(re.fullmatch(r"none|(human( v[0-3]=\d{1,3}| pose| global| camera| shape)+ ?)+", text) for text in ours)


def _touches(label: Any) -> bool:
    """Whether somebody's box has a side in common with the crop, from outside."""
    crop = label.crop
    boxes = np.array(label.value["bbox_xyxy"]) if label.value else np.zeros((0, 4))
    x = (boxes[:, 2] == crop.left) | (boxes[:, 0] == crop.left + crop.width)
    y = (boxes[:, 3] == crop.top) | (boxes[:, 1] == crop.top + crop.height)
    return bool((x | y).any())


def test_a_mirrored_crop_says_mirrored_persons() -> None:
    codec = load("human_poses_tokens")
    value = codec.example(np.random.default_rng(3), (48, 48))
    mirror, whole = Crop(0, 0, 48, 48, hflip=True), Crop(0, 0, 48, 48)
    there = codec.crop(value, mirror, (48, 48), 48)
    assert codec.variants(value, [mirror], (48, 48)) == codec.variants(there, [whole], (48, 48))
    assert there["pose_tokenized"] == value["pose_tokenized_mirrored"]
    poses = [np.array(v["pred_smpl_params"]["body_pose"]) for v in (there, value)]
    np.testing.assert_array_equal(poses[0], mirrored(poses[1]))
    alone = {key: v for key, v in value.items() if key != "pose_tokenized_mirrored"}
    there = codec.crop(alone, mirror, (48, 48), 48)
    assert there["pose_tokenized"] == value["pose_tokenized"]
    assert "pose_tokenized_mirrored" not in there
    assert codec.variants(alone, [mirror], (48, 48)) == codec.variants(there, [whole], (48, 48))


def test_four_groups_of_every_person_come_in_any_order() -> None:
    codec, rng = load("human_poses_tokens"), np.random.default_rng(0)
    pieces = [[person, part] for person in range(2) for part in range(5)]
    orders: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    for _ in range(2400):
        drawn = [tuple(piece) for piece in codec.assemble(pieces, rng)]
        for person in range(2):
            assert [p for p, _ in drawn[5 * person : 5 * person + 5]] == [person] * 5
            assert drawn[5 * person] == (person, 0)
            orders[person][tuple(part for _, part in drawn[5 * person + 1 : 5 * person + 5])] += 1
    for counts in orders:
        assert len(counts) == 24
        assert 60 < min(counts.values()) <= max(counts.values()) < 150  # 100 expected, of deviation 10
    assert codec.assemble([[7]], rng) == [[7]]


def _instance(polygon: list[list[int]], rng: np.random.Generator) -> dict[str, Any]:
    ys, xs = [y for _, y in polygon], [x for x, _ in polygon]
    tokens = rng.integers(0, 1024, 16).tolist()
    return {"polygon": polygon, "bbox": [min(ys), min(xs), max(ys), max(xs)], "tokens": tokens}


def test_query_points_are_drawn_as_in_ml4m() -> None:
    codec, rng = load("sam_instance_tokens"), np.random.default_rng(0)
    corners = [[0, 0], [223, 0], [223, 223], [0, 223]]
    left = [[0, 0], [111, 0], [111, 223], [0, 223]]
    value = {"side": 224, "crops": [[_instance(corners, rng), _instance(left, rng)]]}
    ((*pieces,),) = codec.variants(value, [Crop(0, 0, 9, 9)], (9, 9))
    words = Words()
    ids = [words.encode(piece) if isinstance(piece, str) else np.array(piece, np.uint16) for piece in pieces]
    rows, columns, firsts, both = Counter(), Counter(), Counter(), 0
    for _ in range(2000):
        text = words.decode([int(i) for piece in codec.assemble(ids, rng) for i in piece])
        found, complaints = codec.parse(text)
        assert complaints == []
        assert 1 <= len(found["points"]) <= 7
        for x, y in found["points"]:
            rows[y // 32] += 1
            columns[x // 32] += 1
        for chunk in text.split("point ")[1:]:
            polygons = chunk.split("polygon ")[1:]
            assert len(polygons) == 1 + (int(re.findall(r"v1=(\d+)", chunk)[0]) <= 111)
            if len(polygons) == 2:
                both += 1
                firsts["v2=223" in polygons[0].split()[:4]] += 1
    assert abs(sum(rows.values()) - 14_000) < 10  # 7 a draw, two of 50176 rarely the same
    for counts in (rows, columns):
        assert all(abs(count - 2000) < 6 * 41 for count in counts.values())
    assert abs(firsts[True] - both / 2) < 6 * (both / 4) ** 0.5
    assert abs(both - 7000) < 6 * 59


def test_the_grid_of_query_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamInstanceTokens, "point_order", "grid")
    codec, words = load("sam_instance_tokens"), Words()
    ((*pieces,),) = codec.variants({"side": 224, "crops": [[]]}, [Crop(0, 0, 9, 9)], (9, 9))
    ids = [words.encode(piece) if isinstance(piece, str) else piece for piece in pieces]
    text = words.decode([i for piece in codec.assemble(ids, np.random.default_rng(0)) for i in piece])
    found, complaints = codec.parse(text)
    assert complaints == []
    steps = range(28, 224, 28)
    assert sorted(found["points"]) == [[x, y] for x in steps for y in steps]
    assert found["points"] != sorted(found["points"])
    assert text.count("none") == 49


def _contours(rng: np.random.Generator, side: int) -> list[np.ndarray]:
    """One of each kind: points, stars that cross themselves and leave the lattice, outlines with every pixel."""
    noise = cv2.GaussianBlur(rng.random((side, side)), (0, 0), 2)
    outlines, _ = cv2.findContours((noise > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [
        *(rng.integers(0, side + 1, (count, 2)) for count in (1, 2, 3, 7)),
        np.repeat(rng.integers(0, side, (1, 2)), 3, axis=0),
        np.stack([rng.integers(0, side, 4), np.full(4, side // 2)], 1),
        rng.integers(-side, 2 * side, (9, 2)),
        np.array([[0, 0], [side, 0], [side, side], [0, side]]),
        max(outlines, key=len)[:, 0] if outlines else np.zeros((1, 2), np.int64),
    ]


@pytest.mark.parametrize(("side", "step"), [(1, 1), (5, 1), (40, 1), (224, 11), (255, 13)])
def test_the_lattice_is_what_opencv_says(side: int, step: int) -> None:
    rng = np.random.default_rng(side)
    contours = [contour for _ in range(4) for contour in _contours(rng, side)]
    counts, ends = _lattice.runs([*contours, np.zeros((0, 2), np.int64)], side)
    assert ends.dtype == np.uint16
    assert len(ends) == counts.sum()
    assert counts[-1] == 0
    points = np.stack(np.meshgrid(range(0, side, step), range(0, side, step)), axis=2).reshape(-1, 2)
    found = _lattice.contains(points, counts, ends, side)
    assert not found[:, -1].any()
    for contour, column in zip(contours, found.T, strict=False):
        opencv = contour.astype(np.int32)[:, None]
        expected = [cv2.pointPolygonTest(opencv, (x, y), measureDist=True) >= 0 for x, y in points.tolist()]
        assert column.tolist() == expected


def test_sides_that_uint16_cannot_count_are_refused() -> None:
    for side in (0, 256):
        with pytest.raises(ValueError, match=r"expected 1\.\.255"):
            _lattice.runs([], side)


def test_instances_of_another_number_of_crops_are_refused() -> None:
    codec = load("sam_instance_tokens")
    value = codec.example(np.random.default_rng(0), (48, 48))
    with pytest.raises(ValueError, match="expected instances of 3 crops, got 2"):
        codec.variants(value, [Crop(0, 0, 9, 9)] * 3, (9, 9))
