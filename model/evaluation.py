"""The loss on held-out data, always on the same batches: ml-4m's fixed evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from model import figures, parallel
from model.feeding import Feed
from model.masking import MaskingConfig
from model.parallel import Loss
from model.settings import DType, named_dtype


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """An `evaluate` for `fit`: the loss and its figures over `batch_at(0) .. batch_at(num_batches - 1)`.

    They are logged as `eval/<name>/loss` (the mean over batches) and `eval/<name>/<figure>`, as weighted by `loss`
    (with `model.losses.MaskedLoss` the mean over all targets of a modality). The processes of a run share the batches
    out; the figures do not depend on how many there are, but for rounding. `dtype` is what autocast computes in.
    """

    name: str
    batch_at: Callable[[int], Any]
    num_batches: int
    loss: Loss
    dtype: DType = "float32"
    in_all_processes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"num_batches {self.num_batches}, expected at least 1")

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """The figures of `model`, which is in eval mode; all processes of the run call it."""
        device = next(model.parameters()).device
        processes = parallel.present(device)
        rounds = -(-self.num_batches // processes.world)
        numbers = [number * processes.world + processes.rank for number in range(rounds)]
        measured: list[figures.Figures] = []
        # A sharded model needs all processes in each forward pass: who has no batch left repeats the last one.
        with Feed(self.batch_at, (min(n, self.num_batches - 1) for n in numbers)) as batches, torch.no_grad():
            for number, batch in zip(numbers, batches, strict=True):
                with torch.autocast(device.type, named_dtype(self.dtype), enabled=self.dtype != "float32"):
                    value, parts = self.loss(model, batch.to(device, non_blocking=True))
                if number < self.num_batches:
                    measured.append({"loss": value.detach().float(), **figures.detached(parts)})
        read = list(itertools.chain.from_iterable(processes.gathered(figures.read(measured))))
        return {f"eval/{self.name}/{name}": value for name, value in figures.means(read).items()}


@dataclass(frozen=True)
class Several:
    """Several evaluations as one, such as of several held-out datasets."""

    parts: tuple[Heldout, ...]
    in_all_processes: ClassVar[bool] = True

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """All their figures."""
        return {name: value for part in self.parts for name, value in part(model, step).items()}


def fixed(masking: MaskingConfig, input_tokens: int = 128, target_tokens: int = 128) -> MaskingConfig:
    """A recipe's masking with the budgets of ml-4m's fixed evaluation, every component of the mixture as likely."""
    return replace(
        masking,
        components=tuple(replace(component, weight=1.0) for component in masking.components),
        input_tokens=(input_tokens, input_tokens),
        target_tokens=(target_tokens, target_tokens),
    )
