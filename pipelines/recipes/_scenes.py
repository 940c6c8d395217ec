"""What the recipes of the demo share: where it lies, and the settings of its small tokenizers."""

from __future__ import annotations

from model.domains import Domain
from model.loop import LoopConfig
from model.tokenizers.vqvae import VQVAEConfig, dead_code_threshold
from pipelines.train_tokenizer import TrainTokenizer

OUT = "out/demo"
SIDE = 64
PATCH = 8
BATCH = 8
TOKENS = (SIDE // PATCH) ** 2


def tokenizer(
    modality: str, domain: Domain, *, channels: int, codes: int, labels: int = 0, latent: int = 16
) -> TrainTokenizer:
    """A ViT VQ-VAE of 64 x 64 pixels and 8 x 8 tokens that one CPU core trains in half a minute.

    Small batches and many steps: a codebook settles by the number of its updates, not by their size (docs/log.md).
    """
    return TrainTokenizer(
        roots=(f"{OUT}/scenes",),
        modality=modality,
        model=VQVAEConfig(
            domain=domain,
            image_size=SIDE,
            patch_size=PATCH,
            n_channels=channels,
            n_labels=labels or None,
            enc_type="vit_96x1x3_enc",
            dec_type="vit_96x2x3_dec",
            post_mlp=False,
            codebook_size=codes,
            latent_dim=latent,
            ema_decay=0.98,
            threshold_ema_dead_code=dead_code_threshold(BATCH * TOKENS, codes, share=8.0),
        ),
        loop=LoopConfig(
            steps=1500,
            lr=3e-3,
            min_lr=3e-5,
            warmup_steps=50,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            dtype="bfloat16",
            ema_decay=0.99,
            log_every=50,
            checkpoint_every=500,
        ),
        batch_size=BATCH,
        out=f"{OUT}/tokenizers",
    )
