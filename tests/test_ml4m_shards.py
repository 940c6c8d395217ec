"""ml-4m's tars are trained on as they are: every row is that of the packed shard made of them, draw for draw."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import _opened, _tar_index, export, local, ml4m, shards
from dataengine.manifest import Dataset
from dataengine.ml4m_shards import TarShard
from dataengine.shard_cache import ShardCache
from dataengine.shards import Member
from dataengine.storage import Store
from dataengine.stored import Shard
from model.batches import PackedDataset, TokenBatches, spec_of
from model.masking import MaskingConfig, MixtureComponent
from model.tokenizers.text import TextTokenizer
from pipelines import convert, pack_text, sources
from pipelines.sources import Ml4m
from tests import hostile, ml4m_inputs
from tests.faulty_s3 import s3_server
from tests.ml4m_inputs import INPUTS

# botocore and moto still use names that newer Pythons and libraries deprecate.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FOLDERS = (*INPUTS, "crop_settings")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of all inputs: two shards of two samples, of which one has no caption."""
    folder = tmp_path_factory.mktemp("ml4m")
    dataset = ml4m_inputs.made(folder, count=4, shard_size=2, num_crops=2)
    export.export(dataset, str(folder / "tars"), ml4m.layout(dataset), reader=ml4m.Reader())
    TextTokenizer.tiny().save(folder / "text.json")
    return folder


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    for registry in (_opened.here, _opened.held, _opened.tars):
        registry.clear()


def told(base: Path, **changes: Any) -> Ml4m:
    return Ml4m(**{"text_tokenizer": str(base / "text.json"), "pixels": 32, **changes})


