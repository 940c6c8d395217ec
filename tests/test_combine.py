"""Several datasets as one, and one as two: whole shards, their bytes and identities kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataengine import combine, evolve, local, validate
from dataengine.combine import evenly, merge, ranges, split
from dataengine.export import export, layout
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Conflict, Dataset
from dataengine.storage import Store
from model.tokenizers import text
from pipelines import look, pack
from tests.fakes import Inverted, Threshold, tree, write_images
from tests.faulty_s3 import s3_server
from tests.instants import Killed, at_every_instant, killed_before, label


def take_in(tmp_path: Path, name: str, count: int = 5, **settings: Any) -> Dataset:
    """A dataset whose keys begin with its name, two images a shard, the third of five refused."""
    images = tmp_path / f"images_{name}"
    if not images.exists():
        write_images(images, count)
        for file in sorted(images.iterdir()):
            file.rename(images / f"{name}_{file.name}")
        (images / f"{name}_image002.png").write_bytes(b"no image")
    dataset = Dataset(tmp_path / name)
    worker, tasks = prepare(dataset, f"folder:{images}", IngestSettings(shard_size=2, **settings))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return dataset


@pytest.fixture
def two(tmp_path: Path) -> list[Dataset]:
    """Two datasets of three shards with Canny edges; the first has SAM edges, too, and a failed label."""
    roots = [take_in(tmp_path, "a"), take_in(tmp_path, "b")]
    bad = roots[0].keys(2)[0]
    label(roots[0], ["canny_edge"], Threshold(fail_on=(bad,)))
    evolved = Threshold(fail_on=(bad,))
    label(roots[1], ["canny_edge"], evolved)
    label(roots[0], ["sam_edge"], evolved, Inverted())
    return roots


def tars(dataset: Dataset, column: str) -> list[bytes]:
    return [dataset.store.read(f"{column}/shard-{shard:05d}.tar") for shard in dataset.committed(column)]


def test_a_merged_root_is_a_dataset_like_any_other(two: list[Dataset], tmp_path: Path) -> None:
    out = Dataset(tmp_path / "out")
    made = merge(out, two)
    assert made.columns == ("rgb", "caption", "crop_settings", "canny_edge")
    assert list(made.left_out) == ["sam_edge"]
    assert str(tmp_path / "b") in made.left_out["sam_edge"]
    assert (out.plan.num_shards, out.plan.num_items) == (6, 10)
    for column in made.columns:
        assert tars(out, column) == tars(two[0], column) + tars(two[1], column)
    assert [q.reason for q in out.quarantine()] == [q.reason for d in two for q in d.quarantine()]
    assert len(out.quarantine()) == 2
    assert validate.verify(out) == []
    assert out.orphans() == []
    rows = {r.modality: r for r in look.status(out)}
    assert (rows["canny_edge"].shards, rows["canny_edge"].invalid, rows["rgb"].samples) == (6, 1, 8)
    record = out.commit("canny_edge", 4)
    source = two[1].commit("canny_edge", 1)
    assert record is not None
    assert source is not None
    assert (record.spec, record.sha256, record.invalid) == (source.spec, source.sha256, source.invalid)
    assert record.provenance == {**source.provenance, "origin": [{"plan": two[1].plan.fingerprint, "shard": 1}]}


def test_a_merged_root_is_labelled_and_packed_on(two: list[Dataset], tmp_path: Path) -> None:
    out = Dataset(tmp_path / "out")
    merge(out, two)
    threshold = Threshold(fail_on=(two[0].keys(2)[0],))
    assert label(out, ["canny_edge"], threshold) == 0
    with pytest.raises(Conflict, match="canny_edge/shard-00000 was made with other settings"):
        label(out, ["canny_edge"], Threshold(level=1))
    assert label(out, ["sam_edge"], threshold, Inverted()) == 6
    assert tars(out, "sam_edge")[:3] == tars(two[0], "sam_edge")
    text.train((f"picture number {i}" for i in range(40)), 4400, tmp_path / "text.json")
    worker, tasks = pack.prepare(out, str(tmp_path / "text.json"), 0)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    assert out.committed("tokens") == list(range(6))
    assert validate.verify(out) == []


def test_the_bytes_of_a_merge_do_not_tell_where_its_roots_lay(two: list[Dataset], tmp_path: Path) -> None:
    merge(Dataset(tmp_path / "one"), two)
    moved = []
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
        moved.append(Dataset(tmp_path / f"moved_{name}"))
    merge(Dataset(tmp_path / "two"), moved)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_merge_killed_at_any_instant_is_completed_by_the_same_call(two: list[Dataset], tmp_path: Path) -> None:
    def change(out: Path) -> None:
        merge(Dataset(out), two, ["canny_edge"])
        assert Dataset(out).committed("rgb") == list(range(6))

    # A stride without a common divisor with the steps of a cell meets each of them.
    steps = at_every_instant(lambda name: tmp_path / name, change, stride=7)
    # The plan and two quarantines, and for each of 24 cells a link to the tar and a record of two steps.
    assert steps == 2 + 2 * 2 + 24 * 3


def test_a_shard_of_an_unfinished_merge_has_all_its_columns(two: list[Dataset], tmp_path: Path) -> None:
    for step in range(2, 60, 11):
        out = Dataset(tmp_path / f"out{step}")
        with killed_before(step), pytest.raises(Killed):
            merge(out, two)
        for shard in out.committed("rgb"):
            assert all(out.commit(c, shard) for c in ("caption", "crop_settings", "canny_edge"))
        # All that may be said is that the cells of a shard are there before its rgb record.
        assert [p for p in validate.verify(out) if not p.file.startswith("commits/rgb/")] == []


def test_what_cannot_be_merged_is_named_and_nothing_is_written(two: list[Dataset], tmp_path: Path) -> None:
    out = Dataset(tmp_path / "out")
    crops = take_in(tmp_path, "crops", num_crops=3)
    other = take_in(tmp_path, "other")
    label(other, ["canny_edge"], Threshold(level=77))
    copy = Dataset(tmp_path / "copy")
    merge(copy, [two[1], other], ["caption"])
    half = take_in(tmp_path, "half")
    half.uncommit("crop_settings", 1)
    key = two[1].keys(0)[0]
    for roots, columns, said in (
        (two[:1], (), "at least two roots"),
        ([two[0], crops], (), r"ingested otherwise \(num_crops: 1 and 3\)"),
        (two, ("canny_egde",), "no column of any root"),
        (two, ("sam_edge",), "sam_edge is not complete in .*/b"),
        ([two[1], other], (), "canny_edge was made otherwise in .*/b and .*/other .*'level': 77"),
        ([two[0], half], (), "half is not wholly ingested: crop_settings is committed in 2 of 3"),
        ([*two, copy], (), rf"4 keys are not unique.*{key} in .*/b/shard-00000 and .*/copy/shard-00000"),
    ):
        with pytest.raises(ValueError, match=said):
            merge(out, roots, columns)
        assert not (tmp_path / "out").exists()
    assert merge(out, [two[1], other], ["caption"]).columns == ("rgb", "caption", "crop_settings")
    with pytest.raises(Conflict, match="was planned otherwise"):
        merge(out, [other, two[1]], ["caption"])


def test_equal_hashes_of_unequal_keys_are_no_duplicates(
    two: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combine, "_hash", len)
    assert merge(Dataset(tmp_path / "out"), two).num_shards == 6


def test_a_split_is_undone_by_a_merge(two: list[Dataset], tmp_path: Path) -> None:
    parts = (Dataset(tmp_path / "p"), Dataset(tmp_path / "q"))
    made = split(parts, two[0], [0, 2])
    assert [m.num_shards for m in made] == [2, 1]
    assert [p.plan.num_items for p in parts] == [3, 2]
    assert [len(p.quarantine()) for p in parts] == [0, 1]
    for part in parts:
        assert validate.verify(part) == []
        assert part.modalities() == two[0].modalities()
        assert part.orphans() == []
    assert parts[0].keys(1) == two[0].keys(2)
    whole = Dataset(tmp_path / "whole")
    merge(whole, [parts[1], parts[0]])
    for column in two[0].modalities():
        a, b, c = tars(two[0], column)
        assert tars(whole, column) == [b, a, c]
    assert label(whole, ["sam_edge"], Threshold(fail_on=(two[0].keys(2)[0],)), Inverted()) == 0


def test_a_split_killed_at_any_instant_is_completed_by_the_same_call(two: list[Dataset], tmp_path: Path) -> None:
    two[0].uncommit("sam_edge", 1)

    def change(out: Path) -> None:
        split((Dataset(out / "p"), Dataset(out / "q")), two[0], [1])

    assert at_every_instant(lambda name: tmp_path / name, change, stride=5) == 2 * 2 + 1 * 2 + 14 * 3


def test_a_split_that_makes_no_sense_is_refused(two: list[Dataset], tmp_path: Path) -> None:
    parts = (Dataset(tmp_path / "p"), Dataset(tmp_path / "q"))
    for first, said in (([], "0 of 3 shards"), ([0, 1, 2], "3 of 3 shards"), ([0, 3, 9], "shards 0 to 2, not 3, 9")):
        with pytest.raises(ValueError, match=said):
            split(parts, two[0], first)
    with pytest.raises(ValueError, match="three different roots"):
        split((parts[0], parts[0]), two[0], [0])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(("fraction", "of"), [(0.9, 10), (0.5, 7), (0.01, 5), (0.99, 5), (1 / 3, 100)])
def test_a_fraction_is_spread_over_the_shards(fraction: float, of: int) -> None:
    chosen = evenly(fraction, of)
    assert len(chosen) == min(max(round(fraction * of), 1), of - 1)
    assert chosen == sorted(set(chosen) & set(range(of)))
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_ranges_of_shards() -> None:
    assert ranges("0-3,7, 5") == [0, 1, 2, 3, 5, 7]
    bad: list[Callable[[], object]] = [lambda t=t: ranges(t) for t in ("", "a", "3-1", "-2", "1-", "1-2-3")]  # type: ignore[misc]
    for call in bad:
        with pytest.raises(ValueError, match="expected numbers and ranges"):
            call()
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="more than 0"):
            evenly(fraction, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_on_an_object_store_the_bytes_are_those_of_a_disk(two: list[Dataset], tmp_path: Path) -> None:
    def change(out: str) -> None:
        whole, parts = Dataset(f"{out}/whole"), (Dataset(f"{out}/p"), Dataset(f"{out}/q"))
        merge(whole, two, ["canny_edge"])
        split(parts, whole, [1, 4])
        export(parts[1], f"{out}/export", layout(parts[1], [], True, 3))
        evolve.drop(parts[0], ["canny_edge"])

    with s3_server("merged"):
        change("s3://merged")
        store = Store("s3://merged")
        remote = {path: store.read(path) for path in store.find()}
    change(str(tmp_path / "disk"))
    assert remote == tree(tmp_path / "disk")
    assert any(path.startswith("export/canny_edge/") for path in remote)
