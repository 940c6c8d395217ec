"""What tokens are made of: crops of maps, or what feature networks make of crops of the image; each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataengine import modalities
from dataengine.geometry import Crop, crops_of, cut
from dataengine.labeler import Labeler, Staged
from dataengine.sample import Sample
from pipelines.tokens import Precision

WHOLE = ("grid", "vector")
"""Kinds of values that are of a whole image."""

Cut = Callable[[], list[np.ndarray]]
"""The image of a sample under its crops, cut when first asked for."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A token column: the tokenizer's file and how it runs, and the feature network in front of it, if there is one."""

    column: str
    modality: str
    file: str
    precision: Precision
    compiled: bool
    side: int
    at_once: int
    features: Labeler | None


@dataclass
class _Source:
    """What some columns are tokenised from: pixels of a map, or what a feature network makes of the image's."""

    prepare: Callable[[Sample, Sequence[Crop], Cut], list[Any]]
    """A sample, its crops and what cuts its image by them, to what is labelled of each crop."""
    label: Callable[[Sequence[Any]], dict[str, list[Any]]]
    at_once: int
    columns: dict[str, tuple[str, Callable[[Sequence[Any]], Any]]] = field(default_factory=dict)
    """The modality and the encoder of each column."""


def load(columns: Sequence[Wanted], device: str) -> Staged:
    """Tokenizers that read the same columns, loaded; what two have in common is loaded and run once."""
    from pipelines import _encoder

    sources: list[tuple[Any, _Source]] = []
    for wanted in columns:
        key = wanted.features or (wanted.modality, wanted.side, wanted.at_once)
        source = next((there for known, there in sources if known == key), None)
        if source is None:
            source = _map(wanted) if wanted.features is None else _features(wanted.features, wanted.at_once, device)
            sources.append((key, source))
        encoder = _encoder.Encoder(wanted.file, device, wanted.precision, compiled=wanted.compiled)
        source.columns[wanted.column] = (wanted.modality, encoder)

    def prepare(sample: Sample) -> list[list[Any]]:
        crops = crops_of(sample.values["crop_settings"])
        cuts = functools.cache(lambda: [cut(sample.rgb, crop) for crop in crops])
        return [source.prepare(sample, crops, cuts) for _, source in sources]

    def label(images: Sequence[list[list[Any]]]) -> list[dict[str, Any]]:
        made: dict[str, list[np.ndarray]] = {}
        for i, (_, source) in enumerate(sources):
            counts = [len(image[i]) for image in images]
            crops = [crop for image in images for crop in image[i]]
            ids: dict[str, list[Any]] = {column: [] for column in source.columns}
            for part in _encoder.calls(counts, source.at_once):
                values = source.label(crops[part])
                for column, (modality, encoder) in source.columns.items():
                    ids[column].append(encoder(values[modality]))
            for column, parts in ids.items():
                rows = np.concatenate([part.cpu().numpy().astype(np.uint16) for part in parts])
                made[column] = np.split(rows, np.cumsum(counts)[:-1])
        return [dict(zip(made, rows, strict=True)) for rows in zip(*made.values(), strict=True)]

    return Staged(prepare, label)


def _map(wanted: Wanted) -> _Source:
    """Crops of a map, or of stored features that are of the whole image."""
    codec, modality, side = modalities.load(wanted.modality), wanted.modality, wanted.side

    def prepare(sample: Sample, crops: Sequence[Crop], cuts: Cut) -> list[Any]:
        if codec.kind in WHOLE and any(crop != whole(sample.size) for crop in crops):
            raise ValueError(f"{modality} is of the whole image, and a crop is less: see TokenizeFeatures")
        return [codec.crop(sample.values[modality], crop, sample.size, side) for crop in crops]

    return _Source(prepare, lambda values: {modality: list(values)}, wanted.at_once)


def _features(features: Labeler, at_once: int, device: str) -> _Source:
    """Crops of the image through a feature network."""
    network = features.load(device)
    ready, label = (network.prepare, network.label) if isinstance(network, Staged) else (lambda s: s, network)
    codecs = {name: modalities.load(name) for name in features.emits}

    def prepare(sample: Sample, crops: Sequence[Crop], cuts: Cut) -> list[Any]:
        return [ready(Sample(sample.key, {"rgb": pixels})) for pixels in cuts()]

    def made(values: Sequence[Any]) -> dict[str, list[Any]]:
        outputs = label(values)
        for output in outputs:
            for name, codec in codecs.items():
                if name in output:
                    codec.check(output[name], (1, 1))
        return {name: [output[name] for output in outputs] for name in codecs if name in outputs[0]}

    return _Source(prepare, made, at_once)


def whole(size: tuple[int, int]) -> Crop:
    """The crop that is all of an image of (h, w) pixels."""
    return Crop(0, 0, *size)