def same(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        return one == two
    return (one is None and two is None) or (one.dtype == two.dtype and np.array_equal(one, two))


def hold_equal(found: tuple[Shard, ...], expected: tuple[Shard, ...]) -> None:
    assert [s.keys for s in found] == [s.keys for s in expected]
    for one, two in zip(found, expected, strict=True):
        names = list(two.columns)
        assert (one.columns, one.num_crops, len(one)) == (two.columns, two.num_crops, len(two))
        assert np.array_equal(one.present(names), two.present(names))
        assert np.array_equal(one.lengths(names), two.lengths(names))
        for row in range(len(one)):
            for seed in range(3):
                there = one.row(row, np.random.default_rng(seed), names)
                here = two.row(row, np.random.default_rng(seed), names)
                assert list(there) == list(here)
                assert [n for n in names if not same(there[n], here[n])] == []
            for crop in range(two.num_crops):
                there = one.row(row, np.random.default_rng(0), names[::-1], crop)
                here = two.row(row, np.random.default_rng(0), names[::-1], crop)
                assert [n for n in names if not same(there[n], here[n])] == []


@pytest.mark.parametrize("aligned", [False, True])
def test_rows_are_those_of_the_packed_shards_of_the_same_tars(base: Path, tmp_path: Path, aligned: bool) -> None:
    source = f"{base}/tars/[{','.join(FOLDERS)}]/shard-{{00000..00001}}.tar"
    worker, tasks = convert.prepare(
        Dataset(tmp_path / "out"),
        source,
        text_tokenizer=str(base / "text.json"),
        pixels=32,
        encoded=True,
        aligned=aligned,
    )
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    packed = sources.shards(str(tmp_path / "out"))
    cache = ShardCache(str(tmp_path / "cache"))
    found = sources.shards(source, cache, told(base, aligned_captions=aligned))
    assert len({c.kind for c in found[0].columns.values()}) == 4
    hold_equal(found, packed)
    again: tuple[Shard, ...] = pickle.loads(pickle.dumps(found))
    hold_equal(again, packed)


def test_tars_and_texts_are_mixed_in_one_batch(base: Path, tmp_path: Path) -> None:
    (tmp_path / "c4.jsonl").write_bytes(b'{"text": "a dog and two balls"}\n' * 5)
    worker, tasks, _ = pack_text.prepare(
        Dataset(tmp_path / "c4"), [str(tmp_path / "c4.jsonl")], text_tokenizer=str(base / "text.json"), rows=3
    )
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    cache = ShardCache(str(tmp_path / "cache"))
    roots = (f"{base}/tars/[rgb,crop_settings,caption,tok_rgb@224]/shard-0000{{0..1}}.tar", str(tmp_path / "c4"))
    datasets = tuple(PackedDataset(sources.shards(root, cache, told(base)), 1.0) for root in roots)
    columns = datasets[0].shards[0].columns
    specs = tuple(spec_of(columns[name], 16) for name in ("caption", "rgb@32", "tok_rgb@224"))
    alphas = {s.name: 1.0 for s in specs}
    masking = MaskingConfig(
        components=(MixtureComponent(input_alphas=alphas, target_alphas=alphas),),
        input_tokens=(16, 16),
        target_tokens=(16, 16),
    )
    batches = TokenBatches(datasets=datasets, specs=specs, masking=masking, batch_size=16, seed=0)
    first, again = batches(0), pickle.loads(pickle.dumps(batches))(0)
    assert set(first.enc_mod.unique().tolist()) >= {0, 2}
    assert np.array_equal(first.enc_ids, again.enc_ids)


def test_a_folder_of_folders_is_found_and_indexed_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(str(tmp_path / "cache"))
    found = sources.shards(str(base / "tars"), cache, told(base))
    assert [len(s) for s in found] == [2, 2]
    assert set(found[0].columns) == {*INPUTS, "rgb@32"} - {"rgb"}
    assert found[0].path.startswith(f"{base}/tars/[")
    assert found[0].path.endswith("]/shard-00000.tar")
    present = found[0].present(["caption", "metadata", "tok_rgb@224"])
    assert present.shape == (2, 3)
    _opened.here.clear()
    monkeypatch.setattr(_tar_index, "made", lambda *_: pytest.fail("indexed again"))
    monkeypatch.setattr(TarShard, "_batch", lambda *_, **__: pytest.fail("made again"))
    again = sources.shards(str(base / "tars"), cache, told(base))
    assert np.array_equal(again[0].present(["caption", "metadata", "tok_rgb@224"]), present)
    with pytest.raises(ValueError, match="read-only"):
        present[0, 0] = False
    monkeypatch.undo()
    for file in (tmp_path / "cache" / "tars").iterdir():
        if file.is_file():
            file.write_bytes(file.read_bytes()[:100])  # a damaged cache is made anew
    _opened.here.clear()
    third = sources.shards(str(base / "tars"), cache, told(base))
    assert np.array_equal(third[0].present(["caption", "metadata", "tok_rgb@224"]), present)


def test_tars_of_a_store_are_read_through_the_cache(base: Path, tmp_path: Path) -> None:
    folders = ("caption", "tok_depth@224")
    here = f"{base}/tars/[{','.join(folders)}]/shard-0000{{0..1}}.tar"
    with s3_server("corpus"):
        store = Store("s3://corpus/tars")
        for folder in folders:
            for name in ("shard-00000.tar", "shard-00001.tar"):
                store.put(f"{folder}/{name}", (base / "tars" / folder / name).read_bytes())
        cache = ShardCache(str(tmp_path / "cache"))
        found = sources.shards("s3://corpus/tars", cache, told(base, pixels=0))
        hold_equal(found, sources.shards(here, cache, told(base, pixels=0)))
        assert sum(p.is_file() for p in cache.base.iterdir()) == 4
        named = sources.shards(f"s3://corpus/{here.removeprefix(f'{base}/')}", cache, told(base, pixels=0))
        assert [s.keys for s in named] == [s.keys for s in found]
        store.put("caption/shard-00001.tar", shards.build_tar([Member("other", "txt", b"a")]))
        with pytest.raises(ValueError, match=r"not aligned: at position 0 it has .*'other'"):
            sources.shards("s3://corpus/tars", cache, told(base, pixels=0))


def tar(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def ids(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def test_one_tar_of_several_modalities_under_other_names(base: Path, tmp_path: Path) -> None:
    members = []
    for key in ("a", "b"):
        for name, dtype in (("tok_depth@224", np.int64), ("mine", np.uint16)):
            members.append((f"x/{key}.{name}.npy", ids(np.full((1, 196), ord(key), dtype))))
    members.append(("x/README", b"of no sample"))
    (tmp_path / "s.tar").write_bytes(tar(*members))
    told_as = Ml4m(folders=(("mine", "tok_rgb@224"),))
    (shard,) = sources.shards(str(tmp_path / "s.tar"), ShardCache(str(tmp_path / "cache")), told_as)
    assert list(shard.columns) == ["tok_depth@224", "tok_rgb@224"]
    assert shard.keys == ["x/a", "x/b"]
    row = shard.row(1, np.random.default_rng(0), ["tok_rgb@224"])["tok_rgb@224"]
    assert (row.dtype, set(row.tolist())) == (np.int64, {ord("b")})
    with pytest.raises(IndexError, match=r"row 2 under crop 0: .*/s.tar has 2 rows, 1 crops"):
        shard.row(2, np.random.default_rng(0), [], 0)
    with pytest.raises(KeyError, match="caption"):
        shard.row(0, np.random.default_rng(0), ["caption"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short"),
        (hostile.member(b"a.npy", b"x") + hostile.tar_header(b"b.npy", hostile.wide(-512)), "-512 bytes"),
        (hostile.tar_header(b"a.npy", 1 << 40) + bytes(1024), "ends within"),
        (hostile.tar_header(b"x", 1 << 30, b"x") + bytes(1024), "extended header"),
        (hostile.member(b"a.npy", b"\x93NUMPY") + hostile.END, "no readable .npy"),
        (hostile.member(b"a.npy", ids(np.full((1, 196), -3))) + hostile.END, r"expected ids .* in 0..65535"),
        (hostile.member(b"a.txt", b"x") + hostile.END, "no readable .npy"),
        (
            hostile.member(b"a.npy", ids(np.zeros((1, 7), int))) + hostile.END,
            "with 7 tokens is not among the published",
        ),
        (hostile.END, "holds no sample"),
    ],
)
def test_hostile_tars_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "tok_rgb@224").mkdir()
    (tmp_path / "tok_rgb@224" / "s.tar").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        sources.shards(str(tmp_path), ShardCache(str(tmp_path / "cache")))


def test_a_pickle_among_the_tokens_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    values = np.empty(1, object)
    values[0] = Harm()
    (tmp_path / "s.tar").write_bytes(
        tar(("a.tok_rgb@224.npy", ids(np.zeros((1, 196), np.int16))), ("b.tok_rgb@224.npy", ids(values)))
    )
    (shard,) = sources.shards(str(tmp_path / "s.tar"), ShardCache(str(tmp_path / "cache")))
    assert shard.row(0, np.random.default_rng(0), ["tok_rgb@224"])["tok_rgb@224"].sum() == 0
    with pytest.raises(ValueError, match=r"s.tar: tok_rgb@224 of 'b': .*Object arrays cannot be loaded"):
        shard.row(1, np.random.default_rng(0), ["tok_rgb@224"])
    assert not (tmp_path / "harm").exists()


def test_a_sample_of_other_crops_or_tokens_than_the_first_is_refused(tmp_path: Path) -> None:
    shapes = ((2, 196), (3, 196), (2, 195))
    members = [(f"{i}.tok_rgb@224.npy", ids(np.zeros(shape, np.int16))) for i, shape in enumerate(shapes)]
    (tmp_path / "s.tar").write_bytes(tar(*members))
    (shard,) = sources.shards(str(tmp_path / "s.tar"), ShardCache(str(tmp_path / "cache")))
    rng = np.random.default_rng(0)
    assert shard.row(0, rng, ["tok_rgb@224"], 1)["tok_rgb@224"].shape == (196,)
    with pytest.raises(ValueError, match="tok_rgb@224 of 1: 3 crops, expected 2"):
        shard.row(1, rng, ["tok_rgb@224"], 1)
    with pytest.raises(ValueError, match=r"tok_rgb@224: expected \(1, 196\), got \(1, 195\)"):
        shard.row(2, rng, ["tok_rgb@224"], 1)


def test_tars_that_change_or_are_not_the_same_are_told(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"))
    first = tar(("a.npy", ids(np.zeros((1, 196), np.int16))), ("b.npy", ids(np.ones((1, 196), np.int16))))
    for folder in ("tok_rgb@224", "tok_depth@224"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.tar").write_bytes(first)
    (shard,) = sources.shards(str(tmp_path), cache)
    (tmp_path / "tok_rgb@224" / "s.tar").write_bytes(first[:-1024])
    _opened.tars.clear()
    with pytest.raises(ValueError, match=r"tok_rgb@224/s.tar has changed since it was listed: start again"):
        shard.row(0, np.random.default_rng(0), ["tok_rgb@224"])
    with pytest.raises(FileNotFoundError, match=r"tok_rgb@224/t.tar is not there"):
        sources.shards(f"{tmp_path}/[tok_rgb@224,tok_depth@224]/t.tar", cache)
    (tmp_path / "tok_rgb@224" / "t.tar").write_bytes(first)
    with pytest.raises(ValueError, match=r"t.tar is in tok_rgb@224 or in tok_depth@224, but not in both"):
        sources.shards(str(tmp_path), cache)


def test_roots_that_hold_nothing_to_train_on_are_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root holds no packed tokens: `dataengine pack` makes them"):
        sources.shards(str(base / "root"))
    with pytest.raises(ValueError, match=r"holds neither packed tokens .* nor ml-4m's tars"):
        sources.shards(str(tmp_path))
