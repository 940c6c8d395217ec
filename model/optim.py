"""AdamW with ml-4m's groups, and a warm-up with a cosine after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def decays(name: str) -> bool:
    """Whether ml-4m applies weight decay to the parameter of that name: not to norms, biases and gains."""
    return not ("norm." in name or ".norm" in name or name.endswith((".bias", ".lookup_table_weight", ".gamma")))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, with decay and without; a group without members is left out."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name)].append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decay else 0.0}
        for decay, members in groups.items()
        if members
    ]


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float) -> LRScheduler:
    """A linear rise over `warmup_steps`, then half a cosine down to `min_lr` at `steps`."""
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"{warmup_steps} warm-up steps of {steps}, expected fewer than all")
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps, eta_min=min_lr)
    if warmup_steps == 0:
        return cosine
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])
