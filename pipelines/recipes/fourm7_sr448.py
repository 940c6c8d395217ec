"""Tokens of 448 pixels from those of 224, by a 4M-7 L: `torchrun ... -m pipelines train fourm7_sr448`.

100 billion tokens more of `data/cc12m`, packed at both resolutions, starting from `runs/fourm7_l/model`.
"""

from __future__ import annotations

from pipelines.recipes import _fourm
from pipelines.train import TrainFourM


def recipe() -> TrainFourM:
    """L: 128 GPUs, sharded, activations computed again. ml-4m's file names its table without `.yaml`, and fails."""
    hyper = _fourm.Hyper(
        size="large", gpus=128, batch_size=32, input_tokens=(64, 1024), target_tokens=(1024, 1024), total=100, warmup=5,
        clip_grad=3.0, sharded=True, recompute=True,
    )  # fmt: skip
    return _fourm.run(
        hyper, _fourm.superres(), _fourm.INPUTS_SR, _fourm.MAPS_448, "runs/fourm7_l_sr448",
        init_from="runs/fourm7_l/model",
    )  # fmt: skip
