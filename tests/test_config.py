"""Recipes: every one builds and survives JSON; unknown settings name the nearest right one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dataengine import plugins
from pipelines import config, label
from pipelines.train import TrainFourM
from tests.fakes import Inverted, Threshold, ingested


@dataclass(frozen=True)
class Inner:
    steps: int = 1
    names: tuple[str, ...] = ("a",)
    limit: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    out: str = "out/demo/x"


@pytest.mark.parametrize("name", plugins.names("pipelines.recipes"))
def test_every_recipe_builds_and_is_recorded(name: str) -> None:
    if name == "photo_labels":
        pytest.importorskip("cv2")
    made = config.load(name, object)
    record = config.resolved(made)
    assert record["kind"] == type(made).__name__
    assert json.loads(json.dumps(record)) == record


def test_settings_are_changed_by_path_and_checked_against_their_type() -> None:
    made = config.override(Outer(), ["inner.steps=5", "inner.names=[b, c]", "inner.limit=1e-3", "out=here"])
    assert made == Outer(Inner(5, ("b", "c"), 0.001), "here")
    assert config.override(made, ["inner.limit=null"]).inner.limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.stesp=5", r"unknown setting 'inner.stesp' \(did you mean 'steps'\?\)"),
        ("inner.steps=many", "inner.steps='many': Input should be a valid integer"),
        ("out.x=1", "str has no fields"),
        ("inner", "expected field=value"),
    ],
)
def test_what_cannot_be_set_is_explained(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.override(Outer(), [assignment])


def test_a_mistyped_recipe_names_the_nearest_and_a_wrong_kind_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'nanoo' \(did you mean 'nano'\?\)"):
        config.load("nanoo", TrainFourM)
    with pytest.raises(ValueError, match="configures a Evaluate, this command runs a TrainFourM"):
        config.load("nano_evaluate", TrainFourM)
    with pytest.raises(ValueError, match="no such Python file"):
        config.load(str(tmp_path / "missing.py"), TrainFourM)
    file = tmp_path / "mine.py"
    file.write_text("from tests.test_config import Outer\ndef recipe():\n    return Outer(out='mine')\n")
    assert config.load(str(file), Outer.__mro__[1]).out == "mine"  # type: ignore[attr-defined]


def test_paths_move_with_the_output_folder() -> None:
    assert config.with_paths(Outer(), "out/demo", "/elsewhere").out == "/elsewhere/x"
    assert config.with_paths(Outer(out="data"), "out/demo", "/elsewhere").out == "data"


def test_a_recipe_may_hold_two_labelers_of_one_file(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=2)
    made = label.plan(dataset, ["sam_edge"], label.LabelRun(labelers=(Threshold(level=7), Inverted())))
    assert made.labelers == (Threshold(level=7), Inverted())


def test_a_setting_names_who_makes_a_column(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=2)
    made = label.plan(dataset, [], None, ["det=opencv_persons", "opencv_persons.faces=false"])
    assert [labeler.name for labeler in made.labelers] == ["opencv_persons"]
    assert made.wanted == ("det",)
    assert not made.labelers[0].faces  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"canny_edge makes canny_edge, not det"):
        label.plan(dataset, [], None, ["det=canny_edge"])
    with pytest.raises(ValueError, match="unknown labeler 'opencv_person'"):
        label.plan(dataset, [], None, ["det=opencv_person"])


def test_a_run_that_has_begun_keeps_its_configuration(tmp_path: Path) -> None:
    config.keep(Outer(), tmp_path)
    config.keep(Outer(Inner(2)), tmp_path)  # nothing has been trained yet
    (tmp_path / "checkpoint").mkdir()
    config.keep(Outer(Inner(2), out="moved"), tmp_path)
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match=r"inner .*'steps': 2.* -> .*'steps': 3.*expected the same, or another `out`"):
        config.keep(Outer(Inner(3)), tmp_path)
    assert (tmp_path / "recipe.json").read_bytes() == before
    config.keep(Outer(Inner(3)), tmp_path, free=("inner",))
