"""A mixture of datasets, as batches are drawn from it: which rows, what they hold, how they are masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import stored
from dataengine.stored import Shard
from model import order
from model.budgets import Bools, Ints, MaskingConfig, MixtureComponent, Plan, draw
from model.spec import ModalitySpec

if TYPE_CHECKING:
    from model.batches import PackedDataset

_SWITCHES = ("redistribute", "only_targets", "count_predictions")


@dataclass(frozen=True)
class Rows:
    """The rows of B samples, before any of their values is read.

    datasets: int64 (B,). shards, rows, crops: of each sample. present: bool (B, M), in the order of `names`.
    """

    names: tuple[str, ...]
    datasets: Ints
    shards: list[Shard]
    rows: list[int]
    crops: list[int]
    present: Bools

    def read(self, rng: np.random.Generator, wanted: Bools, values: Sequence[dict[str, Any]]) -> None:
        """Read what is `wanted` (B, M), as `Shard.row` has it, and put it into the `values` of each sample."""
        lines = zip(self.shards, self.rows, self.crops, wanted.tolist(), values, strict=True)
        for shard, row, crop, chosen, into in lines:
            if names := [*compress(self.names, chosen)]:
                found = shard.row(row, rng, names, crop)
                # Of several captions' embeddings, those of an empty one were drawn.
                into.update((name, () if value is None else value) for name, value in found.items())


class Mixture:
    """Datasets, in the proportion of their weights, in the order that a seed says."""

    def __init__(
        self, datasets: Sequence[PackedDataset], specs: Sequence[ModalitySpec], masking: MaskingConfig, seed: int
    ) -> None:
        self._specs = tuple(specs)
        self._names = tuple(spec.name for spec in specs)
        self._mixture = order.Mixture([d.weight for d in datasets], seed)
        self._sources = [_Source(dataset, self._names, seed, i) for i, dataset in enumerate(datasets)]
        own = [dataset.masking or masking for dataset in datasets]
        self._unlike = _distinct(own)
        self._which = np.array([self._unlike.index(config) for config in own])
        self.masking = together(self._unlike)
        """One that has the components of all."""

    def rows(self, first: int, count: int) -> Rows:
        """Of samples first to first + count - 1."""
        datasets, positions = self._mixture.at(first, count)
        present = np.zeros((count, len(self._names)), bool)
        shards: list[Any] = [None] * count
        rows, crops = np.empty(count, np.int64), np.empty(count, np.int64)
        for number in np.unique(datasets).tolist():
            (members,) = np.nonzero(datasets == number)
            source = self._sources[number]
            found, rows[members], crops[members], present[members] = source.at(positions[members])
            for member, shard in zip(members.tolist(), found, strict=True):
                shards[member] = shard
        return Rows(self._names, datasets, shards, rows.tolist(), crops.tolist(), present)

    def plan(self, rng: np.random.Generator, rows: Rows, lengths: Ints | None) -> Plan:
        """Budgets, by the own masking of each dataset; the components are those of `masking`."""
        if len(self._unlike) == 1:
            return draw(rng, self._specs, self.masking, rows.present, lengths)
        shape = rows.present.shape
        plan = Plan(np.empty(shape[0], np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        first = 0
        for number, masking in enumerate(self._unlike):
            (members,) = np.nonzero(self._which[rows.datasets] == number)
            held = None if lengths is None else lengths[members]
            part = draw(rng, self._specs, masking, rows.present[members], held)
            plan.components[members] = part.components + first
            plan.inputs[members], plan.targets[members] = part.inputs, part.targets
            first += len(masking.components)
        return plan


class _Source:
    """A dataset as it is drawn from."""

    def __init__(self, dataset: PackedDataset, names: tuple[str, ...], seed: int, number: int) -> None:
        self._shards = dataset.shards
        sizes = [len(shard) for shard in dataset.shards]
        self._stream = order.Stream(sizes, seed, number, window=dataset.window, repeats=dataset.repeats)
        self._crops = np.array([shard.num_crops for shard in dataset.shards], np.uint64)
        self._names = names
        self._announced: tuple[int, int] | None = None

    def at(self, positions: Ints) -> tuple[list[Shard], Ints, Ints, Bools]:
        """Shards, rows, crops and what is there, (n, M), of positions of the stream."""
        self._fetch_ahead(int(positions[-1]))
        numbers, rows, turns = self._stream.at(positions)
        crops = (turns % self._crops[numbers]).astype(np.int64)
        present = np.zeros((len(rows), len(self._names)), bool)
        for number in np.unique(numbers).tolist():
            (members,) = np.nonzero(numbers == number)
            shard = self._shards[number]
            held = [name in shard.columns for name in self._names]
            table = shard.present([*compress(self._names, held)])
            present[members[:, None], np.flatnonzero(held)] = table[rows[members]]
        return [self._shards[number] for number in numbers.tolist()], rows, crops, present

    def _fetch_ahead(self, position: int) -> None:
        """When a window begins, its shards and those of the next one are called for, where they are far away."""
        place = self._stream.window(position)
        if place != self._announced:
            self._announced = place
            for shards in self._stream.shards_from(position):
                stored.prefetch(self._shards[number] for number in shards)


def together(configs: Sequence[MaskingConfig]) -> MaskingConfig:
    """The components of all, within the ranges of all; ValueError when their switches differ."""
    first = configs[0]
    for name in _SWITCHES:
        if any(getattr(config, name) != getattr(first, name) for config in configs):
            raise ValueError(
                f"masking of several datasets, some with {name} and some without, expected the same in all"
            )
    return replace(
        first,
        components=tuple(component for config in configs for component in config.components),
        input_tokens=_range([config.input_tokens for config in configs]),
        target_tokens=_range([config.target_tokens for config in configs]),
    )


def _distinct(configs: Sequence[MaskingConfig]) -> list[MaskingConfig]:
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


def _range(ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def problems(datasets: Sequence[PackedDataset], specs: Sequence[ModalitySpec], masking: MaskingConfig) -> list[str]:
    """What is wrong with a mixture: datasets without samples, alphas that select nothing; empty when nothing is.

    Each component must name an input and a target that one of its datasets holds; each dataset must get a target.
    """
    if not datasets:
        return ["no datasets, expected at least one"]
    found = [f"{dataset.name} is empty, expected samples" for dataset in datasets if not len(dataset)]
    is_target = {spec.name: spec.is_target for spec in specs}
    own = [dataset.masking or masking for dataset in datasets]
    held = [{name for shard in dataset.shards for name in shard.columns} & is_target.keys() for dataset in datasets]
    for dataset, config, there in zip(datasets, own, held, strict=True):
        if len(dataset) and not any(_selected(c, there, is_target)["target"] for c in config.components):
            named = ", ".join(sorted(there)) or "none of the modalities"
            found.append(f"the target alphas of no component name a modality of {dataset.name}, which holds {named}")
    for config in _distinct(own):
        there = set().union(*(names for names, other in zip(held, own, strict=True) if other == config))
        for i, component in enumerate(config.components):
            selected = _selected(component, there, is_target)
            for side, most in (("input", config.input_tokens[1]), ("target", config.target_tokens[1])):
                if most and not selected[side]:
                    alphas = component.input_alphas if side == "input" else component.target_alphas
                    named = ", ".join(alphas) or "nothing"
                    found.append(f"component {i}: its {side} alphas name {named}, which no dataset holds as {side}")
    return found


def _selected(component: MixtureComponent, there: set[str], is_target: dict[str, bool]) -> dict[str, set[str]]:
    targets = {name for name in component.target_alphas if is_target.get(name, False)}
    return {"input": there & component.input_alphas.keys(), "target": there & targets}
