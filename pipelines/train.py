"""Train FourM on packed shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dataengine.manifest import Dataset
from dataengine.packed import Packed
from model.batches import PackedDataset, TokenBatches, merged_columns, spec_of
from model.fourm import FourM, FourMConfig
from model.loop import FitResult, LoopConfig, fit
from model.masking import MaskedBatch, MaskingConfig
from model.spec import ModalitySpec, union
from pipelines import config
from pipelines.pack import CELL


@dataclass(frozen=True, kw_only=True)
class Source:
    """A packed dataset and how often a sample is drawn from it."""

    root: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainFourM:
    """One model: what it reads (`inputs`) and writes (`outputs`), from which datasets, into the folder `out`.

    `per_token` averages the loss over tokens; without it every modality counts the same (ml-4m's default).
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


def train(run: TrainFourM) -> FitResult:
    """Train, resume, or find it done; the finished model lies in `<out>/model/`."""
    from model import checkpoint

    datasets = tuple(PackedDataset(packed_shards(source.root), source.weight) for source in run.data)
    inputs, outputs = specs(datasets, run)
    model = FourM(run.model, inputs, outputs, seed=run.loop.seed)
    batches = TokenBatches(
        datasets=datasets,
        specs=union(inputs, outputs),
        masking=run.masking,
        batch_size=run.batch_size,
        seed=run.loop.seed,
    )
    out = Path(run.out)
    if int(os.environ.get("RANK", "0")) == 0:
        config.keep(run, out)
    kind = "token" if run.per_token else "mod"

    def loss(network: torch.nn.Module, batch: MaskedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        output = network(batch, kind)
        seen = {f"loss/{m}": float(v.detach()) for m, v in output.losses.items() if output.counts[m]}
        return output.loss, seen

    result = fit(model, batches, loss, run.loop, out)
    if result.finished:
        checkpoint.save_pretrained(model, out / "model")
    return result


def packed_shards(root: str) -> tuple[Packed, ...]:
    """The committed packed shards of a dataset; ValueError when there are none."""
    dataset = Dataset(root)
    records = [dataset.commit(CELL, shard) for shard in dataset.committed(CELL)]
    if not records:
        raise ValueError(f"{root} holds no packed tokens; `dataengine pack` makes them")
    return tuple(Packed(dataset.store.local_path(r.file)) for r in records if r is not None)


def specs(
    datasets: tuple[PackedDataset, ...], run: TrainFourM
) -> tuple[tuple[ModalitySpec, ...], tuple[ModalitySpec, ...]]:
    """The model's view of the recipe's inputs and outputs; ValueError names those that no dataset holds."""
    columns = merged_columns(datasets)
    missing = [m for m in (*run.inputs, *run.outputs) if m not in columns]
    if missing:
        raise ValueError(f"no dataset holds {', '.join(missing)}; there are: {', '.join(columns)}")
    made = {m: spec_of(columns[m], run.patch_size) for m in {*run.inputs, *run.outputs}}
    return tuple(made[m] for m in run.inputs), tuple(made[m] for m in run.outputs)
