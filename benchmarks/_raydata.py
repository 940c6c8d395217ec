"""The job of the ceiling as a Ray Data pipeline, as well tuned as we know how; the layout and the bytes are the same.

read_binary_files (one tar a row) -> map_batches (actors: decode, twelve values, encode) -> write_datasink (twelve
tars a block). Ray Data has no fork to several sinks, so the twelve columns travel as one block, and one sink writes
them all.

The tuning, and why:

- one file a read task and one tar a batch, so that a block is a shard from beginning to end and nothing is regrouped;
- no limit on the size of a block: at 128 MiB Ray Data would cut a shard in two;
- Arrow tables in and out, binary columns: no conversion of rows, and the sink writes from the object store without a
  copy;
- decoding, values and encoding in one actor pool of fixed size, so that pixels never cross the object store;
- the pool takes nearly all cores and reading and writing the rest in small shares, since both mostly wait for the disk;
- it waits for all actors before it begins, and each has two tars at hand at most: none hoards the last ones;
- progress bars, statistics and logs off.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink

from benchmarks._null import MODALITIES, mark, value_sets
from benchmarks._plain import Cell, encoded
from dataengine import modalities


class Encode:
    """Tars of images in, one row an image out, with the bytes of its labels in a column for each modality."""

    def __init__(self, marks: str) -> None:
        value_sets()
        mark(marks)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """One table a tar."""
        for path, data in zip(batch["path"].to_pylist(), batch["bytes"], strict=True):
            keys, rows = zip(*encoded(io.BytesIO(data.as_buffer())), strict=True)
            columns = [pa.array([row[i][1] for row in rows], pa.large_binary()) for i in range(len(MODALITIES))]
            shard = int(Path(path).stem.removeprefix("shard-"))
            yield pa.table([pa.array(keys), pa.array([shard] * len(keys)), *columns], ["key", "shard", *MODALITIES])


class Tars(Datasink[None]):
    """Writes each block, which is a whole shard, as twelve tars."""

    def __init__(self, out: str) -> None:
        self._out = Path(out)

    def write(self, blocks: Iterable[Block], ctx: Any) -> None:
        """The bytes go from the object store to the files without a copy in between."""
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            shard, keys = table["shard"][0].as_py(), table["key"].to_pylist()
            for modality in MODALITIES:
                cell, suffix = Cell(self._out, modality, shard), modalities.load(modality).suffix
                for key, value in zip(keys, table[modality], strict=True):
                    cell.add(key, suffix, memoryview(value.as_buffer()))
                cell.commit()


class EncodeAndWrite:
    """Everything in one function, tars included, and one row a shard out: Ray Data as a mere queue, without a sink."""

    def __init__(self, out: str, marks: str) -> None:
        self._encode, self._tars = Encode(marks), Tars(out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The shards that were written."""
        self._tars.write(self._encode(batch), None)
        return batch.select(["path"])


def run(root: Path, out: Path, shards: Sequence[int], cores: int, marks: Path, *, sink: bool) -> None:
    """The whole job on this machine: with a sink, or written from within the function. Ray is left running."""
    start(cores)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None
    context.wait_for_min_actors_s = 120
    paths = [str(root / "rgb" / f"shard-{shard:05d}.tar") for shard in shards]
    read = ray.data.read_binary_files(paths, include_paths=True, override_num_blocks=len(paths), num_cpus=0.05)
    pool: dict[str, Any] = {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(size=cores, max_tasks_in_flight_per_actor=2),
        "num_cpus": 0.8,
    }
    if sink:
        labelled = read.map_batches(Encode, fn_constructor_args=(str(marks),), **pool)
        labelled.write_datasink(Tars(str(out)), ray_remote_args={"num_cpus": 0.1}, concurrency=cores)
    else:
        read.map_batches(EncodeAndWrite, fn_constructor_args=(str(out), str(marks)), **pool).materialize()


def start(cores: int) -> None:
    """A Ray of our own on this machine, quiet."""
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
