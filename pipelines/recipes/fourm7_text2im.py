"""4M-7 made better at images from captions: `train fourm7_text2im` (B), `fourm7_text2im.large`, `.xlarge`.

100 billion tokens more of `data/cc12m`, a third of them mostly from captions, starting from `runs/fourm7_*/model`.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.recipes import _fourm
from pipelines.recipes._fourm import Hyper
from pipelines.train import TrainFourM

_BASE = Hyper(size="base", gpus=32, batch_size=128, input_tokens=(64, 256), target_tokens=(256, 256), total=100)


def recipe() -> TrainFourM:
    """B: 32 GPUs, whole weights on each."""
    return _run(_BASE, "b")


def large() -> TrainFourM:
    """L: 128 GPUs, sharded; its clipping only measures the norm."""
    return _run(replace(_BASE, size="large", gpus=128, batch_size=64, clip_grad=1e4, sharded=True), "l")


def xlarge() -> TrainFourM:
    """XL: 128 GPUs, sharded, a fifth of the rate, activations computed again."""
    size = replace(
        _BASE, size="xlarge", gpus=128, batch_size=32, warmup=5, blr=2e-5, clip_grad=3.0, sharded=True, recompute=True
    )
    return _run(size, "xl")


def _run(hyper: Hyper, name: str) -> TrainFourM:
    return _fourm.run(
        hyper, _fourm.caption_biased(), _fourm.INPUTS_7, _fourm.OUTPUTS_7, f"runs/fourm7_{name}_text2im",
        init_from=f"runs/fourm7_{name}/model",
    )  # fmt: skip
