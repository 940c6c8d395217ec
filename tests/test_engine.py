"""The engine's promises: aligned tars, commit records that alone are trusted, resume, failures that cost one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dataengine import actors, local, modalities, validate
from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler
from dataengine.manifest import Conflict, Dataset, NotADataset
from dataengine.plan import LabelPlan, order, plan_labels
from dataengine.work import Report
from tests.fakes import BatchMean, Inverted, Threshold, Unloadable, ingested, tree, write_images


def label(dataset: Dataset, wanted: Sequence[str], *labelers: Labeler) -> tuple[LabelPlan, list[Report]]:
    plan = plan_labels(dataset, wanted, labelers)
    reports: list[Report] = []
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=reports.append)
    return plan, reports


def names(root: Path, modality: str, shard: int) -> list[str]:
    with tarfile.open(root / modality / f"shard-{shard:05d}.tar") as tar:
        return [n.split(".")[0] for n in tar.getnames()]


def test_all_tars_of_a_shard_list_the_same_keys_in_the_same_order(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["sam_edge"], Threshold(), Inverted())
    root = tmp_path / "root"
    assert dataset.modalities() == ["rgb", "caption", "crop_settings", "canny_edge", "sam_edge"]
    assert sum(len(dataset.keys(shard)) for shard in range(3)) == 10
    for shard in range(3):
        assert len(names(root, "rgb", shard)) <= 4
        for modality in dataset.modalities():
            assert names(root, modality, shard) == list(dataset.keys(shard))
    assert validate.verify(dataset) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_every_tar(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["canny_edge"], Threshold())
    for modality, suffix in (("rgb", "png"), ("caption", "json"), ("canny_edge", "png"), ("crop_settings", "npy")):
        for shard in range(3):
            url = str(tmp_path / "root" / modality / f"shard-{shard:05d}.tar")
            read = list(webdataset.WebDataset(url, shardshuffle=False))
            assert [s["__key__"] for s in read] == list(dataset.keys(shard))
            assert all(suffix in s for s in read)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        label(ingested(tmp_path, name=name), ["sam_edge"], Threshold(), Inverted())
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) == 1 + 2 * 5 * 3


def test_one_pass_and_two_passes_give_the_same_bytes(tmp_path: Path) -> None:
    label(ingested(tmp_path, name="one"), ["canny_edge", "sam_edge"], Threshold(), Inverted())
    later = ingested(tmp_path, name="two")
    label(later, ["canny_edge"], Threshold())
    label(later, ["sam_edge"], Threshold(), Inverted())
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_labeler_gets_the_same_batches_whoever_else_runs(tmp_path: Path) -> None:
    alone, together = ingested(tmp_path, shard_size=10, name="one"), ingested(tmp_path, shard_size=10, name="two")
    label(alone, ["sam_edge"], BatchMean())
    label(together, ["sam_edge", "canny_edge"], BatchMean(), Threshold())
    (a, b) = (d.commit("sam_edge", 0) for d in (alone, together))
    assert a is not None
    assert b is not None
    assert a.sha256 == b.sha256


def test_a_second_run_has_nothing_to_do_and_a_lost_record_is_made_again(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["canny_edge"], Threshold())
    before = tree(tmp_path / "root")
    plan, reports = label(dataset, ["canny_edge"], Threshold())
    assert (plan.num_cells, plan.num_done, reports) == (0, 3, [])
    (tmp_path / "root/commits/canny_edge/shard-00001.json").unlink()
    plan, _ = label(dataset, ["canny_edge"], Threshold())
    assert [t.shard for t in plan.tasks] == [1]
    assert tree(tmp_path / "root") == before


def test_a_tar_without_a_record_is_no_data_and_is_replaced_if_its_bytes_differ(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    half = tmp_path / "root/canny_edge/shard-00000.tar"
    half.parent.mkdir()
    half.write_bytes(b"half a tar")
    assert dataset.orphans() == ["canny_edge/shard-00000.tar"]
    with pytest.raises(NotADataset, match="not committed"):
        dataset.read("canny_edge", 0)
    label(dataset, ["canny_edge"], Threshold())
    assert dataset.orphans() == []
    assert validate.verify(dataset) == []


def test_other_settings_are_a_conflict_and_change_nothing(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["canny_edge"], Threshold())
    before = tree(tmp_path / "root")
    with pytest.raises(Conflict, match="--replace canny_edge"):
        label(dataset, ["canny_edge"], Threshold(level=3))
    assert tree(tmp_path / "root") == before


def test_the_loser_of_a_race_keeps_the_winner(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    slow = plan_labels(dataset, ["canny_edge"], [Threshold(level=3)])
    label(dataset, ["canny_edge"], Threshold())
    before = tree(tmp_path / "root")
    with pytest.raises(Conflict, match="another identity"):
        local.run(slow.group(dataset.store.url), slow.tasks, workers=1, device="cpu", on_report=lambda r: None)
    assert tree(tmp_path / "root") == before


def test_a_failing_sample_gets_a_placeholder_and_costs_no_other(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    bad, wrong = dataset.keys(0)[1], dataset.keys(0)[2]
    _, reports = label(dataset, ["sam_edge"], Threshold(fail_on=(bad,), wrong_on=(wrong,)), Inverted())
    record = dataset.commit("canny_edge", 0)
    assert record is not None
    assert record.invalid[bad] == "RuntimeError: cannot label this"
    assert "invalid value" in record.invalid[wrong]
    assert "float32" in record.invalid[wrong]
    after = dataset.commit("sam_edge", 0)
    assert after is not None
    assert after.invalid == dict.fromkeys((bad, wrong), "input canny_edge is not valid")
    assert sum(c.num_invalid for r in reports for c in r.cells if c.modality == "canny_edge") == 2
    codec = modalities.load("canny_edge")
    values = [codec.decode(m.data) for m in dataset.read("canny_edge", 0)]
    assert values[1].max() == 0
    assert values[0].max() == 255
    assert validate.verify(dataset) == []


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    label(ingested(tmp_path, name="one"), ["canny_edge"], Threshold())
    dataset = ingested(tmp_path, name="two")
    label(dataset, ["canny_edge"], Threshold(too_many=1))
    for shard in range(3):
        a, b = (Dataset(tmp_path / n).commit("canny_edge", shard) for n in ("one", "two"))
        assert a is not None
        assert b is not None
        assert a.sha256 == b.sha256
        assert b.invalid == {}


def test_verify_finds_a_flipped_byte_a_missing_file_and_a_misaligned_tar(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    root = tmp_path / "root"
    data = bytearray((root / "rgb/shard-00000.tar").read_bytes())
    data[700] ^= 1
    (root / "rgb/shard-00000.tar").write_bytes(bytes(data))
    (root / "caption/shard-00001.tar").unlink()
    record = json.loads((root / "commits/crop_settings/shard-00002.json").read_text())
    record["keys_sha256"] = "0" * 64
    (root / "commits/crop_settings/shard-00002.json").write_text(json.dumps(record))
    found = {p.file: p.problem for p in validate.verify(dataset)}
    assert set(found) >= {"rgb/shard-00000.tar", "caption/shard-00001.tar", "crop_settings/shard-00002.tar"}
    assert "sha256" in found["rgb/shard-00000.tar"]
    assert "keys" in found["crop_settings/shard-00002.tar"]


def test_ingest_again_changes_nothing_and_a_changed_corpus_is_refused(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    before = tree(tmp_path / "root")
    _, tasks = prepare(dataset, f"folder:{tmp_path}/images", IngestSettings(shard_size=4, num_crops=2))
    assert tasks == []
    write_images(tmp_path / "images" / "more", 1, seed=5)
    with pytest.raises(Conflict, match="num_items: 10 there, 11 asked"):
        prepare(dataset, f"folder:{tmp_path}/images", IngestSettings(shard_size=4, num_crops=2))
    assert tree(tmp_path / "root") == before


def test_crop_settings_depend_on_the_key_alone(tmp_path: Path) -> None:
    codec = modalities.load("crop_settings")
    found = []
    for size, name in ((4, "one"), (7, "two")):
        dataset = ingested(tmp_path, shard_size=size, name=name)
        found.append(
            {
                m.key: codec.decode(m.data)
                for s in dataset.committed("crop_settings")
                for m in dataset.read("crop_settings", s)
            }
        )
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][k], found[1][k]) for k in found[0])
    assert len({v.tobytes() for v in found[0].values()}) == 10


def test_unknown_and_circular_modalities_are_explained() -> None:
    with pytest.raises(ValueError, match="nothing makes 'depth'"):
        order(["depth"], [Threshold()], ["rgb"])

    class Backwards(Inverted):
        inputs = ("sam_edge",)
        emits = ("canny_edge",)

    with pytest.raises(ValueError, match="wait for one another"):
        order(["sam_edge"], [Inverted(), Backwards()], ["rgb"])


@pytest.mark.ray
def test_ray_gives_the_bytes_of_local_and_survives_a_dying_worker(tmp_path: Path) -> None:
    label(ingested(tmp_path, name="one"), ["sam_edge"], Threshold(), Inverted())
    dataset = ingested(tmp_path, name="two")
    plan = plan_labels(dataset, ["sam_edge"], (Threshold(die_once=str(tmp_path / "died")), Inverted()))
    reports: list[Report] = []
    # More workers than any machine has cores: those without one must not be given a shard.
    actors.run(plan.group(dataset.store.url), plan.tasks, workers=1000, device="cpu", on_report=reports.append)
    assert (tmp_path / "died").exists()
    assert sorted(r.shard for r in reports) == [0, 1, 2]
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert {k: v for k, v in one.items() if k.endswith(".tar")} == {k: v for k, v in two.items() if k.endswith(".tar")}


@pytest.mark.ray
def test_ray_passes_on_what_stopped_a_worker_from_starting(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    plan = plan_labels(dataset, ["canny_edge"], [Unloadable()])
    with pytest.raises(FileNotFoundError, match="no weights at all"):
        actors.run(plan.group(dataset.store.url), plan.tasks, workers=2, device="cpu", on_report=lambda r: None)
    assert dataset.committed("canny_edge") == []


def test_a_shard_of_which_every_image_was_refused_is_labelled_as_what_it_is_empty(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    for i in (2, 3):
        (images / f"image{i:03d}.png").write_bytes(b"no image")
    dataset = ingested(tmp_path, shard_size=2)
    assert [len(dataset.keys(s)) for s in dataset.committed("rgb")] == [2, 0]
    label(dataset, ["sam_edge"], Threshold(), Inverted())
    assert dataset.committed("sam_edge") == [0, 1]
    assert validate.verify(dataset) == []
