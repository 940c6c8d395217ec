"""Training the text tokenizer on datasets: what it reads, what it leaves out, and what it says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dataengine import local, modalities
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Conflict, Dataset
from model.tokenizers.text import COCO_CLASSES, NUM_SPECIAL, TextTokenizer, words
from pipelines import train_text
from pipelines.commands import app
from tests import ml4m_inputs
from tests.ml4m_inputs import TEXT_COLUMNS, publish

KEYWORDS = ("human", "pose", "global", "camera", "shape", "point", "polygon", "none")


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_text")
    ml4m_inputs.made(folder, count=2, shard_size=1, num_crops=2)
    scenes = Dataset(folder / "scenes")
    worker, tasks = prepare(scenes, "scenes:6?size=32&seed=0", IngestSettings(shard_size=3))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return folder


@pytest.fixture
def roots(once: Path, tmp_path: Path) -> tuple[Dataset, Dataset]:
    """All text-like inputs of 4M-21, and scenes with captions; both in two shards."""
    shutil.copytree(once, tmp_path / "copy")
    return Dataset(tmp_path / "copy" / "root"), Dataset(tmp_path / "copy" / "scenes")


def captions(*datasets: Dataset) -> list[str]:
    members = [m for dataset in datasets for s in dataset.committed("caption") for m in dataset.read("caption", s)]
    return [caption for m in members for caption in json.loads(m.data)]


def learned(path: Path) -> set[str]:
    vocab = json.loads(path.read_text())["model"]["vocab"]
    return {piece for piece, id in vocab.items() if id >= NUM_SPECIAL}


def test_words_without_a_fixed_id() -> None:
    texts = ["v0=0 v3=999 Dining Table", "", "[S_3] two persons, a person; café 汉字 v0=1000"]
    rest = ["two", "persons", ",", "a", ";", "café", "汉", "字", "v0", "=", "1000"]
    assert words(texts) == [[], [], rest]


def test_all_that_is_text_is_learned_but_what_has_an_id(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    made = train_text.train(roots, path, 5000)
    assert made.columns == sorted({"caption", *TEXT_COLUMNS})
    assert made.left_out == []
    tokenizer = TextTokenizer.load(path)
    assert made.vocab_size == tokenizer.vocab_size
    for word in KEYWORDS:
        assert len(tokenizer.encode(word)) == 1, word
    pieces = learned(path)
    assert not pieces & set(COCO_CLASSES)
    assert not any("=" in piece or piece in ("v0", "v1") for piece in pieces)
    said = captions(*roots)
    assert len(said) == made.num_captions > 0
    assert made.pieces_per_caption == np.mean([len(tokenizer.encode(caption)) for caption in said])
    # Nothing was cut off: with so much room every word that was read is one piece.
    assert all(len(tokenizer.encode(word)) == 1 for line in words(said) for word in line)


def test_the_figures_count_what_was_read(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    made = train_text.train(roots, tmp_path / "text.json", 5000, ["caption"])
    said = captions(*roots)
    assert (made.columns, made.num_texts) == (["caption"], len(said))
    assert made.num_words == sum(len(line) for line in words(said))
    poses = train_text.train(roots, tmp_path / "poses.json", 5000, ["human_poses_tokens"])
    codec = modalities.load("human_poses_tokens")
    persons = [codec.decode(m.data) for s in (0, 1) for m in roots[0].read("human_poses_tokens", s)]
    assert {len(value["bbox_xyxy"]) for value in persons} == {2}
    # Of a person under each of two crops five texts of one keyword each; a crop without a person says `none`.
    assert poses.num_texts == poses.num_words
    assert 2 * len(persons) <= poses.num_texts <= 2 * 2 * 5 * len(persons)
    assert (poses.num_captions, poses.pieces_per_caption) == (0, None)


def test_the_same_labels_give_the_same_bytes(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    train_text.train(roots, first, 4400)
    train_text.train(roots[::-1], second, 4400)
    assert first.read_bytes() == second.read_bytes()
    before = first.stat().st_mtime_ns
    train_text.train(roots, first, 4400)
    assert first.stat().st_mtime_ns == before
    with pytest.raises(Conflict, match="another text tokenizer"):
        train_text.train(roots, first, 4350)
    assert first.read_bytes() == second.read_bytes()


def test_only_valid_labels_and_no_random_ones_are_read(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    scenes = roots[1]
    for shard in scenes.committed("rgb"):
        bad, *good = scenes.keys(shard)
        said = [["quetzalcoatlus"], *(["pterodactyl"] for _ in good)]
        publish(scenes, "caption@blip", shard, said, {}, invalid=bad)
        # Random in one of its shards: the others were made by the same network, or read what it made.
        publish(scenes, "caption@noise", shard, [["gibberish"]] * (1 + len(good)), {"random": shard == 1})
    made = train_text.train([scenes], tmp_path / "blip.json", 5000, ["caption@blip"])
    assert (made.num_texts, made.num_words, made.pieces_per_caption) == (4, 4, 1.0)
    assert "pterodactyl" in learned(tmp_path / "blip.json")
    assert not any("q" in piece for piece in learned(tmp_path / "blip.json"))
    train_text.train([scenes], tmp_path / "all.json", 5000)
    assert not learned(tmp_path / "all.json") & {"pterodactyl", "gibberish"}
    with pytest.raises(ValueError, match="caption@noise comes from random weights"):
        train_text.train([scenes], tmp_path / "noise.json", 5000, ["caption@blip", "caption@noise"])
    with pytest.raises(ValueError, match="depth is no text-like column"):
        train_text.train([scenes], tmp_path / "noise.json", 5000, ["depth"])
    assert not (tmp_path / "noise.json").exists()


def test_a_random_column_is_left_out_and_named(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    scenes = roots[1]
    for shard in scenes.committed("rgb"):
        codec = modalities.load("metadata")
        values = [codec.placeholder((32, 32)) for _ in scenes.keys(shard)]
        publish(scenes, "metadata", shard, values, {"random": True})
    made = train_text.train([scenes], tmp_path / "text.json", 5000)
    assert (made.columns, made.left_out) == (["caption", "det"], ["metadata"])


def test_what_cannot_be_trained_on_is_refused(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    inputs, _ = roots
    with pytest.raises(ValueError, match="no words in 42 texts of metadata"):
        train_text.train([inputs], tmp_path / "text.json", 5000, ["metadata"])
    with pytest.raises(ValueError, match="vocab_size 65537, expected at most 65536"):
        train_text.train([inputs], tmp_path / "text.json", 65537)
    with pytest.raises(ValueError, match="vocab_size 4284, expected more than the 4284"):
        train_text.train([inputs], tmp_path / "text.json", 4284)
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        train_text.train([Dataset(tmp_path / "nothing")], tmp_path / "text.json", 5000)
    assert not (tmp_path / "text.json").exists()


def test_the_command(roots: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    path, urls = tmp_path / "made" / "text.json", [str(d.store.url) for d in roots]
    arguments = ["train-text-tokenizer", *urls, "--out", str(path), "--vocab-size", "4400"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["vocab_size"] == TextTokenizer.load(path).vocab_size == 4400
    assert said["num_captions"] == len(captions(*roots))
    assert CliRunner().invoke(app, [*arguments[:-1], "4350"]).exit_code == 5
    assert CliRunner().invoke(app, [*arguments, "--columns", "depth"]).exit_code == 2
