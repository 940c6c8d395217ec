"""The loss of FourM as the training loop wants it: the loss, and the mean cross-entropy of each modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.masking import MaskedBatch


@dataclass(frozen=True)
class MaskedLoss:
    """`FourM.forward`'s loss of a kind, with `loss/<modality>` in nats for the modalities that have targets.

    Nothing is read from the device: each figure is a total and a number of targets, so that the mean over batches, of
    a step or of an evaluation, is the mean over all their targets.
    """

    kind: Literal["mod", "token"] = "mod"

    def __call__(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and figures (2,) by name."""
        output = model(batch, self.kind)
        figures = {}
        for name, value in output.losses.items():
            mean = value.detach().float()
            count = output.counts[name]
            weight = count.to(mean) if isinstance(count, Tensor) else mean.new_full((), count)
            figures[f"loss/{name}"] = torch.stack([mean * weight, weight])
        return output.loss, figures
