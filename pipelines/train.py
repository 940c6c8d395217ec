"""Train FourM on packed shards: from scratch or from a checkpoint, refused at the beginning when anything is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import checkpoint, initialise
from model.batches import TokenBatches, spec_of
from model.fourm import FourM, FourMConfig
from model.initialise import Changes
from model.loop import FitResult, LoopConfig, fit
from model.masking import MaskedBatch, MaskingConfig
from model.spec import ModalitySpec, union
from pipelines import config, training_data
from pipelines.training_data import Source, packed_shards

__all__ = ["Prepared", "Source", "TrainFourM", "packed_shards", "prepared", "train"]

TOKENIZERS = "tokenizers.json"
"""Beside a trained model: who made the tokens of each modality it was trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainFourM:
    """One model: what it reads (`inputs`) and writes (`outputs`), from which datasets, into the folder `out`.

    `per_token` averages the loss over tokens; without it every modality counts the same (ml-4m's default).
    `init_from` is a checkpoint (folder, file or Hugging Face repository, ours or ml-4m's) to begin with: modalities of
    both keep their weights, others are drawn anew or left out (`model.initialise`).
    """

    data: tuple[Source, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    model: FourMConfig
    masking: MaskingConfig
    loop: LoopConfig
    batch_size: int
    out: str
    patch_size: int = 16
    per_token: bool = False
    init_from: str = ""


@dataclass(frozen=True)
class Prepared:
    """A run before its first step. `tokenizers` says of each modality who made its tokens, as far as is known."""

    model: FourM
    batches: TokenBatches
    tokenizers: Mapping[str, Mapping[str, str]]
    changes: Changes | None


def train(run: TrainFourM) -> FitResult:
    """Train, resume, or find it done; the finished model lies in `<out>/model/`.

    In each of the processes that torchrun or Ray started; the first one writes. ValueError, before anything is
    trained, lists all that is wrong with the datasets, the mixture and the checkpoint to begin with.
    """
    made = prepared(run)
    out = Path(run.out)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        config.keep(run, out)
        if made.changes is not None:
            about = {"from": run.init_from, **vars(made.changes)}
            (out / "initialised.json").write_text(json.dumps(about, indent=1) + "\n")
    kind = "token" if run.per_token else "mod"

    def loss(network: torch.nn.Module, batch: MaskedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        output = network(batch, kind)
        seen = {f"loss/{m}": float(v.detach()) for m, v in output.losses.items() if output.counts[m]}
        return output.loss, seen

    # A batch without targets of a modality gives its tables no gradient.
    result = fit(made.model, made.batches, loss, replace(run.loop, unused_parameters=True), out)
    if result.finished and first:
        checkpoint.save_pretrained(made.model, out / "model")
        (out / "model" / TOKENIZERS).write_text(json.dumps(made.tokenizers, indent=1) + "\n")
    return result


def prepared(run: TrainFourM) -> Prepared:
    """The model and the batches of a run; ValueError lists all that is wrong."""
    if any(source.masking is not None for source in run.data):
        raise ValueError("data with a masking of its own: the loader has one for all datasets")
    datasets = training_data.opened(run.data)
    found = training_data.columns_of(datasets)
    names = tuple(dict.fromkeys((*run.inputs, *run.outputs)))
    problems = training_data.merged(found, names, run.patch_size)
    missing = [name for name in names if name not in found]
    if missing:
        problems.append(f"no dataset holds {', '.join(missing)}; there are: {', '.join(found)}")
    source = initialise.read(run.init_from) if run.init_from else None
    made = {name: spec_of(found[name][0][0], run.patch_size) for name in names if name in found}
    if source is not None:
        made = {name: initialise.adopted(spec, source) for name, spec in made.items()}
    inputs, outputs = _side(run.inputs, made), _side(run.outputs, made)
    tokenizers = {name: _makers(found, name) for name in made}
    problems += training_data.vocabulary_problems(datasets, tuple(made.values()))
    if not missing:
        problems += training_data.mixture_problems(run.data, datasets, run.masking, inputs, outputs)
    if source is not None:
        problems += [f"init_from {run.init_from}: {said}" for said in _unfit(run, source, inputs, outputs, tokenizers)]
    training_data.refuse(problems)
    changes = None
    if source is None:
        model = FourM(run.model, inputs, outputs, seed=run.loop.seed)
    else:
        model, changes = initialise.initialised(source, run.model, inputs, outputs, seed=run.loop.seed)
    batches = TokenBatches(
        datasets=datasets,
        specs=union(inputs, outputs),
        masking=training_data.restricted(run.masking, inputs, outputs),
        batch_size=run.batch_size,
        seed=run.loop.seed,
    )
    return Prepared(model, batches, tokenizers, changes)


def _side(names: tuple[str, ...], made: Mapping[str, ModalitySpec]) -> tuple[ModalitySpec, ...]:
    return tuple(made[name] for name in names if name in made)


def _makers(found: Mapping[str, list[tuple[training_data.Column, str]]], name: str) -> dict[str, str]:
    columns = [column for column, _ in found[name]]
    known = {what: next(filter(None, (getattr(c, what) for c in columns)), "") for what in ("tokenizer", "network")}
    return {what: sha256 for what, sha256 in known.items() if sha256}


def _unfit(
    run: TrainFourM,
    source: FourM,
    inputs: tuple[ModalitySpec, ...],
    outputs: tuple[ModalitySpec, ...],
    tokenizers: Mapping[str, Mapping[str, str]],
) -> list[str]:
    problems = initialise.problems(source, run.model, inputs, outputs)
    path = initialise.folder_of(run.init_from)
    file = (path if path.is_dir() else path.parent) / TOKENIZERS
    if file.exists():
        problems += initialise.token_problems(json.loads(file.read_text()), tokenizers)
    return problems
