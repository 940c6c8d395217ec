"""4M-7 from scratch, as ml-4m trains it: `torchrun ... -m pipelines train fourm7` (B), `fourm7.large`, `fourm7.xlarge`.

500 billion tokens of packed CC12M under `data/cc12m`; docs/recipes.md has the table.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.recipes import _fourm
from pipelines.recipes._fourm import Hyper
from pipelines.train import TrainFourM

_BASE = Hyper(size="base", gpus=64, batch_size=128, input_tokens=(128, 128), target_tokens=(128, 128))


def recipe() -> TrainFourM:
    """4M-7 B: 64 GPUs, whole weights on each."""
    return _run(_BASE, "b")


def large() -> TrainFourM:
    """4M-7 L: 128 GPUs, sharded; its clipping only measures the norm."""
    return _run(replace(_BASE, size="large", gpus=128, batch_size=64, clip_grad=1e4, sharded=True), "l")


def xlarge() -> TrainFourM:
    """4M-7 XL: 128 GPUs, sharded, a fifth of the rate, activations computed again."""
    size = replace(_BASE, size="xlarge", gpus=128, batch_size=64, blr=2e-5, clip_grad=3.0, sharded=True, recompute=True)
    return _run(size, "xl")


def _run(hyper: Hyper, name: str) -> TrainFourM:
    return _fourm.run(hyper, _fourm.mod7(), _fourm.INPUTS_7, _fourm.OUTPUTS_7, f"runs/fourm7_{name}")
