"""Each corpus format reads what other tools write, and damage stays with its item."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from dataengine import corpora
from dataengine.corpora import Corpus, RawSample, _reach
from dataengine.keys import is_key
from tests import nasty


def read(corpus: Corpus, shard_size: int = 1000) -> list[RawSample]:
    return [raw for split in corpus.splits(shard_size) for raw in corpus.read(split)]


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


# Folder


def test_nasty_folder_gives_every_item_once(tmp_path: Path) -> None:
    cases = {c.name: c for c in nasty.write(tmp_path)}
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "plain.jpg").write_bytes(b"hidden")
    (tmp_path / "._plain.jpg").write_bytes(b"resource fork")
    (tmp_path / "notes.md").write_text("no image")
    found = read(corpora.load(f"folder:{tmp_path}"), 7)
    assert sorted(raw.source for raw in found) == sorted(cases)
    assert len({raw.key for raw in found}) == len(cases)
    assert all(is_key(raw.key) and raw.image == cases[raw.source].data and raw.error is None for raw in found)
    keys = {raw.source: raw.key for raw in found}
    assert (keys["twin.jpg"], keys["twin.png"], keys["UPPER.JPG"]) == ("twin--jpg", "twin--png", "UPPER--JPG")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", '{"d/a.jpg": "one", "d/b.jpg": ["two", {"caption": "three"}]}'),
        (
            "captions.jsonl",
            '{"file_name": "d/a.jpg", "text": "one"}\n{"path": "./d/b.jpg", "captions": ["two", "three"]}\n',
        ),
        ("metadata.csv", 'file_name,text\nd/a.jpg,one\nd/b.jpg,two\n"d/b.jpg",three\n'),
    ],
)
def test_folder_captions_in_a_table(tmp_path: Path, name: str, content: str) -> None:
    for image in ("a", "b", "c"):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{image}.jpg").write_bytes(b"x")
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [r.captions for r in read(corpora.load(f"folder:{tmp_path}"))] == [("one",), ("two", "three"), ()]


def test_folder_captions_beside_the_image(tmp_path: Path) -> None:
    for image in ("a", "b", "c", "d"):
        (tmp_path / f"{image}.jpg").write_bytes(b"x")
    (tmp_path / "a.txt").write_text(" ein Bär\nim Wald \n", encoding="utf-8")
    (tmp_path / "b.json").write_text('{"url": "u", "caption": "json"}')
    (tmp_path / "c.json").write_text("{broken")
    (tmp_path / "captions.json").write_text('{"a.jpg": "not this", "d.jpg": "table"}')
    found = read(corpora.load(f"folder:{tmp_path}"))
    assert [r.captions for r in found] == [("ein Bär\nim Wald",), ("json",), (), ("table",)]
    assert [r.error is None for r in found] == [True, True, False, True]
    assert "JSONDecodeError" in (found[2].error or "")


def test_folder_table_that_fits_no_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "captions.json").write_text('{"images/a.jpg": "x"}')
    with pytest.raises(ValueError, match=r"'images/a.jpg', but 'a.jpg'"):
        corpora.load(f"folder:{tmp_path}").splits(10)
    (tmp_path / "captions.json").unlink()
    (tmp_path / "captions.csv").write_text("name,text\na.jpg,x\n")
    with pytest.raises(
        ValueError, match=r"captions.csv, row 1: expected a path under file_name .* got \['name', 'text'\]"
    ):
        corpora.load(f"folder:{tmp_path}").splits(10)


def test_folder_that_changed_is_an_error(tmp_path: Path) -> None:
    for name in "bcde":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    first, second = corpora.load(f"folder:{tmp_path}").splits(2)
    (tmp_path / "a.jpg").write_bytes(b"x")
    for split in (first, second):
        with pytest.raises(ValueError, match="has changed"):
            list(corpora.load(f"folder:{tmp_path}").read(split))


def test_folder_file_that_vanished_stops_nothing(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    corpus = corpora.load(f"folder:{tmp_path}")
    splits = corpus.splits(10)
    (tmp_path / "b.jpg").unlink()
    found = list(corpus.read(splits[0]))
    assert [r.error is None for r in found] == [True, False, True]
    assert "FileNotFoundError" in (found[1].error or "")


# WebDataset


def test_webdataset_captions_and_order(tmp_path: Path) -> None:
    members = {
        "./d/a.jpg": b"A",
        "./d/a.txt": b"text\n",
        "b.json": json.dumps({"caption": "json", "url": "u"}).encode(),
        "c.jpg": b"C",
        "b.JPG": b"B",
        "README": b"no member of a sample",
        "e.png": b"E",
        "e.mask.png": b"mask",
        "e.txt": b"",
        "e.json": b'{"caption": null}',
        "f.txt": b"no image here",
    }
    tar(tmp_path / "x.tar", members)
    found = read(corpora.load(f"webdataset:{tmp_path}/x.tar"), 2)
    assert [r.key for r in found] == ["x--d--a", "x--b", "x--c", "x--e", "x--f"]
    assert [r.image for r in found] == [b"A", b"B", b"C", b"E", b""]
    assert [r.captions for r in found] == [("text",), ("json",), (), (), ()]
    assert found[4].error == "ValueError: no image among txt"
    chosen = read(corpora.load(f"webdataset:{tmp_path}?image=mask.png&caption=json"))
    assert [r.image for r in chosen if r.error is None] == [b"mask"]


def test_webdataset_names_that_repeat_are_items_of_their_own(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.txt", b"one"), ("a.jpg", b"2"), ("a.txt", b"two")])
    found = read(corpora.load(f"webdataset:{tmp_path}"))
    assert [(r.image, r.captions) for r in found] == [(b"1", ("one",)), (b"2", ("two",))]
    assert found[0].key == "x--a"
    assert found[1].key.startswith("x--a--1-")


@pytest.mark.parametrize("damage", ["cut in a member", "cut between members", "spoiled header", "no tar", "empty"])
def test_damaged_tar_gives_its_readable_items_and_one_error(tmp_path: Path, damage: str) -> None:
    tar(tmp_path / "x.tar", {f"{i}.jpg": bytes([i]) * 1000 for i in range(5)})  # 1536 bytes each with its header
    whole = (tmp_path / "x.tar").read_bytes()
    spoiled = {
        "cut in a member": whole[: 1536 * 3 + 600],
        "cut between members": whole[: 1536 * 3],
        "spoiled header": whole[: 1536 * 3] + b"\xff" * 512 + whole[1536 * 3 + 512 :],
        "no tar": b"<html>404</html>" * 100,
        "empty": b"",
    }
    (tmp_path / "x.tar").write_bytes(spoiled[damage])
    tars(tmp_path, "y.tar")
    found = read(corpora.load(f"webdataset:{tmp_path}"), 2)
    readable = 0 if damage in ("no tar", "empty") else 3
    assert [r.image for r in found] == [bytes([i]) * 1000 for i in range(readable)] + [b"", b"image"]
    assert "the tar is damaged" in (found[readable].error or "")
    assert len({r.key for r in found}) == len(found)


def test_missing_tar_of_a_range_is_one_error(tmp_path: Path) -> None:
    tars(tmp_path, "0.tar", "2.tar")
    found = read(corpora.load(f"webdataset:{tmp_path}/{{0..2}}.tar"))
    assert [r.image for r in found] == [b"image", b"", b"image"]
    assert "there is no such tar" in (found[1].error or "")


def test_tar_that_shrank_is_an_error(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", {f"{i}.jpg": b"x" for i in range(4)})
    corpus = corpora.load(f"webdataset:{tmp_path}")
    last = corpus.splits(2)[-1]
    tar(tmp_path / "x.tar", {"0.jpg": b"x"})
    with pytest.raises(ValueError, match="has changed: it had at least 4 items and now has 1"):
        list(corpus.read(last))


# Parquet


def table(path: Path, rows: list[dict[str, object]], group: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def test_parquet_splits_follow_row_groups(tmp_path: Path) -> None:
    table(tmp_path / "big.parquet", [{"jpg": bytes([i])} for i in range(250)], group=100)
    corpus = corpora.load(f"parquet:{tmp_path}")
    assert [(s.start, s.stop) for s in corpus.splits(60)] == [(0, 50), (50, 100), (100, 150), (150, 200), (200, 250)]
    assert [(s.start, s.stop) for s in corpus.splits(200)] == [(0, 200), (200, 250)]
    for size in (7, 60, 99, 200, 1000):
        assert [r.image[0] for r in read(corpus, size)] == list(range(250))
    assert [r.key for r in read(corpus)][7] == "big--000000007"


def test_parquet_cells(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(b"A")
    (tmp_path / "b.jpg").write_bytes(b"B")
    rows: list[dict[str, object]] = [
        {"pic": "a.jpg", "alt": ["one", "two"]},
        {"pic": str(tmp_path / "b.jpg"), "alt": []},
        {"pic": f"file://{tmp_path}/b.jpg", "alt": None},
        {"pic": "missing.jpg", "alt": None},
        {"pic": None, "alt": None},
        {"pic": "http://127.0.0.1:9/x.jpg", "alt": None},
    ]
    table(tmp_path / "sub" / "rows.parquet", rows)
    found = read(corpora.load(f"parquet:{tmp_path}?image=pic&caption=alt"))
    assert [r.image for r in found] == [b"A", b"B", b"B", b"", b"", b""]
    assert [r.captions for r in found] == [("one", "two"), (), (), (), (), ()]
    assert [(r.error or "").partition(":")[0] for r in found[3:]] == ["FileNotFoundError", "ValueError", "ValueError"]
    assert "?fetch=yes" in (found[5].error or "")
    structs: list[dict[str, object]] = [
        {"image": {"bytes": b"A", "path": "x"}},
        {"image": {"bytes": None, "path": "a.jpg"}},
    ]
    table(tmp_path / "sub" / "rows.parquet", structs)
    assert [r.image for r in read(corpora.load(f"parquet:{tmp_path}"))] == [b"A", b"A"]


def test_parquet_without_the_column_is_an_error(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", [{"jpg": b"x", "title": "t"}])
    with pytest.raises(ValueError, match="no caption column 'titel' \\(did you mean 'title'\\?\\)"):
        corpora.load(f"parquet:{tmp_path}?caption=titel").splits(10)
    table(tmp_path / "x.parquet", [{"data": b"x"}])
    with pytest.raises(ValueError, match=r"no image column .* one of data"):
        corpora.load(f"parquet:{tmp_path}").splits(10)


def test_damaged_parquet_is_errors_and_the_next_file_is_read(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [{"jpg": bytes(50) + bytes([i])} for i in range(100)], group=50)
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    second = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    start = second.dictionary_page_offset or second.data_page_offset
    whole[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(whole)
    (tmp_path / "b.parquet").write_bytes(b"not a table")
    table(tmp_path / "c.parquet", [{"jpg": b"C"}])
    found = read(corpora.load(f"parquet:{tmp_path}"), 50)
    assert [r.error is None for r in found] == [True] * 50 + [False] * 51 + [True]
    assert len({r.key for r in found}) == 102


class _Server(http.server.BaseHTTPRequestHandler):
    failures = 2

    def do_GET(self) -> None:
        fails = self.path == "/flaky.jpg" and type(self).failures > 0
        type(self).failures -= fails
        status = 404 if self.path == "/gone.jpg" else 503 if fails else 200
        body = self.path.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_parquet_fetches_when_asked_and_tries_again(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reach, "WAIT", tenacity.wait_none())
    urls = [f"{server}/{name}.jpg" for name in ("a", "flaky", "gone", "b")]
    table(tmp_path / "urls.parquet", [{"url": u, "caption": u[-5:]} for u in urls])
    found = read(corpora.load(f"parquet:{tmp_path}?fetch=any"))
    assert [r.image for r in found] == [b"/a.jpg", b"/flaky.jpg", b"", b"/b.jpg"]
    assert "FileNotFoundError" in (found[2].error or "")


# Hugging Face


def test_hf_dataset_dict_columns_and_errors(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.jpg").write_bytes(b"A")
    rows = {"pic": [b"1", b"2", b"3"], "path": [str(tmp_path / "a.jpg"), "b.jpg", "a.jpg"], "text": ["x", None, "z"]}
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)})
    saved.save_to_disk(tmp_path / "set")
    found = read(corpora.load(f"hf:{tmp_path}/set?split=test&image=pic"), 2)
    assert [(r.key, r.image, r.captions) for r in found] == [
        ("set--test--000000000", b"1", ("x",)),
        ("set--test--000000001", b"2", ()),
        ("set--test--000000002", b"3", ("z",)),
    ]
    found = read(corpora.load(f"hf:{tmp_path}/set?split=test&image=path&files={tmp_path}"))
    assert [r.error is None for r in found] == [True, False, False]
    with pytest.raises(ValueError, match="no split 'train'; known: test"):
        corpora.load(f"hf:{tmp_path}/set").splits(2)
    with pytest.raises(ValueError, match="no column 'pick' \\(did you mean 'pic'\\?\\)"):
        corpora.load(f"hf:{tmp_path}/set?split=test&image=pick").splits(2)
