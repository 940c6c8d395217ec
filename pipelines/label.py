"""Label: from modality names and a recipe to labelers, and from labelers to committed cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from dataengine import plugins, versions
from dataengine.groups import Group, Node
from dataengine.index import Index
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.modalities import split
from dataengine.plan import LabelPlan, plan_labels
from dataengine.schedule import Stage
from dataengine.versions import Versioned
from pipelines import config, running
from pipelines.live import Prices
from pipelines.pack import CELL
from pipelines.running import Runner, Summary


@dataclass(frozen=True, kw_only=True)
class LabelRun:
    """A recipe for labelling: labelers with their settings, tried before the defaults of `labelers/`."""

    labelers: tuple[Labeler, ...] = ()
    groups: tuple[Group, ...] = ()
    """Labelers that share a process, with what they ask for, where the engine is not to choose it."""


def run_of(recipe: str | LabelRun | None) -> LabelRun:
    """The run that a recipe's name, a Python file or a run itself stands for; an empty one for None."""
    return recipe if isinstance(recipe, LabelRun) else LabelRun() if recipe is None else config.load(recipe, LabelRun)


def default_labelers() -> list[Labeler]:
    """Every labeler of the registry with its default settings (published checkpoints), alternatives last."""
    found = [plugins.load("labelers", name, Labeler)() for name in plugins.names("labelers")]
    return sorted(found, key=lambda labeler: labeler.alternative)


def candidates(recipe: str | LabelRun | None, settings: Sequence[str] = ()) -> list[Labeler]:
    """Every labeler there is, those that a recipe or settings (`det=dfine`, `sam.points_per_side=16`) name first."""
    chosen, settings = _choices(settings)
    return [*_set([*chosen.values(), *run_of(recipe).labelers], settings), *default_labelers()]


def plan(
    dataset: Dataset,
    modalities: Sequence[str],
    recipe: str | LabelRun | None,
    settings: Sequence[str] = (),
    replace: Sequence[str | tuple[str, int]] = (),
) -> LabelPlan:
    """The label plan of some modalities; with none named, all that the recipe's labelers emit."""
    run = run_of(recipe)
    chosen, settings = _choices(settings)
    settings, reads = _reads(settings)
    candidates = [*_set([*chosen.values(), *run.labelers], settings), *default_labelers()]
    wanted = list(modalities) or [m for labeler in run.labelers for m in labeler.emits]
    wanted += [column for column in chosen if column not in wanted]
    if not wanted:
        raise ValueError("name the modalities to label, or a recipe with labelers")
    for m in reads:
        if m not in wanted:
            raise ValueError(f"{m} is told what to read, and is not among the modalities to label: {', '.join(wanted)}")
    candidates = versions.offered(candidates, wanted, reads)
    offered = {m for labeler in candidates for m in labeler.emits}
    for m in wanted:
        if m in dataset.plan.ingested:  # said before any weights are looked for
            beside = f"; a version can stand beside it, as {m}@v2" if m in offered else ""
            raise ValueError(f"{m}: written at ingest, not by a labeler{beside}")
        if m not in offered:
            known = sorted(offered)
            raise ValueError(
                f"nothing makes {m!r}{plugins.nearest(m, known)}; there are labelers for: {', '.join(known)}"
            )
    stray = [m for m in replace if isinstance(m, str) and m not in wanted]
    if stray:
        raise ValueError(f"--replace {', '.join(stray)}: not among the modalities to label, {', '.join(wanted)}")
    index = Index.open(dataset.store)
    meaningful = _meaningful(index, wanted, candidates)
    return plan_labels(dataset, wanted, [labeler.adapted(meaningful) for labeler in candidates], replace, index)


def _meaningful(index: Index, wanted: Sequence[str], candidates: Sequence[Labeler]) -> set[str]:
    """The modalities that exist or will, without those of random weights: an optional input must mean something."""
    there = {m for m in index.modalities() if m != CELL and not index.totals(m).random}
    for m in wanted:
        maker = next((c for c in candidates if m in c.emits), None)
        if maker is not None and not maker.random:
            there.add(m)
    return there


