"""`verify` finds what is not as it was committed, and names it; `--replay` labels again and compares."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import local, modalities, packed, shards, validate
from dataengine.codecs import encode_npy
from dataengine.labeler import Labeler
from dataengine.manifest import Commit, Dataset
from dataengine.plan import plan_labels
from dataengine.shards import Member
from labelers.canny_edge import Canny
from labelers.color_palette import Palette
from tests import hostile
from tests.fakes import Inverted, ingested

ROOT = Path(__file__).parents[1]


def label(dataset: Dataset, wanted: list[str], *labelers: Labeler) -> None:
    plan = plan_labels(dataset, wanted, labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in three shards, with edges of two kinds and palettes."""
    folder = tmp_path_factory.mktemp("whole")
    dataset = ingested(folder)
    label(dataset, ["canny_edge", "color_palette", "sam_edge"], Canny(), Palette(), Inverted())
    return folder / "root"


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "root")


def edit(root: Path, column: str, shard: int, **values: Any) -> None:
    path = root / f"commits/{column}/shard-{shard:05d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replaced(root: Path, column: str, shard: int, change: Callable[[list[Member]], list[Member]]) -> None:
    """Change the members of a cell, and its record with them."""
    path = root / f"{column}/shard-{shard:05d}.tar"
    data = shards.build_tar(change(list(shards.read_tar(path.read_bytes()))))
    path.write_bytes(data)
    edit(root, column, shard, sha256=shards.sha256(data), num_bytes=len(data))


def first(data: bytes) -> Callable[[list[Member]], list[Member]]:
    return lambda members: [dataclasses.replace(members[0], data=data), *members[1:]]


def problems(root: Path, **settings: Any) -> list[tuple[str, str, str]]:
    return [(p.file, p.key, p.problem) for p in validate.verify(Dataset(root), **settings)]


def flip(root: Path) -> None:
    path = root / EDGES
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def crops(root: Path) -> None:
    codec = modalities.load("crop_settings")
    rows = codec.decode(next(iter(shards.read_tar((root / "crop_settings/shard-00001.tar").read_bytes()))).data)
    replaced(
        root,
        "crop_settings",
        1,
        first(encode_npy(np.where(np.arange(rows.shape[1]) < 2, 9999, rows).astype(rows.dtype))),
    )


