"""What the recipes of the demo share: where it lies, and the settings of its small tokenizers."""

from __future__ import annotations

from model.loop import LoopConfig
from model.tokenizers.domains import Domain
from model.tokenizers.vqvae import VQVAEConfig, dead_code_threshold
from pipelines.train_tokenizer import TrainTokenizer

OUT = "out/demo"
SIDE = 64
PATCH = 8
BATCH = 16
TOKENS = (SIDE // PATCH) ** 2


def tokenizer(
    modality: str,
    domain: Domain,
    *,
    channels: int,
    codes: int,
    steps: int,
    labels: int = 0,
    latent: int = 16,
    dim: int = 96,
    lr: float = 2e-3,
) -> TrainTokenizer:
    """A ViT VQ-VAE of 64 x 64 pixels and 8 x 8 tokens that two CPU cores train in about a minute."""
    return TrainTokenizer(
        roots=(f"{OUT}/scenes",),
        modality=modality,
        model=VQVAEConfig(
            domain=domain,
            image_size=SIDE,
            patch_size=PATCH,
            n_channels=channels,
            n_labels=labels or None,
            enc_type=f"vit_{dim}x2x3_enc",
            dec_type=f"vit_{dim}x3x3_dec",
            post_mlp=True,
            codebook_size=codes,
            latent_dim=latent,
            ema_decay=0.9,
            threshold_ema_dead_code=dead_code_threshold(BATCH * TOKENS, codes, share=4.0),
        ),
        loop=LoopConfig(
            steps=steps,
            lr=lr,
            min_lr=lr / 100,
            warmup_steps=50,
            betas=(0.9, 0.95),
            dtype="bfloat16",
            ema_decay=0.99,
            log_every=20,
        ),
        batch_size=BATCH,
        out=f"{OUT}/tokenizers",
    )
