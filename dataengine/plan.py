"""From wanted modalities to the cells to do: who computes what from what, in which order, and what is done already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dataengine import provenance
from dataengine.labeler import Labeler
from dataengine.manifest import Conflict, Dataset
from dataengine.shards import shard_name
from dataengine.work import LabelGroup, Task


@dataclass(frozen=True)
class LabelPlan:
    """Labelers in dependency order, the wanted modalities, and for each shard the cells still to do."""

    labelers: tuple[Labeler, ...]
    wanted: tuple[str, ...]
    tasks: tuple[Task, ...]
    num_done: int

    def group(self, root: str) -> LabelGroup:
        """All of it as one group: one process decodes an image once and runs every labeler on it."""
        return LabelGroup(root, self.labelers)

    @property
    def num_cells(self) -> int:
        """How many cells are to do."""
        return sum(len(task.specs) for task in self.tasks)


def order(wanted: Sequence[str], labelers: Iterable[Labeler], present: Iterable[str]) -> list[Labeler]:
    """The labelers that `wanted` needs, each after those that make its inputs.

    `labelers` are tried in their order; the first that emits a modality makes it. ValueError when nothing makes a
    modality or labelers wait for one another.
    """
    makers: dict[str, Labeler] = {}
    for labeler in labelers:
        for modality in labeler.emits:
            makers.setdefault(modality, labeler)
    ordered: list[Labeler] = []
    ready = set(present)

    def visit(modality: str, path: tuple[str, ...]) -> None:
        maker = makers.get(modality)
        if modality in path:
            raise ValueError(f"modalities wait for one another: {' <- '.join((*path, modality))}")
        if maker is None:
            if modality in ready:
                return
            raise ValueError(
                f"nothing makes {modality!r}"
                + (f" (an input of {path[-1]!r})" if path else "")
                + f"; there are labelers for: {', '.join(sorted(makers))}"
            )
        if maker in ordered:
            return
        for needed in maker.inputs:
            if needed not in ready or needed in wanted:
                visit(needed, (*path, modality))
        ordered.append(maker)

    for modality in wanted:
        visit(modality, ())
    return ordered


def plan_labels(
    dataset: Dataset,
    wanted: Sequence[str],
    labelers: Iterable[Labeler],
    replace: Collection[str | tuple[str, int]] = (),
) -> LabelPlan:
    """The cells that are wanted, or needed for wanted ones, and not committed; Conflict names those made otherwise.

    The columns, or (column, shard) cells, of `replace` are planned as if they were not there; nothing is deleted.
    """
    ingested = dataset.plan.ingested
    taken = [m for m in wanted if m in ingested]
    if taken:
        raise ValueError(f"{', '.join(taken)}: written at ingest, not by a labeler")
    shards = dataset.committed("rgb")
    complete = {m for m in dataset.modalities() if m not in replace and set(dataset.committed(m)) >= set(shards)}
    ordered = order(wanted, labelers, complete)
    names = {m for labeler in ordered for m in labeler.emits}
    needed = {m for labeler in ordered for m in labeler.inputs} & names
    cells = set(wanted) | needed
    tasks, num_done = [], 0
    for shard in shards:
        specs = _specs(dataset, ordered, shard)
        todo = {}
        for modality in sorted(cells):
            gone = modality in replace or (modality, shard) in replace
            record = None if gone else dataset.commit(modality, shard)
            if record is None:
                todo[modality] = specs[modality]
            elif record.spec != specs[modality]:
                raise Conflict(
                    f"{modality}/{shard_name(shard)} was made with other settings, weights or inputs (identity "
                    f"{record.spec[:12]}, now {specs[modality][:12]}); --replace {modality} makes it anew"
                )
            else:
                num_done += 1
        if todo:
            tasks.append(Task(shard, todo))
    return LabelPlan(tuple(ordered), tuple(wanted), tuple(tasks), num_done)


def _specs(dataset: Dataset, ordered: Sequence[Labeler], shard: int) -> dict[str, str]:
    """The identity of every cell of a shard that these labelers make, from the identities of what they read."""
    known: dict[str, str] = {}

    def spec_of(modality: str) -> str:
        if modality not in known:
            record = dataset.commit(modality, shard)
            if record is None:
                raise Conflict(f"{modality}/{shard_name(shard)} is an input and is not committed")
            known[modality] = record.spec
        return known[modality]

    for labeler in ordered:
        inputs = {m: spec_of(m) for m in sorted({"rgb", *labeler.inputs})}
        for modality in labeler.emits:
            known[modality] = provenance.spec({**labeler.identity(), "emits": modality}, inputs)
    return known