def _choices(settings: Sequence[str]) -> tuple[dict[str, Labeler], list[str]]:
    """Who makes which column, as `det=dfine` or `det@v2=dfine` say it, and the other settings."""
    chosen: dict[str, Labeler] = {}
    rest = []
    for setting in settings:
        column, _, name = setting.partition("=")
        if "." in column:
            rest.append(setting)
            continue
        labeler = plugins.load("labelers", name, Labeler)()
        modality, version = split(column)
        if modality not in labeler.emits:
            raise ValueError(f"{setting}: {name} makes {', '.join(labeler.emits)}, not {modality}")
        chosen[column] = Versioned(inner=labeler, column_version=version) if version else labeler
    return chosen, rest


def _set(labelers: Sequence[Labeler], settings: Sequence[str]) -> list[Labeler]:
    """The labelers with `labeler.field=value` applied to every one of that name; a name not among them is added."""
    out = list(labelers)
    for setting in settings:
        name, _, rest = setting.partition(".")
        if not any(labeler.name == name for labeler in out):
            known = plugins.names("labelers")
            if name not in known:
                raise ValueError(f"unknown labeler {name!r}{plugins.nearest(name, known)} in {setting!r}")
            out.append(plugins.load("labelers", name, Labeler)())
        out = [_override(labeler, rest) if labeler.name == name else labeler for labeler in out]
    return out


def _override(labeler: Labeler, assignment: str) -> Labeler:
    if isinstance(labeler, Versioned):
        return dataclasses.replace(labeler, inner=_override(labeler.inner, assignment))
    return config.override(labeler, [assignment])


def _reads(settings: Sequence[str]) -> tuple[list[str], dict[str, tuple[tuple[str, str], ...]]]:
    """Settings of labelers, and of versions of columns: `sam_edge@v2.sam_instance=sam_instance@v2`, what one reads."""
    of_labelers: list[str] = []
    reads: dict[str, tuple[tuple[str, str], ...]] = {}
    for setting in settings:
        left, _, column = setting.partition("=")
        if "@" in left:
            version, _, name = left.rpartition(".")
            reads[version] = (*reads.get(version, ()), (name, column))
        else:
            of_labelers.append(setting)
    return of_labelers, reads


def execute(
    dataset: Dataset,
    made: LabelPlan,
    pins: Sequence[Group] = (),
    *,
    runner: Runner,
    workers: int | None,
    device: str,
    max_bad_fraction: float,
    what: str = "label",
    replace: Sequence[str] = (),
    prices: Prices | None = None,
    batch_seconds: float = running.BATCH_SECONDS,
    after: Callable[[Sequence[Stage]], Sequence[Stage]] = lambda stages: (),
) -> Summary:
    """Run a label plan: packed into groups by what is known of its labelers and of the nodes there are.

    `after` adds stages that the same run goes through, such as one that needs those of the labelers.
    """
    if not made.tasks:
        return Summary(what, 0)
    from pipelines import planning

    with ExitStack() as stack:
        nodes: list[Node] = []
        where = pick_device(device)
        if runner == "ray":
            from dataengine import actors

            stack.enter_context(actors.connected())
            nodes = [
                Node(cpus=n.get("CPU", 0.0), gpus=n.get("GPU", 0.0), memory_bytes=int(n.get("memory", 0)))
                for n in actors.nodes().values()
            ]
            if device == "auto" and any(node.gpus for node in nodes):
                where = "cuda"  # a driver without a GPU may lead a cluster that has some
        stages = planning.stages(dataset, made, pins, device=where, workers=workers, nodes=nodes, replace=replace)
        alone = planning.kept(made.labelers, where)
        return running.execute(
            dataset,
            [*stages, *after(stages)],
            what=what,
            runner=runner,
            workers=workers,
            device=where,
            max_bad_fraction=max_bad_fraction,
            recipe=[{**x.identity(), "random": x.random} for x in made.labelers],
            prices=prices,
            light={name: max(b.images_per_second for b in seen.batches) for name, seen in alone.items()},
            batch_seconds=batch_seconds,
        )


def replace(dataset: Dataset, modalities: Sequence[str]) -> int:
    """Uncommit whole columns so that they can be made anew; the number of cells forgotten."""
    ingested = dataset.plan.ingested
    for m in modalities:
        if m in ingested:
            raise ValueError(f"{m} was ingested: it cannot be replaced, make another root")
    cells = [(m, shard) for m in modalities for shard in dataset.committed(m)]
    for m, shard in cells:
        dataset.uncommit(m, shard)
    return len(cells)


def pick_device(wanted: str) -> str:
    """`auto` is cuda where there is one, else cpu."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
