"""Evaluate: predictions of a trained model from RGB alone, against the truth and the best constant predictor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from dataengine.manifest import Dataset
from model import domains
from model.generate import Step
from pipelines.label_batches import LabelBatches, source_of
from pipelines.sample import Samples, Tokenizers, predict


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """A trained model on held-out samples; constants are fitted on `train_root`."""

    model: str
    tokenizers: str
    root: str
    train_root: str
    given: tuple[str, ...]
    steps: tuple[Step, ...]
    samples: int = 200
    side: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """One metric of one modality: the model's, the constant predictor's, and that of the tokenizer's reconstruction."""

    modality: str
    metric: str
    model: float
    constant: float
    tokenizer: float
    num_samples: int

    @property
    def ratio(self) -> float:
        """Model over constant."""
        return self.model / self.constant


def abs_rel(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean of |predicted - true| / true over all pixels (Eigen et al. 2014)."""
    return float(np.mean(np.abs(predicted - truth) / truth))


def mean_angle(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean angle in degrees between unit vectors (..., 3)."""
    cosine = np.clip((predicted * truth).sum(axis=-1), -1, 1)
    return float(np.degrees(np.arccos(cosine)).mean())


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes of the truth of intersection over union, counted over all images together."""
    classes = np.unique(truth)
    lookup = np.full(256, len(classes))
    lookup[classes] = np.arange(len(classes))
    per_class = multiclass_jaccard_index(
        torch.from_numpy(lookup[predicted]), torch.from_numpy(lookup[truth]), num_classes=len(classes) + 1, average=None
    )
    return float(per_class[: len(classes)].mean())


METRICS = {"depth": ("abs-rel", abs_rel), "normal": ("mean angle, degrees", mean_angle), "semseg": ("mIoU", mean_iou)}


def constants(root: str, modality: str, side: int) -> np.ndarray:
    """The best constant for each pixel on a dataset: median depth, mean normal direction, majority class."""
    maps = np.stack(all_maps(root, modality, side))
    if modality == "depth":
        return np.asarray(np.median(maps, axis=0))
    if modality == "normal":
        mean = maps.mean(axis=0, dtype=np.float64)
        return np.asarray((mean / np.linalg.norm(mean, axis=-1, keepdims=True)).astype(np.float32))
    counts = np.stack([(maps == c).sum(axis=0) for c in range(256)])
    return np.asarray(counts.argmax(axis=0).astype(np.uint8))


def all_maps(root: str, modality: str, side: int) -> list[np.ndarray]:
    """Every valid map of a dataset under its centre crop."""
    datasets = (Dataset(root),)
    batches = LabelBatches(
        datasets=datasets,
        source=source_of(modality, datasets, None),
        domain=domains.Rgb(),
        sides=(side,),
        batch_size=1,
        seed=0,
    )
    return [example.value for example in batches.examples()]


def evaluate(run: Evaluate) -> tuple[list[Score], dict[str, list[Any]]]:
    """The scores of every target that has a metric, and the predicted maps by modality."""
    from model import checkpoint

    apart(run.root, run.train_root)
    model, tokenizers, samples = checkpoint.from_pretrained(run.model), Tokenizers(run.tokenizers), Samples(run.root)
    targets = [s.target for s in run.steps]
    rows = samples.rows([*run.given, *(t for t in targets if t.startswith("tok_"))], run.samples)
    scores, maps = [], {}
    for step in run.steps:
        ids = predict(model, rows, run.given, [step], run.seed)[step.target]
        name = step.target.removeprefix("tok_").split("@")[0]
        maps[name] = tokenizers.values(step.target, ids)
        if name in METRICS:
            own = tokenizers.values(step.target, np.stack([row[step.target] for row in rows]))
            scores.append(_score(run, name, maps[name], own, samples.truth(name, run.side, len(rows))))
    return scores, maps


def apart(root: str, train_root: str) -> None:
    """ValueError when a sample to be scored is one of the training samples."""
    scored, trained = (
        {key for shard in dataset.committed("rgb") for key in dataset.keys(shard)}
        for dataset in (Dataset(root), Dataset(train_root))
    )
    if scored & trained:
        raise ValueError(
            f"{len(scored & trained)} samples of {root}, such as {min(scored & trained)}, are also in "
            f"{train_root}: a score needs samples that were not trained on"
        )


def _score(run: Evaluate, name: str, predicted: Sequence[Any], own: Sequence[Any], truth: Sequence[Any]) -> Score:
    metric, measure = METRICS[name]
    true = np.stack(truth)
    constant = np.broadcast_to(constants(run.train_root, name, run.side), true.shape)
    return Score(
        modality=name,
        metric=metric,
        model=measure(np.stack(predicted), true),
        constant=measure(constant, true),
        tokenizer=measure(np.stack(own), true),
        num_samples=len(true),
    )