CAPTION, EDGES = "commits/caption/shard-00001.json", "canny_edge/shard-00001.tar"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # What is done, the file that is named, and a part of what is said.
    "a flipped bit": (flip, EDGES, "sha256"),
    "a shorter file": (
        lambda r: os.truncate(r / "caption/shard-00001.tar", 1000), "caption/shard-00001.tar", "has 1000 bytes"),
    "no file": (lambda r: (r / "caption/shard-00001.tar").unlink(), "caption/shard-00001.tar", "is missing"),
    "no rgb record": (
        lambda r: (r / "commits/rgb/shard-00001.json").unlink(), "commits/rgb/shard-00001.json", "are not"),
    "two keys changed places": (
        lambda r: replaced(r, "canny_edge", 1, lambda m: [m[1], m[0], *m[2:]]),
        EDGES, "key 0 is 'image004--png', expected 'image003--png'"),
    "one sample fewer": (
        lambda r: replaced(r, "canny_edge", 1, lambda m: m[:-1]), EDGES, "keys, expected"),
    "a link in a tar": (
        lambda r: (r / EDGES).write_bytes(b""), EDGES, "has 0 bytes"),
    "a value that does not decode": (
        lambda r: replaced(r, "canny_edge", 1, first(b"no png")), EDGES, "expected a PNG"),
    "a value of another size": (
        lambda r: replaced(r, "canny_edge", 1, first(modalities.load("canny_edge").encode(np.zeros((3, 3), np.uint8)))),
        EDGES, "(3, 3)"),
    "a palette of no colours": (
        lambda r: replaced(r, "color_palette", 1, first(b"[]")), "color_palette/shard-00001.tar", ""),
    "an image that does not decode": (
        lambda r: replaced(r, "rgb", 1, first(b"no image")), "rgb/shard-00001.tar", "expected a PNG"),
    "a crop outside of its image": (crops, "crop_settings/shard-00001.tar", "expected crops within"),
    "another suffix": (
        lambda r: replaced(r, "caption", 1, lambda m: [dataclasses.replace(x, suffix="exe") for x in m]),
        "caption/shard-00001.tar", "'exe', expected json"),
    "a record that is no JSON": (
        lambda r: (r / CAPTION).write_text("{"), CAPTION, "no commit"),
    "a record that is a list": (
        lambda r: (r / CAPTION).write_text("[]"), CAPTION, "no commit"),
    "a record of another cell": (
        lambda r: edit(r, "caption", 1, modality="rgb"), CAPTION, "its own cell"),
    "a field too many": (lambda r: edit(r, "caption", 1, extra=1), CAPTION, "extra"),
    "a number as text": (
        lambda r: edit(r, "caption", 1, num_bytes="9"), CAPTION, "num_bytes is '9', expected int"),
    "a record that leads out": (
        lambda r: edit(r, "caption", 1, file="../../etc/passwd"), CAPTION, "below the root"),
    "a count that is wrong": (lambda r: edit(r, "caption", 1, num_samples=99), "caption/shard-00001.tar", "says 99"),
    "a failure of no sample": (
        lambda r: edit(r, "canny_edge", 1, invalid={"nobody": "x"}), EDGES, "'nobody'"),
    "a column of no modality": (
        lambda r: (shutil.copytree(r / "commits/caption", r / "commits/captoin"),
                   [edit(r, "captoin", i, modality="captoin") for i in range(3)]),
        "caption/shard-00001.tar", "did you mean 'caption'"),
    "a shard too many": (
        lambda r: (r / "plan.json").write_text(
            (r / "plan.json").read_text().replace('"num_shards": 3', '"num_shards": 2')),
        "commits/rgb/shard-00002.json", "the plan has 2"),
    "a quarantine that is no JSON": (
        lambda r: ((r / "quarantine").mkdir(), (r / "quarantine/shard-00000.jsonl").write_text('{"key": 1}\n')),
        "quarantine/shard-00000.jsonl", "line 1: expected an object of key, source, stage"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_file_and_what_was_expected(root: Path, damage: str) -> None:
    do, file, said = DAMAGE[damage]
    assert problems(root) == []
    do(root)
    found = problems(root)
    assert any(f == file and said in problem for f, _, problem in found), found
    assert all("Traceback" not in problem for _, _, problem in found)


def test_a_bad_value_is_named_with_its_key_and_costs_no_other_check(root: Path) -> None:
    replaced(root, "canny_edge", 0, first(b"no png"))
    replaced(root, "canny_edge", 2, first(b"no png"))
    flip(root)
    found = problems(root)
    assert [(f, k) for f, k, _ in found] == [
        ("canny_edge/shard-00000.tar", "image000--png"),
        (EDGES, ""),
        ("canny_edge/shard-00002.tar", "image006--png"),
    ]
    assert problems(root, workers=2) == found


def test_a_sample_is_decoded_and_everything_is_hashed(root: Path) -> None:
    for shard in range(3):
        replaced(root, "canny_edge", shard, lambda members: [dataclasses.replace(m, data=b"no png") for m in members])
    (root / "caption/shard-00002.tar").write_bytes(b"other")
    counts = {}
    for sample in (0.0, 0.3, 0.7, 1.0):
        done = list(validate.checks(Dataset(root), sample=sample))
        found = [p for c in done for p in c.problems]
        counts[sample] = sum("expected a PNG" in p.problem for p in found)
        assert any("sha256" in p.problem for p in found)
        assert sum(c.num_bytes for c in done) == sum(p.stat().st_size for p in root.rglob("*.tar"))
    assert counts[0.0] == 0 < counts[0.3] < counts[0.7] < counts[1.0] == 10
    with pytest.raises(ValueError, match=r"sample is 1\.5"):
        problems(root, sample=1.5)


def test_a_shard_that_ends_its_process_is_a_problem_and_the_others_are_checked(root: Path) -> None:
    flip(root)
    replaced(root, "canny_edge", 2, first(b"no png"))
    work = [(str(root), shard, tuple(columns), 1.0) for shard, columns in validate.cells(Dataset(root)).items()]
    done = list(validate._spread(work, 2, hostile.deadly))  # type: ignore[arg-type]
    assert sorted(c.shard for c in done) == [0, 1, 2]
    said = [p.problem for c in sorted(done, key=lambda c: c.shard) for p in c.problems]
    assert said[0] == "ends the process that reads it"
    assert len(said) == 2


def test_what_no_record_names_is_a_note(root: Path) -> None:
    for path in ("rgb/shard-00099.tar", "commits/rgb/notes.json", "commits/rgb/deep/shard-00000.json", "README.md"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("x")
    for path in ("runs/x/events.jsonl", "staging/rgb/shard-00000/x/0-4.tar", "leases/shard-00000/1.json"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")
    files = [f for c in validate.checks(Dataset(root)) for f in c.files]
    assert sorted(validate.orphans(Dataset(root), files)) == [
        "README.md", "commits/rgb/deep/shard-00000.json", "commits/rgb/notes.json", "rgb/shard-00099.tar",
    ]  # fmt: skip
    assert problems(root) == []


def test_packed_tokens_are_held_to_their_schema(root: Path) -> None:
    dataset = Dataset(root)
    keys = dataset.keys(1)
    column = packed.Column(name="tok_depth@64", kind="tokens", max_tokens=4, vocab_size=100)
    words = packed.Column(name="caption", kind="sequence", max_tokens=9, vocab_size=50)

    def commit(data: bytes) -> None:
        dataset.uncommit("tokens", 1)
        digest = shards.sha256(data)
        dataset.publish(
            Commit(
                modality="tokens", shard=1, spec="s", file="tokens/shard-00001.arrow", num_bytes=len(data),
                sha256=digest, num_samples=len(keys), keys_sha256=shards.keys_sha256(keys),
            ),
            data,
        )  # fmt: skip

    def tokens(largest: int, word: int = 3, names: tuple[str, ...] = keys) -> bytes:
        ids = [np.full((2, 4), largest, np.uint16) for _ in names]
        return packed.write([column, words], 2, names, {column.name: ids, "caption": [[[[word]]] for _ in names]})

    commit(tokens(99))
    assert problems(root) == []
    for data, said in (
        (tokens(100), "tok_depth@64: id 100, expected less than 100"),
        (tokens(1, word=50), "caption: id 50, expected less than 50"),
        (tokens(1, names=keys[::-1]), "key 0 is"),
        (tokens(1)[:-40], "no packed shard"),
        (b"no arrow", "no packed shard"),
    ):
        commit(data)
        ((file, _, problem),) = problems(root)
        assert file == "tokens/shard-00001.arrow"
        assert said in problem


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "pipelines", "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_says_what_it_read_how_fast_and_what_is_wrong(root: Path) -> None:
    replaced(root, "canny_edge", 1, first(b"no png"))
    (root / "left.tar").write_bytes(b"x")
    done = run(root, "--json", "--workers", 2, "--replay", "1%")
    assert done.returncode == 4
    found = json.loads(done.stdout)
    assert found["problems"][0] == {
        "file": EDGES, "key": "image003--png", "problem": "expected a PNG, got b'no png'",
    }  # fmt: skip
    assert found["num_cells"] == 18
    assert found["mb_per_second"] > 0
    assert found["notes"] == ["left.tar"]
    outcomes = {(r["modality"], r["outcome"]) for r in found["replayed"]}
    assert {("color_palette", "same"), ("sam_edge", "cannot")} <= outcomes
    assert "canny_edge/shard-00001.tar image003--png: expected a PNG" in done.stderr
    assert run(root, "--replay", "0").returncode == 2
