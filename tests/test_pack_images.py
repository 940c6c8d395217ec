"""Packing images as they are stored, of a dataset and of ml-4m's tars: the pixels of `--pixels` alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dataengine import export, local, ml4m, shards, validate
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from dataengine.packed import Packed
from dataengine.shards import Member
from model.tokenizers.text import TextTokenizer
from pipelines import cli, columns, commands  # noqa: F401  commands register themselves
from tests.fakes import write_images

CROPS = 3
TARS = "[rgb,crop_settings]/shard-{00000..00001}.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of images alone, and its tars for ml-4m."""
    folder = tmp_path_factory.mktemp("images")
    dataset = Dataset(folder / "root")
    settings = IngestSettings(shard_size=2, num_crops=CROPS, min_crop_scale=0.3)
    worker, tasks = prepare(dataset, f"folder:{write_images(folder / 'images', 4)}", settings)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    TextTokenizer.tiny().save(folder / "text.json")  # of metadata, which come with images
    export.export(dataset, str(folder / "tars"), ml4m.layout(dataset, ("rgb", "crop_settings")), reader=ml4m.Reader())
    return folder


def packs(root: Path, *options: str) -> str:
    text = root.parent / "text.json"
    done = CliRunner().invoke(cli.app, ["pack", str(root), "--text-tokenizer", str(text), *options])
    return re.sub(r"\s+", " ", done.output) if done.exit_code else ""


def rows(root: Path) -> list[np.ndarray]:
    """Every crop of every row."""
    found = [Packed(path) for path in sorted((root / "tokens").glob("*.arrow"))]
    rng: Any = np.random.default_rng(0)
    every = [(shard, i, crop) for shard in found for i in range(len(shard)) for crop in range(CROPS)]
    return [np.asarray(shard.row(i, rng, ["rgb@32"], crop)["rgb@32"]) for shard, i, crop in every]


def test_images_are_read_as_pixels_are(folder: Path, tmp_path: Path) -> None:
    root, converted, pixels = folder / "root", tmp_path / "converted", tmp_path / "pixels"
    assert packs(root, "--pixels", "32", "--images") == ""
    source = f"{folder}/tars/{TARS}"
    assert packs(converted, "--pixels", "32", "--images", "--from-ml4m", source) == ""
    assert packs(pixels, "--pixels", "32", "--from-ml4m", source) == ""
    shard = Packed(root / "tokens" / "shard-00000.arrow")
    assert shard.columns["rgb@32"].kind == "images"
    expected = rows(pixels)
    assert len(expected) == 4 * CROPS
    assert len({image.tobytes() for image in expected}) > 4
    for where in (root, converted):
        assert np.array_equal(rows(where), expected)
    assert validate.verify(Dataset(root)) == []
    # Packed once more with pixels, for the kind is part of what a shard is.
    assert packs(root, "--pixels", "32") == ""
    assert Packed(root / "tokens" / "shard-00000.arrow").columns["rgb@32"].kind == "pixels"
    assert np.array_equal(rows(root), expected)


def test_a_side_is_needed_and_so_are_images(folder: Path, tmp_path: Path) -> None:
    assert "the side that they are read with: --pixels 224" in packs(folder / "root", "--images")
    source = f"{folder}/tars/{TARS}"
    assert "the side that they are read with" in packs(tmp_path / "a", "--images", "--from-ml4m", source)
    said = packs(tmp_path / "b", "--pixels", "32", "--images", "--from-ml4m", source.replace("rgb,", ""))
    assert "pixels need the folders rgb and crop_settings" in said


def test_images_of_tars_that_cannot_be_decoded_are_refused_by_key(folder: Path, tmp_path: Path) -> None:
    for name in ("rgb", "crop_settings"):
        (tmp_path / "tars" / name).mkdir(parents=True)
        members = list(shards.read_tar((folder / "tars" / name / "shard-00000.tar").read_bytes()))
        if name == "rgb":
            start = members[1].data.index(b"IDAT") + 4
            data = members[1].data[:start] + bytes(20) + members[1].data[start + 20 :]
            members[1] = Member(members[1].key, members[1].suffix, data)
        (tmp_path / "tars" / name / "shard-00000.tar").write_bytes(shards.build_tar(members))
    source = f"{tmp_path}/tars/{TARS.replace('{00000..00001}', '00000')}"
    said = packs(tmp_path / "out", "--pixels", "32", "--images", "--from-ml4m", source)
    assert re.search(rf"rgb@32 of {members[1].key}: no readable image", said)
