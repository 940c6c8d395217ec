"""Training steps a second and peak memory of FourM, beside ml-4m's model and optimizer on the same masked batches.

python -m benchmarks.train_step [--quick] [--reference DIR] [--json]

The modalities of 4M-21, budgets of 256 input and 256 target tokens, all values synthetic, all weights random and the
same on both sides. `real` is the share of slots that hold a token. Ours takes a step as the training loop does:
forward, backward, norm and clipping of the gradient, fused AdamW. With `--reference`, a checkout of apple/ml-4m
(which needs einops), the other side is its model on full-length inputs, its order of work in a step and the AdamW it
uses. Each side runs in a process of its own. `loss_difference` is relative, of the first step, before any update: it
says that both compute the same. `--quick` is the tiny size at batch 2 on one thread.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import _fresh, _ml4m, _report
from model import optim
from model.checkpoint import ml4m_spec
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch, MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec

QUICK, FULL = (("tiny",), 2, 1, 3), (("tiny", "base"), 8, 2, 7)
"""Sizes, samples in a batch, threads, and steps that are timed."""
TOKENS = 256
GRIDS = ("rgb", "depth", "normal", "semseg", "clip", "dinov2", "imagebind", "canny_edge", "sam_edge")
SEQUENCES = ("caption", "det", "metadata", "human_poses", "color_palette", "sam_instance")
NAMES = ("rgb@224", "t5_caption", *SEQUENCES, *(f"tok_{name}@224" for name in GRIDS),
         "tok_dinov2_global", "tok_imagebind_global")  # fmt: skip
LENGTHS = {"caption": (8, 40), "det": (5, 60), "human_poses": (1, 120), "color_palette": (3, 22),
           "sam_instance": (20, 280)}  # fmt: skip


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """Steps a second and memory by size and precision."""
    sizes, batch, threads, steps = QUICK if quick else FULL
    found: dict[str, Any] = {"benchmark": "train_step", "batch": batch, "threads": threads, "sizes": {}}
    for size in sizes:
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            asked = {"size": size, "batch": batch, "threads": threads, "steps": steps, "dtype": dtype}
            sides: dict[str, Any] = {}
            for name, checkout in (("ours", None), ("reference", reference)):
                if name == "ours" or checkout is not None:
                    _report.console.print(f"{size}, {dtype}, {name} ...")
                    # Its own packages come from where ours do, or from PYTHONPATH.
                    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
                    where = None if checkout is None else [str(checkout.resolve()), *filter(None, own)]
                    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
                        packages = _fresh.packages(Path(folder) / "packages")
                        (packages / "model").symlink_to(_fresh.HERE / "model")
                        sides[name] = _fresh.call("train_step", "steps_of", {**asked, "reference": where}, packages)
            if reference is not None:
                ours, theirs = sides["ours"], sides["reference"]
                sides["speedup"] = ours["samples_per_s"] / theirs["samples_per_s"]
                sides["memory_ratio"] = ours["peak_mb"] / theirs["peak_mb"]
                sides["loss_difference"] = abs(ours["first_loss"] / theirs["first_loss"] - 1)
            found["sizes"].setdefault(size, {})[dtype] = sides
    return found


def steps_of(
    size: str, batch: int, threads: int, steps: int, dtype: str, reference: list[str] | None
) -> dict[str, Any]:
    """Median time of a step, after one that warms up, of one side; run in a process of its own."""
    torch.set_num_threads(threads)
    specs = [ml4m_spec(name) for name in NAMES]
    batches = [_batch(specs, batch, seed) for seed in range(steps + 1)]
    step = _ours(size, specs, dtype) if reference is None else _theirs(size, specs, dtype, reference)
    held = [b if reference is None else _ml4m.as_reference(b, specs, whole=True) for b in batches]
    seconds, losses = [], []
    for one in held:
        began, used = time.perf_counter(), time.process_time()
        losses.append(step(one))
        seconds.append((time.perf_counter() - began, time.process_time() - used))
    wall, cpu = (float(np.median(part)) for part in zip(*seconds[1:], strict=True))
    real = {side: float(np.mean([_filled(b, side) for b in batches])) for side in ("enc", "dec")}
    return {
        "samples_per_s": batch / wall, "step_s": wall, "step_cpu_s": cpu, "first_loss": losses[0], "real": real,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def _filled(batch: MaskedBatch, side: str) -> float:
    modality = getattr(batch, f"{side}_mod")
    return int((modality >= 0).sum()) / (len(modality) * TOKENS)


def _batch(specs: list[ModalitySpec], size: int, seed: int) -> MaskedBatch:
    rng = np.random.default_rng(seed)
    targets = {spec.name: 0.1 for spec in specs}  # vectors and pixels draw targets too and waste them, as in ml-4m
    mixture = (
        MixtureComponent(weight=1.0, input_alphas=dict.fromkeys(NAMES, 0.1), target_alphas=targets),
        MixtureComponent(weight=1.0, input_alphas={"rgb@224": 1.0, "t5_caption": 0.1}, target_alphas=targets),
    )
    config = MaskingConfig(components=mixture, input_tokens=(TOKENS,) * 2, target_tokens=(TOKENS,) * 2)
    samples = [mask_sample(rng, {s.name: _value(s, rng) for s in specs}, specs, config) for _ in range(size)]
    return collate(samples, specs, TOKENS, TOKENS)


def _value(spec: ModalitySpec, rng: np.random.Generator) -> Any:
    if spec.kind == "pixels":
        return rng.standard_normal((3, 224, 224), np.float32)
    if spec.kind == "embeddings":
        return rng.standard_normal((rng.integers(8, 40), spec.dim_in), np.float32)
    if spec.kind == "tokens":
        return rng.integers(0, spec.vocab_size, spec.max_tokens)
    if spec.chunked:
        return rng.integers(204, 30_000, (rng.integers(1, 18), 2)).tolist()
    return rng.integers(204, 30_000, rng.integers(*LENGTHS[spec.name])).tolist()


def _ours(size: str, specs: list[ModalitySpec], dtype: str) -> Callable[[MaskedBatch], float]:
    model = FourM(FourMConfig.preset(size), specs, [spec for spec in specs if spec.is_target])
    _ml4m.draw(model)
    optimizer = optim.adamw(model, lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))

    def step(batch: MaskedBatch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        value, _ = torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        return value

    return step


def _theirs(size: str, specs: list[ModalitySpec], dtype: str, paths: list[str]) -> Callable[[dict[str, Any]], float]:
    sys.path[1:1] = paths
    reference = _ml4m.load(Path(paths[0]))
    outputs = [spec for spec in specs if spec.is_target]
    model = reference.model(reference.settings(FourMConfig.preset(size)), specs, outputs, tied=True)
    from fourm.utils.native_scaler import get_grad_norm_

    _ml4m.draw(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95))

    def step(batch: dict[str, Any]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, losses = model(batch, num_encoder_tokens=TOKENS, num_decoder_tokens=TOKENS, loss_type="mod")
        value = loss.item()
        _ = [one.item() for one in losses.values()]
        loss.backward()
        get_grad_norm_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


if __name__ == "__main__":
    _report.main(measure)
