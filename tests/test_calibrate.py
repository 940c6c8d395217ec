"""The command that fits a detector's scores to another's on what both have labelled."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dataengine import local
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from dataengine.versions import Versioned
from labelers import _calibration
from labelers.dfine import DFine
from pipelines import calibrate  # noqa: F401  registers its command
from pipelines.__main__ import app
from tests.fakes import ingested


@dataclass(frozen=True, kw_only=True)
class Sure(Labeler):
    """Forty boxes an image, whose scores are random numbers to a power: what another power makes of the same."""

    inputs = ("rgb",)
    emits = ("det",)
    power: float

    def load(self, device: str) -> Loaded:
        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"det": {"instances": self.instances(sample.key)}} for sample in samples]

        return label

    def instances(self, key: str) -> list[dict[str, Any]]:
        scores = np.random.default_rng(zlib.crc32(key.encode())).random(40) ** self.power
        return [
            {"boxes": [0.02 * i, 0.0, 0.02 * i + 0.02, 0.5], "class_name": "cat", "score": float(score)}
            for i, score in enumerate(scores)
        ]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """What two detectors said of forty images."""
    made = ingested(tmp_path, count=40, shard_size=20)
    labelers = [Sure(power=1.0), Versioned(inner=Sure(power=3.0), column_version="fast")]
    plan = plan_labels(made, ["det", "det@fast"], labelers)
    local.run(plan.group(made.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    return made


def test_scores_of_one_column_are_fitted_to_another_and_used(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "fast.json"
    done = CliRunner().invoke(app, ["calibrate", dataset.store.url, "det@fast", "det", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "40 images" in done.output
    knots = DFine(calibration=str(out)).calibration
    levels = np.array([0.3, 0.6, 0.9])
    np.testing.assert_allclose(_calibration.apply(knots, levels**3), levels, atol=0.02)  # type: ignore[arg-type]


def test_what_cannot_be_fitted_is_said(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "none.json"
    for columns, message in (
        (("det@slow", "det"), "no shard has all of det@slow, det"),
        (("rgb", "det"), "rgb: expected a column of boxes"),
    ):
        done = CliRunner().invoke(app, ["calibrate", dataset.store.url, *columns, "--out", str(out)])
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())
    assert not out.exists()
