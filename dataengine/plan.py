"""From wanted modalities to the cells to do: who computes what from what, in which order, and what is done already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dataengine import provenance
from dataengine.index import Index
from dataengine.labeler import Labeler
from dataengine.manifest import Conflict, Dataset
from dataengine.shards import shard_name
from dataengine.work import LabelGroup, Task


@dataclass(frozen=True)
class LabelPlan:
    """Labelers in dependency order, the wanted modalities, and for each shard the cells still to do.

    `num_rows` is the number of samples of every shard, whether there is anything to do in it or not.
    """

    labelers: tuple[Labeler, ...]
    wanted: tuple[str, ...]
    tasks: tuple[Task, ...]
    num_done: int
    num_rows: Mapping[int, int] = field(default_factory=dict)

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
    index: Index | None = None,
) -> LabelPlan:
    """The cells that are wanted, or needed for wanted ones, and not committed; Conflict names those made otherwise.

    The columns, or (column, shard) cells, of `replace` are planned as if they were not there; nothing is deleted.
    `index` is one that was opened just now, where there is one.
    """
    ingested = dataset.plan.ingested
    taken = [m for m in wanted if m in ingested]
    if taken:
        raise ValueError(f"{', '.join(taken)}: written at ingest, not by a labeler")
    index = Index.open(dataset.store) if index is None else index
    num_rows = index.num_samples("rgb")
    complete = {m for m in index.modalities() if m not in replace and num_rows.keys() <= set(index.shards(m))}
    ordered = order(wanted, labelers, complete)
    names = {m for labeler in ordered for m in labeler.emits}
    needed = {m for labeler in ordered for m in labeler.inputs} & names
    cells = sorted(set(wanted) | needed)
    made = [_Identity(labeler, cells) for labeler in ordered]
    read = {m for identity in made for m in identity.inputs}
    committed = {m: index.specs(m) for m in {*cells, *read}}
    tasks, num_done = [], 0
    for shard in num_rows:
        specs = _specs(made, committed, shard)
        todo = {}
        for modality in cells:
            gone = modality in replace or (modality, shard) in replace
            there = None if gone else committed[modality].get(shard)
            if there is None:
                todo[modality] = specs[modality]
            elif there != specs[modality]:
                raise Conflict(
                    f"{modality}/{shard_name(shard)} was made with other settings, weights or inputs (identity "
                    f"{there[:12]}, now {specs[modality][:12]}); --replace {modality} makes it anew"
                )
            else:
                num_done += 1
        if todo:
            tasks.append(Task(shard, todo))
    return LabelPlan(tuple(ordered), tuple(wanted), tuple(tasks), num_done, num_rows)


class _Identity:
    """What of a labeler's identity all shards share: asked for once, because weights may take minutes to hash."""

    def __init__(self, labeler: Labeler, cells: Collection[str]) -> None:
        parts = {m: labeler.of_column(m) for m in labeler.emits if m in cells}
        identities = {key: part.identity() for key, part in {id(part): part for part in parts.values()}.items()}
        self.inputs = sorted({"rgb", *labeler.inputs})
        self.reads = {m: sorted({"rgb", *part.inputs}) for m, part in parts.items()}
        self.specs = {m: provenance.specs({**identities[id(part)], "emits": m}) for m, part in parts.items()}


def _specs(made: Sequence[_Identity], committed: Mapping[str, Mapping[int, str]], shard: int) -> dict[str, str]:
    """The identity of every cell of a shard that these labelers make, from the identities of what they read."""
    known: dict[str, str] = {}
    for labeler in made:
        for m in labeler.inputs:
            if m not in known:
                if shard not in committed[m]:
                    raise Conflict(f"{m}/{shard_name(shard)} is an input and is not committed")
                known[m] = committed[m][shard]
        made_of = {m: {i: known[i] for i in read} for m, read in labeler.reads.items()}
        known.update((m, spec_of(made_of[m])) for m, spec_of in labeler.specs.items())
    return known
