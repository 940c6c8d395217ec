"""The metrics of the any-to-any table on known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataengine import modalities
from dataengine.corpora.scenes import render
from dataengine.modalities.metadata import KINDS
from model import domains
from pipelines import measures, reconstruction
from pipelines.caption_facts import ALL, facts
from pipelines.measures import Measure, of_domain
from pipelines.text_measures import Boxes, Caption, Det, Metadata, Palette

RNG = np.random.default_rng(0)
SCENES = [render(seed, 32) for seed in range(6)]
FEATURES = [RNG.normal(size=(4, 4, 8)).astype(np.float16) for _ in SCENES]
NUMBERS = [{k.key: (int(10 * i) if k.is_whole else k.low + (k.high - k.low) * i / 7) for k in KINDS} for i in range(6)]
PALETTES = [[{str(n): RNG.integers(0, 256, (n, 3)).tolist() for n in range(1, 8)}] for _ in SCENES]

CASES: dict[str, tuple[Measure, list[Any], float]] = {
    "rgb": (of_domain(domains.Rgb()), [s.rgb for s in SCENES], 100.0),
    "depth": (of_domain(domains.Depth()), [s.depth / 20 for s in SCENES], 0.0),
    "normal": (of_domain(domains.Normal()), [s.normal for s in SCENES], 0.0),
    "semseg": (of_domain(domains.Semseg()), [s.semseg for s in SCENES], 1.0),
    "edges": (of_domain(domains.Edges()), [s.edges for s in SCENES], 1.0),
    "features": (of_domain(domains.Features(channels=8)), FEATURES, 1.0),
    "caption": (Caption(), [[s.caption] for s in SCENES], 1.0),
    "det": (Det(), [{"instances": s.boxes} for s in SCENES], 1.0),
    "metadata": (Metadata(), NUMBERS, 0.0),
    "palette": (Palette(), PALETTES, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_truth_is_perfect_and_beats_the_constant_which_beats_one_value(name: str) -> None:
    measure, labels, perfect = CASES[name]
    true = [measure.ready(value) for value in labels]
    measure.fit(true)
    assert measure.score(true, true) == pytest.approx(perfect, abs=0.05)
    constant = measure.score([measure.constant(true)] * len(true), true)
    singles = [measure.score([one] * (len(true) - 1), true[:i] + true[i + 1 :]) for i, one in enumerate(true)]
    sign = 1 if measure.larger_is_better else -1
    assert sign * perfect > sign * constant > sign * float(np.mean(singles))
    assert measure.score([measure.constant([one]) for one in true], true) == pytest.approx(perfect, abs=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_label_is_nearest_to_itself_by_its_vector(name: str) -> None:
    measure, labels, _ = CASES[name]
    true = [measure.ready(value) for value in labels]
    measure.fit(true)
    vectors = np.stack([measure.vector(value) for value in true])
    assert vectors.ndim == 2
    assert vectors.dtype == np.float32
    distance = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=-1)
    assert distance.argmin(axis=1).tolist() == list(range(len(true)))


@pytest.mark.parametrize("name", ["rgb", "depth", "normal", "semseg", "edges", "features"])
def test_maps_score_as_their_tokenizers_are_scored(name: str) -> None:
    measure, labels, _ = CASES[name]
    assert isinstance(measure, measures._Map)
    true = [measure.ready(value) for value in labels]
    made = true[1:] + true[:1]
    found = reconstruction.figures(measure.domain, made, true)
    assert measure.score(made, true) == pytest.approx(found[measure.metric], rel=1e-4)
    if name != "edges":  # which are widened for others than themselves
        np.testing.assert_array_equal(measure.constant(true), reconstruction.constant(measure.domain, true))


def test_lines_that_seldom_meet_are_widened_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = of_domain(domains.Edges())

    def scores() -> list[float]:
        found = []
        for seed in range(20):
            rows = 14 + np.random.default_rng(seed).integers(0, 5, 60)  # each line somewhere in a band of five rows
            lines = np.zeros((60, 32, 32), np.uint8)
            lines[np.arange(60), rows] = 255
            found.append(measure.score([measure.constant(list(lines[:8]))] * 52, list(lines[8:])))
        return found

    widened = scores()
    same = np.zeros((32, 32), np.uint8)
    same[16] = 255
    np.testing.assert_array_equal(measure.constant([same] * 8), same)
    monkeypatch.setattr(measures, "_WIDTHS", (0.0,))
    assert np.mean(widened) > np.mean(scores()) + 0.005


def test_one_threshold_is_for_all_sets() -> None:
    caption = Caption()
    surely, hardly = frozenset({"car"}), frozenset({"person"})
    sets = [[surely] * 9 + [hardly], [hardly] * 9 + [frozenset()], [hardly] + [frozenset()] * 9]
    assert caption.best(sets) == [surely, hardly, frozenset()]
    assert caption.constant(sets[2]) == hardly  # alone, to say it is better than to say nothing


def test_what_has_no_measure_is_refused() -> None:
    for domain in (domains.Depth(mapping="standardised"), domains.Poses()):
        with pytest.raises(ValueError, match="has no measure"):
            of_domain(domain)


def test_facts_of_captions() -> None:
    assert facts("A red car and two people in blue shirts on grey asphalt under a blue sky") == {
        "car", "red car", "person", "person x 2", "blue person", "on road", "sky clear",
    }  # fmt: skip
    assert facts("beneath white clouds, a person in a white shirt on a green lawn") == {
        "person", "white person", "on grass-merged", "sky cloudy",
    }  # fmt: skip
    assert facts("a fridge on sand") == facts("there is a refrigerator on a sandy beach") != facts("a ball on sand")
    assert facts("what a model may write") == frozenset()
    for scene in (render(seed, 16) for seed in range(40)):
        assert facts(scene.caption) <= set(ALL)
        named = {box["class_name"] for box in scene.boxes}
        assert {fact for fact in facts(scene.caption) if fact in named} or "empty" in scene.caption


def test_boxes_match_one_to_one_and_by_class() -> None:
    det = Det()
    true = Boxes(np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]), ("car", "person"))
    half = Boxes(np.array([[0, 0, 0.5, 0.25]]), ("car",))
    assert det.score([half], [true]) == pytest.approx(2 * 0.5 / 3)
    assert det.score([Boxes(half.corners, ("person",))], [true]) == 0
    twice = Boxes(np.repeat(true.corners[:1], 2, axis=0), ("car", "car"))
    assert det.score([twice], [true]) == pytest.approx(2 * 1 / 4)
    nothing = det.ready({"instances": []})
    assert det.score([nothing], [nothing]) == 1


def test_what_boxes_agree_on_is_in_most_of_them() -> None:
    det, rng = Det(), np.random.default_rng(0)
    same = np.array([[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.6, 0.6, 0.9, 0.9]])
    values = []
    for _ in range(9):
        corner = rng.uniform(0, 0.7, 2)  # one box of each value is anywhere
        corners = np.concatenate([same + rng.normal(0, 0.005, same.shape), [[*corner, *(corner + 0.3)]]])
        values.append(Boxes(corners, ("car", "cat", "cat", "dog")))
    found = det.constant([*values, det.ready({"instances": []})])
    assert sorted(found.names) == ["car", "cat", "cat"]
    assert det.score([found], [Boxes(same, ("car", "cat", "cat"))]) > 0.9
    assert det.constant([det.ready({"instances": []})] * 2).names == ()


def test_metadata_is_compared_in_bins_and_relative_to_its_spread() -> None:
    metadata, codec = Metadata(), modalities.load("metadata")
    true = [metadata.ready(value) for value in NUMBERS]
    metadata.fit(true)
    texts = [" ".join(codec.variants(value, [], (8, 8))[0]) for value in NUMBERS]  # type: ignore[attr-defined]
    read = [metadata.said(codec.parse(text)[0]) for text in texts]  # type: ignore[attr-defined]
    assert metadata.score(read, true) == 0
    assert metadata.score([metadata.constant(true)] * len(true), true) == pytest.approx(1)
    assert metadata.score([metadata.said({})] * len(true), true) > 1


def test_colours_match_in_any_order_and_missing_ones_cost_most() -> None:
    palette = Palette()
    true = palette.ready([{"5": [[10, 0, 0], [0, 20, 0], [0, 0, 30], [90, 90, 90], [200, 0, 200]]}])
    other = palette.ready([{"5": [[200, 0, 200], [90, 90, 90], [0, 0, 30], [0, 20, 0], [13, 0, 4]]}])
    assert palette.score([other], [true]) == pytest.approx(1.0)
    assert palette.score([palette.ready([{}])], [true]) == pytest.approx(255 * 3**0.5)
    assert palette.score([palette.ready([{"1": [[10, 0, 0]]}])], [true]) == pytest.approx(255 * 3**0.5 * 4 / 5)
