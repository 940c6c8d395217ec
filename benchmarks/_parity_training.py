"""A small FourM trained by the loop, and by ml-4m's model, optimizer, schedule and step on the same batches."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from benchmarks import _ml4m
from model.fourm import FourM, FourMConfig
from model.loop import LoopConfig, fit
from model.masking import MaskedBatch, MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec

CONFIG = FourMConfig(dim=32, encoder_depth=2, decoder_depth=2, num_heads=2)
SPECS = (
    ModalitySpec(name="caption", kind="sequence", max_tokens=12, vocab_size=240),
    ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16),
    ModalitySpec(name="tok_depth@64", kind="tokens", max_tokens=16, vocab_size=32),
    ModalitySpec(name="tok_global", kind="tokens", max_tokens=4, vocab_size=16, learned_positions=True),
)
SPECS_OUT = tuple(spec for spec in SPECS if spec.is_target)
BATCH, INPUTS, TARGETS = 4, 16, 16
TABLES, RATE, LOWEST, WARMUP, DECAY, CLIP = 0.03, 5e-4, 1e-6, 20, 0.05, 1.0


def batch_at(number: int) -> MaskedBatch:
    """Images of one colour, and tokens that tell it: something that can be learned."""
    rng = np.random.default_rng([5, number])
    names = [spec.name for spec in SPECS]
    component = MixtureComponent(
        input_alphas=dict.fromkeys(names, 1.0), target_alphas={spec.name: 1.0 for spec in SPECS_OUT}
    )
    config = MaskingConfig(components=(component,), input_tokens=(INPUTS,) * 2, target_tokens=(TARGETS,) * 2)
    samples = []
    for _ in range(BATCH):
        kind = int(rng.integers(8))
        shade = np.float32((kind - 3.5) / 2) * np.ones((3, 64, 64), np.float32)
        sample = {
            "caption": [204 + kind + i % 3 for i in range(int(rng.integers(4, 12)))],
            "rgb@64": shade,
            "tok_depth@64": (np.arange(16) // 4 + 4 * kind) % 32,
            "tok_global": np.arange(4) + kind,
        }
        samples.append(mask_sample(rng, sample, SPECS, config))
    return collate(samples, SPECS, INPUTS, TARGETS, trim=False)


def losses_of_reference(theirs: _ml4m.Reference, batches: list[MaskedBatch]) -> list[float]:
    """The losses of ml-4m's training on these batches, one a step, by its own parts of a step."""
    model = theirs.model(theirs.settings(CONFIG), list(SPECS), list(SPECS_OUT), tied=True)
    _ml4m.draw(model, tables=TABLES)
    args = argparse.Namespace(opt="adamw", lr=RATE, weight_decay=DECAY, opt_eps=1e-8, opt_betas=[0.9, 0.95])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the names of all parameters
        optimizer = theirs.utils.create_optimizer(args, model)
        rates = theirs.utils.cosine_scheduler(RATE, LOWEST, 1, len(batches), warmup_steps=WARMUP)
    scaler = theirs.utils.NativeScalerWithGradNormCount(enabled=False)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group["lr_scale"]
        loss, _ = model(_ml4m.as_reference(batch, list(SPECS)), INPUTS, TARGETS)
        losses.append(loss.item())
        scaler(loss, optimizer, clip_grad=CLIP, parameters=model.parameters())
        optimizer.zero_grad()
    return losses


def losses_of_ours(batches: list[MaskedBatch], out: Path) -> list[float]:
    """The losses of the loop on these batches."""
    model = FourM(CONFIG, SPECS, SPECS_OUT)
    _ml4m.draw(model, tables=TABLES)
    losses: list[float] = []

    def loss(model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(batch).loss
        losses.append(float(found.detach()))
        return found, {}

    config = LoopConfig(
        steps=len(batches), lr=RATE, min_lr=LOWEST, warmup_steps=WARMUP, weight_decay=DECAY, clip_grad=CLIP,
        schedule="ml4m-cosine", device="cpu", progress=False,
    )  # fmt: skip
    fit(model, batches.__getitem__, loss, config, out)
    return losses


def measure(theirs: _ml4m.Reference, steps: int) -> dict[str, Any]:
    """The largest relative difference of a loss over the steps, and the first and last loss."""
    batches = [batch_at(number) for number in range(steps)]
    wanted = losses_of_reference(theirs, batches)
    with tempfile.TemporaryDirectory(prefix="parity-training-") as folder:
        found = losses_of_ours(batches, Path(folder))
    apart = np.abs(np.array(found) / np.array(wanted) - 1)
    return {
        "steps": steps, "largest_difference": float(apart.max()), "median_difference": float(np.median(apart)),
        "first_loss": wanted[0], "last_loss": wanted[-1],
    }  # fmt: skip
