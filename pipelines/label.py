"""Label: from modality names and a recipe to labelers, and from labelers to committed cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dataengine import plugins
from dataengine.groups import Group
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.plan import LabelPlan, plan_labels
from pipelines import config
from pipelines.pack import CELL, is_random


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
    """Every labeler of the registry with its default settings (published checkpoints)."""
    return [plugins.load("labelers", name, Labeler)() for name in plugins.names("labelers")]


def plan(
    dataset: Dataset,
    modalities: Sequence[str],
    recipe: str | LabelRun | None,
    settings: Sequence[str] = (),
    replace: Sequence[str | tuple[str, int]] = (),
) -> LabelPlan:
    """The label plan of some modalities; with none named, all that the recipe's labelers emit."""
    run = run_of(recipe)
    candidates = [*_set(run.labelers, settings), *default_labelers()]
    wanted = list(modalities) or [m for labeler in run.labelers for m in labeler.emits]
    if not wanted:
        raise ValueError("name the modalities to label, or a recipe with labelers")
    offered = {m for labeler in candidates for m in labeler.emits}
    for m in wanted:
        if m not in offered and m not in dataset.plan.ingested:
            known = sorted(offered)
            raise ValueError(
                f"nothing makes {m!r}{plugins.nearest(m, known)}; there are labelers for: {', '.join(known)}"
            )
    stray = [m for m in replace if isinstance(m, str) and m not in wanted]
    if stray:
        raise ValueError(f"--replace {', '.join(stray)}: not among the modalities to label, {', '.join(wanted)}")
    meaningful = _meaningful(dataset, wanted, candidates)
    return plan_labels(dataset, wanted, [labeler.adapted(meaningful) for labeler in candidates], replace)


def _meaningful(dataset: Dataset, wanted: Sequence[str], candidates: Sequence[Labeler]) -> set[str]:
    """The modalities that exist or will, without those of random weights: an optional input must mean something."""
    there = {m for m in dataset.modalities() if m != CELL and not is_random(dataset, m)}
    for m in wanted:
        maker = next((c for c in candidates if m in c.emits), None)
        if maker is not None and not maker.random:
            there.add(m)
    return there


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
        out = [config.override(labeler, [rest]) if labeler.name == name else labeler for labeler in out]
    return out


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
