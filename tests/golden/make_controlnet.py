"""Makes controlnet.npz with apple/ml-4m, commit cda590faa3b9f022c28537193d3e1650527646a3, and diffusers 0.20.0.

PYTHONPATH=.:CHECKOUT_OF_ML4M:FOLDER python tests/golden/make_controlnet.py

As make_divae.py, whose surroundings it needs too. Stable Diffusion is very small and random here, and instead of a text
encoder there is a stand-in without weights: the empty prompt's encoding, all that is used, is a parameter.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.golden import make_divae as divae

SETTINGS: dict[str, Any] = {
    "image_size": 32, "image_size_sd": 64, "enc_type": "vit_64x1x2_enc", "post_mlp": True, "patch_size": 8,
    "codebook_size": 64, "latent_dim": 16, "threshold_ema_dead_code": 0.0,
}  # fmt: skip
STEPS = 5
SCALED = 0.5
_SHAPE: dict[str, Any] = {
    "block_out_channels": (32, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
    "attention_head_dim": 8, "cross_attention_dim": 32,
}  # fmt: skip


def images() -> torch.Tensor:
    """Four images in [-1, 1]."""
    return divae.maps("clean", 3)[..., :32, :32].clamp(-1, 1)


class _Text(nn.Module):
    config = SimpleNamespace()
    dtype = torch.float32

    def forward(self, ids: torch.Tensor, attention_mask: None) -> tuple[torch.Tensor]:
        return (torch.zeros(1, ids.shape[1], 32),)


class _Tokenizer:
    model_max_length = 77

    def __call__(self, prompt: str, **how: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.zeros(1, 77, dtype=torch.long))


def reference() -> Any:
    """ml-4m's VQControlNet on a tiny Stable Diffusion."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from fourm.vq import vqvae
    from fourm.vq.models import controlnet

    scheduler = SimpleNamespace(
        config={
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
            "set_alpha_to_one": False, "steps_offset": 1,
        }
    )  # fmt: skip
    pipeline = SimpleNamespace(
        unet=UNet2DConditionModel(sample_size=64, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_SHAPE),
        vae=AutoencoderKL(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, sample_size=512,
        ),
        text_encoder=_Text(), tokenizer=_Tokenizer(), scheduler=scheduler, vae_scale_factor=2,
    )  # fmt: skip
    vqvae.StableDiffusionPipeline = SimpleNamespace(from_pretrained=lambda path: pipeline)
    controlnet.controlnet = lambda **how: controlnet.ControlnetCond(
        conditioning_embedding_out_channels=(16, 32, 96, 256), **how, **_SHAPE
    )
    divae.reference(divae.UNET)  # gives the reference our small encoder
    return vqvae.VQControlNet(**SETTINGS, sync_codebook=False).eval()


def main() -> None:
    """Run the reference and write controlnet.npz."""
    divae.surroundings()
    torch.set_num_threads(1)
    model = reference()
    model.load_state_dict(divae.random_state(model.state_dict()))
    with torch.no_grad():
        ids = model.tokenize(images())
        decoded = {
            name: model.decode_tokens(
                ids[:2], timesteps=STEPS, generator=torch.Generator().manual_seed(divae.SEED), vae_decode=True, **how
            )
            for name, how in (("decoded", {}), ("scaled", {"cond_scale": SCALED}))
        }
    torch.manual_seed(divae.SEED)
    # As run_training_vqcontrolnet.py: train_one_epoch.
    large = torch.nn.functional.interpolate(images(), SETTINGS["image_size_sd"], mode="bilinear", align_corners=False)
    clean = model.train().vae_encode(large)
    noise = torch.randn(clean.shape)
    timesteps = torch.randint(0, 1000, (len(clean),))
    out, code_loss = model(images(), model.noise_scheduler.add_noise(clean, noise, timesteps), timesteps)
    found = {
        "ids": ids.numpy().astype(np.int16),
        "loss": (torch.nn.functional.mse_loss(out, noise) + code_loss).item(),
        "layout": divae.layout(model.state_dict()),
        "stable_diffusion": json.dumps(_layout()),
        "note": f"apple/ml-4m cda590fa with diffusers 0.20.0, torch {torch.__version__}; random, seed {divae.SEED}",
    }
    found |= {name: divae.kept(values) for name, values in decoded.items()}
    path = Path(__file__).with_name("controlnet.npz")
    np.savez_compressed(path, **found)
    print(path, path.stat().st_size)


def _layout() -> dict[str, list[int]]:
    """Names and shapes of Stable Diffusion 1.5 and the ControlNet of ml-4m's settings, but the text encoder."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        parts = {
            "decoder.unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "decoder.controlnet": ControlNetModel(
                conditioning_channels=32, conditioning_embedding_out_channels=(32, 32, 96, 256),
                cross_attention_dim=768, attention_head_dim=8,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
            ),
        }  # fmt: skip
    return {
        f"{part}.{name}": list(value.shape)
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


if __name__ == "__main__":
    main()
