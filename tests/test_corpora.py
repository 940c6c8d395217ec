"""Every corpus format keeps the contract; each reads what other tools write, and damage stays where it is."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dataengine import corpora, plugins, storage
from dataengine.canonical import Limits, canonicalise
from dataengine.corpora import Corpus, RawSample, _location
from dataengine.keys import is_key


def read(corpus: Corpus, shard_size: int = 1000) -> list[RawSample]:
    return [raw for split in corpus.splits(shard_size) for raw in corpus.read(split)]


@pytest.fixture(params=plugins.names("dataengine.corpora"))
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    return plugins.load("dataengine.corpora", request.param, Corpus).example(str(tmp_path))


def same(first: Sequence[RawSample], second: Sequence[RawSample]) -> bool:
    return [(r.key, r.source, r.image, r.captions, r.error) for r in first] == [
        (r.key, r.source, r.image, r.captions, r.error) for r in second
    ] and all(
        a.values.keys() == b.values.keys() and all(np.array_equal(a.values[m], b.values[m]) for m in a.values)
        for a, b in zip(first, second, strict=True)
    )


def test_order_is_the_same_twice_and_in_another_process(corpus: Corpus) -> None:
    first = read(corpus, 2)
    assert same(first, read(corpus, 2))
    other = pickle.loads(pickle.dumps(corpus))
    assert other.splits(2) == corpus.splits(2)
    assert same(first, read(other, 2))
    name = type(corpus).__module__.rpartition(".")[2]
    assert same(first, read(corpora.load(f"{name}:{corpus.location}"), 2))


def test_splits_partition_the_items(corpus: Corpus) -> None:
    whole = {raw.key: raw for raw in read(corpus)}
    for shard_size in (1, 2, 3):
        splits = corpus.splits(shard_size)
        assert all(1 <= s.stop - s.start <= shard_size for s in splits)
        parts = [list(corpus.read(s)) for s in splits]
        assert [len(p) for p in parts] == [s.stop - s.start for s in splits]
        assert sorted(r.key for p in parts for r in p) == sorted(whole)
    with pytest.raises(ValueError, match="shard size"):
        corpus.splits(0)


def test_items_are_whole(corpus: Corpus) -> None:
    found = read(corpus)
    assert len(found) >= 5
    assert all(is_key(raw.key) for raw in found)
    assert len({raw.key for raw in found}) == len(found)
    for raw in found:
        assert raw.error is None
        assert raw.source
        assert raw.captions
        assert set(corpus.emits) <= set(raw.values)
        if "rgb" not in raw.values:
            assert canonicalise(raw.image, Limits()).image.shape == (32, 40, 3)


def test_formats_are_found_by_name() -> None:
    with pytest.raises(ValueError, match="did you mean 'parquet'"):
        corpora.load("parket:x")
    with pytest.raises(ValueError, match="expected FORMAT:LOCATION"):
        corpora.load("photos")


# Locations


def test_options_are_checked() -> None:
    assert _location.parse("a/b?.tar", {"image": ""}) == ("a/b?.tar", {"image": ""})
    assert _location.parse("a?image=x%20y", {"image": ""}) == ("a", {"image": "x y"})
    with pytest.raises(ValueError, match="unknown option 'imgae' \\(did you mean 'image'\\?\\)"):
        corpora.load("parquet:x?imgae=jpg")
    with pytest.raises(ValueError, match="fetch is 'maybe', expected yes or no"):
        corpora.load("parquet:x?fetch=maybe")


def test_pieces_are_even() -> None:
    cut = [(s.start, s.stop) for s in _location.pieces("x", [(0, 1010), (1010, 1010), (1010, 1011)], 1000)]
    assert cut == [(0, 505), (505, 1010), (1010, 1011)]


def tars(folder: Path, *names: str) -> None:
    for name in names:
        tar(folder / name, {f"{name[0]}.jpg": b"image"})


def tar(path: Path, members: dict[str, bytes] | Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["a/1.tar", "a/2.tar", "b/1.tar"]),
        ("/a/2.tar", ["2.tar"]),
        ("/a", ["1.tar", "2.tar"]),
        ("/*/1.tar", ["a/1.tar", "b/1.tar"]),
        ("/a/?.tar", ["1.tar", "2.tar"]),
        ("/{a,b}/1.tar", ["a/1.tar", "b/1.tar"]),
        ("/{b,a}/*.tar", ["a/1.tar", "a/2.tar", "b/1.tar"]),
    ],
)
def test_patterns_name_files_relative_to_their_fixed_part(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    tars(tmp_path, "a/1.tar", "a/2.tar", "b/1.tar")
    (tmp_path / "a" / "1.json").write_text("{}")
    assert _location.Files(f"{tmp_path}{pattern}", (".tar",)).names() == expected


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    tars(tmp_path / "set [1] {x}", "a.tar")
    assert storage.expand(str(tmp_path / "set [1] {x}"), (".tar",)) == [str(tmp_path / "set [1] {x}" / "a.tar")]
    assert _location.Files(str(tmp_path / "set [1] {x}"), (".tar",)).names() == ["a.tar"]


def test_other_filesystems(tmp_path: Path) -> None:
    fs, _ = storage.split_url("memory://")
    tars(tmp_path, "a.tar", "b.tar")
    for name in ("a.tar", "b.tar"):
        fs.pipe_file(f"/corpus/{name}", (tmp_path / name).read_bytes())
    try:
        for location in ("memory://corpus", "memory://corpus/*.tar", "memory://corpus/{a,b}.tar"):
            found = read(corpora.load(f"webdataset:{location}"))
            assert [(r.key, r.source) for r in found] == [("a--a", "a.tar/a"), ("b--b", "b.tar/b")]
        fs.pipe_file("/photos/deep/x.jpg", b"image")
        assert [r.source for r in read(corpora.load("folder:memory://photos"))] == ["deep/x.jpg"]
    finally:
        fs.rm("/", recursive=True)


@pytest.mark.parametrize("format", ["folder", "webdataset", "parquet"])
def test_a_location_with_nothing_is_an_error(tmp_path: Path, format: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        corpora.load(f"{format}:{tmp_path / 'missing'}").splits(10)


def test_formats_import_no_heavy_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dataengine.corpora.hf, dataengine.corpora.parquet, dataengine.corpora.webdataset;"
        "print([m for m in ('torch', 'datasets', 'pandas', 'cv2', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
