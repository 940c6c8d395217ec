"""The permissive profile: which weights it refuses, what it says, and what could stand in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from dataengine import plugins, weights
from dataengine.labeler import Labeler
from dataengine.versions import Versioned
from dataengine.weights import Weights
from labelers.sam import Sam
from pipelines.licences import PUBLISHED, conditions, refuse_restricted, stand_ins, terms
from tests.fakes import Inverted, Threshold, ingested
from tests.instants import label


@dataclass(frozen=True, kw_only=True)
class Licensed(Threshold):
    """A labeler with weights under some licence."""

    checkpoint: str = "somebody/their-weights"
    licence: str = "CC-BY-NC-4.0"
    untrained: bool = False

    def weights(self) -> Weights:
        if Path(self.checkpoint).is_file():
            return weights.describe(self.checkpoint, licence=self.licence)
        return Weights(self.checkpoint, "0" * 64, self.licence, self.untrained)


@dataclass(frozen=True, kw_only=True)
class DepthNetwork(Licensed):
    emits = ("depth", "normal")


@dataclass(frozen=True, kw_only=True)
class PoseNetwork(DepthNetwork):
    emits = ("human_poses",)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        *((name, "free") for name in ("Apache-2.0", "MIT", "apache 2.0", "CC0-1.0", "none (random weights)")),
        *((name, "conditional") for name in ("CC-BY-SA 3.0", "RAIL++-M", "X; commercial use allowed")),
        *((name, "forbidden") for name in ("CC-BY-NC 4.0", "cc-by-nc-sa-4.0", "Non-commercial research EULA")),
        *((name, "forbidden") for name in ("MIT code, CC-BY-NC weights", "SMPL body model", "noncommercial")),
        *((name, "forbidden") for name in ("MIT; commercial use forbidden", "Omnidata EULA", "Apple AMLR")),
        ("as the data it was trained on", "inherited"),
        *((name, "unknown") for name in ("", "other", "Apache", "MIT-ish", "ncsa", "licence of SOMEBODY")),
    ],
)
def test_what_a_licence_allows(licence: str, expected: str) -> None:
    assert terms(licence) == expected


def test_conditions_are_said() -> None:
    assert "shared alike" in conditions("CC-BY-SA 3.0")
    assert conditions("MIT") == ""


def published() -> list[tuple[str, Any]]:
    made = [(name, plugins.load("labelers", name, Labeler)()) for name in plugins.names("labelers")]
    return [(name, x) for name, x in made if any(f.name == "checkpoint" for f in fields(x))]


@pytest.mark.parametrize(("name", "labeler"), published(), ids=[name for name, _ in published()])
def test_every_labeler_has_a_known_licence_and_claims_the_same(
    name: str, labeler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def claimed(checkpoint: str, files: object = None, *, licence: str, optional: object = ()) -> Weights:
        return Weights(checkpoint, "", licence, False)

    monkeypatch.setattr(weights, "describe", claimed)
    monkeypatch.setattr(weights, "describe_folder", claimed)
    assert PUBLISHED[labeler.checkpoint] == labeler.weights().licence


def test_the_registry_is_permissive_without_downloading_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> Path:
        raise AssertionError("asked for a file")

    monkeypatch.setattr(weights, "resolve", forbidden)
    every = [plugins.load("labelers", name, Labeler)() for name in plugins.names("labelers")]
    refuse_restricted([x for x in every if terms(PUBLISHED.get(getattr(x, "checkpoint", ""), "MIT")) == "free"])
    assert len(every) > 5


def refusal(*labelers: Labeler) -> str:
    with pytest.raises(ValueError, match="permissive profile refuses") as raised:
        refuse_restricted(labelers)
    return str(raised.value)


def test_weights_that_forbid_commercial_use_are_refused_and_what_could_stand_in_is_named() -> None:
    refuse_restricted([Threshold(), Inverted(), Licensed(licence="MIT"), Licensed(untrained=True)])
    said = refusal(Threshold(), Licensed())
    assert "(canny_edge) with somebody/their-weights, whose licence, CC-BY-NC-4.0, forbids commercial use" in said
    assert "could stand in: canny_edge for canny_edge" in said
    said = refusal(DepthNetwork())
    assert "(depth, normal)" in said
    assert "depth_anything.checkpoint=depth-anything/Depth-Anything-V2-Small-hf for depth (Apache-2.0)" in said
    assert "marigold_normal.checkpoint=prs-eth/marigold-normals-v1-1 for normal (RAIL++-M)" in said
    assert "none yet could stand in" in refusal(PoseNetwork())
    said = refusal(Versioned(inner=Licensed(), column_version="v2"))
    assert "(canny_edge@v2) with somebody/their-weights, whose licence, CC-BY-NC-4.0" in said
    assert "could stand in: canny_edge for canny_edge" in said
    said = refusal(DepthNetwork(checkpoint="depth-anything/Depth-Anything-V2-Large-hf", licence="Apache-2.0"))
    assert "CC-BY-NC-4.0, forbids commercial use" in said


def test_another_checkpoint_of_the_same_labeler_can_stand_in(tmp_path: Path) -> None:
    random = Sam().tiny(tmp_path)
    refuse_restricted([random])
    card = tmp_path / "sam.pth.card.json"
    card.write_text(json.dumps({"licence": "CC-BY-NC-SA 4.0"}))
    said = refusal(random)
    assert "CC-BY-NC-SA 4.0, forbids commercial use" in said
    assert f"could stand in: sam with sam.checkpoint={Sam().checkpoint} for sam_instance (Apache-2.0)" in said
    assert f"sam with sam.checkpoint={Sam().checkpoint} for sam_instance (Apache-2.0)" in stand_ins(random)


def test_an_unknown_licence_is_refused_until_somebody_states_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    file.write_bytes(b"weights")
    mine = Licensed(checkpoint=str(file), licence="MIT")
    said = refusal(mine)
    assert "whose licence is not known" in said
    assert f"to {file}.card.json beside the file" in said
    card = tmp_path / "mine.pth.card.json"
    for stated, passes in (
        ({"licence": "Apache-2.0"}, True),
        ({"licence": "cc-by-nc-4.0"}, False),
        ({"licence": "Terms of Somebody"}, False),
        ({"licence": "Terms of Somebody", "commercial": True}, True),
        ({"licence": "Apache-2.0", "commercial": False}, False),
        ({"random": False}, False),
    ):
        card.write_text(json.dumps(stated))
        if passes:
            refuse_restricted([mine])
        else:
            refusal(mine)
    card.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        mine.weights()
    said = refusal(replace(mine, checkpoint="https://user:secret@host/mine.pth"))
    assert "secret" not in said


def test_a_stated_licence_goes_into_provenance(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    file.write_bytes(b"weights")
    (tmp_path / "mine.pth.card.json").write_text(json.dumps({"licence": "Mine", "commercial": True}))
    made = weights.describe(str(file), licence="MIT")
    assert (made.licence, made.random) == ("Mine; commercial use allowed", False)


@pytest.mark.parametrize(("licence", "refused"), [("CC-BY-NC-4.0", True), ("Apache-2.0", False)])
def test_columns_that_are_read_are_held_to_the_same(tmp_path: Path, licence: str, refused: bool) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["sam_edge"], Licensed(licence=licence), Inverted())
    reader = _reader("sam_edge")
    check: Callable[[], None] = lambda: refuse_restricted([reader], dataset)  # noqa: E731
    if not refused:
        check()
        return
    with pytest.raises(ValueError, match=r"the column sam_edge, an input, .* CC-BY-NC-4.0 \(canny_edge, somebody/"):
        check()
    # A column that is made anew does not count.
    refuse_restricted([Threshold(), Inverted(), reader], dataset)


def _reader(column: str) -> Labeler:
    @dataclass(frozen=True, kw_only=True)
    class Reader(Threshold):
        inputs = (column,)
        emits = ("depth",)

    return Reader()
