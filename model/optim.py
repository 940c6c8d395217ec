"""AdamW with ml-4m's groups, the learning rate as a function of the step, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

LrScales = Sequence[tuple[str, float]]

_FROM_ZERO = "ml4m-"


def decays(name: str) -> bool:
    """Whether ml-4m applies weight decay to the parameter of that name: not to norms, biases and gains."""
    return not ("norm." in name or ".norm" in name or name.endswith((".bias", ".lookup_table_weight", ".gamma")))


def parameter_groups(model: nn.Module, weight_decay: float, lr_scales: LrScales = ()) -> list[dict[str, Any]]:
    """The trainable parameters in groups of equal decay and `lr_scale`; a parameter without gradient is in none.

    `lr_scales` are (start of the parameter's name, factor) pairs, of which the longest start wins. ValueError when one
    fits no trainable parameter, or there is nothing to train.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    unused = {start for start, _ in lr_scales}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fitting = [(start, scale) for start, scale in lr_scales if name.startswith(start)]
            unused -= {start for start, _ in fitting}
            scale = max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else 1.0
            groups.setdefault((decays(name), scale), []).append(parameter)
    if unused:
        raise ValueError(f"lr_scales {', '.join(sorted(unused))}: expected the start of a trainable parameter's name")
    if not groups:
        raise ValueError("no parameter requires a gradient, expected at least one to train")
    return [
        {"params": members, "weight_decay": weight_decay if decay else 0.0, "lr_scale": scale}
        for (decay, scale), members in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], lr_scales: LrScales = ()
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, lr_scales), lr=lr, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def rate(
    schedule: str,
    step: int,
    *,
    steps: int,
    lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
) -> float:
    """The learning rate of a step: a linear rise over `warmup_steps`, then the schedule.

    "cosine" is half a cosine down to `min_lr` at `steps`. "constant" and "inverse_sqrt-<timescale>" (ml-4m's
    lr / sqrt((i + T) / T)) end with `cooldown_steps` on a line to `min_lr`. With "ml4m-" before any of them the rise
    is ml-4m's: from 0, which makes the first step idle, to `lr` at its last step.
    """
    if step < warmup_steps:
        from_zero = schedule.startswith(_FROM_ZERO)
        return lr * step / max(1, warmup_steps - 1) if from_zero else lr * (step + 1) / (warmup_steps + 1)
    if schedule.removeprefix(_FROM_ZERO) == "cosine":
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2
    cooling = steps - cooldown_steps
    before = min(step, max(cooling - 1, warmup_steps)) - warmup_steps
    timescale = timescale_of(schedule)
    level = lr if timescale is None else lr / math.sqrt((before + timescale) / timescale)
    return level + (min_lr - level) * max(0, step - cooling) / max(1, cooldown_steps - 1)


def timescale_of(schedule: str) -> float | None:
    """The timescale of an inverse square root, None for the other schedules; ValueError for an unknown one."""
    name = schedule.removeprefix(_FROM_ZERO)
    kind, _, timescale = name.partition("-")
    if kind == "inverse_sqrt" and timescale.isdigit() and int(timescale):
        return float(timescale)
    if name in ("cosine", "constant"):
        return None
    raise ValueError(f"schedule {schedule!r}, expected cosine, constant or inverse_sqrt-<timescale>, or ml4m-<these>")


class Average:
    """An exponential moving average of a model's parameters and buffers: the first update copies them.

    Buffers too: a codebook is a buffer, and must stay with the weights around it. Of a sharded model it averages the
    shards that this process holds.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.updates = 0
        self._model = model
        copies = {id(value): value.detach().clone() for value in self._own().values()}
        # A tensor under two names is one tensor here too, or an exchange would undo itself.
        self.tensors = {name: copies[id(value)] for name, value in model.state_dict(keep_vars=True).items()}
        self._blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's weights; whole numbers and flags are copied."""
        old, new = [], []
        for averaged, value in self._pairs():
            if self.updates and value.is_floating_point():
                old.append(averaged)
                new.append(value)
            else:
                averaged.copy_(value)
        if old:
            self._blend(old, new, self.updates)
        self.updates += 1

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The averaged weights in the model's place, and its own ones afterwards, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for averaged, value in self._pairs():
            own = value.clone()
            value.copy_(averaged)
            averaged.copy_(own)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, value in self._own().items():
            yield local(self.tensors[name]), local(value.detach())

    def _own(self) -> dict[str, Tensor]:
        """The model's tensors by their first name; looked up each time, since modules may set a buffer anew."""
        seen: set[int] = set()
        named = self._model.state_dict(keep_vars=True).items()
        return {name: value for name, value in named if not (id(value) in seen or seen.add(id(value)))}  # type: ignore[func-returns-value]


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value
