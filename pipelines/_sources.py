"""What tokens are made of: crops of maps, or what feature networks make of crops of the image; each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataengine import modalities
from dataengine.attempt import Failed, device_broken, out_of_memory
from dataengine.geometry import Crop, crops_of, cut
from dataengine.labeler import Labeler, Staged
from dataengine.sample import Sample
from dataengine.storage import redacted
from pipelines.tokens import Exact

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
    precision: Exact
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
    """What was prepared to values by modality, some of which may be Failed."""
    at_once: int
    columns: dict[str, tuple[str, Callable[[Sequence[Any]], Any]]] = field(default_factory=dict)
    """The modality and the encoder of each column."""


def load(columns: Sequence[Wanted], device: str) -> Staged:
    """Tokenizers that read the same columns, loaded; what two have in common is loaded and run once.

    What fails fails for the columns that are made of it: of the others every byte is as if these had not been there.
    """
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

    def prepare(sample: Sample) -> list[list[Any] | Failed]:
        crops = crops_of(sample.values["crop_settings"])
        cuts = functools.cache(lambda: [cut(sample.rgb, crop) for crop in crops])
        return [_attempted(source.prepare, sample, crops, cuts) for _, source in sources]

    def label(images: Sequence[list[list[Any] | Failed]]) -> list[dict[str, Any]]:
        made: dict[str, list[Any]] = {}
        for i, (_, source) in enumerate(sources):
            made |= _tokenised(source, [image[i] for image in images])
        return [dict(zip(made, rows, strict=True)) for rows in zip(*made.values(), strict=True)]

    return Staged(prepare, label)


def _tokenised(source: _Source, images: Sequence[list[Any] | Failed]) -> dict[str, list[np.ndarray | Failed]]:
    """Ids uint16 (crops, tokens) of each image, or why it has none, by column."""
    from pipelines import _encoder

    counts = [0 if isinstance(image, Failed) else len(image) for image in images]
    crops = [crop for image in images if not isinstance(image, Failed) for crop in image]
    rows: dict[str, list[Any]] = {column: [] for column in source.columns}
    for part in _encoder.calls(counts, source.at_once):
        values = source.label(crops[part])
        for column, (modality, encoder) in source.columns.items():
            rows[column] += _each(encoder, values[modality])
    return {column: _by_image(column, images, counts, found) for column, found in rows.items()}


def _by_image(
    column: str, images: Sequence[list[Any] | Failed], counts: Sequence[int], rows: Sequence[Any]
) -> list[np.ndarray | Failed]:
    """Rows of ids on a device, or failures, of all crops, as what each image has."""
    import torch

    from pipelines import _encoder

    good = [row for row in rows if not isinstance(row, Failed)]
    # All in one copy: each would wait for the device.
    numbers = iter(torch.stack(good).cpu().numpy() if good else ())
    there = iter([row if isinstance(row, Failed) else next(numbers) for row in rows])
    out: list[np.ndarray | Failed] = []
    for image, count in zip(images, counts, strict=True):
        own: list[Any] = [next(there) for _ in range(count)]
        failed = [row for row in (image, *own) if isinstance(row, Failed)]
        if not failed and any((row < 0).any() for row in own):
            failed = [Failed(f"FloatingPointError: {_encoder.not_finite(column)}")]
        out.append(failed[0] if failed else np.stack(own).astype(np.uint16))
    return out


def _attempted(make: Callable[..., Any], *given: Any) -> Any:
    """What it makes, or why it cannot; but what the engine must know of, memory that ran out above all, is raised."""
    try:
        return make(*given)
    except Exception as error:
        if out_of_memory(error) or device_broken(error):
            raise
        return Failed(redacted(f"{type(error).__name__}: {error}")[:300])


def _each(run: Callable[[Sequence[Any]], Any], values: Sequence[Any]) -> list[Any]:
    """What is made of values together, in order, or of each alone where that fails; failures stay what they are."""
    good = [value for value in values if not isinstance(value, Failed)]
    made = _attempted(lambda: list(run(good))) if good else []
    if isinstance(made, Failed):
        made = [_attempted(lambda one: run([one])[0], value) for value in good]
    rows = iter(made)
    return [value if isinstance(value, Failed) else next(rows) for value in values]


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
    known = modalities.names()
    checks = {name: modalities.load(name).check if name in known else None for name in features.emits}

    def prepare(sample: Sample, crops: Sequence[Crop], cuts: Cut) -> list[Any]:
        return [ready(Sample(sample.key, {"rgb": pixels})) for pixels in cuts()]

    def value(output: dict[str, Any] | Failed, name: str) -> Any:
        if isinstance(output, Failed):
            return output
        found = output.get(name, Failed(f"{features.name} gave no {name}"))
        check = checks[name]
        failed = None if check is None or isinstance(found, Failed) else _attempted(check, found, (1, 1))
        return found if failed is None else failed

    def made(values: Sequence[Any]) -> dict[str, list[Any]]:
        outputs = _each(label, values)
        return {name: [value(output, name) for output in outputs] for name in checks}

    return _Source(prepare, made, at_once)


def whole(size: tuple[int, int]) -> Crop:
    """The crop that is all of an image of (h, w) pixels."""
    return Crop(0, 0, *size)
