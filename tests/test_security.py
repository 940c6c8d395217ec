"""What somebody else wrote is data: hostile tars, images, arrays, tables and checkpoints (docs/security.md)."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine import corpora, shards
from dataengine.corpora import Corpus, RawSample, _reach
from dataengine.keys import is_key
from tests import hostile
from tests.hostile import END, member, pax, tar_header, wide

ROOT = Path(__file__).parents[1]
AFTER = member(b"after.jpg", b"good")


def read(corpus: Corpus) -> list[RawSample]:
    return [raw for split in corpus.splits(1000) for raw in corpus.read(split)]


# -- tars that are read in ---------------------------------------------------------------------------------------------

SPARSE = pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__name=b"a.jpg",
             GNU__sparse__realsize=b"4611686018427387904")  # fmt: skip
HEADERS: dict[str, tuple[bytes, str | None]] = {
    # What stands before a good member, and a word of the error it gives; None where it is taken in as data.
    "absolute name": (member(b"/etc/cron.d/x.jpg", b"data"), None),
    "parent folders": (member(b"../../../x.jpg", b"data"), None),
    "symbolic link": (member(b"a.jpg", kind=b"2", link=b"/etc/passwd"), "symbolic link"),
    "hard link": (member(b"a.jpg", kind=b"1", link=b"after.jpg"), "hard link"),
    "named pipe": (member(b"a.jpg", kind=b"6"), "named pipe"),
    "device": (member(b"a.jpg", kind=b"3"), "device"),
    "link as a caption": (member(b"a.jpg", b"data") + member(b"a.txt", kind=b"2", link=b"/etc"), "symbolic link"),
    "sparse, PAX": (SPARSE + member(b"a.jpg", b"1\n0\n4\n".ljust(512, b"\0") + b"data"), "sparse"),
    "sparse, old": (member(b"a.jpg", b"data", b"S"), "sparse"),
    "unknown type": (member(b"a.jpg", b"data", b"Z"), "type"),
    "PAX name": (pax(path=b"../../\0evil\n\x1b[31m.jpg") + member(b"a.jpg", b"data"), None),
    "PAX size that fits": (pax(size=b"512") + tar_header(b"a.jpg", 4) + b"data".ljust(512, b"x"), None),
    "PAX header for all": (member(b"g", b"18 path=other.jpg\n", b"g") + member(b"a.jpg", b"data"), None),
    "line feed in a name": (member(b"a\nb.jpg", b"data"), None),
    "escape, bad UTF-8": (member(b"\x1b]0;x\x07\xff.jpg", b"data"), None),
    "name of 200 kB": (pax(path=b"n" * 200_000 + b".jpg") + member(b"a.jpg", b"data"), None),
    "3000 long names": (member(b"././@LongLink", b"x.jpg\0", b"L") * 3000 + member(b"a.jpg", b"data"), None),
    "3000 PAX headers": (pax(comment=b"x") * 3000 + member(b"a.jpg", b"data"), None),
    "folder": (member(b"a.jpg/", kind=b"5"), "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_member_costs_itself_alone(tmp_path: Path, case: str) -> None:
    before, error = HEADERS[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.tar").write_bytes(before + AFTER + END)
    found = read(corpora.load(f"webdataset:{tmp_path}/in"))
    assert (found[-1].key, found[-1].image, found[-1].error) == ("t--after", b"good", None)
    assert all(is_key(raw.key) for raw in found)
    if error == "nothing":
        assert len(found) == 1
    elif error is None:
        assert len(found) == 2
        assert found[0].image.startswith(b"data")
    else:
        assert len(found) == 2
        assert error in (found[0].error or "")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "t.tar"]  # nothing was written by a name


SPOILED = {
    "8 exabytes": tar_header(b"a.jpg", wide(1 << 63)) + AFTER,
    "negative size": tar_header(b"a.jpg", wide(-512)) + AFTER,
    "negative, unknown type": tar_header(b"a.jpg", wide(-512), b"Z") + AFTER,
    "PAX size of 4 exabytes": pax(size=b"%d" % (1 << 62)) + member(b"a.jpg", b"x") + AFTER,
    "negative PAX size": pax(size=b"-1024") + member(b"a.jpg", b"x") + AFTER,
    "PAX header of 4 GB": tar_header(b"p", wide(1 << 32), b"x") + AFTER,
    "negative PAX header": tar_header(b"p", wide(-512), b"x") + AFTER,
    "PAX header of digits": member(b"p", b"1" * 1_000_000, b"x") + AFTER,
    "PAX records that overlap": member(b"p", b"5 a=b\n", b"x") + AFTER,
    "wrong checksum": member(b"a.jpg", b"x")[:100] + b"9" + member(b"a.jpg", b"x")[101:] + AFTER,
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_header_that_cannot_be_true_ends_the_tar_with_one_error(tmp_path: Path, case: str) -> None:
    (tmp_path / "0.tar").write_bytes(member(b"before.jpg", b"good") + SPOILED[case] + END)
    (tmp_path / "1.tar").write_bytes(AFTER + END)
    found = read(corpora.load(f"webdataset:{tmp_path}"))
    assert [(raw.key, raw.error is None) for raw in found if raw.error is None] == [
        ("0--before", True),
        ("1--after", True),
    ]
    assert len(found) == 3
    assert "the tar is damaged" in (found[1].error or "")
    with pytest.raises(ValueError, match=r"."):
        list(shards.read_tar(SPOILED[case] + END))


def test_a_compressed_tar_is_not_decompressed(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "bomb.tar").write_bytes(gzip.compress(bytes(50_000_000)))
    (found,) = read(corpora.load(f"webdataset:{tmp_path}"))
    assert "the tar is damaged" in (found.error or "")
    (tmp_path / "bomb.tar").rename(tmp_path / "bomb.tar.gz")
    with pytest.raises(ValueError, match="found none"):
        corpora.load(f"webdataset:{tmp_path}").splits(10)


def test_many_members_of_one_name_take_linear_time(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(member(b"a.jpg", b"x") * 20_000 + END)
    corpus = corpora.load(f"webdataset:{tmp_path}")
    assert len({raw.key for split in corpus.splits(20_000) for raw in corpus.read(split)}) == 20_000


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"S", b"Z"])
def test_a_shard_that_is_read_back_holds_regular_files_only(kind: bytes) -> None:
    with pytest.raises(ValueError, match="expected a regular file"):
        list(shards.read_tar(member(b"a.jpg", kind=kind, link=b"/etc/passwd") + AFTER + END))
    with pytest.raises(ValueError, match="expected a regular file"):
        list(shards.read_tar(SPARSE + member(b"a.jpg", b"1\n0\n4\n".ljust(512, b"\0") + b"data") + END))


def test_a_good_tar_of_any_dialect_is_read_as_tarfile_reads_it() -> None:
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        names = ["a.jpg", "sub/b.tar.gz", *([] if dialect == tarfile.USTAR_FORMAT else ["ü" * 90 + ".jpg"])]
        with tarfile.open(fileobj=stream, mode="w", format=dialect) as tar:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = 700 * number
                tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        found = [(f"{m.key}.{m.suffix}", m.data) for m in shards.read_tar(stream.getvalue())]
        assert found == [(name, bytes([i]) * 700 * i) for i, name in enumerate(names)]


# -- bombs -------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pathlib import Path
from dataengine import codecs, corpora
from dataengine.canonical import Limits, Refused, canonicalise

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

out = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    if path.suffix == ".npy":
        try:
            outcome = f"array {codecs.decode_npy(data).shape}"
        except ValueError as error:
            outcome = "refused"
    elif path.suffix == ".parquet":
        corpus = corpora.load(f"parquet:{path}")
        sizes = [(len(raw.image), raw.error) for split in corpus.splits(1000) for raw in corpus.read(split)]
        outcome = f"{len(sizes)} rows, {sum(error is not None for _, error in sizes)} errors"
        del sizes
    else:
        try:
            done = canonicalise(data, Limits())
            outcome = f"taken {codecs.decode_rgb(done.encoded).shape}"
        except Refused as error:
            outcome = error.reason
    out[path.name] = (outcome, peak() - before)
print(json.dumps(out))
"""


