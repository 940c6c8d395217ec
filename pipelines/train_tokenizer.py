"""Train a map tokenizer on the committed labels of some datasets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dataengine.manifest import Dataset
from model.batches import MapBatches
from model.loop import FitResult, LoopConfig, fit
from model.tokenizers.vqvae import VQVAE, VQVAEConfig, reconstruction_loss
from pipelines import config
from pipelines.pack import is_random


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """One tokenizer: the modality of `roots`, cut to `model.image_size`; written to `<out>/<modality>.safetensors`."""

    roots: tuple[str, ...]
    modality: str
    model: VQVAEConfig
    loop: LoopConfig
    batch_size: int
    out: str


def train(run: TrainTokenizer) -> FitResult:
    """Train, or resume, or find it done; ValueError when the labels come from random weights."""
    datasets = tuple(Dataset(root) for root in run.roots)
    for dataset in datasets:
        if is_random(dataset, run.modality):
            raise ValueError(
                f"{run.modality} of {dataset.store.name} comes from random weights: nothing is trained on it"
            )
    if run.model.domain is None:
        raise ValueError("model.domain is not set, expected how maps become network input")
    model = VQVAE(run.model)
    batches = MapBatches(
        datasets=datasets,
        modality=run.modality,
        domain=run.model.domain,
        side=run.model.image_size,
        batch_size=run.batch_size,
        seed=run.loop.seed,
    )
    work = Path(run.out) / run.modality
    work.mkdir(parents=True, exist_ok=True)
    (work / "recipe.json").write_text(json.dumps(config.resolved(run), indent=1) + "\n")
    result = fit(model, batches, reconstruction_loss, run.loop, work)
    if result.finished:
        model.save(tokenizer_file(run))
    return result


def tokenizer_file(run: TrainTokenizer) -> Path:
    """Where the finished tokenizer lies."""
    return Path(run.out) / f"{run.modality}.safetensors"
