"""A finished dataset changed: drop, rename, export; what is kept, what is refused, and being killed at any instant."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from dataengine import evolve, validate
from dataengine.export import export, layout
from dataengine.manifest import Conflict, Dataset
from dataengine.versions import Versioned
from tests.fakes import Inverted, Threshold, ingested, tree
from tests.instants import Killed, at_every_instant, killed_before, label

# webdataset leaves the tars it has read open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        dataset = ingested(tmp_path, name=name)
        label(dataset, ["sam_edge"], Threshold(), Inverted())
        return tmp_path / name

    return make


def leave_rows(root: Path, column: str) -> None:
    left = root / "staging" / column / "shard-00001" / "0123456789abcdef" / "000000-000002-00.tar"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"rows")


def test_a_dropped_column_leaves_nothing_and_can_be_made_again(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    dataset, before = Dataset(root), tree(root)
    leave_rows(root, "sam_edge")
    (dropped,) = evolve.drop(dataset, ["sam_edge"])
    assert (dropped.num_cells, dropped.num_files) == (3, 4)
    assert tree(root) == {p: data for p, data in before.items() if "sam_edge" not in p}
    assert evolve.drop(dataset, ["sam_edge"]) == [evolve.Dropped("sam_edge", 0, 0)]
    assert label(dataset, ["sam_edge"], Threshold(), Inverted()) == 3
    assert tree(root) == before


def test_what_must_not_be_dropped_is_refused_and_nothing_changes(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    dataset, before = Dataset(root), tree(root)
    for columns, forced, said in (
        (["sam_edge", "rgb"], (), "rgb was ingested"),
        (["canny_edge"], (), "sam_edge was made from canny_edge"),
        (["sam_edge", "cany_edge"], (), "did you mean 'canny_edge'"),
        (["runs"], (), "unknown modality"),
        (["../other"], (), "expected letters"),
        (["sam_edge"], ("canny_edge",), "not among the columns"),
    ):
        with pytest.raises(ValueError, match=said):
            evolve.drop(dataset, columns, forced)
        assert tree(root) == before
    evolve.drop(dataset, ["canny_edge"], ["canny_edge"])
    assert dataset.modalities() == ["rgb", "caption", "crop_settings", "sam_edge"]
    assert validate.verify(dataset) == []


def test_a_drop_killed_at_any_instant_is_completed_by_the_same_call(labelled: Callable[[str], Path]) -> None:
    def drop(root: Path) -> None:
        evolve.drop(Dataset(root), ["canny_edge", "sam_edge"])
        assert "sam_edge" not in "".join(tree(root))

    def make(name: str) -> Path:
        root = labelled(name)
        leave_rows(root, "canny_edge")
        return root

    assert at_every_instant(make, drop) == 2 * 3 * 2 + 1


def test_a_drop_forgets_what_was_made_from_a_column_before_the_column(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    with killed_before(2), pytest.raises(Killed):
        evolve.drop(Dataset(root), ["canny_edge", "sam_edge"])
    assert Dataset(root).committed("canny_edge") == [0, 1, 2]
    assert Dataset(root).committed("sam_edge") == [2]
    assert validate.verify(Dataset(root)) == []


def test_a_renamed_column_is_known_to_the_labeler_that_made_it(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    dataset, before = Dataset(root), tree(root)
    evolve.drop(dataset, ["sam_edge"])
    specs = [evolve.existing(dataset, "canny_edge", s).spec for s in range(3)]
    assert evolve.rename(dataset, "canny_edge", "canny_edge@old") == 3
    assert dataset.modalities()[3:] == ["canny_edge@old"]
    assert validate.verify(dataset) == []
    for shard in range(3):
        assert before[f"canny_edge/shard-{shard:05d}.tar"] == tree(root)[f"canny_edge@old/shard-{shard:05d}.tar"]
    assert evolve.rename(dataset, "canny_edge@old", "canny_edge") == 3
    assert [evolve.existing(dataset, "canny_edge", s).spec for s in range(3)] == specs
    assert evolve.existing(dataset, "canny_edge", 0).provenance["renamed"] == ["canny_edge", "canny_edge@old"]
    assert label(dataset, ["canny_edge"], Threshold()) == 0
    with pytest.raises(Conflict):
        label(dataset, ["canny_edge"], Threshold(level=9))
    assert label(dataset, ["sam_edge"], Threshold(), Inverted()) == 3
    assert evolve.rename(dataset, "canny_edge@old", "canny_edge") == 0


def test_a_new_version_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["canny_edge"], Threshold())
    better = Threshold(level=30)
    label(dataset, ["canny_edge@v2"], Versioned(inner=better, column_version="v2"))
    with pytest.raises(Conflict, match=r"canny_edge/shard-00000.tar is there and is not canny_edge@v2's"):
        evolve.rename(dataset, "canny_edge@v2", "canny_edge")
    evolve.drop(dataset, ["canny_edge"])
    evolve.rename(dataset, "canny_edge@v2", "canny_edge")
    assert label(dataset, ["canny_edge"], better) == 0
    with pytest.raises(Conflict):
        label(dataset, ["canny_edge"], Threshold())
    assert dataset.orphans() == []
    # But for the former name, all is as if it had been made under the new one.
    other = ingested(tmp_path, name="other")
    label(other, ["canny_edge"], better)
    for shard in range(3):
        record, made = (evolve.existing(d, "canny_edge", shard) for d in (dataset, other))
        assert record == replace(made, provenance={**made.provenance, "renamed": ["canny_edge@v2"]})


def test_a_renaming_that_would_mislead_is_refused(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    dataset, before = Dataset(root), tree(root)
    for old, new, said in (
        ("caption", "caption@v2", "caption was ingested"),
        ("sam_edge", "rgb", "rgb was ingested"),
        ("sam_edge", "sam_edge", "has that name already"),
        ("sam_edge", "depth", "would be read as depth"),
        ("sam_edge", "canny_edge", "would be read as canny_edge"),
        ("depth", "depth@v2", "no column 'depth'"),
        ("canny_edge", "canny_edge@v2", "sam_edge was made from canny_edge"),
        ("sam_edge", "sam_edge@../../x", "expected letters"),
    ):
        with pytest.raises(ValueError, match=said):
            evolve.rename(dataset, old, new)
        assert tree(root) == before
    evolve.drop(dataset, ["canny_edge"], ["canny_edge"])
    with pytest.raises(ValueError, match="is not that of its recorded settings and the inputs"):
        evolve.rename(dataset, "sam_edge", "sam_edge@v2")
    assert evolve.rename(dataset, "sam_edge", "sam_edge@v2", forced=True) == 3
    assert validate.verify(dataset) == []


def test_a_renaming_killed_at_any_instant_is_completed_by_the_same_call(labelled: Callable[[str], Path]) -> None:
    def rename(root: Path) -> None:
        dataset = Dataset(root)
        evolve.rename(dataset, "sam_edge", "sam_edge@v2")
        assert dataset.committed("sam_edge@v2") == [0, 1, 2]

    def make(name: str) -> Path:
        root = labelled(name)
        leave_rows(root, "sam_edge")
        return root

    assert at_every_instant(make, rename) == 3 * (3 + 2) + 1


def test_at_every_instant_of_a_renaming_one_of_the_names_is_whole(labelled: Callable[[str], Path]) -> None:
    for step in range(15):
        dataset = Dataset(labelled(f"root{step}"))
        with killed_before(step), pytest.raises(Killed):
            evolve.rename(dataset, "sam_edge", "sam_edge@v2")
        assert [0, 1, 2] in (dataset.committed("sam_edge"), dataset.committed("sam_edge@v2"))
        assert [p for p in validate.verify(dataset) if "sam_edge" in p.file] == []


@pytest.fixture
def faulty(tmp_path: Path) -> Dataset:
    """Ten samples in shards of 3, 3 and 4: four Canny labels failed, of which the SAM edges are made."""
    dataset = ingested(tmp_path)
    bad = (dataset.keys(0)[1], *dataset.keys(1))
    label(dataset, ["sam_edge"], Threshold(fail_on=bad), Inverted())
    return dataset


def keys(folder: Path, column: str) -> list[list[str]]:
    out = []
    for path in sorted((folder / column).glob("*.tar")):
        with tarfile.open(path) as tar:
            out.append([name.split(".")[0] for name in tar.getnames()])
    return out


def test_an_export_of_everything_has_the_bytes_of_the_dataset(faulty: Dataset, tmp_path: Path) -> None:
    made = export(faulty, str(tmp_path / "out"), layout(faulty, [], False, None))
    assert made["columns"] == faulty.modalities()
    assert (made["num_samples"], made["num_dropped"], made["shards"]) == (10, 0, [3, 3, 4])
    assert made["invalid"] == {"canny_edge": 4, "sam_edge": 4}
    exported = tree(tmp_path / "out")
    assert json.loads(exported.pop("export.json")) == made
    assert exported == {p: d for p, d in tree(Path(faulty.store.base)).items() if p.endswith(".tar")}


def test_dropping_the_invalid_keeps_all_tars_aligned(faulty: Dataset, tmp_path: Path) -> None:
    bad = {faulty.keys(0)[1], *faulty.keys(1)}
    good = [k for shard in range(3) for k in faulty.keys(shard) if k not in bad]
    out = tmp_path / "out"
    made = export(faulty, str(out), layout(faulty, ["rgb", "caption", "sam_edge"], True, None))
    assert (made["num_samples"], made["num_dropped"], made["shards"], made["invalid"]) == (6, 4, [2, 4], {})
    for column in ("rgb", "caption", "sam_edge"):
        assert [k for shard in keys(out, column) for k in shard] == good
        read = webdataset.WebDataset(f"{out}/{column}/shard-{{00000..00001}}.tar", shardshuffle=False)
        assert [s["__key__"] for s in read] == good
    # Only the exported columns count.
    assert layout(faulty, ["rgb", "caption"], True, None).num_samples == 10


def test_shards_of_another_size_hold_the_same_members_in_the_same_order(faulty: Dataset, tmp_path: Path) -> None:
    plan = layout(faulty, ["rgb", "canny_edge"], True, 4)
    made = export(faulty, str(tmp_path / "out"), plan)
    assert made["shards"] == [4, 2]
    assert keys(tmp_path / "out", "rgb") == keys(tmp_path / "out", "canny_edge")
    bad = {faulty.keys(0)[1], *faulty.keys(1)}
    members = [m.data for s in range(3) for m in faulty.read("rgb", s) if m.key not in bad]
    read = webdataset.WebDataset(f"{tmp_path}/out/rgb/shard-{{00000..00001}}.tar", shardshuffle=False)
    assert [s["png"] for s in read] == members


def test_an_export_killed_at_any_instant_is_completed_by_the_same_call(faulty: Dataset, tmp_path: Path) -> None:
    def change(out: Path) -> None:
        export(faulty, str(out), layout(faulty, ["rgb", "canny_edge"], True, 2))

    assert at_every_instant(lambda name: tmp_path / name, change) == 2 + 2 * 3 * 2 + 2 + 1


def test_an_export_is_never_mixed_with_another(faulty: Dataset, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with killed_before(4), pytest.raises(Killed):
        export(faulty, out, layout(faulty, ["rgb", "caption"], False, None))
    with pytest.raises(Conflict, match="another source, columns, drop_invalid"):
        export(faulty, out, layout(faulty, ["rgb"], True, None))
    export(faulty, out, layout(faulty, ["rgb", "caption"], False, None))
    with pytest.raises(Conflict, match="another shard_size"):
        export(faulty, out, layout(faulty, ["rgb", "caption"], False, 2))
    with pytest.raises(Conflict, match="there is sam_edge already"):
        export(faulty, faulty.store.base, layout(faulty, ["sam_edge"], False, None))


def test_what_cannot_be_exported_is_named(faulty: Dataset, tmp_path: Path) -> None:
    faulty.uncommit("sam_edge", 1)
    assert layout(faulty, [], False, None).skipped == {"sam_edge": "is committed in 2 of 3 shards"}
    for columns, said in ((["rgb", "sam_edge"], "2 of 3"), (["depht"], "no column"), (["depth"], "no column")):
        with pytest.raises(ValueError, match=said):
            layout(faulty, columns, False, None)
    evolve.drop(faulty, ["sam_edge", "canny_edge"])
    label(faulty, ["canny_edge"], Threshold(fail_on=tuple(k for s in range(3) for k in faulty.keys(s))))
    with pytest.raises(ValueError, match="none of 10 samples is valid"):
        export(faulty, str(tmp_path / "out"), layout(faulty, [], True, None))


KILLED = """
import os, signal, sys
from dataengine.storage import Store
from pipelines.__main__ import main
left, remove = int(sys.argv.pop(1)), Store.remove_many
def removing(store, paths):
    for path in paths:
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        remove(store, [path])
Store.remove_many = removing
sys.argv[0] = "dataengine"
main()
"""


def test_a_killed_command_is_completed_by_the_same_command(labelled: Callable[[str], Path]) -> None:
    root = labelled("root")
    kept = {p: data for p, data in tree(root).items() if "edge" not in p}

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, *map(str, arguments)],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    drop = ("drop", root, "canny_edge", "sam_edge", "--json")
    assert command(5, *drop).returncode == -signal.SIGKILL
    assert len(tree(root)) == len(kept) + 12 - 5
    done = command(100, *drop)
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout), key=lambda d: str(d["column"])) == [
        {"column": "canny_edge", "num_cells": 3, "num_files": 3},
        {"column": "sam_edge", "num_cells": 0, "num_files": 1},
    ]
    assert tree(root) == kept
    refused = command(100, "drop", root, "rgb")
    assert (refused.returncode, "rgb was ingested" in refused.stderr) == (2, True)
