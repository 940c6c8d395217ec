"""What the recipes of the demo share: where it lies, and the settings of its small tokenizers."""

from __future__ import annotations

from dataclasses import replace

from model.domains import Domain
from model.loop import LoopConfig
from model.settings import DType
from model.tokenizers._vq import VQConfig
from model.tokenizers.vqvae import VQVAEConfig, dead_code_threshold
from pipelines.train_tokenizer import TrainTokenizer

OUT = "out/demo"
SIDE = 64
PATCH = 8
BATCH = 8


def tokenizer(
    modality: str,
    domain: Domain,
    *,
    channels: int,
    codes: int,
    labels: int = 0,
    latent: int = 16,
    patch: int = PATCH,
    patch_proj: bool = True,
    steps: int = 1500,
    dtype: DType = "bfloat16",
) -> TrainTokenizer:
    """A ViT VQ-VAE of 64 x 64 pixels that one CPU core trains in about a minute; 8 x 8 tokens unless told otherwise.

    Small batches and many steps: a codebook settles by the number of its updates, not by their size (docs/log.md).
    """
    tokens = (SIDE // patch) ** 2
    model = VQVAEConfig(
        domain=domain,
        image_size=SIDE,
        patch_size=patch,
        patch_proj=patch_proj,
        n_channels=channels,
        n_labels=labels or None,
        enc_type="vit_96x1x3_enc",
        dec_type="vit_96x2x3_dec",
        post_mlp=False,
        codebook_size=codes,
        latent_dim=latent,
        ema_decay=0.98,
        threshold_ema_dead_code=dead_code_threshold(BATCH * tokens, codes, share=8.0),
    )
    return of(modality, model, steps=steps, dtype=dtype)


def vectors(modality: str, domain: Domain, *, root: str, heldout: str, steps: int) -> TrainTokenizer:
    """An MLP with eight codebooks of 16 codes: eight ids for a vector."""
    channels = domain.num_channels
    assert channels is not None
    mlp = "BottleneckMLP/B_2-Wi_128"
    model = VQVAEConfig(
        domain=domain,
        image_size=SIDE,
        patch_size=PATCH,
        n_channels=channels,
        enc_type=mlp,
        dec_type=mlp,
        quant_type="memcodes",
        codebook_size=16,
        num_codebooks=8,
        latent_dim=128,
    )
    made = of(modality, model, steps=steps, dtype="float32", batch_size=64)
    return replace(made, roots=(root,), heldout=(heldout,))


def of(modality: str, model: VQConfig, *, steps: int, dtype: DType, batch_size: int = BATCH) -> TrainTokenizer:
    """How all of them are trained."""
    return TrainTokenizer(
        roots=(f"{OUT}/scenes",),
        heldout=(f"{OUT}/scenes_heldout",),
        modality=modality,
        model=model,
        loop=LoopConfig(
            steps=steps,
            lr=3e-3,
            min_lr=3e-5,
            warmup_steps=50,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            dtype=dtype,
            ema_decay=0.99,
            log_every=50,
            evaluate_every=500,
            pictures_every=500,
            checkpoint_every=500,
        ),
        batch_size=batch_size,
        out=f"{OUT}/tokenizers",
    )
