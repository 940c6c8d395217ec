"""Train FourM on packed shards: from scratch or from a checkpoint, refused at the beginning when anything is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model import checkpoint, evaluation, initialise
from model.batches import PackedDataset, TokenBatches, spec_of
from model.evaluation import Heldout, Several
from model.flops import FourMWork
from model.fourm import FourM, FourMConfig
from model.initialise import Changes
from model.loop import FitResult, LoopConfig, fit
from model.losses import MaskedLoss
from model.masking import MaskingConfig
from model.spec import ModalitySpec, union
from pipelines import config, training_data
from pipelines.training_data import Source, packed_shards

__all__ = ["Examined", "Prepared", "Source", "TrainFourM", "examined", "packed_shards", "prepared", "train"]

TOKENIZERS = "tokenizers.json"
"""Beside a trained model: who made the tokens of each modality it was trained on."""


@dataclass(frozen=True, kw_only=True)
class TrainFourM:
    """One model: what it reads (`inputs`) and writes (`outputs`), from which datasets, into the folder `out`.

    `per_token` averages the loss over tokens; without it every modality counts the same (ml-4m's default).
    The loss on `heldout`, each dataset by itself, is logged every `loop.evaluate_every` steps, over the same
    `heldout_batches` batches of `heldout_tokens` (inputs, targets) each time: ml-4m's fixed evaluation.

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
    heldout: tuple[Source, ...] = ()
    heldout_batches: int = 16
    heldout_tokens: tuple[int, int] = (128, 128)


@dataclass(frozen=True)
class Examined:
    """A run that may begin: what it trains and is judged on, its model's modalities, the checkpoint it begins with.

    `tokenizers` says of each modality who made its tokens, as far as is known.
    """

    datasets: tuple[PackedDataset, ...]
    heldout: tuple[PackedDataset, ...]
    inputs: tuple[ModalitySpec, ...]
    outputs: tuple[ModalitySpec, ...]
    tokenizers: Mapping[str, Mapping[str, str]]
    source: FourM | None


@dataclass(frozen=True)
class Prepared:
    """A run before its first step."""

    model: FourM
    batches: TokenBatches
    evaluate: Several | None
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
        config.keep(run, out, free=("heldout", "heldout_batches", "heldout_tokens"))
        if made.changes is not None:
            about = {"from": run.init_from, **vars(made.changes)}
            (out / "initialised.json").write_text(json.dumps(about, indent=1) + "\n")
    slots = run.masking.input_tokens[1] + run.masking.target_tokens[1]
    result = fit(
        made.model,
        made.batches,
        _loss(run),
        # A batch without targets of a modality gives its tables no gradient.
        replace(run.loop, unused_parameters=True),
        out,
        evaluate=made.evaluate,
        work=FourMWork.of(made.model, slots),
    )
    if result.finished and first:
        checkpoint.save_pretrained(made.model, out / "model")
        (out / "model" / TOKENIZERS).write_text(json.dumps(made.tokenizers, indent=1) + "\n")
    return result


def _loss(run: TrainFourM) -> MaskedLoss:
    return MaskedLoss("token" if run.per_token else "mod")


def examined(run: TrainFourM) -> Examined:
    """The datasets and modalities of a run; ValueError lists all that is wrong, with what it would begin from too."""
    opened = training_data.opened((*run.data, *run.heldout))
    datasets, heldout = opened[: len(run.data)], opened[len(run.data) :]
    found = training_data.columns_of(datasets)
    names = tuple(dict.fromkeys((*run.inputs, *run.outputs)))
    problems = training_data.merged(training_data.columns_of(opened), names, run.patch_size)
    both = {source.root for source in run.data} & {source.root for source in run.heldout}
    problems += [f"{root} is trained on and held out, expected one of them" for root in sorted(both)]
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
    return Examined(datasets, heldout, inputs, outputs, tokenizers, source)


def prepared(run: TrainFourM) -> Prepared:
    """The model and the batches of a run; ValueError lists all that is wrong."""
    ready = examined(run)
    changes = None
    if ready.source is None:
        model = FourM(run.model, ready.inputs, ready.outputs, seed=run.loop.seed)
    else:
        model, changes = initialise.initialised(
            ready.source, run.model, ready.inputs, ready.outputs, seed=run.loop.seed
        )
    return Prepared(model, _batches(run, ready, ready.datasets), _evaluation(run, ready), ready.tokenizers, changes)


def _batches(run: TrainFourM, ready: Examined, datasets: Sequence[PackedDataset]) -> TokenBatches:
    def own(masking: MaskingConfig) -> MaskingConfig:
        return training_data.restricted(masking, ready.inputs, ready.outputs)

    return TokenBatches(
        datasets=tuple(d if d.masking is None else replace(d, masking=own(d.masking)) for d in datasets),
        specs=union(ready.inputs, ready.outputs),
        masking=own(run.masking),
        batch_size=run.batch_size,
        seed=run.loop.seed,
    )


def _evaluation(run: TrainFourM, ready: Examined) -> Several | None:
    parts = []
    for source, dataset in zip(run.heldout, ready.heldout, strict=True):
        masking = evaluation.fixed(dataset.masking or run.masking, *run.heldout_tokens)
        fixed = replace(run, loop=replace(run.loop, seed=0), masking=masking)
        batches = _batches(fixed, ready, (replace(dataset, masking=None, weight=1.0),))
        parts.append(
            Heldout(
                name=source.root.rstrip("/").rpartition("/")[2],
                batch_at=batches,
                num_batches=run.heldout_batches,
                loss=_loss(run),
                dtype=run.loop.dtype,
            )
        )
    return Several(tuple(parts)) if parts else None


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
