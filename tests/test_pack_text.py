"""Texts alone become packed shards, each row once; what is no text is left out, and counted."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dataengine import local, texts
from dataengine.manifest import Conflict, Dataset
from model.tokenizers.text import TextTokenizer
from pipelines import cli, columns, commands, pack_text, sources  # noqa: F401  commands register themselves
from pipelines.pack import CELL

WORDS = "a red cube on the floor two balls and a dog dining table person".split()


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.json"
    TextTokenizer.tiny().save(path)
    return str(path)


def said(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


def lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(v).encode() + b"\n" for v in values)


def objects(values: list[Any]) -> list[dict[str, Any]]:
    return [{"url": "x", "text": v} for v in values]


def packed(root: Path, source: list[str], text_tokenizer: str, **settings: Any) -> list[int]:
    """The shards that were made."""
    worker, tasks, _ = pack_text.prepare(Dataset(root), source, text_tokenizer=text_tokenizer, **settings)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return [t.shard for t in tasks]


def rows_of(root: Path) -> list[tuple[str, list[int]]]:
    rng = np.random.default_rng(0)
    return [
        (key, shard.row(i, rng, ["caption"])["caption"])
        for shard in sources.shards(str(root))
        for i, key in enumerate(shard.keys)
    ]


def test_every_kind_of_file_gives_its_rows_in_order(tmp_path: Path, text_tokenizer: str) -> None:
    values = said(70)
    encode = TextTokenizer.load(Path(text_tokenizer)).encode
    expected = [encode(v) for v in values]
    data = lines(objects(values))
    folder = tmp_path / "c4"
    folder.mkdir()
    (folder / "a.json.gz").write_bytes(gzip.compress(data[:900]) + gzip.compress(data[900:]))  # of two members
    (folder / "b.jsonl.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    (folder / "c.jsonl").write_bytes(b"\n" + data.replace(b"\n", b"\n\n"))
    pq.write_table(pa.table({"text": values, "n": range(70)}), folder / "d.parquet", row_group_size=16)
    pq.write_table(pa.table({"text": pa.array(values).dictionary_encode()}), folder / "e.parquet")
    (folder / "f.ndjson.bz2").write_bytes(bz2.compress(data))
    (folder / "README.md").write_bytes(b"no texts")
    assert packed(tmp_path / "out", [str(folder)], text_tokenizer, rows=30) == list(range(18))
    found = rows_of(tmp_path / "out")
    assert [ids for _, ids in found] == expected * 6
    assert len({key for key, _ in found}) == 420
    assert [found[i][0] for i in (0, 69, 70)] == ["a--000000000", "a--000000069", "b--000000000"]
    shards = sources.shards(str(tmp_path / "out"))
    assert [len(s) for s in shards] == [30, 30, 10] * 6
    assert {tuple(s.columns) for s in shards} == {("caption",)}
    assert shards[0].columns["caption"].vocab_size == TextTokenizer.load(Path(text_tokenizer)).vocab_size


def test_a_text_is_cut_as_ml4m_does_and_a_long_one_is_not_encoded_whole(text_tokenizer: str) -> None:
    encode = TextTokenizer.load(Path(text_tokenizer)).encode
    asked: list[int] = []

    def counted(text: str) -> list[int]:
        asked.append(len(text))
        return encode(text)

    rng = np.random.default_rng(0)
    for length in (3, 40, 60, 200, 5000):
        text = " ".join(rng.choice([*WORDS, "cu" * 60, "v0=13", "v1=7"], length))
        for most in (5, 31, 256):
            assert pack_text.cut(text, most, counted) == encode(text)[:most]
    asked.clear()
    assert len(pack_text.cut("dog " * 100_000, 256, counted)) == 256
    assert max(asked) <= 8 * 256
    blank = " " * 50_000 + "dog"
    assert pack_text.cut(blank, 256, counted) == encode("dog")


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path, text_tokenizer: str) -> None:
    bad = [None, "", " \n", 7, ["a"], "\ud800 dog"]
    (tmp_path / "a.jsonl").write_bytes(
        lines([*objects(["a dog", *bad, "two balls"]), [1], {"other": "a"}]) + b"{no json\n" + b'{"text": "\xff"}\n'
    )
    (tmp_path / "b.jsonl").write_bytes(lines(objects([None, ""])))
    root = tmp_path / "out"
    done = CliRunner().invoke(
        cli.app,
        ["pack-text", str(root), f"{tmp_path}/*.jsonl", "--text-tokenizer", text_tokenizer, "--max-bad-fraction", "1"],
    )
    assert done.exit_code == 0, done.output
    assert [len(s) for s in sources.shards(str(root))] == [2, 0]
    assert [key for key, _ in rows_of(root)] == ["a--000000000", "a--000000007"]
    records = [Dataset(root).commit(CELL, shard) for shard in (0, 1)]
    assert [r.provenance["text"]["left_out"] for r in records if r] == [
        {"empty": 2, "no JSON": 2, "no Unicode": 1, "no object": 1, "no text": 2, "null": 2},
        {"empty": 1, "null": 1},
    ]
    arguments = ["pack-text", str(tmp_path / "strict"), f"{tmp_path}/*.jsonl", "--text-tokenizer", text_tokenizer]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 3, done.output


def test_it_resumes_and_what_changed_is_made_anew(
    tmp_path: Path, text_tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines(objects(said(25, ord(name))))))
    root, source = tmp_path / "out", [f"{tmp_path}/{{a,b}}.jsonl.gz"]
    worker, tasks, counts = pack_text.prepare(Dataset(root), source, text_tokenizer=text_tokenizer, rows=10)
    assert (len(tasks), counts) == (6, {0: 10, 1: 10, 2: 5, 3: 10, 4: 10, 5: 5})
    work = worker.start("cpu")
    for i in (4, 1, 0):  # as a worker among others, and one that goes back
        work(tasks[i])
    monkeypatch.setattr(texts, "count", lambda url: pytest.fail(f"{url} counted again"))
    assert packed(root, source, text_tokenizer, rows=10) == [2, 3, 5]
    assert packed(root, source, text_tokenizer, rows=10) == []
    monkeypatch.undo()
    before = rows_of(root)
    assert len(before) == 50
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(objects(said(24, 7)))))
    assert packed(root, source, text_tokenizer, rows=10) == [3, 4, 5]
    assert rows_of(root)[:25] == before[:25]
    with pytest.raises(Conflict, match="holds 6 packed shards of something else"):
        packed(root, source, text_tokenizer, rows=40)


def test_what_cannot_be_read_is_told(tmp_path: Path, text_tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, data: bytes, match: str, **settings: Any) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=match):
            packed(tmp_path / "out" / name, [str(tmp_path / name)], text_tokenizer, **settings)

    refused("list.json", b'[{"text": "a"}]', r"list.json: begins with a list, expected JSON lines")
    refused("not.json.gz", lines(objects(["a"])), r"not.json.gz: ")
    refused("cut.json.gz", gzip.compress(lines(objects(said(500))))[:200], r"cut.json.gz: ")
    refused("no.parquet", b"PAR1 no", r"no.parquet: ")
    refused("none.txt", b"a", "no files of texts at .*none.txt, expected .parquet")
    refused("zero.jsonl", lines(objects(["a"])), "0 rows a shard, expected at least 1", rows=0)
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "t.parquet")
    refused("t.parquet", (tmp_path / "t.parquet").read_bytes(), "no column 'text', expected one of content")
    monkeypatch.setattr(texts, "MAX_LINE", 50)
    refused("long.jsonl", lines(objects(["a" * 60])), r"long.jsonl: a line of more than 50 bytes")
    worker, tasks, _ = pack_text.prepare(
        Dataset(tmp_path / "c"), [str(tmp_path / "t.parquet")], text_tokenizer=text_tokenizer, field="content"
    )
    pq.write_table(pa.table({"content": pa.array([], pa.string())}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet has changed: it has no row 0 any more"):
        worker.start("cpu")(tasks[0])
    (tmp_path / "d" / "plan.json").parent.mkdir()
    (tmp_path / "d" / "plan.json").write_bytes(b"{}")
    with pytest.raises(Conflict, match="is a dataset of its own"):
        packed(tmp_path / "d", [str(tmp_path / "t.parquet")], text_tokenizer)
