"""What a trained tokenizer is made of stays known: its start, its licence, its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dataengine import weights
from model import domains
from model.loop import LoopConfig
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines.train_tokenizer import TrainTokenizer, made

CONFIG = VQVAEConfig(
    domain=domains.Depth(), image_size=32, n_channels=1, enc_type="vit_16x1x1_enc", dec_type="vit_16x1x1_dec",
    patch_size=8, codebook_size=16, latent_dim=4,
)  # fmt: skip


@pytest.mark.parametrize("how", ["init_from", "init_encoder_from"])
def test_nothing_starts_from_random_weights(how: str, tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    VQVAE(CONFIG).save(file)
    run = TrainTokenizer(
        roots=("unread",), modality="depth", model=CONFIG, loop=LoopConfig(steps=1, lr=1e-3), batch_size=1,
        out=str(tmp_path), **{how: str(file)},
    )  # fmt: skip
    assert made(run).config == replace(CONFIG)
    weights.mark_random(file, seed=0)
    with pytest.raises(ValueError, match=r"start\.safetensors is random, expected a trained tokenizer"):
        made(run)
