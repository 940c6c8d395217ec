"""Packed shards: what is written is what is read, under the crop that was asked for, and nothing else is believed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dataengine import _mapped, _packing, packed
from dataengine.packed import Column, Packed

SHA = "a" * 64
COLUMNS = (
    Column(name="tok_depth@16", kind="tokens", max_tokens=4, vocab_size=100, side=16, grid=(2, 2), tokenizer=SHA),
    Column(name="rgb@16", kind="pixels", max_tokens=256, side=16),
    Column(name="metadata", kind="sequence", max_tokens=40, vocab_size=5000, chunked=True),
    Column(name="det", kind="sequence", max_tokens=40, vocab_size=5000, choice="crop"),
    Column(name="caption", kind="sequence", max_tokens=40, vocab_size=5000, draw="caption"),
    Column(name="t5_caption", kind="embeddings", max_tokens=77, dim=8, draw="caption", network=SHA),
)
NAMES = [c.name for c in COLUMNS]
KEYS = ["a", "b", "c"]


def example_rows() -> dict[str, list[Any]]:
    rng = np.random.default_rng(0)
    return {
        "tok_depth@16": [rng.integers(0, 100, (2, 4)).astype(np.uint16), None, np.zeros((2, 4), np.uint16)],
        "rgb@16": list(rng.integers(0, 256, (3, 2, 16, 16, 3), np.uint8)),
        "metadata": [[[[1, 2], [3, 4], [5, 6]]], [[[7, 8]]], None],
        "det": [[[[10, 11]], [[12]]], [[[]], [[13]]], [[[14], np.array([17, 18])], [[15]]]],
        "caption": [[[[0]], [[1]], [[2]]], [[[0]]], None],
        "t5_caption": [
            [np.full((n + 1, 8), n, np.float16) for n in range(3)],
            [np.zeros((0, 8), np.float16)],
            [rng.standard_normal((2, 8)).astype(np.float16)],
        ],
    }


def written(tmp_path: Path) -> tuple[Packed, dict[str, list[Any]]]:
    rows = example_rows()
    path = tmp_path / "shard.arrow"
    path.write_bytes(packed.write(COLUMNS, 2, KEYS, rows))
    return Packed(path), rows


def test_rows_come_back_under_the_crop_asked_for(tmp_path: Path) -> None:
    shard, rows = written(tmp_path)
    rng = np.random.default_rng(1)
    assert shard.keys == KEYS
    for crop in (0, 1):
        row = shard.row(0, rng, NAMES, crop=crop)
        assert row["tok_depth@16"].dtype == np.int64
        assert np.array_equal(row["tok_depth@16"], rows["tok_depth@16"][0][crop])
        assert np.array_equal(row["rgb@16"], rows["rgb@16"][0][crop])
        assert row["det"] == [[10, 11], [12]][crop]
    assert shard.row(1, rng, NAMES, crop=0)["tok_depth@16"] is None
    assert shard.row(2, rng, NAMES, crop=0)["metadata"] is None
    assert shard.row(1, rng, ["det"], crop=0)["det"] == []
    assert shard.row(2, rng, ["det"], crop=0)["det"] == [14, 17, 18]
    for index, crop in ((3, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError, match="3 rows, 2 crops"):
            shard.row(index, rng, ["det"], crop=crop)


def test_embeddings_and_pixels_are_views_of_the_file(tmp_path: Path) -> None:
    shard, rows = written(tmp_path)
    row = shard.row(2, np.random.default_rng(1), NAMES, crop=1)
    assert row["t5_caption"].dtype == np.float16
    assert np.array_equal(row["t5_caption"], rows["t5_caption"][2][0])
    for name in ("t5_caption", "rgb@16"):
        assert row[name].base is not None
        assert not row[name].flags.writeable
    assert shard.row(1, np.random.default_rng(1), ["t5_caption"])["t5_caption"] is None


def test_crops_variants_and_orders_are_drawn_evenly(tmp_path: Path) -> None:
    shard, _ = written(tmp_path)
    rng = np.random.default_rng(2)
    drawn = [shard.row(0, rng, ["metadata", "det", "caption"]) for _ in range(1200)]
    orders = [tuple(map(tuple, r["metadata"])) for r in drawn]
    assert all(sorted(order) == [(1, 2), (3, 4), (5, 6)] for order in orders)
    # Each of six orders 200 times with a deviation of 13, a caption 400 with 16, a crop 600 with 17.
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(n - 200) for n in counts) < 60
    assert max(abs(sum(r["caption"] == [i] for r in drawn) - 400) for i in range(3)) < 75
    assert abs(sum(r["det"] == [12] for r in drawn) - 600) < 80


def test_a_caption_and_its_embedding_are_drawn_together(tmp_path: Path) -> None:
    shard, _ = written(tmp_path)
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(60):
        row = shard.row(0, rng, ["t5_caption", "caption"])
        assert row["t5_caption"][0, 0] == row["caption"][0] == len(row["t5_caption"]) - 1
        seen.add(row["caption"][0])
    assert seen == {0, 1, 2}


def test_what_a_modality_draws_itself_is_drawn_by_it(tmp_path: Path) -> None:
    poses = Column(name="human_poses", kind="sequence", max_tokens=275, codec="human_poses_tokens", choice="crop")
    person = [[1], [2], [3], [4], [5]]
    path = tmp_path / "poses.arrow"
    path.write_bytes(packed.write([poses], 1, ["a"], {"human_poses": [[[*person, [6], [7], [8], [9], [10]]]]}))
    rng = np.random.default_rng(0)
    seen = {tuple(Packed(path).row(0, rng, ["human_poses"])["human_poses"]) for _ in range(50)}
    assert {(s[0], s[5]) for s in seen} == {(1, 6)}  # persons stay, and so does what begins one
    assert len({s[1:5] for s in seen}) > 10
    assert all(sorted(s) == list(range(1, 11)) for s in seen)


def test_equal_rows_are_equal_bytes_and_a_shard_travels_by_its_path(tmp_path: Path) -> None:
    shard, rows = written(tmp_path)
    assert packed.write(COLUMNS, 2, KEYS, rows) == Path(shard.path).read_bytes()
    again = pickle.loads(pickle.dumps(shard))
    assert len(again) == 3
    assert again.columns == {c.name: c for c in COLUMNS}
    assert packed.check(Path(shard.path).read_bytes()) == tuple(KEYS)


def test_the_pieces_are_the_file_that_arrow_writes_and_its_columns_are_not_copied() -> None:
    batch = packed.build(COLUMNS, 2, KEYS, {name: iter(values) for name, values in example_rows().items()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    pieces = packed.pieces(batch)
    assert b"".join(pieces) == sink.getvalue().to_pybytes() == packed.write(COLUMNS, 2, KEYS, example_rows())
    assert packed.check(batch) == tuple(KEYS)
    pixels = batch.column("rgb@16").values.buffers()[1]
    assert pixels.address in [np.frombuffer(p, np.uint8).ctypes.data for p in pieces]


def test_iterators_are_used_one_after_the_other_and_must_have_all_keys() -> None:
    order = []

    def values(name: str, items: list[Any]) -> Iterator[Any]:
        for item in items:
            order.append(name)
            yield item

    packed.build(COLUMNS, 2, KEYS, {n: values(n, v) for n, v in example_rows().items()})
    assert order == [n for n in NAMES for _ in KEYS]
    for column in COLUMNS:
        for items in (example_rows()[column.name][:2], [*example_rows()[column.name], None]):
            with pytest.raises(ValueError, match="zip"):
                packed.build([column], 2, KEYS, {column.name: iter(items)})


@pytest.mark.parametrize(("name", "most"), [("caption", 2), ("caption", 3), ("det", 4), ("t5_caption", 5)])
def test_more_than_offsets_can_count_is_refused_with_the_remedy(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, rows = [c for c in COLUMNS if c.name == name], example_rows()
    monkeypatch.setattr(_packing, "_MOST", most)
    said = (
        rf"{name}: more than {most} numbers.*: make smaller shards \(`dataengine ingest` with a smaller --shard-size\)"
    )
    with pytest.raises(ValueError, match=said):
        packed.build(columns, 2, KEYS, rows)
    monkeypatch.setattr(_packing, "_MOST", 100)
    assert len(packed.build(columns, 2, KEYS, rows)) == 3


def test_values_that_do_not_fit_are_named_when_they_are_written() -> None:
    def write(name: str, value: Any) -> bytes:
        (column,) = (c for c in COLUMNS if c.name == name)
        return packed.write([column], 2, ["k"], {name: [value]})

    with pytest.raises(ValueError, match=r"tok_depth@16: expected \(2, 4\), got \(1, 4\)"):
        write("tok_depth@16", np.zeros((1, 4), np.uint16))
    with pytest.raises(ValueError, match=r"det of k: 1 variants, expected one for each of 2 crops"):
        write("det", [[[1]]])
    for piece in ([-1], [65536], [1.5], "ab"):
        with pytest.raises(ValueError, match=r"caption of k: expected numbers 0\.\.65535"):
            write("caption", [[piece]])
    with pytest.raises(ValueError, match=r"t5_caption of k: float16 \(2, 7\), expected float16 \(rows, 8\)"):
        write("t5_caption", [np.zeros((2, 7), np.float16)])


def test_columns_say_what_is_wrong_with_them() -> None:
    good = {"name": "x", "kind": "tokens", "max_tokens": 4}
    for change, said in (
        ({"kind": "words"}, "kind 'words'"),
        ({"choice": "all"}, "choice 'all'"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"kind": "pixels"}, "side 0"),
        ({"kind": "embeddings"}, "dim 0"),
        ({"grid": (2, 3)}, r"grid \(2, 3\), expected 4 tokens"),
        ({"tokenizer": "published"}, "tokenizer 'published', expected a sha256"),
    ):
        with pytest.raises(ValueError, match=said):
            Column(**{**good, **change})
    with pytest.raises(ValueError, match="depth is no modality that is read as text"):
        Column(name="depth", kind="sequence", max_tokens=4).source  # noqa: B018


def changed(data: bytes, change: dict[str, Any], first: dict[str, Any] | None = None) -> bytes:
    """The file with other words about it, and about its first column."""
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        batch = reader.get_batch(0)
    about = json.loads(batch.schema.metadata[b"dataengine.tokens"])
    about["columns"][0] |= first or {}
    schema = batch.schema.with_metadata({b"dataengine.tokens": json.dumps(about | change).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))
    out: bytes = sink.getvalue().to_pybytes()
    return out


def test_foreign_files_and_false_words_are_refused_on_opening(tmp_path: Path) -> None:
    data = packed.write(COLUMNS, 2, KEYS, example_rows())
    path = tmp_path / "other.arrow"
    for bad, said in (
        (changed(data, {"format": 1}), "token format 1, expected 2: `dataengine pack` makes it anew"),
        (changed(data, {"format": 3}), "token format 3, expected 2"),
        (changed(data, {"num_crops": 3}), "columns .* expected"),
        (changed(data, {"num_crops": "2"}), "num_crops '2'"),
        (changed(data, {"columns": []}), "columns .* expected"),
        (changed(data, {"columns": [{"name": "x"}]}), "no packed shard: (KeyError|TypeError)"),
        (changed(data, {}, {"max_tokens": 5, "grid": []}), "columns .* expected"),
        (changed(data, {}, {"codex": 1}), "no packed shard: TypeError"),
        (data[:-20], "other.arrow"),
        (b"", "other.arrow"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=said):
            Packed(path)
        with pytest.raises(ValueError, match=said.replace("other.arrow", "no packed shard")):
            packed.check(bad)


def test_what_others_have_made_is_held_to_the_format() -> None:
    poses = Column(name="human_poses", kind="sequence", max_tokens=275, codec="human_poses_tokens", vocab_size=50)
    sam = Column(name="sam_instance", kind="sequence", max_tokens=290, codec="sam_instance_tokens", vocab_size=50)
    any_det = Column(name="det", kind="sequence", max_tokens=9)
    t5 = Column(name="t5_caption", kind="embeddings", max_tokens=2, dim=1)
    one = np.ones((1, 1), np.float16)
    for column, value, said in (
        (COLUMNS[0], np.full((2, 4), 100, np.uint16), "tok_depth@16: id 100, expected less than 100"),
        (COLUMNS[2], [[[5000]]], "metadata: id 5000, expected less than 5000"),
        (poses, [[[1], [2], [3], [4], [50]]], "human_poses: id 50, expected less than 50"),
        (sam, [[[1], [2]]], "sam_instance: sam_instance_tokens cannot be assembled"),
        (t5, [np.ones((3, 1), np.float16)], "t5_caption: 3 rows, expected at most 2"),
        (t5, [one * np.float16(np.inf)], "t5_caption: expected finite numbers"),
    ):
        data = packed.write([column], 2, ["k"], {column.name: [value]})
        with pytest.raises(ValueError, match=said):
            packed.check(data)
    data = packed.write([any_det], 2, ["k", "l"], {"det": [[[[1]]], None]})
    assert packed.check(data) == ("k", "l")
    with pytest.raises(ValueError, match="det: 1 variants in a row, expected one for each of 2 crops"):
        packed.check(changed(data, {}, {"choice": "crop"}))


def test_presence_and_lengths_are_known_without_reading(tmp_path: Path) -> None:
    shard, _ = written(tmp_path)
    rng = np.random.default_rng(4)
    there, lengths = shard.present(NAMES), shard.lengths(NAMES)
    assert there.dtype == np.bool_
    assert there.tolist() == [[shard.row(i, rng, NAMES)[n] is not None for n in NAMES] for i in range(3)]
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [[4, 256, 6, 2, 1, 3], [0, 256, 2, 1, 1, 0], [4, 256, 0, 3, 0, 2]]
    assert shard.present(NAMES) is there
    assert shard.present(NAMES[::-1]).tolist() == there[:, ::-1].tolist()
    assert shard.present([]).shape == (3, 0)
    assert not there.flags.writeable
    with pytest.raises(KeyError, match="depth"):
        shard.present(["depth"])


def test_what_is_assembled_counts_as_the_most_and_shards_of_nothing_have_no_lengths(tmp_path: Path) -> None:
    poses = Column(name="human_poses", kind="sequence", max_tokens=275, codec="human_poses_tokens")
    path = tmp_path / "poses.arrow"
    path.write_bytes(packed.write([poses], 1, ["a", "b"], {"human_poses": [None, [[[1]] * 5]]}))
    assert Packed(path).lengths(["human_poses"]).tolist() == [[0], [275]]
    path = tmp_path / "none.arrow"
    path.write_bytes(packed.write(COLUMNS, 2, [], {n: [] for n in NAMES}))
    assert Packed(path).present(NAMES).shape == Packed(path).lengths(NAMES).shape == (0, 6)
    path = tmp_path / "null.arrow"
    path.write_bytes(packed.write(COLUMNS, 2, ["a"], {n: [None] for n in NAMES}))
    assert not Packed(path).present(NAMES).any()
    assert not Packed(path).lengths(NAMES).any()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much of files is mapped")
def test_a_process_keeps_no_more_of_a_shard_than_it_read_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped() -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    image = Column(name="rgb@256", kind="pixels", max_tokens=65536, side=256)
    value = np.full((1, 256, 256, 3), 7, np.uint8)
    path = tmp_path / "large.arrow"
    path.write_bytes(packed.write([image], 1, [str(i) for i in range(160)], {"rgb@256": [value] * 160}))
    shard, rng = Packed(path), np.random.default_rng(0)

    def grown() -> int:
        before = mapped()
        for index in range(160):
            assert shard.row(index, rng, ["rgb@256"])["rgb@256"].max() == 7
        return mapped() - before

    assert path.stat().st_size > 30 << 20
    monkeypatch.setattr(_mapped, "_READS", 16)
    assert grown() < 8 << 20
    held = shard.row(0, rng, ["rgb@256"])["rgb@256"]
    monkeypatch.setattr(_mapped, "_READS", 1)
    shard.row(1, rng, ["rgb@256"])
    assert held.max() == 7  # a view is still what it was
    monkeypatch.setattr(_mapped, "_READS", 1000)
    assert grown() > 20 << 20
