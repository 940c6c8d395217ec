"""The settings of the training loop."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from model import optim, snapshots
from model.parallel import Mode

DType = Literal["float32", "bfloat16", "float16"]

# Settings that may differ between a run and its resumption, because no loss depends on them but by rounding.
_FREE = frozenset(
    "checkpoint_every keep_checkpoints async_checkpoints evaluate_every pictures_every threads max_seconds progress "
    "wandb device parallel compile blocks recompute unused_parameters workers reshard peak_flops".split()
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train: steps are optimizer steps, `lr` is the peak after the warm-up.

    A step is the mean over `batches_per_step` batches, which the processes of the run share out evenly: any number of
    them that divides it trains on the same samples. `lr_scales` are (start of a parameter's name, factor of `lr`)
    pairs. `ema_decay` also averages the weights; the average is what a finished run leaves in the model.

    `dtype` is what autocast computes in; weights stay float32. `blocks` are class names of the modules that "fsdp"
    gathers one at a time, and that `recompute` runs twice instead of keeping their activations. Of "fsdp" alone:
    `reshard` off keeps what was gathered in the forward pass for the backward pass (ZeRO-2 in place of ZeRO-3,
    Rajbhandari et al. 2020), `gather_dtype` is what weights are gathered in, `reduce_dtype` what gradients are added
    up in.
    `unused_parameters` is for losses that leave out parameters on some batches. `device` None is the model's own,
    or a GPU where there is one. `max_seconds` stops early with a checkpoint, to be resumed. `threads` is torch's
    number of CPU threads, None for its own choice. `wandb` is a project of Weights & Biases to log to as well.
    `workers` processes make the batches, 0: a thread. `async_checkpoints` writes them while the training goes on.
    `peak_flops` is what a device can do a second, for the log's `mfu`; None looks its name up.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    schedule: str = "cosine"  # or constant, or inverse_sqrt-<timescale>
    warmup_steps: int = 0
    cooldown_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = 1.0
    lr_scales: tuple[tuple[str, float], ...] = ()
    batches_per_step: int = 1
    dtype: DType = "float32"
    device: str | None = None
    parallel: Mode = "auto"
    compile: bool = False
    blocks: tuple[str, ...] = ("Block", "DecoderBlock")
    recompute: bool = False
    unused_parameters: bool = False
    reshard: bool = True
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    workers: int = 0
    log_every: int = 10
    evaluate_every: int = 1000
    pictures_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    async_checkpoints: bool = False
    ema_decay: float | None = None
    seed: int = 0
    threads: int | None = None
    max_seconds: float | None = None
    progress: bool = True
    wandb: str | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        counts = "steps batches_per_step log_every evaluate_every pictures_every checkpoint_every keep_checkpoints"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected at least 1")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}, expected at least 0")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops {self.peak_flops}, expected more than 0, or None")
        for name in ("gather_dtype", "reduce_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} {getattr(self, name)!r}, expected float32 or bfloat16")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} and lr {self.lr}, expected 0 <= min_lr <= lr")
        if self.dtype not in get_args(DType):
            raise ValueError(f"dtype {self.dtype!r}, expected {', '.join(get_args(DType))}")
        if self.parallel not in get_args(Mode):
            raise ValueError(f"parallel {self.parallel!r}, expected {', '.join(get_args(Mode))}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}, expected more than 0 and less than 1, or None")
        if any(scale <= 0 for _, scale in self.lr_scales):
            raise ValueError(f"lr_scales {self.lr_scales}, expected factors above 0; freeze by requires_grad_(False)")
        optim.timescale_of(self.schedule)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        return named_dtype(self.dtype)


def named_dtype(name: DType) -> torch.dtype:
    """torch's dtype of a name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def in_tokens(
    *,
    total_tokens: float,
    warmup_tokens: float = 0,
    cooldown_tokens: float = 0,
    input_tokens: int,
    target_tokens: int,
    batch: int,
    base_lr: float,
    base_min_lr: float = 0.0,
    epoch_samples: int | None = None,
) -> dict[str, Any]:
    """`steps`, `warmup_steps`, `cooldown_steps`, `lr` and `min_lr` of a `LoopConfig` for lengths given in tokens.

    A step takes `batch` samples (of all processes, accumulation included) and counts as batch * (input_tokens +
    target_tokens) tokens: the largest budgets, as ml-4m counts, not the tokens that are there. Lengths are rounded up
    to whole steps; with `epoch_samples` the total is rounded up to whole epochs of epoch_samples // batch steps, which
    is what ml-4m does. Rates are per 256 samples: lr = base_lr * batch / 256.

        LoopConfig(**in_tokens(total_tokens=500e9, warmup_tokens=10e9, input_tokens=128, target_tokens=128,
                               batch=8192, base_lr=1e-4), batches_per_step=64)
    """
    counts = {"input_tokens + target_tokens": input_tokens + target_tokens, "batch": batch, "total": total_tokens}
    for name, value in counts.items():
        if not value > 0:
            raise ValueError(f"{name} {value}, expected more than 0")
    slots = input_tokens + target_tokens
    warmup, cooldown = (math.ceil(tokens / (slots * batch)) for tokens in (warmup_tokens, cooldown_tokens))
    steps = math.ceil(total_tokens / (slots * batch))
    if epoch_samples is not None:
        if epoch_samples < batch:
            raise ValueError(f"epoch_samples {epoch_samples}, expected at least one batch of {batch}")
        steps = math.ceil(total_tokens / (slots * epoch_samples)) * (epoch_samples // batch)
    return {
        "steps": steps,
        "warmup_steps": warmup,
        "cooldown_steps": cooldown,
        "lr": base_lr * batch / 256,
        "min_lr": base_min_lr * batch / 256,
    }


def check(config: LoopConfig, out: Path) -> dict[str, Any]:
    """The settings for `out/loop.json`; ValueError when they contradict each other or the run that lies there."""
    # Not in the constructor: on the command line settings change one after the other.
    if not 0 <= config.warmup_steps < config.steps - config.cooldown_steps:
        raise ValueError(
            f"{config.warmup_steps} warm-up and {config.cooldown_steps} cool-down steps of {config.steps}, "
            "expected fewer than all"
        )
    if config.cooldown_steps and config.schedule.endswith("cosine"):
        raise ValueError(f"cooldown_steps {config.cooldown_steps}, expected 0: a cosine ends at min_lr by itself")
    path = out / "loop.json"
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    if snapshots.newest(out / "checkpoint") is not None and path.exists():
        # A setting that is younger than the run had its default.
        defaults = {f.name: json.loads(json.dumps(f.default)) for f in fields(config) if f.default is not MISSING}
        before = defaults | json.loads(path.read_text())
        changed = [
            f"{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if k not in _FREE and before.get(k) != v
        ]
        if changed:
            raise ValueError(f"{out} holds a run with other settings: {'; '.join(changed)}; expected the same")
    return settings
