"""4M-21's small codebook of images: `dataengine train-tokenizer ml4m_rgb_1k`; the encoder for diffusion decoders."""

from __future__ import annotations

from dataclasses import replace

from pipelines.recipes import _tokenizers
from pipelines.tokenizer_loss import PerceptualLoss
from pipelines.train_tokenizer import TrainTokenizer


def recipe() -> TrainTokenizer:
    """1,024 codes, ViT to ViT, with a perceptual loss of CLIP-B16.

    ml-4m's weight is 1.0 (its file's name says 5.0), of a loss that is once more divided by the images of a GPU.
    """
    made = _tokenizers.first("rgb", "rgb_1k_224", batch_size=64, epochs=50)
    return replace(made, perceptual=PerceptualLoss(weight=1 / 64), out="tokenizers_1k")


def adapted() -> TrainTokenizer:
    """The second stage, at every size that its name says."""
    made = _tokenizers.adapted(recipe(), "rgb_1k_224-448")
    return replace(made, init_from="tokenizers_1k/rgb.safetensors", out="tokenizers_1k_448")
