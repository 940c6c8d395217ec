"""Batches of raw labels as a tokenizer takes them: crops drawn by each modality's own geometry, things one by one.

Every batch is a pure function of (seed, number of the batch), whatever was read before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dataengine import modalities
from dataengine.geometry import Crop, crop_settings, crops_of, cut
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.modalities import human_poses, sam_instance_tokens
from dataengine.sample import Sample
from model.domains import Domain
from pipelines import tokenize_instances

CROPS = "crop_settings"
CACHED_BYTES = 512 * 2**20
"""How much of the shards read last stays in memory, as they are stored."""

Cells = Mapping[str, bytes]
"""The members of one sample, by column."""


@dataclass(frozen=True)
class Draw:
    """The random choices of one sample. Without `rng` none: the first, central crop, and nothing mirrored.

    `min_scale` None draws one of the stored crops; else a new one, of at least that share of the image's area, of an
    aspect of 3/4 to 4/3, mirrored by a coin (torchvision's RandomResizedCrop, as ml-4m trains its tokenizers).
    """

    rng: np.random.Generator | None
    min_scale: float | None = None

    def crop(self, stored: bytes, size: Callable[[], tuple[int, int]]) -> Crop:
        """A crop of an image of `size()` pixels (h, w), whose crop_settings are `stored`."""
        if self.rng is None or self.min_scale is None:
            rows = crops_of(modalities.load(CROPS).decode(stored))
            return rows[0] if self.rng is None else rows[int(self.rng.integers(len(rows)))]
        return crops_of(crop_settings(self.rng, *size(), 2, self.min_scale))[1]

    def coin(self) -> bool:
        """Heads or tails."""
        return self.rng is not None and bool(self.rng.integers(2))


class Source(ABC):
    """What a tokenizer of one modality is trained on: values, any number, of each sample."""

    columns: tuple[str, ...]

    @abstractmethod
    def values(self, cells: Cells, draw: Draw, side: int) -> list[Any]:
        """The values of a sample under one draw, for maps of `side` pixels; none if nothing is left."""

    def finished(self, values: Sequence[Any], side: int) -> list[Any]:
        """What a batch of `values` becomes before it is the domain's."""
        return list(values)


class Maps(Source):
    """Maps, cropped; vectors and features that are stored, as they are."""

    def __init__(self, modality: str) -> None:
        self.codec = modalities.load(modality)
        self.columns = (modality, CROPS)

    def values(self, cells: Cells, draw: Draw, side: int) -> list[Any]:
        """One."""
        value = self.codec.decode(cells[self.columns[0]])
        if self.codec.kind != "map":
            return [value]
        size = value.shape[0], value.shape[1]
        return [self.codec.crop(value, draw.crop(cells[CROPS], lambda: size), size, side)]


class Taught(Source):
    """Features of the crops themselves, which a labeler of rgb makes on the way."""

    columns = ("rgb", CROPS)

    def __init__(self, modality: str, teacher: Labeler, device: str) -> None:
        if modality not in teacher.emits or set(teacher.inputs) != {"rgb"}:
            raise ValueError(
                f"teacher {teacher.name}, which makes {', '.join(teacher.emits)} of {', '.join(teacher.inputs)}: "
                f"expected one that makes {modality} of rgb"
            )
        if teacher.random:
            raise ValueError(f"teacher {teacher.name} has random weights: nothing is trained on what it says")
        self.modality, self.teacher, self.device = modality, teacher, device
        self._loaded: dict[int, Loaded] = {}

    def values(self, cells: Cells, draw: Draw, side: int) -> list[Any]:
        """The pixels of one crop, at their own size."""
        image = modalities.load("rgb").decode(cells["rgb"])
        return [cut(image, draw.crop(cells[CROPS], lambda: image.shape[:2]))]

    def finished(self, values: Sequence[Any], side: int) -> list[Any]:
        """Their features, of `side` pixels."""
        if side not in self._loaded:
            self._loaded[side] = self._at(side).load(self.device)
        samples, at_once = [Sample(str(i), {"rgb": pixels}) for i, pixels in enumerate(values)], self.teacher.batch_size
        parts = (self._loaded[side](samples[i : i + at_once]) for i in range(0, len(samples), at_once))
        return [features[self.modality] for part in parts for features in part]

    def _at(self, side: int) -> Labeler:
        if "side" in {f.name for f in fields(self.teacher)}:
            return replace(self.teacher, side=side)  # type: ignore[call-arg]
        return self.teacher


class Masks(Source):
    """The mask of each thing in its box, bool (64, 64); of the polygons of `sam_mask`, or those of `sam_instance`."""

    def __init__(self, column: str) -> None:
        self.codec = modalities.load(column)
        self.columns = (column, CROPS, "rgb")

    def values(self, cells: Cells, draw: Draw, side: int) -> list[Any]:
        """Of things within one crop."""
        if side != tokenize_instances.MASK_SIDE:
            raise ValueError(f"masks of {side} pixels, expected {tokenize_instances.MASK_SIDE}: model.image_size")
        things = self.codec.decode(cells[self.columns[0]])
        polygons = [
            np.array(thing["points"], np.int32) if "points" in thing else tokenize_instances.outline(thing)
            for thing in things
        ]
        crop = draw.crop(cells[CROPS], lambda: modalities.load("rgb").decode(cells["rgb"]).shape[:2])
        inside = tokenize_instances.cropped(polygons, crop, sam_instance_tokens.SIDE)
        return [tokenize_instances.mask_in_box(points) for points in inside]


class Persons(Source):
    """The pose of each person, float32 (207,), mirrored by a coin: crops change nothing else of it."""

    def __init__(self, modality: str) -> None:
        self.codec = modalities.load(modality)
        self.columns = (modality,)

    def values(self, cells: Cells, draw: Draw, side: int) -> list[Any]:
        """Of all persons."""
        value = self.codec.decode(cells[self.columns[0]])
        if not isinstance(value, dict):
            return []
        poses = np.array(value["pred_smpl_params"]["body_pose"], np.float32)
        if draw.coin():
            poses = human_poses.mirrored(poses)
        return list(poses.reshape(len(poses), -1).astype(np.float32))


def source_of(modality: str, datasets: Sequence[Dataset], teacher: Labeler | None, device: str = "cpu") -> Source:
    """Where the values of a modality come from: a teacher, if there is one, else its labels, which must exist."""
    if teacher is not None:
        return Taught(modality, teacher, device)
    name = modalities.split(modality)[0]
    if name == "sam_mask":
        whole = [d for d in datasets if not d.committed(modality)]
        return Masks("sam_instance" if whole and modality == name else modality)
    return Persons(modality) if name == "human_poses" else Maps(modality)


class Example(NamedTuple):
    """A value that is looked at: the sample's key and image under the same crop, for things the whole image."""

    key: str
    value: Any
    rgb: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LabelBatches:
    """Called with a number, a batch of network input. Shards, and samples in them, come in a new order every epoch.

    `sides` is what a batch's maps may have for a side: one is drawn for each optimizer step of `batches_per_step`. Of a
    sample with several things one is drawn. A batch is of one shard; the last one of a shard is filled from its start.
    """

    datasets: tuple[Dataset, ...]
    source: Source
    domain: Domain
    sides: tuple[int, ...]
    batch_size: int
    seed: int
    min_scale: float | None = None
    batches_per_step: int = 1
    cached_bytes: int = CACHED_BYTES
    _cache: dict[tuple[int, int], list[Cells]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, number: int) -> Tensor:
        """The batch of that number."""
        side = self.side_at(number // self.batches_per_step)
        return self.domain.to_network(self.source.finished(self._drawn(number, side), side))

    def side_at(self, step: int) -> int:
        """The side of an optimizer step's maps, by the seed and the step alone: the same in every process and run."""
        return int(np.random.default_rng([self.seed, step, 3]).choice(self.sides))

    def examples(self, limit: int | None = None) -> list[Example]:
        """The first values of all shards in their order, under the central crop and at the largest side."""
        side, out = max(self.sides), list[Example]()
        for d, shard, _ in self._cells:
            keys = self.datasets[d].keys(shard)
            for cells in self._members(d, shard):
                found = self.source.values(cells, Draw(None), side)
                key, rgb = keys[int.from_bytes(cells["row"])], _central(cells, side)
                out += [Example(key, value, rgb) for value in found]
                if limit is not None and len(out) >= limit:
                    break
            if limit is not None and len(out) >= limit:
                break
        values = self.source.finished([one.value for one in out[:limit]], side) if out else []
        return [one._replace(value=value) for one, value in zip(out, values, strict=False)]

    def _drawn(self, number: int, side: int) -> list[Any]:
        draw = Draw(np.random.default_rng([self.seed, number]), self.min_scale)
        assert draw.rng is not None
        cells = self._cells
        epoch, place = divmod(number, sum(n for _, _, n in cells))
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(cells)).tolist()
        while place >= cells[order[0]][2]:
            place -= cells[order[0]][2]
            order.append(order.pop(0))
        for i in order:
            dataset, shard, _ = cells[i]
            members = self._members(dataset, shard)
            shuffled = np.random.default_rng([self.seed, epoch, 2, i]).permutation(len(members))
            found: list[Any] = []
            for at in range(len(members) * self.batch_size):
                one = members[shuffled[(place * self.batch_size + at) % len(members)]]
                values = self.source.values(one, draw, side)
                if values:
                    found.append(values[int(draw.rng.integers(len(values))) if len(values) > 1 else 0])
                if len(found) == self.batch_size:
                    return found
                if at + 1 == len(members) and not found:
                    break  # nothing in this shard: the next one
            if found:
                return found
        raise ValueError(f"no {self.source.columns[0]} in any sample of {self._where}, expected some")

    @property
    def _where(self) -> str:
        return ", ".join(d.store.name for d in self.datasets)

    @cached_property
    def _cells(self) -> list[tuple[int, int, int]]:
        """(dataset, shard, number of batches) of every committed shard with at least one valid value."""
        cells = []
        column = self.source.columns[0]
        for d, dataset in enumerate(self.datasets):
            for shard in dataset.committed(column):
                record = dataset.commit(column, shard)
                valid = 0 if record is None else record.num_samples - len(record.invalid)
                if valid:
                    cells.append((d, shard, -(-valid // self.batch_size)))
        if not cells:
            raise ValueError(f"no valid {column} in {self._where}")
        return cells

    def _members(self, dataset: int, shard: int) -> list[Cells]:
        """The valid samples of a shard, as stored, each with its `row` in it."""
        if (dataset, shard) not in self._cache:
            found = self._read(self.datasets[dataset], shard)
            held = sum(_bytes(members) for members in self._cache.values()) + _bytes(found)
            while self._cache and held > self.cached_bytes:
                held -= _bytes(self._cache.pop(next(iter(self._cache))))
            self._cache[dataset, shard] = found
        return self._cache[dataset, shard]

    def _read(self, dataset: Dataset, shard: int) -> list[Cells]:
        # The image too: examples are shown on it, and random crops of things need its size.
        columns = dict.fromkeys((*self.source.columns, CROPS, "rgb"))
        record = dataset.commit(self.source.columns[0], shard)
        invalid = {} if record is None else record.invalid
        parts = zip(*(dataset.read(column, shard) for column in columns), strict=True)
        return [
            {"row": row.to_bytes(4), **{c: m.data for c, m in zip(columns, members, strict=True)}}
            for row, members in enumerate(parts)
            if members[0].key not in invalid
        ]


def _bytes(members: Sequence[Cells]) -> int:
    return sum(len(data) for cells in members for data in cells.values())


def _central(cells: Cells, side: int) -> np.ndarray:
    codec = modalities.load("rgb")
    image = codec.decode(cells["rgb"])
    crop = Draw(None).crop(cells[CROPS], lambda: image.shape[:2])
    shown: np.ndarray = codec.crop(image, crop, image.shape[:2], side)
    return shown
