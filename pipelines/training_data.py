"""The datasets of a training run, opened and held to what the run expects, so that it is refused before it begins.

All that is wrong is said at once: a run on many machines should not fail once for each mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dataengine.packed import Column
from dataengine.stored import Shard
from model import mixture
from model.batches import PackedDataset, spec_of
from model.masking import MaskingConfig
from model.spec import NUM_SENTINELS, SENTINEL_0, ModalitySpec, union
from pipelines import sources
from pipelines.sources import Ml4m

RESERVED = SENTINEL_0 + NUM_SENTINELS
"""The first ids of a text vocabulary, which masking itself writes."""

_LOOKED_AT = 16
"""Rows at either end of a dataset whose ids are looked at."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A packed dataset and how samples are drawn from it.

    `weight` is how often, `masking` its own mixture where it is not the run's. A row is taken `repeats` times in a
    row, masked anew each time; the rows of `window` shards are mixed (0: of all). `tars` says how ml-4m's tars are
    read, where `root` is not packed.
    """

    root: str
    weight: float = 1.0
    masking: MaskingConfig | None = None
    repeats: int = 1
    window: int = 16
    tars: Ml4m | None = None


def refuse(problems: Sequence[str]) -> None:
    """ValueError with all of them, one a line; nothing happens when there is none."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{len(problems)} reasons not to train:\n" + "\n".join(f"- {said}" for said in problems))


def packed_shards(root: str) -> tuple[Shard, ...]:
    """The shards of a root, of which none is read yet; ValueError when there are none."""
    return sources.shards(root)


def opened(data: Sequence[Source]) -> tuple[PackedDataset, ...]:
    """All datasets; ValueError names every one that cannot be read, is of another version, or has no sample."""
    datasets, wrong = [], []
    for source in data:
        try:
            shards = sources.shards(source.root, tars=source.tars)
            dataset = PackedDataset(shards, source.weight, source.masking, source.repeats, source.window)
        except (ValueError, FileNotFoundError) as error:
            wrong.append(f"{source.root}: {error}")
            continue
        if not len(dataset):
            wrong.append(f"{source.root} is empty: its {len(dataset.shards)} packed shards hold no sample")
        datasets.append(dataset)
    if not data:
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
    data: Sequence[Source],
    datasets: Sequence[PackedDataset],
    masking: MaskingConfig,
    inputs: Sequence[ModalitySpec],
    outputs: Sequence[ModalitySpec],
) -> list[str]:
    """Concentrations that select nothing, or what the model does not have; see also `model.mixture.problems`.

    Each modality must be drawn on its side. Concentration 0 draws nothing here, though ml-4m takes a table of zeros as
    an even split.
    """
    own = [_positive(masking if source.masking is None else source.masking) for source in data]
    alone = [replace(dataset, masking=config) for dataset, config in zip(datasets, own, strict=True)]
    wrong = mixture.problems(alone, union(inputs, outputs), _positive(masking))
    everywhere = {s.name for s in (*inputs, *outputs)}
    targets = {s.name for s in (*inputs, *outputs) if s.is_target}
    for side, held in (("input", {s.name for s in inputs}), ("target", {s.name for s in outputs})):
        drawn = set()
        for dataset, config in zip(datasets, own, strict=True):
            there = {name for shard in dataset.shards for name in shard.columns} & everywhere
            for i, component in enumerate(config.components):
                alphas = component.input_alphas if side == "input" else component.target_alphas
                found = there & alphas.keys() & (targets if side == "target" else everywhere)
                wrong += [
                    f"component {i} draws {name} as {side}, which is no {side} of the model"
                    for name in sorted(found - held)
                ]
                drawn |= found
        wrong += [f"{name} is never drawn as {side}: no component names it" for name in sorted(held - drawn)]
    return list(dict.fromkeys(wrong))


def _positive(masking: MaskingConfig) -> MaskingConfig:
    """The same without concentrations of 0."""
    components = tuple(
        replace(
            c,
            input_alphas={name: alpha for name, alpha in c.input_alphas.items() if alpha > 0},
            target_alphas={name: alpha for name, alpha in c.target_alphas.items() if alpha > 0},
        )
        for c in masking.components
    )
    return replace(masking, components=components)


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
