"""The settings of the training loop."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from model import optim, snapshots
from model.parallel import Mode

DType = Literal["float32", "bfloat16", "float16"]

# Settings that may differ between a run and its resumption, because no loss depends on them but by rounding.
_FREE = frozenset(
    "checkpoint_every keep_checkpoints evaluate_every pictures_every threads max_seconds progress wandb "
    "device parallel compile blocks recompute unused_parameters".split()
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train: steps are optimizer steps, `lr` is the peak after the warm-up.

    A step is the mean over `batches_per_step` batches, which the processes of the run share out evenly: any number of
    them that divides it trains on the same samples. `lr_scales` are (start of a parameter's name, factor of `lr`)
    pairs. `ema_decay` also averages the weights; the average is what a finished run leaves in the model.

    `dtype` is what autocast computes in; weights stay float32. `blocks` are class names of the modules that "fsdp"
    gathers one at a time, and that `recompute` runs twice instead of keeping their activations.
    `unused_parameters` is for losses that leave out parameters on some batches. `device` None is the model's own,
    or a GPU where there is one. `max_seconds` stops early with a checkpoint, to be resumed. `threads` is torch's
    number of CPU threads, None for its own choice. `wandb` is a project of Weights & Biases to log to as well.
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
    log_every: int = 10
    evaluate_every: int = 1000
    pictures_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    ema_decay: float | None = None
    seed: int = 0
    threads: int | None = None
    max_seconds: float | None = None
    progress: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        counts = "steps batches_per_step log_every evaluate_every pictures_every checkpoint_every keep_checkpoints"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected at least 1")
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
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


def check(config: LoopConfig, out: Path) -> dict[str, Any]:
    """The settings for `out/loop.json`; ValueError when they contradict each other or the run that lies there."""
    # Not in the constructor: on the command line settings change one after the other.
    if not 0 <= config.warmup_steps < config.steps - config.cooldown_steps:
        raise ValueError(
            f"{config.warmup_steps} warm-up and {config.cooldown_steps} cool-down steps of {config.steps}, "
            "expected fewer than all"
        )
    if config.cooldown_steps and config.schedule == "cosine":
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
