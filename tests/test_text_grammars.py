"""The grammars that sequence models read: ml-4m's examples to the letter, and parsing of whatever a model writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine import coco, modalities
from dataengine.geometry import Crop
from dataengine.modalities import TextLike
from dataengine.modalities.metadata import KINDS

NAMES = [name for name in modalities.names() if isinstance(modalities.load(name), TextLike)]
CENTER = Crop(0, 40, 240, 240)
SIZE = (240, 320)
WORDS = st.sampled_from(
    ["v0=0", "v0=12", "v1=3", "v1=20", "v2=999", "v3=7", "v0=1000", "v0=-3", "v0=", "v4=1", "v1=07", "[EOS]", "[UNK]",
     "[S_3]", "[PAD]", "dog", "dining", "table", "dining table", "##ing", "=", "\n", "ü"]
)  # fmt: skip


def load(name: str) -> TextLike:
    modality = modalities.load(name)
    assert isinstance(modality, TextLike)
    return modality


def text_of(pieces: list[str]) -> str:
    return " ".join(pieces)


def instance(box: list[float], name: str, score: float) -> dict[str, Any]:
    return {"boxes": box, "class_name": name, "score": score}


THREE = {
    "instances": [
        instance([0.1, 0.2, 0.5, 0.9], "person", 0.9),
        instance([0, 0.05, 0.3, 0.2], "dining table", 0.61),
        instance([0.2, 0.2, 0.6, 0.6], "dog", 0.5),
    ]
}


def test_boxes_as_in_ml4m() -> None:
    ((*pieces,),) = load("det").variants(THREE, [CENTER], SIZE)
    assert text_of(pieces) == "v0=0 v1=50 v2=233 v3=200 dining table v0=0 v1=200 v2=500 v3=899 person"


def test_boxes_of_every_crop() -> None:
    mirrored = Crop(0, 40, 240, 240, hflip=True)
    below = Crop(220, 200, 20, 20)
    variants = load("det").variants(THREE, [CENTER, mirrored, below], SIZE)
    assert [text_of(v) for v in variants] == [
        "v0=0 v1=50 v2=233 v3=200 dining table v0=0 v1=200 v2=500 v3=899 person",
        "v0=500 v1=200 v2=999 v3=899 person v0=766 v1=50 v2=999 v3=200 dining table",
        "",
    ]


def test_the_threshold_is_included_and_ties_keep_their_order() -> None:
    value = {"instances": [instance([0.5, 0, 1, 1], n, s) for n, s in (("dog", 0.6), ("cat", 0.9), ("cow", 0.5999))]}
    (pieces,) = load("det").variants(value, [Crop(0, 0, 10, 10)], (10, 10))
    # 0.5 * 999 = 499.5 rounds to the even 500
    assert pieces == ["v0=500 v1=0 v2=999 v3=999 dog", "v0=500 v1=0 v2=999 v3=999 cat"]


def test_halves_round_to_even() -> None:
    value = {"instances": [instance([1 / 1998, 3 / 1998, 1, 1], "dog", 1.0)]}
    ((piece,),) = load("det").variants(value, [Crop(0, 0, 1, 1)], (1, 1))
    assert piece == "v0=0 v1=2 v2=999 v3=999 dog"


def test_metadata_as_in_ml4m() -> None:
    value = {
        "original_width": 640,
        "original_height": 427,
        "brightness": 127.3,
        "watermark_score": 0.5,
        "aesthetic_score": 5.5,
    }
    assert load("metadata").variants(value, [], SIZE) == [
        ["v1=0 v0=20", "v1=1 v0=13", "v1=10 v0=24", "v1=19 v0=1", "v1=20 v0=2"]
    ]


def test_palettes_as_in_ml4m() -> None:
    value = load("color_palette").example(np.random.default_rng(0), SIZE)
    value[0]["2"] = [[70, 20, 250], [71, 20, 250]]
    value[0]["1"] = [[0.5, 1.5, 254.5]]
    variants = load("color_palette").variants(value, [], SIZE)
    assert len(variants) == 7
    assert text_of(variants[0]) == "v1=1 v0=0 v0=2 v0=254"
    assert text_of(variants[1]) == "v1=2 v0=70 v0=20 v0=250 v0=71 v0=20 v0=250"
    assert [len(text_of(v).split()) for v in variants] == [4, 7, 10, 13, 16, 19, 22]


def test_captions_are_unmodified() -> None:
    assert load("caption").variants(["a  Dog.", ""], [CENTER], SIZE) == [["a  Dog."], [""]]
    assert load("caption").variants([], [CENTER], SIZE) == []


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b'["a","b"]', ["a", "b"]),
        (b'"a dog"', ["a dog"]),
        (b'[{"caption":"a dog"}]', ["a dog"]),
        (b'{"caption":"a dog","url":"x"}', ["a dog"]),
        (b"[]", []),
    ],
)
def test_captions_in_all_forms_of_ml4m(data: bytes, captions: list[str]) -> None:
    assert load("caption").decode(data) == captions


def test_captions_of_no_form() -> None:
    for data in (b"[1]", b"{}", b"3", b'[["a"]]'):
        with pytest.raises(ValueError, match="caption: expected strings"):
            load("caption").decode(data)


def test_kinds_are_ml4ms() -> None:
    keys = (
        "original_width original_height caption_n_chars caption_n_words caption_n_sentences n_humans n_sam_instances "
        "n_coco_instances coco_instance_diversity colorfulness brightness contrast saturation entropy walkability "
        "objectness semantic_diversity geometric_complexity occlusion_score watermark_score aesthetic_score"
    )
    assert [kind.key for kind in KINDS] == keys.split()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("original_width", 31, 0),
        ("original_width", 32, 1),
        ("original_height", 10**6, 999),
        ("n_humans", 1000, 999),
        ("n_humans", -1, 0),
        ("colorfulness", 150, 49),
        ("colorfulness", 149.99, 48),
        ("colorfulness", -3.0, 0),
        ("contrast", 127, 49),
        ("entropy", 10, 49),
        ("walkability", 0.0205, 1),
        ("walkability", 0.02, 0),
        ("geometric_complexity", 0.75, 49),
        ("occlusion_score", 0.125, 24),
        ("watermark_score", 0.49, 0),
        ("aesthetic_score", 4.49, 0),
        ("aesthetic_score", 4.5, 1),
    ],
)
def test_bins(key: str, value: float, expected: int) -> None:
    (kind,) = (k for k in KINDS if k.key == key)
    assert kind.to_bin(value) == expected


def test_bins_decode_as_ml4m_shows_them() -> None:
    value, complaints = load("metadata").parse("v1=20 v0=2 v1=0 v0=20 v1=9 v0=16 v1=17 v0=49 v1=5 v0=3")
    assert complaints == []
    assert list(value) == ["original_width", "n_humans", "colorfulness", "geometric_complexity", "aesthetic_score"]
    assert value == {
        "original_width": 640,
        "n_humans": 3,
        "colorfulness": 48.0,
        "geometric_complexity": pytest.approx(0.735),
        "aesthetic_score": 2,
    }
    assert isinstance(value["original_width"], int)


PALETTE_OF_2 = [{"2": [[70, 20, 250], [71, 20, 250]]}]
DOG = instance([0.0, 0.0, 1.0, 1.0], "dog", 1.0)


@pytest.mark.parametrize(
    ("name", "text", "value", "complaints"),
    [
        ("det", "", {"instances": []}, []),
        ("det", "v0=0 v1=0 v2=999 v3=999 dog [EOS] junk", {"instances": [DOG]}, []),
        ("det", "v0=0 v1=0 v2=999 v3=999 dog[EOS][PAD]", {"instances": [DOG]}, []),
        ("det", "a dog v0=0 v1=0 v2=999 v3=999 dog", {"instances": [DOG]}, ["begin with v0=, got 'a dog'"]),
        ("det", "v0=0 v1=0 v2=999 v3=999 dog v0=5", {"instances": [DOG]}, ["and a class, got 'v0=5'"]),
        ("det", "v0=0 v1=0 v3=999 v2=999 dog", {"instances": []}, ["v0= v1= v2= v3="]),
        ("det", "v0=0 v1=0 v2=999 v3=999", {"instances": []}, ["and a class"]),
        ("det", "v0=0 v1=0 v2=1000 v3=999 dog", {"instances": []}, ["v2=1000"]),
        ("det", "v0=0 v1=0 v2=999 v3=999 aeroplane", {"instances": []}, ["COCO class name, got 'aeroplane'"]),
        ("det", "v0=9 v1=0 v2=8 v3=999 dog", {"instances": []}, ["x0 <= x1"]),
        ("metadata", "", {}, []),
        ("metadata", "v1=5 v0=3 [EOS]", {"n_humans": 3}, []),
        ("metadata", "v1=5 v0=3 v1=5 v0=4", {"n_humans": 3}, ["n_humans a second time: 'v1=5 v0=4'"]),
        ("metadata", "v1=21 v0=3", {}, ["v1=0 to v1=20"]),
        ("metadata", "v1=9 v0=50", {}, ["a bin below 50 for colorfulness"]),
        ("metadata", "v1=19 v0=2", {}, ["a bin below 2 for watermark_score"]),
        ("metadata", "v0=3 v1=5", {}, ["begin with v1=, got 'v0=3'", "v1= v0=, got 'v1=5'"]),
        ("metadata", "v1=5 v0=3 v0=4", {}, ["v1= v0="]),
        ("color_palette", "v1=2 v0=70 v0=20 v0=250 v0=71 v0=20 v0=250", PALETTE_OF_2, []),
        ("color_palette", "v1=3 v0=70 v0=20 v0=250 v0=71 v0=20 v0=250", PALETTE_OF_2, ["9 levels after v1=3, got 6"]),
        ("color_palette", "v1=2 v0=70 v0=20 v0=250 v0=71 v0=20 v0=250 v0=1", PALETTE_OF_2, ["6 levels", ]),
        ("color_palette", "v1=1 v0=70 v0=20 v0=256", [{}], ["v0=0 to v0=255, got 'v0=256'"]),
        ("color_palette", "v1=8 v0=1 v0=2 v0=3", [{"1": [[1, 2, 3]]}], ["v1=1 to v1=7 first, got 'v1=8'"]),
        ("color_palette", "", [{}], ["v1=1 to v1=7 first, got ''"]),
        ("caption", "a dog [EOS] [PAD]", ["a dog"], []),
        ("caption", "a v0=12 dog [S_3]", ["a dog"], ["'v0=12' is no word", "'[S_3]' is no word"]),
        ("caption", "[EOS]", [], ["expected words"]),
    ],
)  # fmt: skip
def test_parse(name: str, text: str, value: Any, complaints: list[str]) -> None:
    found, complained = load(name).parse(text)
    assert found == value
    assert len(complained) == len(complaints)
    for complaint, expected in zip(complained, complaints, strict=True):
        assert expected in complaint


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORDS, max_size=24))
@pytest.mark.parametrize("name", NAMES)
def test_parsing_never_raises_and_is_shown(name: str, words: list[str]) -> None:
    modality = load(name)
    value, complaints = modality.parse(" ".join(words))
    assert all(isinstance(complaint, str) and 0 < len(complaint) < 200 for complaint in complaints)
    modality.picture(value, np.zeros((32, 32, 3), dtype=np.uint8))
    modality.decode(modality.encode(value))


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=80))
@pytest.mark.parametrize("name", NAMES)
def test_parsing_any_text_never_raises(name: str, text: str) -> None:
    load(name).parse(text)


coordinate = st.floats(0, 1)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)
boxes = st.lists(
    st.builds(instance, box.filter(lambda b: b[0] < b[2] and b[1] < b[3]), st.sampled_from(coco.THINGS), st.just(0.8)),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(instances=boxes)
def test_boxes_round_trip(instances: list[dict[str, Any]]) -> None:
    det, whole = load("det"), Crop(0, 0, 100, 80)
    (pieces,) = det.variants({"instances": instances}, [whole], (100, 80))
    value, complaints = det.parse(text_of(pieces))
    assert complaints == []
    nearest = sorted(instances, key=lambda i: float(np.hypot(*i["boxes"][:2])))
    assert sorted(i["class_name"] for i in value["instances"]) == sorted(i["class_name"] for i in nearest)
    corners = [[i["boxes"] for i in v] for v in (value["instances"], nearest)]
    np.testing.assert_allclose(
        np.sort(np.reshape(corners[0], (-1, 4)), axis=0),
        np.sort(np.reshape(corners[1], (-1, 4)), axis=0),
        atol=0.502 / 999,
    )
    det.check(value, (100, 80))
    (again,) = det.variants(value, [whole], (100, 80))
    assert sorted(again) == sorted(pieces)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_metadata_round_trips(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(KINDS), unique=True))
    value = {k.key: data.draw(st.integers(0, 31_000) if k.is_whole else st.floats(k.low, k.high or 10)) for k in chosen}
    (pieces,) = load("metadata").variants(value, [], SIZE)
    shuffled = data.draw(st.permutations(pieces))
    found, complaints = load("metadata").parse(text_of(shuffled))
    assert complaints == []
    assert found == {k.key: k.from_bin(k.to_bin(value[k.key])) for k in chosen}
    for kind in chosen:
        if kind.rule == "range":
            assert abs(found[kind.key] - value[kind.key]) <= (kind.high - kind.low) * (1 / 49 + 1 / 50)
        elif kind.rule == "size":
            assert found[kind.key] == min(value[kind.key] // 32, 999) * 32
        elif kind.rule == "count":
            assert found[kind.key] == min(value[kind.key], 999)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_palettes_round_trip(seed: int) -> None:
    modality = load("color_palette")
    value = modality.example(np.random.default_rng(seed), SIZE)
    for n, pieces in enumerate(modality.variants(value, [], SIZE), start=1):
        assert modality.parse(text_of(pieces)) == ([{str(n): value[0][str(n)]}], [])


@settings(max_examples=60, deadline=None)
@given(caption=st.text(st.characters(exclude_characters="[=", exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_captions_round_trip(caption: str) -> None:
    modality = load("caption")
    ((piece,),) = modality.variants([caption], [], SIZE)
    found, complaints = modality.parse(piece)
    assert found == ([caption.strip()] if caption.strip() else [])
    assert bool(complaints) == (not caption.strip())


@settings(max_examples=60, deadline=None)
@given(value=st.floats(-1e6, 1e6), index=st.integers(0, len(KINDS) - 1))
def test_every_value_has_a_bin(value: float, index: int) -> None:
    kind = KINDS[index]
    assert 0 <= kind.to_bin(int(value) if kind.is_whole else value) < kind.num_bins
