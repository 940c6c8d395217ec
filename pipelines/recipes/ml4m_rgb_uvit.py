"""A UViT that denoises under the codes of ml4m_rgb_1k: `dataengine train-tokenizer ml4m_rgb_uvit`."""

from __future__ import annotations

from dataclasses import replace

from model import domains
from model.tokenizers.divae import DiVAEConfig
from pipelines.recipes import _tokenizers
from pipelines.train_tokenizer import TrainTokenizer

MODEL = DiVAEConfig(
    domain=domains.Rgb(),
    image_size=224,
    image_size_enc=448,
    post_mlp=True,
    codebook_size=1024,
    freeze_enc=True,
    dec_type="uvit_b_p4_f16",
    prediction_type="v_prediction",
    beta_schedule="shifted_cosine:0.5",
    clip_sample=True,
)


def recipe() -> TrainTokenizer:
    """The encoder half is that of `tokenizers_1k_448/rgb.safetensors`, and stays as it is."""
    made = _tokenizers.of(
        "rgb",
        MODEL,
        batch_size=64,
        epochs=50,
        warmup_steps=5 * _tokenizers.EPOCH // (_tokenizers.GPUS * 64),
        blr=1e-4,
        dtype="float16",
        ema_decay=0.9999,
        min_crop_scale=_tokenizers.IMAGES,
    )
    encoder = "tokenizers_1k_448/rgb.safetensors"
    return replace(made, init_encoder_from=encoder, out="tokenizers_uvit", dead_code_share=None)
