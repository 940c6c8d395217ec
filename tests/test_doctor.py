"""The doctor's findings are about this machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from typer.testing import CliRunner

from dataengine import plugins
from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from labelers.clip_b16 import ClipB16
from pipelines import checkup, doctor, measure
from pipelines.__main__ import app


def test_it_reports_every_labeler_and_downloads_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        report = doctor.examine()
    assert set(report["labelers"]) == set(plugins.names("labelers"))
    assert report["labelers"]["canny_edge"] == "ready (an algorithm): canny_edge"
    assert "downloads are off" in report["labelers"]["sam"] or "not found" in report["labelers"]["sam"]
    assert report["packages"]["torch"] == importlib.metadata.version("torch")


def test_a_rival_distribution_is_named_with_how_to_remove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"model": ["m21-dataengine", "theirs"], "labelers": ["m21-dataengine"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    assert doctor.rivals() == "model also comes with theirs: pip uninstall theirs"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time, of two small photographs."""
    monkeypatch.setattr(measure, "MAX_BATCH", 1)
    monkeypatch.setattr(measure, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(checkup, "PHOTOGRAPHS", ("chelsea", "rocket"))
    for name in checkup.PHOTOGRAPHS:
        small = getattr(skimage.data, name)()[::4, ::4]
        monkeypatch.setattr(skimage.data, name, lambda small=small: small)


@pytest.mark.parametrize("name", plugins.names("labelers"))
def test_every_labeler_passes_its_checkup_on_its_random_checkpoint(name: str, tmp_path: Path, quick: None) -> None:
    labeler = plugins.load("labelers", name, Labeler)().tiny(tmp_path)
    found = checkup.examine(labeler, "cpu")
    assert (found.outcome, found.num_valid, found.num_images) == ("ready", 2, 2), found.detail
    assert found.measured is not None
    assert found.measured.batches[0].size == 1
    assert found.golden == checkup.UNKNOWN
    has_weights = labeler.weights() is not None
    assert found.random == has_weights
    assert (found.parameters > 0) == (found.sha256 != "") == has_weights
    text = "\n".join(checkup.lines(found))
    assert ("RANDOM WEIGHTS" in text) == has_weights
    assert "2 of 2 are valid" in text
    json.dumps(found.as_json())


def test_outputs_are_compared_with_those_that_were_kept(tmp_path: Path, quick: None) -> None:
    labeler = ClipB16().tiny(tmp_path)
    golden = tmp_path / "golden"
    assert checkup.examine(labeler, "cpu", golden).golden == "kept 2 outputs as golden"
    assert checkup.examine(labeler, "cpu", golden).golden == "the same: 2 of 2"
    (file,) = golden.glob("*/chelsea.CLIP-B16.npy")
    there = np.load(file)
    there[3, 4, 5] += np.float16(0.5)
    np.save(file, there)
    assert checkup.examine(labeler, "cpu", golden).golden == "1 of 2 differ, by at most 0.5"


def test_one_that_is_missing_or_breaks_stops_no_other_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = CliRunner().invoke(app, ["doctor", "labelers", "sam", "canny_edge", "--json", "--device", "cpu"])
    assert done.exit_code == 4
    missing, there = json.loads(done.stdout)
    assert (missing["labeler"], missing["outcome"]) == ("sam", "no weights")
    assert "set checkpoint=PATH" in missing["detail"]
    assert (there["labeler"], there["outcome"], there["num_valid"]) == ("canny_edge", "ready", 4)
    assert there["images_per_second"]["1"] > 0
    assert "HF_HUB_OFFLINE" not in os.environ
    assert CliRunner().invoke(app, ["doctor", "labelers", "canny"]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "everything"]).exit_code == 2


@dataclass(frozen=True, kw_only=True)
class Crashing(Labeler):
    """Ends its process as soon as it is loaded, or says that it cannot be."""

    inputs = ("rgb",)
    emits = ("canny_edge",)
    gate = "accept the terms somewhere"

    says: str = ""

    def load(self, device: str) -> Loaded:
        if self.says:
            raise KeyError(self.says)
        os._exit(3)


def test_a_labeler_that_ends_its_process_or_throws_is_a_finding() -> None:
    found = checkup._alone(Crashing(), "cpu", None)
    assert found.outcome == "failed"
    assert "terminated abruptly" in found.detail
    found = checkup.examine(Crashing(says="no such tensor"), "cpu")
    assert (found.outcome, found.detail) == ("failed", "KeyError: 'no such tensor'")
    assert checkup.lines(found)[0] == "test_doctor (canny_edge): failed"


def test_parameters_and_operations_are_those_of_the_network(tmp_path: Path, quick: None) -> None:
    """Of one linear layer of 8 x 4 on 5 vectors: 36 parameters, 2 * 8 * 4 * 5 operations."""
    found = checkup.examine(Linear(), "cpu")
    assert (found.parameters, found.gflop) == (36, pytest.approx(320e-9))


@dataclass(frozen=True, kw_only=True)
class Linear(Labeler):
    """Edges that are none, by a small network."""

    inputs = ("rgb",)
    emits = ("canny_edge",)

    def load(self, device: str) -> Loaded:
        import torch

        layer = torch.nn.Linear(8, 4)

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                layer(torch.ones(5 * len(samples), 8))
            return [{"canny_edge": np.zeros(s.size, np.uint8)} for s in samples]

        return run
