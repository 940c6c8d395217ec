"""4M-21 from 4M-7, as ml-4m trains it: `torchrun ... -m pipelines train fourm21` (B), `fourm21.large`, `.xlarge`.

500 billion tokens: 60 % CC12M with all modalities, 20 % COYO700M with seven and 20 % text of C4, under `data/`. Starts
from `runs/fourm7_*/model`; `init_from=FOLDER` for another, such as a published 4M-7.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.recipes import _fourm
from pipelines.recipes._fourm import Hyper
from pipelines.train import Source, TrainFourM

_BASE = Hyper(size="base", gpus=64, batch_size=64, input_tokens=(256, 256), target_tokens=(256, 256))


def recipe() -> TrainFourM:
    """4M-21 B: 64 GPUs, whole weights on each."""
    return _run(_BASE, "b")


def large() -> TrainFourM:
    """4M-21 L: 64 GPUs, sharded, activations computed again; its clipping only measures the norm."""
    return _run(replace(_BASE, size="large", clip_grad=1e4, sharded=True, recompute=True), "l")


def xlarge() -> TrainFourM:
    """4M-21 XL: 128 GPUs, sharded, a fifth of the rate, activations computed again."""
    size = replace(_BASE, size="xlarge", gpus=128, batch_size=32, blr=2e-5, clip_grad=3.0, sharded=True, recompute=True)
    return _run(size, "xl")


def _run(hyper: Hyper, name: str) -> TrainFourM:
    data = (
        Source(root="data/cc12m", weight=0.6, repeats=4),
        # ml-4m's file names a table for COYO700M that it does not hold; this one of its own is what that name says.
        Source(root="data/coyo700m", weight=0.2, masking=_fourm.masking(hyper, _fourm.mod7_biased())),
        Source(root="data/c4", weight=0.2, masking=_fourm.masking(hyper, _fourm.text_only())),
    )
    return _fourm.run(
        hyper, _fourm.mod21(), _fourm.INPUTS_21, _fourm.OUTPUTS_21, f"runs/fourm21_{name}",
        data=data, init_from=f"runs/fourm7_{name}/model",
    )  # fmt: skip
