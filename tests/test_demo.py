"""The demo, at a glance's scale: every stage, the page in a browser, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataengine.manifest import Dataset
from pipelines import demo
from tests import browser as browsers

SCALE = demo.Scale(scenes=32, heldout=8, tokenizer_steps=60, model_steps=110)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo."""
    folder = tmp_path_factory.mktemp("demo")
    demo.run(folder, runner="local", scale=SCALE)
    return folder


def test_every_modality_is_committed_and_random_ones_say_so(out: Path) -> None:
    photos, scenes = Dataset(out / "photos"), Dataset(out / "scenes")
    for dataset, expected in ((photos, 15), (scenes, 18)):
        modalities = dataset.modalities()
        assert len(modalities) == expected, modalities
        assert all(dataset.committed(m) == list(range(dataset.plan.num_shards)) for m in modalities)
    random = {m for m in photos.modalities() if m != "tokens" and demo.pack.is_random(photos, m)}
    assert random == {"CLIP-B16", "DINOv2-B14", "DINOv2-B14-global", "sam_instance", "sam_edge"}
    record = photos.commit("metadata", 0)
    assert record is not None
    assert "sam_instance" not in record.provenance["settings"]["from_modalities"]
    captions = [c for s in photos.committed("rgb") for c in photos.read("caption", s)]
    assert len(captions) >= 15
    assert all(len(json.loads(c.data)[0]) > 20 for c in captions)
    packed = demo.pack.prepare(photos, str(out / "tokenizers" / "text.json"), 64)[0].columns
    assert {c.name for c in packed}.isdisjoint(random)


def test_the_scores_are_of_scenes_never_seen(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["samples"] == SCALE.heldout
    assert set(metrics["scores"]) == {"depth", "normal", "semseg"}
    for score in metrics["scores"].values():
        assert score["ratio"] == pytest.approx(score["model"] / score["constant"])
    seen, scored = (
        {k for s in Dataset(out / n).committed("rgb") for k in Dataset(out / n).keys(s)}
        for n in ("scenes", "scenes_heldout")
    )
    assert len(seen) == SCALE.scenes
    assert not seen & scored


def test_a_second_run_does_no_work_again(out: Path) -> None:
    def state() -> dict[Path, int]:
        aside = ("seconds.json", "index.arrow")  # what it took, and a cache that leaves out the newest records
        return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name not in aside}

    before = state()
    demo.run(out, runner="local", scale=SCALE)
    assert state() == before


@pytest.mark.browser
@pytest.mark.skipif(not browsers.CHROMIUM.exists(), reason=f"no Chromium at {browsers.CHROMIUM}")
def test_the_page_shows_photographs_predictions_and_curves(out: Path) -> None:
    problems: list[str] = []
    with browsers.chromium_browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((out / "index.html").as_uri())
        assert page.locator("img").count() > 20 * 10
        assert page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0
        text = page.locator("body").inner_text().lower()
        page.screenshot(path=str(out / "page.png"))
    assert problems == []
    for expected in (
        "random weights",
        "never saw",
        "orange dahlia",
        "quarantine",
        "loss by modality",
        "caption to semseg",
    ):
        assert expected in text, expected
