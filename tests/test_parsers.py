"""Parsers of the text-like modalities: inverses of what was serialised, and strict with whatever else is written."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataengine.geometry import Crop
from tests.serialised import TEXTS, Words, labels, load, maker, said, small

MUTANTS = 10_000


def test_poses_round_trip() -> None:
    codec, words = load("human_poses_tokens"), Words()
    size, whole = (224, 224), Crop(0, 0, 224, 224)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        value = codec.example(rng, size)
        value["pred_cam"] = rng.uniform((-1, -1, 0), (3, 3, 19), (2, 3)).tolist()
        value["pred_smpl_params"]["betas"] = rng.uniform(-3, 3, (2, 10)).tolist()
        ((*pieces,),) = codec.variants(value, [whole], size)
        ids = codec.assemble([words.encode(str(piece)) for piece in pieces], rng)
        text = words.decode([i for piece in ids for i in piece])
        found, complaints = codec.parse(text)
        assert complaints == []
        codec.check(found, size)
        assert found["pose_tokenized"] == value["pose_tokenized"]
        params, expected = found["pred_smpl_params"], value["pred_smpl_params"]
        half = {"global_orient": 0.5 / 499.5, "betas": 0.5 / 166.5}
        for key, tolerance in half.items():
            np.testing.assert_allclose(params[key], expected[key], atol=tolerance + 1e-9)
        np.testing.assert_allclose(found["pred_cam"], value["pred_cam"], atol=0.5 / 49.95 + 1e-9)
        np.testing.assert_allclose(found["bbox_xyxy"], value["bbox_xyxy"], atol=224 * 0.502 / 999)
        assert codec.variants(found, [whole], size) == [pieces]


def test_instances_round_trip() -> None:
    codec, words = load("sam_instance_tokens"), Words()
    met = 0
    for label in labels("sam_instance_tokens")[::10]:
        text = words.decode(said(codec, label, words))
        found, complaints = codec.parse(text)
        assert complaints == []
        codec.check(found, label.size)
        assert found["points"] == maker.query_points(label).tolist()
        instances = label.value["crops"][label.row]
        for instance in instances:
            contour = np.array(instance["polygon"], np.int32)[:, None]
            inside = [p for p in found["points"] if cv2.pointPolygonTest(contour, tuple(p), measureDist=True) >= 0]
            same = [i for i in found["crops"][0] if i["tokens"] == instance["tokens"]]
            assert [i["points"] for i in same] == [inside] * bool(inside)
            assert all(i["bbox"] == [int(v) for v in instance["bbox"]] for i in same)
            met += len(same)
    assert met > 100


@pytest.mark.parametrize(
    ("name", "text", "kept", "complaint"),
    [
        ("human_poses_tokens", "", 0, "expected 'none', or 'human' first, got ''"),
        ("human_poses_tokens", "none {person}", 1, "'human' first, got 'none'"),
        ("human_poses_tokens", "{person} {person}", 2, None),
        ("human_poses_tokens", "dog {person}", 1, "'human' first, got 'dog'"),
        ("human_poses_tokens", "{person} shape v0=1", 0, "person 1: expected 'human', got 'shape v0=1'"),
        ("human_poses_tokens", "{person:pose} {person}", 1, "person 1: expected 'pose', got"),
        ("human_poses_tokens", "human v0=9 v1=0 v2=3 v3=9", 0, "x0 <= x1"),
        ("human_poses_tokens", "human v0=1 v1=0 v2=3", 0, "after 'human', got 'v0=1 v1=0 v2=3'"),
        ("human_poses_tokens", "human v0=1 v1=0 v2=3 v3=9 pose v0=512", 0, "8 of v0=0 to v1=511, got 'v0=512'"),
        ("human_poses_tokens", "human v0=1 v1=0 v2=3 v3=9 camera v0=5 v0=-3 v0=4", 0, "3 of v0= after 'camera'"),
        ("human_poses_tokens", "{person:turn}", 1, "person 1: expected a rotation after 'global'"),
        ("sam_instance_tokens", "", 0, "expected 'point' first, got ''"),
        ("sam_instance_tokens", "point v0=3 v1=4 none", 0, None),
        ("sam_instance_tokens", "point v0=3 v1=4 {instance} point v0=4 v1=4 {instance}", 1, None),
        ("sam_instance_tokens", "point v0=3 v1=4 {instance} {instance}", 1, "twice at one point"),
        ("sam_instance_tokens", "point v0=3 v1=4 none {instance}", 1, "'none' or 'polygon' after a point"),
        ("sam_instance_tokens", "point v0=3 v1=4", 0, "'none' or 'polygon' after a point, got ''"),
        ("sam_instance_tokens", "point v0=3 v1=224 none", 0, "v0= v1= below 224 after 'point'"),
        ("sam_instance_tokens", "point v0=3 v1=4 none point v0=3 v1=4 none", 0, "the point v0=3 v1=4 a second time"),
        ("sam_instance_tokens", "point v0=3 v1=4 polygon v0=0 v1=0 v2=9 v3=9 v0=1", 0, "16 of v0=0 to v1=511"),
        ("sam_instance_tokens", "point v0=3 v1=4 polygon v0=9 v1=0 v2=8 v3=9", 0, "xmin <= xmax"),
        ("sam_instance_tokens", "point v0=3 v1=4 polygon v0=9 v1=0 v2=225 v3=9", 0, "up to 224"),
    ],
)  # fmt: skip
def test_parsers_say_what_is_wrong(name: str, text: str, kept: int, complaint: str | None) -> None:
    box, rest = "human v0=1 v1=0 v2=3 v3=9", "camera v0=9 v0=9 v0=9 shape" + " v0=9" * 10
    turn, pose = "global" + " v0=999 v0=500 v0=500 v0=500" * 2 + " v0=999", "pose v1=9" + " v0=511" * 7
    text = text.replace("{person:pose}", f"{box} {turn} {rest}").replace(
        "{person:turn}", f"{box} {rest} {pose} global" + " v0=0" * 9
    )
    text = text.replace("{person}", f"{box} {pose} {turn} {rest}")
    text = text.replace("{instance}", "polygon v0=0 v1=0 v2=9 v3=9" + " v0=511 v1=3" * 8)
    value, complaints = load(name).parse(text)
    found = value["crops"][0] if isinstance(value, dict) and "crops" in value else value and value["bbox_xyxy"]
    assert len(found) == kept
    assert len(complaints) == (complaint is not None)
    assert complaint is None or complaint in complaints[0]


def _mutant(rng: np.random.Generator, ids: list[int], largest: int) -> list[int]:
    """One to three changes: a token deleted, doubled, swapped or replaced, or the end cut off."""
    ids = list(ids)
    for _ in range(int(rng.integers(1, 4))):
        if not ids:
            return [int(rng.integers(largest))]
        i, j, kind = (int(v) for v in rng.integers((len(ids), len(ids), 5)))
        if kind == 0:
            del ids[i]
        elif kind == 1:
            ids.insert(i, ids[i])
        elif kind == 2:
            ids[i], ids[j] = ids[j], ids[i]
        elif kind == 3:
            ids[i] = int(rng.integers(largest))
        else:
            del ids[i:]
    return ids


@pytest.mark.parametrize("name", TEXTS)
def test_parsers_survive_mutants(name: str) -> None:
    codec, tokenizer, rng = load(name), small(), np.random.default_rng(0)
    whole = {"color_palette": lambda v: [{**codec.placeholder((1, 1))[0], **v[0]}]}.get(name, lambda v: v)
    # Long ones would only take longer.
    sequences = [ids for label in labels(name)[:200] if len(ids := said(codec, label, tokenizer)) < 160]
    complained = 0
    for k in range(MUTANTS):
        text = tokenizer.decode(_mutant(rng, sequences[k % len(sequences)], tokenizer.vocab_size))
        value, complaints = codec.parse(text)
        assert all(isinstance(complaint, str) and 0 < len(complaint) < 250 for complaint in complaints)
        codec.check(whole(value), (224, 224))
        complained += bool(complaints)
    assert 0.2 * MUTANTS < complained < MUTANTS


def test_valid_sequences_are_not_complained_of() -> None:
    for name in set(TEXTS) - {"caption"}:
        codec, tokenizer = load(name), small()
        for label in labels(name)[::25]:
            text = tokenizer.decode(said(codec, label, tokenizer))
            if "v0=" in text:
                assert codec.parse(text)[1] == [], text
