"""Training against a critic (VQGAN, Esser et al. 2021) without a second optimizer: model and critic as one module.

AdamW treats every parameter by itself, so one optimizer over both does what two would, and the one loop trains, shares,
saves and resumes them like any model. What must not mix are the gradients, and here they cannot: the critic judges
twice, once with its weights held fixed, for the model, and once what the model made held fixed, for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Made(NamedTuple):
    """What a model's own loss gives, and the pair that the critic is to tell apart, both as the critic takes them."""

    loss: Tensor
    fake: Tensor
    real: Tensor
    metrics: dict[str, float]


class Adversarial(nn.Module):
    """A model and its critic, which gives large values to what it takes for real; `made` runs the model on a batch.

    The critic joins in after `start` batches (of each process). Its own rate is `LoopConfig.lr_scales`, for the names
    that start with "critic.".
    """

    batches: Tensor

    def __init__(
        self,
        model: nn.Module,
        critic: nn.Module,
        made: Callable[[nn.Module, Any], Made],
        *,
        weight: float = 0.1,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.critic = critic
        self.weight = weight
        self.start = start
        self._made = made
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The sum of the model's loss, its wish to be taken for real, and the critic's hinge loss (Lim and Ye 2017)."""
        made = self._made(self.model, batch)
        # As a factor and not by leaving the critic out: each process must have gradients for the same parameters.
        on = (self.batches >= self.start).to(made.loss.dtype)
        if self.training:
            self.batches += 1
        fixed = {name: value.detach() for name, value in self.critic.named_parameters()}
        wish = -functional_call(self.critic, fixed, made.fake).mean()
        fake, real = self.critic(made.fake.detach()), self.critic(made.real)
        judged = F.relu(1 + fake).mean() + F.relu(1 - real).mean()
        metrics = {"adversarial": float(wish.detach()), "critic": float(judged.detach())}
        return made.loss + on * (self.weight * wish + judged), made.metrics | metrics


def adversarial_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
    """What `model.loop.fit` wants: the loss of an `Adversarial`."""
    loss: tuple[Tensor, dict[str, float]] = model(batch)
    return loss
