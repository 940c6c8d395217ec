"""`verify --replay` labels a sample again elsewhere, and compares."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import modalities, replay, shards
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.shards import Member
from dataengine.versions import Versioned
from dataengine.weights import Weights, describe
from labelers.canny_edge import Canny
from labelers.color_palette import Palette
from pipelines import verifying
from tests.fakes import Inverted, Threshold, ingested, tree
from tests.test_verify import label, replaced, whole  # noqa: F401


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "root")


def outcomes(root: Path, part: float, *given: Labeler, settings: tuple[str, ...] = ()) -> list[replay.Replayed]:
    dataset = Dataset(root)
    return list(replay.replay(dataset, replay.drawn(dataset, part), verifying.Maker(dataset, given, settings)))


def test_the_sample_is_the_same_every_time_and_has_every_labelled_column(root: Path) -> None:
    def chosen(part: float) -> list[tuple[str, int]]:
        return [(r.modality, r.shard) for r in replay.drawn(Dataset(root), part)]

    one = chosen(0.01)
    assert [m for m, _ in one] == ["canny_edge", "color_palette", "sam_edge"]
    assert len({shard for _, shard in one}) == 1
    assert chosen(0.01) == one
    assert set(one) < set(chosen(0.5)) < set(chosen(1.0))
    assert len(chosen(1.0)) == 9
    plan = (root / "plan.json").read_text()
    other = set()
    for digit in "0123456789":
        (root / "plan.json").write_text(plan.replace(json.loads(plan)["fingerprint"], digit * 64))
        other.add(chosen(0.01)[0][1])
    assert len(other) > 1


def test_labelling_again_gives_the_same_bytes_and_writes_nothing(root: Path) -> None:
    before = tree(root)
    found = outcomes(root, 1.0, Inverted())
    assert [(r.outcome, r.detail) for r in found] == [("same", "")] * 9
    assert tree(root) == before


def test_a_cell_that_comes_out_otherwise_is_measured(root: Path) -> None:
    codec = modalities.load("canny_edge")

    def off_by_some(members: list[Member]) -> list[Member]:
        value = codec.decode(members[0].data)
        changed = value.copy()
        changed[0, :2] = np.where(value[0, :2] > 0, 0, 255)
        return [dataclasses.replace(members[0], data=codec.encode(changed)), *members[1:]]

    replaced(root, "canny_edge", 2, off_by_some)
    found = {(r.modality, r.shard): r for r in outcomes(root, 1.0, Inverted())}
    wrong = found["canny_edge", 2]
    size = codec.decode(next(iter(shards.read_tar((root / "canny_edge/shard-00002.tar").read_bytes()))).data).size
    assert wrong.outcome == "differs"
    assert wrong.detail == f"1 of {wrong.num_samples} samples; in them {2 / size:.3%} of the values, by at most 255"
    assert "labelled again it differs" in str(wrong.problem())
    assert found["sam_edge", 2].outcome == "differs"  # its input is not what it was made from
    assert sum(r.outcome == "same" for r in found.values()) == 7


def test_versions_of_columns_are_made_by_what_made_them(root: Path) -> None:
    dataset = Dataset(root)
    second = Versioned(inner=Canny(low=10), column_version="v2")
    third = Versioned(inner=Inverted(), column_version="v2", reads=(("canny_edge", "canny_edge@v2"),))
    label(dataset, ["canny_edge@v2", "sam_edge@v2"], second, third)
    found = [r for r in outcomes(root, 1.0, Inverted()) if "@" in r.modality]
    assert [(r.modality, r.outcome) for r in found] == [("canny_edge@v2", "same")] * 3 + [("sam_edge@v2", "same")] * 3


def made(root: Path, column: str, **changes: Any) -> None:
    """Say in the record of shard 0 that something else made a cell."""
    path = root / f"commits/{column}/shard-00000.json"
    record = json.loads(path.read_text())
    record["provenance"] |= changes
    path.write_text(json.dumps(record))


def test_what_cannot_be_made_again_says_why(root: Path, tmp_path: Path) -> None:
    dataset = Dataset(root)
    record = dataset.commit("canny_edge", 0)
    assert record is not None
    settings = record.provenance["settings"]
    palette = dataclasses.asdict(Palette())
    weights = {"source": "x", "sha256": "ab" * 32, "licence": "", "random": False}
    for changes, why in (
        ({"labeler": "gone"}, "there is no labeler 'gone' here"),
        ({"labeler": "../../etc/passwd"}, "there is no labeler"),
        ({"version": 99}, "code differs: version 1 of canny_edge here, 99 made it"),
        ({"settings": {**settings, "low": "many"}}, "has no such settings"),
        ({"settings": {**settings, "unheard_of": 1}}, "settings differ"),
        ({"weights": weights}, "weights differ: none here, abababababababab made it"),
        ({"labeler": "sam", "settings": {}, "weights": weights}, "weights absent"),
        ({"labeler": "color_palette", "settings": palette}, "makes color_palette, and not canny_edge"),
    ):
        made(root, "canny_edge", labeler="canny_edge", version=1, settings=settings, weights=None)
        made(root, "canny_edge", **changes)
        (found,) = [r for r in outcomes(root, 1.0, Inverted()) if r.shard == 0 and r.modality == "canny_edge"]
        assert found.outcome == "cannot"
        assert why in found.detail, found.detail
    with pytest.raises(ValueError, match=r"LABELER\.field=value"):
        outcomes(root, 1.0, settings=("canny",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Threshold):
    """Edges whose level is the first byte of a file."""

    checkpoint: str = ""

    def weights(self) -> Weights:
        return describe(self.checkpoint, licence="none")

    def load(self, device: str) -> Loaded:
        return dataclasses.replace(self, level=Path(self.checkpoint).read_bytes()[0]).made(device)

    def made(self, device: str) -> Loaded:
        return Threshold(level=self.level).load(device)


def test_weights_are_told_by_their_hash_wherever_they_lie(tmp_path: Path) -> None:
    for name, level in (("one", 100), ("two", 200)):
        (tmp_path / name).write_bytes(bytes([level]) * 9)
    dataset = ingested(tmp_path)
    label(dataset, ["canny_edge"], Weighted(checkpoint=str(tmp_path / "one")))
    given = Weighted(checkpoint=str(tmp_path / "one"))
    assert [r.outcome for r in outcomes(tmp_path / "root", 1.0, given)] == ["same"] * 3
    (tmp_path / "one").rename(tmp_path / "moved")
    (found,) = outcomes(tmp_path / "root", 0.01, given)
    assert "weights absent" in found.detail
    moved = f"{given.name}.checkpoint={tmp_path}/moved"
    assert [r.outcome for r in outcomes(tmp_path / "root", 0.01, given, settings=(moved,))] == ["same"]
    (found,) = outcomes(tmp_path / "root", 0.01, dataclasses.replace(given, checkpoint=str(tmp_path / "two")))
    assert "weights differ" in found.detail


@pytest.mark.parametrize(("text", "part"), [("1%", 0.01), ("0.5", 0.5), (" 100 % ", 1.0)])
def test_a_part_is_a_percentage_or_a_fraction(text: str, part: float) -> None:
    assert verifying.fraction(text) == part
    for wrong in ("0", "101%", "-1", "all", "nan"):
        with pytest.raises(ValueError, match="expected a part"):
            verifying.fraction(wrong)


def test_threshold_is_another_labeler_of_the_same_column(root: Path) -> None:
    found = outcomes(root, 0.01, Threshold(), Inverted())
    assert {r.modality: r.outcome for r in found}["canny_edge"] == "same"  # made by canny_edge, not by what is given
