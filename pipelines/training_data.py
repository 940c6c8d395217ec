"""The datasets of a training run, opened and held to what the run expects, so that it is refused before it begins.

All that is wrong is said at once: a run on many machines should not fail once for each mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataengine.manifest import Dataset, NotADataset
from dataengine.packed import Column, Packed
from model.batches import PackedDataset, spec_of
from model.masking import MaskingConfig, MixtureComponent
from model.spec import NUM_SENTINELS, SENTINEL_0, ModalitySpec
from pipelines.pack import CELL

RESERVED = SENTINEL_0 + NUM_SENTINELS
"""The first ids of a text vocabulary, which masking itself writes."""

_LOOKED_AT = 16
"""Rows at either end of a dataset whose ids are looked at."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A packed dataset, how often a sample is drawn from it, and its own mixture where it is not the run's."""

    root: str
    weight: float = 1.0
    masking: MaskingConfig | None = None


def refuse(problems: Sequence[str]) -> None:
    """ValueError with all of them, one a line; nothing happens when there is none."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} reasons not to train:\n" + "\n".join(f"- {said}" for said in problems))


def packed_shards(root: str) -> tuple[Packed, ...]:
    """The committed packed shards of a dataset; ValueError when there are none, or some cannot be read."""
    dataset = Dataset(root)
    records = [dataset.commit(CELL, shard) for shard in dataset.committed(CELL)]
    files = [dataset.store.local_path(r.file) for r in records if r is not None]
    if not files:
        raise ValueError(f"{root} holds no packed tokens; `dataengine pack` makes them")
    shards, wrong = [], []
    for file in files:
        try:
            shards.append(Packed(file))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"{root}: {len(wrong)} of {len(files)} packed shards cannot be read: {wrong[0]}")
    return tuple(shards)


def opened(sources: Sequence[Source]) -> tuple[PackedDataset, ...]:
    """All datasets; ValueError names every one that cannot be read, is of another version, or has no sample."""
    datasets, wrong = [], []
    for source in sources:
        try:
            dataset = PackedDataset(packed_shards(source.root), source.weight)
        except (ValueError, FileNotFoundError, NotADataset) as error:
            wrong.append(str(error))
            continue
        if not len(dataset):
            wrong.append(f"{source.root} is empty: its {len(dataset.shards)} packed shards hold no sample")
        datasets.append(dataset)
    if not sources:
        wrong.append("data is empty, expected at least one dataset")
    refuse(wrong)
    return tuple(datasets)


def columns_of(datasets: Sequence[PackedDataset]) -> dict[str, list[tuple[Column, str]]]:
    """The unlike columns of each name, with a shard that has it: more than one where datasets differ."""
    found: dict[str, dict[Column, str]] = {}
    for dataset in datasets:
        for shard in dataset.shards:
            for name, column in shard.columns.items():
                found.setdefault(name, {}).setdefault(column, shard.path)
    return {name: list(columns.items()) for name, columns in found.items()}


def merged(found: Mapping[str, Sequence[tuple[Column, str]]], names: Iterable[str], patch_size: int) -> list[str]:
    """What is wrong with columns of several datasets: other tokenizers or layouts under one name."""
    wrong = []
    for name in names:
        columns = found.get(name, ())
        for column, path in columns[1:]:
            first = columns[0][0]
            said = _unlike(first, column, patch_size)
            if said:
                wrong.append(
                    f"{name} of {path} was made by another tokenizer or layout than {name} of {columns[0][1]} "
                    f"({'; '.join(said)}): tokenise and pack both with the same one"
                )
                break
    return wrong


def _unlike(first: Column, other: Column, patch_size: int) -> list[str]:
    # Which variant is read and how texts are put together may differ: it is no business of the model's.
    seen = [vars(spec_of(column, patch_size)) for column in (first, other)]
    said = [f"{k} {v!r}, not {seen[0][k]!r}" for k, v in seen[1].items() if v != seen[0][k]]
    for what in ("tokenizer", "network"):
        before, now = getattr(first, what), getattr(other, what)
        if before and now and before != now:
            said.append(f"{what} {now:.12}, not {before:.12}")
    return said


def vocabulary_problems(datasets: Sequence[PackedDataset], specs: Sequence[ModalitySpec]) -> list[str]:
    """Vocabularies too small: for the reserved ids of texts, or for ids in the first and the last rows of a dataset."""
    wrong = [
        f"{spec.name}: a vocabulary of {spec.vocab_size}, expected at least the {RESERVED} reserved ids of texts"
        for spec in specs
        if spec.kind == "sequence" and spec.vocab_size < RESERVED
    ]
    sizes = {spec.name: spec.vocab_size for spec in specs if spec.is_target}
    for dataset in datasets:
        for name, (largest, path) in _largest_ids(dataset, sizes).items():
            if largest >= sizes[name]:
                wrong.append(f"{name} of {path}: id {largest}, expected less than its vocabulary of {sizes[name]}")
    return wrong


def _largest_ids(dataset: PackedDataset, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    ends = [shard for shard in dataset.shards if len(shard)]
    largest: dict[str, tuple[int, str]] = {}
    for shard in dict.fromkeys((ends[0], ends[-1])):
        rng = np.random.default_rng(0)
        rows = sorted({*range(min(_LOOKED_AT, len(shard))), *range(max(0, len(shard) - _LOOKED_AT), len(shard))})
        there = [name for name in names if name in shard.columns]
        for row in rows:
            for name, value in shard.row(row, rng, there).items():
                if value is not None and len(value):
                    ids = np.concatenate(value) if isinstance(value[0], list) else np.asarray(value)
                    found = int(ids.max()) if len(ids) else 0
                    if found > largest.get(name, (-1, ""))[0]:
                        largest[name] = (found, shard.path)
    return largest


def mixture_problems(
    sources: Sequence[Source],
    datasets: Sequence[PackedDataset],
    masking: MaskingConfig,
    inputs: Sequence[ModalitySpec],
    outputs: Sequence[ModalitySpec],
) -> list[str]:
    """Concentrations that select nothing, or what the model does not have.

    A component must find an input and a target in one dataset at least, a dataset must get a target from one component,
    and each modality must be drawn on its side. Concentration 0 draws nothing, though ml-4m takes a table of zeros as
    an even split.
    """
    sides = {"input": {s.name for s in inputs}, "target": {s.name for s in outputs}}
    everywhere = sides["input"] | sides["target"]
    targets = {s.name for s in (*inputs, *outputs) if s.is_target}
    drawn: dict[str, set[str]] = {"input": set(), "target": set()}
    wrong: dict[str, None] = {}
    used: dict[tuple[str, int, str], bool] = {}
    for source, dataset in zip(sources, datasets, strict=True):
        there = {name for shard in dataset.shards for name in shard.columns} & everywhere
        own = masking if source.masking is None else source.masking
        which = "masking" if source.masking is None else f"masking of {source.root}"
        found: set[str] = set()
        for i, component in enumerate(own.components):
            for side, alphas in _sides(component):
                positive = {name for name in there if alphas.get(name, 0) > 0}
                if side == "target":
                    positive &= targets
                wrong |= dict.fromkeys(
                    f"{which}: component {i} draws {name} as {side}, which is no {side} of the model"
                    for name in sorted(positive - sides[side])
                )
                chosen = positive & sides[side]
                drawn[side] |= chosen
                needed = side == "target" or own.input_tokens[1] > 0
                key = (which, i, side)
                used[key] = used.get(key, False) or bool(chosen) or not needed
                if side == "target":
                    found |= chosen
        if not found:
            wrong[f"{which}: no component draws a target that {source.root} holds ({', '.join(sorted(there))})"] = None
    for (which, i, side), selects in used.items():
        if not selects:
            wrong[f"{which}: component {i} selects no {side} in any dataset that it is for"] = None
    for side, names in sides.items():
        kind = "inputs" if side == "input" else "outputs"
        for name in sorted(names - drawn[side]):
            wrong[f"{name} is one of the {kind}, and no component draws it as {side}"] = None
    return list(wrong)


def _sides(component: MixtureComponent) -> tuple[tuple[str, Mapping[str, float]], ...]:
    return ("input", component.input_alphas), ("target", component.target_alphas)


def restricted(
    masking: MaskingConfig, inputs: Sequence[ModalitySpec], outputs: Sequence[ModalitySpec]
) -> MaskingConfig:
    """The mixture without concentrations of what could be drawn and the model cannot take or predict.

    They are 0 (`mixture_problems` refuses others), which in ml-4m's arithmetic is drawn once in many million samples;
    there the model leaves it out. Modalities that can never be a target keep their share of the budget, as in ml-4m.
    """
    held_in, held_out = {s.name for s in inputs}, {s.name for s in outputs}
    never = {s.name for s in (*inputs, *outputs) if not s.is_target}
    return replace(
        masking,
        components=tuple(
            replace(
                c,
                input_alphas={n: a for n, a in c.input_alphas.items() if n in held_in},
                target_alphas={n: a for n, a in c.target_alphas.items() if n in held_out | never},
            )
            for c in masking.components
        ),
    )
