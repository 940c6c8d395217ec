"""A ViT VQ-VAE for maps: the function and the checkpoints of ml-4m's VQVAE (Mizrahi et al. 2023, 4M)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import domains
from model.domains import Map
from model.tokenizers._mlp import BottleneckMLP, is_mlp, mlp_size
from model.tokenizers._quantize import Usage, usage
from model.tokenizers._vit import ViTDecoder, vit_size
from model.tokenizers._vq import VQ, VQConfig


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig(VQConfig):
    """`VQConfig` and the decoder, which `dec_type` names as `enc_type` does the encoder."""

    image_size_dec: int | None = None
    dec_type: str = "vit_b_dec"
    out_conv: bool = False
    patch_size_dec: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_mlp(self.dec_type) and self.dec_size % self.dec_patch:
            raise ValueError(f"image size {self.dec_size}, expected a multiple of the patch size {self.dec_patch}")

    @property
    def dec_size(self) -> int:
        """The image size the decoder's position table is made for."""
        return self.image_size_dec or self.image_size

    @property
    def dec_patch(self) -> int:
        """The patch size of the decoder's position table, and of its output unless that is a feature map."""
        return self.patch_size_dec or self.patch_size


class VQVAE(VQ):
    """Encoder, quantizer, decoder, each half a ViT or an MLP; state-dict keys are ml-4m's."""

    Config = VQVAEConfig
    config: VQVAEConfig
    decoder: ViTDecoder | BottleneckMLP

    def _build(self, config: VQConfig) -> None:
        assert isinstance(config, VQVAEConfig)
        super()._build(config)
        self.decoder, width = _decoder(config)
        self.post_quant_proj = nn.Conv2d(config.latent_dim, width, 1)

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Ids int64 (B, *grid) to network output (B, C, H, W)."""
        return self.decoder(self.post_quant_proj(self.quantize.lookup(ids)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, C, H, W), quantizer loss, ids (B, *grid); in training mode the codebook learns."""
        codes, code_loss, ids = self.quantized(x)
        return self.decoder(self.post_quant_proj(codes)), code_loss, ids

    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The domain's loss plus the quantizer's."""
        out, code_loss, ids = self(x)
        reconstruction = self.domain.loss(out, x)
        stats = {
            "reconstruction": float(reconstruction.detach()),
            "commitment": float(code_loss.detach()),
            "codes": float(len(ids.unique())),
        }
        return reconstruction + code_loss, stats

    @classmethod
    def tiny(cls) -> VQVAE:
        """32 x 32 rgb pixels to 4 x 4 tokens."""
        config = VQVAEConfig(
            domain=domains.Rgb(),
            image_size=32,
            patch_size=8,
            enc_type="vit_64x1x2_enc",
            dec_type="vit_64x1x2_dec",
            post_mlp=True,
            codebook_size=64,
            latent_dim=16,
            threshold_ema_dead_code=0.05,
        )
        return cls(config).eval()

    def examples(self) -> list[Map]:
        """Four images of coloured stripes."""
        rng = np.random.default_rng(0)
        size = self.config.image_size
        rows = [rng.integers(0, 256, (size // 4, 1, 3), dtype=np.uint8) for _ in range(4)]
        return [np.broadcast_to(row.repeat(4, axis=0), (size, size, 3)).copy() for row in rows]


def _decoder(config: VQVAEConfig) -> tuple[ViTDecoder | BottleneckMLP, int]:
    """The decoder that `dec_type` names, and the width of what it takes."""
    channels = config.n_labels or config.n_channels
    if is_mlp(config.dec_type):
        size = mlp_size(config.dec_type)
        return BottleneckMLP(size[1], channels, size), size[1]
    patch = config.dec_patch if config.patch_proj else None
    side, vit = config.dec_size // config.dec_patch, vit_size(config.dec_type, "dec")
    return ViTDecoder(channels, patch, (side, side), vit, config.post_mlp, config.out_conv), vit[0]


def reconstruction_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """`VQ.training_loss`, as `model.loop.fit` wants it."""
    assert isinstance(model, VQ)
    return model.training_loss(batch)


def codebook_usage(model: VQVAE, ids: Sequence[NDArray[np.int64]]) -> Usage:
    """How many codes a set of ids uses, and their perplexity."""
    return usage((torch.from_numpy(part) for part in ids), model.vocab_size)


def dead_code_threshold(tokens_per_batch: int, codebook_size: int, share: float = 32.0) -> float:
    """ml-4m's rule: a code used less than 1/share of an even split of the batch is dead."""
    return tokens_per_batch / codebook_size / share
