"""Packing a dataset: which columns, under which names, what they say of themselves, and when they are made anew."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import packed as benchmark
from dataengine import local, modalities, packed, validate
from dataengine.manifest import Dataset
from dataengine.packed import Packed
from model.batches import PackedDataset, merged_columns, spec_of
from model.tokenizers import text
from model.tokenizers.text import TextTokenizer
from pipelines import pack
from pipelines.train import packed_shards
from tests import ml4m_inputs
from tests.ml4m_inputs import INPUTS, SHA, TEXT_COLUMNS, TOKEN_COLUMNS, publish

NUM_CROPS = 2


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    words = "point polygon none human pose global camera shape picture number"
    text.train([words] * 9, 4400, folder / "text.json")
    ml4m_inputs.made(folder, count=4, shard_size=2, num_crops=NUM_CROPS)
    return folder


@pytest.fixture
def dataset(once: Path, tmp_path: Path) -> Dataset:
    """A copy of a dataset with all inputs, two shards of two samples, and a text tokenizer beside it."""
    shutil.copytree(once, tmp_path / "copy")
    return Dataset(tmp_path / "copy" / "root")


def text_file(dataset: Dataset) -> Path:
    return Path(str(dataset.store.url)).parent / "text.json"


def packs(dataset: Dataset, pixels: int = 0, columns: tuple[str, ...] = ()) -> tuple[Packed, ...]:
    worker, tasks = pack.prepare(dataset, str(text_file(dataset)), pixels, columns)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return packed_shards(str(dataset.store.url))


def test_all_inputs_are_packed_under_the_names_of_the_model(dataset: Dataset) -> None:
    first, second = packs(dataset, pixels=32)
    assert set(first.columns) == {*INPUTS, "rgb@32"} - {"rgb"}
    assert validate.verify(dataset) == []
    column = first.columns
    of_text = (
        hashlib.sha256(text_file(dataset).read_bytes()).hexdigest(),
        TextTokenizer.load(text_file(dataset)).vocab_size,
    )
    for name in ("caption", "det", "metadata", "color_palette", "human_poses", "sam_instance"):
        assert (column[name].tokenizer, column[name].vocab_size) == of_text
    quoting = {n: c.network for n, c in column.items() if c.network}
    tokens = SHA["tokenizer"]
    assert quoting == {"human_poses": tokens, "sam_instance": tokens, "t5_caption": SHA["t5"]}
    assert (column["human_poses"].codec, column["sam_instance"].codec) == ("human_poses_tokens", "sam_instance_tokens")
    assert {column[n].tokenizer for n in TOKEN_COLUMNS} == {tokens}
    shapes = {n: (column[n].vocab_size, column[n].side, column[n].grid) for n in TOKEN_COLUMNS}
    assert shapes["tok_rgb@224"] == (16384, 224, (14, 14))
    assert shapes["tok_dinov2_global"] == (8192, 0, (16,))
    assert (column["t5_caption"].dim, column["t5_caption"].max_tokens) == (16, 77)
    draws = {n: c.draw for n, c in column.items() if c.draw}
    assert draws == {"caption": "caption", "t5_caption": "caption"}
    assert [len(first), len(second)] == [2, 2]


def test_rows_are_what_the_modalities_say_of_the_values(dataset: Dataset) -> None:
    (shard, _) = packs(dataset)
    tokenizer = TextTokenizer.load(text_file(dataset))
    key, rng = shard.keys[1], np.random.default_rng(0)
    assert key == dataset.keys(0)[1]

    def stored(column: str) -> Any:
        return modalities.load(column).decode(dataset.read(column, 0)[1].data)

    def said(name: str, crop: int) -> str:
        ids = shard.row(1, rng, [name], crop)[name]
        return tokenizer.decode([i for piece in ids for i in piece] if shard.columns[name].chunked else ids)

    for crop in range(NUM_CROPS):
        ids = shard.row(1, rng, ["tok_clip@224"], crop)["tok_clip@224"]
        assert np.array_equal(ids, stored("tok_clip@224")[crop])
        instances = stored("sam_instance_tokens")["crops"][crop]
        found, complaints = modalities.load("sam_instance_tokens").parse(said("sam_instance", crop))
        assert complaints == []
        known = [(i["bbox"], i["tokens"]) for i in instances]
        assert all((i["bbox"], i["tokens"]) in known for i in found["crops"][0])
        persons, complaints = modalities.load("human_poses_tokens").parse(said("human_poses", crop))
        assert all("rotation" in c for c in complaints)
        if isinstance(persons, dict):
            both = [*stored("human_poses_tokens")["pose_tokenized"]]
            both += stored("human_poses_tokens")["pose_tokenized_mirrored"]
            assert all(ids in both for ids in persons["pose_tokenized"])
    value, _ = modalities.load("metadata").parse(said("metadata", 0))
    assert set(value) == set(stored("metadata"))
    emb = stored("t5_caption")
    assert np.array_equal(shard.row(1, rng, ["t5_caption"])["t5_caption"], emb["emb"][0][emb["mask_valid"][0]])


def test_invalid_labels_are_absent_and_empty_ones_are_not(dataset: Dataset) -> None:
    keys = dataset.keys(0)
    for column, values in (("det", [{"instances": []}] * 2), ("caption", [[], ["words"]])):
        dataset.uncommit(column, 0)
        publish(dataset, column, 0, values, {}, invalid=keys[1] if column == "det" else "")
    none = {"emb": np.zeros((1, 1, 16), np.float16), "mask_valid": np.zeros((1, 1), np.bool_)}
    dataset.uncommit("t5_caption", 0)
    publish(dataset, "t5_caption", 0, [none, none], {})
    shard, _ = packs(dataset, columns=("det", "caption", "t5_caption"))
    rows = [shard.row(i, np.random.default_rng(0), ["det", "caption", "t5_caption"]) for i in (0, 1)]
    assert (rows[0]["det"], rows[1]["det"]) == ([], None)
    assert rows[0]["caption"] is None
    assert rows[1]["caption"]
    assert rows[0]["t5_caption"] is rows[1]["t5_caption"] is None


def test_a_version_is_packed_where_it_is_named(dataset: Dataset) -> None:
    name, version = "tok_depth@224", "tok_depth@224@v2"
    facts = {"vocab_size": 512, "num_tokens": 64, "grid": [8, 8], "weights": {"sha256": "e" * 64}}
    for number in (0, 1):
        ids = [np.full((NUM_CROPS, 64), i, np.uint16) for i in range(2)]
        publish(dataset, version, number, ids, facts)
        publish(dataset, "caption@v2", number, [["v0=1"], ["v0=2"]], {})
        emb = {"emb": np.ones((1, 1, 16), np.float16), "mask_valid": np.ones((1, 1), np.bool_)}
        publish(dataset, "t5_caption@v2", number, [emb, emb], {"inputs": ["caption@v2"]})
        poses = modalities.load("human_poses_tokens").example(np.random.default_rng(0), (20, 20))
        publish(dataset, "human_poses_tokens@v2", number, [poses, poses], {"weights": None})
    assert version not in packs(dataset)[0].columns
    chosen = (name, version, "caption", "caption@v2", "t5_caption@v2", "human_poses_tokens@v2")
    (shard, _) = packs(dataset, columns=chosen)
    names = {c.removeprefix("human_poses_tokens") for c in chosen if "poses" not in c} | {"human_poses@v2"}
    assert set(shard.columns) == names
    column = shard.columns[version]
    assert (column.tokenizer, column.vocab_size, column.grid) == ("e" * 64, 512, (8, 8))
    assert shard.row(1, np.random.default_rng(0), [version])[version].tolist() == [1] * 64
    assert shard.columns["t5_caption@v2"].draw == shard.columns["caption@v2"].draw == "caption@v2"
    assert shard.columns["caption"].draw == ""
    assert shard.columns["human_poses@v2"].codec == "human_poses_tokens@v2"
    assert len(shard.row(0, np.random.default_rng(0), ["human_poses@v2"], 0)["human_poses@v2"]) > 1


def test_what_cannot_be_packed_is_refused_by_name(dataset: Dataset) -> None:
    for column, said in (
        ("rgb", "rgb is no column that can be packed; there is: caption, "),
        ("nothing", "nothing is no column that can be packed"),
        ("tokens", "tokens is no column that can be packed"),
    ):
        with pytest.raises(ValueError, match=said):
            packs(dataset, columns=("det", column))
    dataset.uncommit("det", 1)
    with pytest.raises(ValueError, match="det is not complete or comes from random weights"):
        packs(dataset, columns=("det",))
    assert "det" not in packs(dataset)[0].columns


def test_a_stale_shard_is_made_anew_and_another_left_alone(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_tasks(*columns: str) -> list[int]:
        return [t.shard for t in pack.prepare(dataset, str(text_file(dataset)), 0, columns)[1]]

    packs(dataset)
    assert open_tasks() == []
    before = dataset.commit(pack.CELL, 0)
    dataset.uncommit("det", 1)
    publish(dataset, "det", 1, [{"instances": []}] * 2, {})
    assert open_tasks() == [1]
    packs(dataset)
    assert dataset.commit(pack.CELL, 0) == before
    assert open_tasks("det") == [0, 1]
    packs(dataset)
    monkeypatch.setattr(packed, "FORMAT", packed.FORMAT + 1)
    assert open_tasks() == [0, 1]


def test_a_trainer_refuses_other_tokenizers_and_takes_the_layout_from_the_columns(dataset: Dataset) -> None:
    shards = packs(dataset)
    columns = merged_columns([PackedDataset(shards)])
    specs = {n: spec_of(c, 16) for n, c in columns.items()}
    assert (specs["t5_caption"].kind, specs["t5_caption"].dim_in) == ("embeddings", 16)
    assert [n for n, s in specs.items() if s.learned_positions] == ["tok_dinov2_global", "tok_imagebind_global"]
    assert specs["metadata"].chunked
    assert set(TEXT_COLUMNS) - set(specs) == {"human_poses_tokens", "sam_instance_tokens"}
    for column in ("human_poses_tokens", "tok_normal@224", "t5_caption"):
        values = [modalities.load(column).decode(m.data) for m in dataset.read(column, 1)]
        record = dataset.commit(column, 1)
        assert record is not None
        made_by = {**record.provenance, "weights": {"sha256": "f" * 64}}
        for number in (0, 1):
            dataset.uncommit(column, number)
            publish(dataset, column, number, values, made_by)
        name = column.removesuffix("_tokens")
        old = Path(shards[0].path).read_bytes()
        other = Path(str(dataset.store.url)).parent / f"{name}.arrow"
        other.write_bytes(old)
        with pytest.raises(ValueError, match=f"{name} of .*was made by another tokenizer.*'f"):
            merged_columns([PackedDataset((Packed(other),)), PackedDataset(packs(dataset))])
        shards = packs(dataset)


def test_the_benchmark_measures_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_webdataset", lambda tars, count: {"read": float(len(tars))})  # leaves files open
    found = json.loads(json.dumps(benchmark.figures(3, 20)))
    sizes, row_us = found["bytes_a_sample"], found["row_us"]
    for name in set(INPUTS) - {"rgb"}:
        assert sizes[name]["packed"] > 0
        assert sizes[name]["times_smaller"] > 1
        assert row_us[name] > 0
    # Ten crops of eleven modalities: 19 160 ids of two bytes, and eleven headers of a tar and of an array.
    assert sizes["tokens"]["packed"] >= 2 * 19160
    assert sizes["tokens"]["times_smaller"] < 2
    assert found["tokens_otherwise"]["bits"] < found["tokens_otherwise"]["uint16"]
    assert found["webdataset_us"] == {"read": len(INPUTS) - 2}
