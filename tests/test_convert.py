"""Converting ml-4m's tars: which shards are there already, and which have become others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dataengine import codecs, shards
from dataengine.manifest import Dataset
from dataengine.shards import Member
from pipelines import convert
from pipelines.train import packed_shards


def test_other_ids_of_the_same_size_are_converted_anew(tmp_path: Path) -> None:
    tar, out = tmp_path / "tok_rgb@224" / "shard-00000.tar", Dataset(tmp_path / "out")
    tar.parent.mkdir()

    def write(number: int) -> None:
        ids = np.full((2, 196), number, np.int16)
        tar.write_bytes(shards.build_tar([Member("a", "npy", codecs.encode_npy(ids))]))

    def again() -> bool:
        worker, tasks = convert.prepare(out, str(tmp_path / "[tok_rgb@224]" / "shard-00000.tar"), text_tokenizer="")
        for task in tasks:
            worker.start("cpu")(task)
        return bool(tasks)

    write(3)
    before = tar.stat()
    assert [again(), again()] == [True, False]
    write(7)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert tar.stat().st_size == before.st_size
    assert [again(), again()] == [True, False]
    (shard,) = packed_shards(str(tmp_path / "out"))
    assert shard.row(0, np.random.default_rng(0), ["tok_rgb@224"])["tok_rgb@224"].tolist() == [7] * 196