def test_bombs_are_refused_or_defused_in_bounded_memory(tmp_path: Path) -> None:
    for name, data in {**hostile.png_bombs(), **hostile.header_bombs()}.items():
        (tmp_path / name).write_bytes(data)
    for name, data in hostile.npy_lies().items():
        (tmp_path / f"{name}.npy").write_bytes(data)
    _dictionary_bomb(tmp_path / "dictionary.parquet")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shown = {name: outcome for name, (outcome, _) in found.items() if not name.endswith(".npy")}
    assert shown == {
        **dict.fromkeys(hostile.png_bombs(), "taken (48, 64, 3)"),
        "canvas.webp": "too-many-pixels",
        "tile.tif": "too-many-pixels",
        "page.tif": "too-many-pixels",
        "scans.jpg": "too-many-scans",
        "dictionary.parquet": "100 rows, 0 errors",
    }
    assert {outcome for name, (outcome, _) in found.items() if name.endswith(".npy")} == {"refused"}
    # MiB above what the process had: copies of the input; of the table some values, where all of them are 2500.
    assert {name: mib for name, (_, mib) in found.items() if mib > (500 if "parquet" in name else 60)} == {}


def _dictionary_bomb(path: Path) -> None:
    """24 MiB once, 100 rows that say "that one": 2.5 GB when it is expanded."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array([bytes(24 << 20)], pa.binary()))
    pq.write_table(pa.table({"jpg": column}), path, compression="zstd", store_schema=False)


def test_an_item_that_is_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reach, "MAX_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(1001))
    (tmp_path / "b.jpg").write_bytes(bytes(1000))
    (tmp_path / "t.tar").write_bytes(member(b"a.jpg", bytes(1001)) + member(b"b.jpg", bytes(1000)) + END)
    pq.write_table(pa.table({"jpg": [bytes(1001), bytes(1000)]}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"path": ["a.jpg", "b.jpg"]}), tmp_path / "u.parquet")
    for spec in ("folder:{}", "webdataset:{}", "parquet:{}/t.parquet", "parquet:{}/u.parquet"):
        first, second = read(corpora.load(spec.format(tmp_path)))
        assert "1001 bytes, at most 1000" in (first.error or "")
        assert (len(second.image), second.error) == (1000, None)


def test_images_beyond_what_a_shard_may_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataengine import ingest
    from dataengine.manifest import Dataset
    from tests.fakes import write_images

    images = write_images(tmp_path / "images", 5)
    sizes = [p.stat().st_size for p in sorted(images.glob("*.*")) if p.suffix in (".jpg", ".png")]
    monkeypatch.setattr(ingest, "MAX_SHARD_BYTES", sum(sizes[:3]))
    dataset = Dataset(tmp_path / "root")
    worker, tasks = ingest.prepare(dataset, f"folder:{images}", ingest.IngestSettings())
    for task in tasks:
        worker.start("cpu")(task)
    assert len(dataset.keys(0)) == 3
    assert {q.reason for q in dataset.quarantine()} == {"shard-full"}
    assert len(dataset.quarantine()) == 2


def test_a_parquet_footer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataengine.corpora import parquet

    pq.write_table(pa.table({"jpg": [b"x"] * 50}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": [b"x"]}), tmp_path / "b.parquet")
    monkeypatch.setattr(parquet, "_MAX_ROWS", 49)
    first, second = read(corpora.load(f"parquet:{tmp_path}"))
    assert "declares 50 rows" in (first.error or "")
    assert second.error is None
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-30] + b"\xff" * 22 + whole[-8:])  # the footer, not its length
    assert [raw.error is None for raw in read(corpora.load(f"parquet:{tmp_path}"))] == [False, False]


def test_a_key_nested_without_end_in_a_caption_is_that_items_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.json").write_text("[" * 100_000)
    (tmp_path / "b.jpg").write_bytes(b"x")
    first, second = read(corpora.load(f"folder:{tmp_path}"))
    assert "nested too deep" in (first.error or "")
    assert second.error is None


# -- files that are not what they seem ---------------------------------------------------------------------------------


def test_links_pipes_and_devices_in_a_folder_are_not_read(tmp_path: Path) -> None:
    secret, images = tmp_path / "secret.txt", tmp_path / "images"
    secret.write_text("the secret")
    images.mkdir()
    (images / "a.jpg").write_bytes(b"A")
    (images / "inside.jpg").symlink_to("a.jpg")
    (images / "outside.jpg").symlink_to(secret)
    (images / "words.jpg").write_bytes(b"W")
    (images / "words.txt").symlink_to(secret)
    (images / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(images / "pipe.jpg")
    found = {raw.source: raw for raw in read(corpora.load(f"folder:{images}"))}
    assert {name for name, raw in found.items() if raw.error is None} == {"a.jpg", "inside.jpg"}
    assert "no regular file" in (found["pipe.jpg"].error or "")
    assert not any("the secret" in str(raw) for raw in found.values())
    followed = {raw.source: raw for raw in read(corpora.load(f"folder:{images}?links=yes"))}
    assert (followed["outside.jpg"].image, followed["words.jpg"].captions) == (b"the secret", ("the secret",))
    assert "no regular file" in (followed["zero.jpg"].error or "")


def test_a_name_that_is_not_utf8_is_taken_in_and_shown(tmp_path: Path) -> None:
    from dataengine.ingest import IngestSettings, prepare
    from dataengine.manifest import Dataset
    from pipelines import look, page

    images = tmp_path / "images"
    images.mkdir()
    for name in (b"\xff.jpg", b"\xfe\x1b[2J.jpg"):
        Path(os.fsdecode(os.fsencode(images) + b"/" + name)).write_bytes(hostile.encode(hostile.image(), "JPEG"))
    Path(os.fsdecode(os.fsencode(images) + b"/\xfd.jpg")).write_bytes(b"no image")
    dataset = Dataset(tmp_path / "root")
    worker, tasks = prepare(dataset, f"folder:{images}", IngestSettings())
    for task in tasks:
        worker.start("cpu")(task)
    assert len(dataset.keys(0)) == 2
    assert "\\udcfd.jpg" in page.render(look.page(dataset, 4)).encode().decode()


# -- how far a table reaches -------------------------------------------------------------------------------------------


def test_a_table_reaches_no_file_outside_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"the secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"A")
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    cells = ["a.jpg", "../in/a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), f"file://{tmp_path}/secret.jpg"]
    cells += [f"local://{tmp_path}/secret.jpg", "link.jpg", "/dev/zero", "file:///etc/passwd", "a.jpg\0"]
    cells += [f"simplecache::file://{tmp_path}/secret.jpg", f"zip://a.jpg::{tmp_path}/secret.jpg", "memory://x"]
    cells += ["data:image/png;base64,AA==", "ftp://h/x.jpg", f"reference://x::{tmp_path}/secret.jpg", "dir::/etc"]
    cells += ["s3://bucket/x.jpg", "gs://bucket/x.jpg", "https://example.org/x.jpg", "HTTP://169.254.169.254/x"]
    pq.write_table(pa.table({"path": cells}), tmp_path / "in" / "t.parquet")
    found = read(corpora.load(f"parquet:{tmp_path}/in"))
    assert [raw.image for raw in found] == [b"A", b"A"] + [b""] * (len(cells) - 2)
    assert not any(raw.image.endswith(b"secret") for raw in found)
    assert all("fetch=yes" in (raw.error or "") for raw in found[-4:])
    allowed = read(corpora.load(f"parquet:{tmp_path}/in?files={tmp_path}"))
    assert allowed[2].image == b"the secret"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0",
     "[::ffff:127.0.0.1]", "2130706433", "[fd00::1]"],
)  # fmt: skip
def test_private_addresses_are_not_asked(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(ValueError, match=r"not public|no URL"):
        _reach.fetched(f"http://{host}/latest/meta-data/", private=False)


def test_public_and_private_addresses() -> None:
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111"):
        assert _reach.is_public(address)
    for address in ("64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::ffff:10.0.0.1", "224.0.0.1", "fe80::1%eth0"):
        assert not _reach.is_public(address)
