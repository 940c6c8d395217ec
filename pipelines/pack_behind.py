"""Tokenise and pack in one run: each shard is packed once its tokens are committed, while they are in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dataengine import modalities
from dataengine.manifest import Dataset
from dataengine.modalities import TextLike
from dataengine.plan import LabelPlan
from dataengine.schedule import Stage, single
from dataengine.work import Report, Task, Work
from pipelines import label, pack, running
from pipelines.pack import CELL
from pipelines.running import Summary


@dataclass(frozen=True)
class PackBehind:
    """The packing worker of a run that is making the columns: what a shard is packed from is looked up when it is."""

    root: str
    text_tokenizer: str
    pixels: int
    encoded: bool
    columns: tuple[str, ...]

    def start(self, device: str) -> Work:
        """Nothing to load before the columns are there."""
        dataset = Dataset(self.root)

        def work(task: Task) -> Report:
            worker, tasks = pack.prepare(
                dataset, self.text_tokenizer, self.pixels, self.columns, (task.shard,), encoded=self.encoded
            )
            return worker.start(device)(tasks[0]) if tasks else Report(task.shard, (), 0.0)

        return work


def tokenize_and_pack(
    dataset: Dataset, plan: LabelPlan, text_tokenizer: str, pixels: int, encoded: bool = False, **where: Any
) -> Summary:
    """Run a plan of tokenizers, and pack every shard that has all of its tokens: equal to `pack` after `tokenize`."""
    columns = to_pack(dataset, plan)
    if not columns:
        raise ValueError("nothing to pack: every column of tokens or text is incomplete or comes from random weights")
    if any(isinstance(modalities.load(column), TextLike) for column in columns):
        pack.Vocabulary.of(text_tokenizer)  # missing, it is missed now and not after the first shard
    pack.image_columns(pixels, encoded)  # and what cannot be asked for is said now
    worker = PackBehind(dataset.store.url, text_tokenizer, pixels, encoded, tuple(columns))
    tasks = [Task(shard, {CELL: ""}) for shard in dataset.committed("rgb")]

    def after(stages: Sequence[Stage]) -> list[Stage]:
        behind = single(worker, tasks, plan.num_rows, name=CELL)
        return [replace(behind, needs=tuple(stage.name for stage in stages), seconds_per_row=0.001)]

    if plan.tasks:
        return label.execute(dataset, plan, what="tokenize", after=after, **where)
    return running.execute(dataset, after(()), what="pack", **{**where, "device": "cpu"})


def to_pack(dataset: Dataset, plan: LabelPlan) -> list[str]:
    """The columns that `pack` will take once the plan is done: the tokens it makes, and what else is there."""
    ingested = set(dataset.committed("rgb"))
    made = {column: x for x in plan.labelers for column in x.emits}
    out = []
    for column in {*dataset.modalities(), *made} - {CELL}:
        maker = made.get(column)
        if modalities.split(column)[1] or not pack.can_be_packed(column):
            continue
        if maker is None:
            good = set(dataset.committed(column)) >= ingested and not pack.is_random(dataset, column)
        else:
            part = maker.of_column(column)
            good = not part.random and not any(pack.is_random(dataset, m) for m in part.inputs if m not in made)
        if good:
            out.append(column)
    return sorted(out)
