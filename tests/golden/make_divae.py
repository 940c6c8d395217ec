"""Makes divae.npz with apple/ml-4m, commit cda590faa3b9f022c28537193d3e1650527646a3, and diffusers 0.20.0.

PYTHONPATH=.:CHECKOUT_OF_ML4M:FOLDER python tests/golden/make_divae.py

FOLDER holds diffusers 0.20.0, huggingface_hub 0.24.0 and einops.

No file of the reference is changed. transformers is hidden from the old diffusers, which does not know the new one, and
fourm.utils stands without its data sets: two functions of it are needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 7
SIDE = 64
EVERY = 3
"""Of rows and columns of a map every third is kept: with patches of 4 pixels every place of a patch."""

_ENCODER: dict[str, Any] = {
    "image_size": SIDE, "enc_type": "vit_64x1x2_enc", "post_mlp": True, "patch_size": 16, "codebook_size": 64,
    "latent_dim": 16, "threshold_ema_dead_code": 0.0,
}  # fmt: skip
UNET = _ENCODER | {"dec_type": "unet_patched_32x1", "n_channels": 3}
UVITS: dict[str, dict[str, Any]] = {
    name: _ENCODER | {"dec_type": dec_type, "conditioning": how, "dec_transformer_dropout": 0.0, "n_channels": 1}
    for name, dec_type, how in (
        ("uvit", "uvit_32-64x2x2_p4_f16", "concat"),
        ("uvit_longskip", "uvit_32-64x4x2_p4_f16_longskip", "concat"),
        ("uvit_extraconv", "uvit_32-64x1x2_p4_f16_extraconv", "xattn"),
        ("uvit_xattn", "uvit_32-64x2x2_p4_f8", "xattn"),
    )
}
FULL: dict[str, dict[str, Any]] = {
    "layout_rgb": {
        "image_size": 448, "n_channels": 3, "post_mlp": True, "codebook_size": 16384, "dec_type": "unet_patched",
        "beta_schedule": "linear", "prediction_type": "sample",
    },
    "layout_depth": {
        "image_size": 448, "n_channels": 1, "post_mlp": True, "codebook_size": 8192, "dec_type": "unet_patched",
        "beta_schedule": "linear", "prediction_type": "sample",
    },
    "layout_uvit": {
        "image_size": 448, "n_channels": 3, "post_mlp": True, "codebook_size": 1024, "dec_type": "uvit_b_p4_f16",
        "beta_schedule": "shifted_cosine:0.5", "prediction_type": "v_prediction",
    },
}  # fmt: skip
SCHEDULES = (
    ("linear", True), ("linear", False), ("squaredcos_cap_v2", True), ("squaredcos_cap_v2", False),
    ("shifted_cosine:0.5", True), ("shifted_cosine:2", True),
)  # fmt: skip
STEPS = (1, 3, 7, 25, 30, 300)
SPACINGS = ("trailing", "linspace", "leading")
DECODED: dict[str, dict[str, Any]] = {
    "ddim": {"beta_schedule": "linear", "prediction_type": "sample", "thresholding": True},
    "ddim_v": {"beta_schedule": "shifted_cosine:0.5", "prediction_type": "v_prediction", "thresholding": False},
    "ddim_cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "thresholding": True},
    "ddim_clip": {"beta_schedule": "linear", "prediction_type": "sample", "thresholding": False, "clip_sample": True},
    "ddim_epsilon": {
        "beta_schedule": "linear", "prediction_type": "epsilon", "zero_terminal_snr": False, "thresholding": True
    },
    "ddim_30": {"beta_schedule": "linear", "prediction_type": "sample", "thresholding": True},
    "ddim_linspace": {"beta_schedule": "linear", "prediction_type": "sample", "thresholding": True},
    "ddpm": {"beta_schedule": "linear", "prediction_type": "sample", "thresholding": True},
}  # fmt: skip
SAMPLED: dict[str, dict[str, Any]] = {
    name: {
        "steps": 30 if name == "ddim_30" else 5,
        "spacing": "linspace" if name == "ddim_linspace" else "trailing",
        "sampler": "ddpm" if name == "ddpm" else "ddim",
    }
    for name in DECODED
}
LOSSES = ("sample", "epsilon", "v_prediction", "v_prediction-epsilon_loss")
DROPPED: dict[str, dict[str, Any]] = {
    "dropped": {"cls_free_guidance_dropout": 0.5},
    "masked": {"cls_free_guidance_dropout": 0.9, "masked_cfg": True},
    "masked_few": {"cls_free_guidance_dropout": 0.9, "masked_cfg": True, "masked_cfg_low": 2, "masked_cfg_high": 5},
}
TIMESTEPS = (0, 1, 400, 999)


def draws(what: str) -> np.random.Generator:
    """A generator of its own for each name, so that no order matters."""
    return np.random.default_rng([SEED, zlib.crc32(what.encode())])


def maps(what: str, channels: int, num: int = len(TIMESTEPS)) -> torch.Tensor:
    """Noise of unit variance, (num, channels, 64, 64)."""
    return torch.from_numpy(draws(what).standard_normal((num, channels, SIDE, SIDE), dtype=np.float32))


def hidden() -> torch.Tensor:
    """Which codes of a 4 x 4 grid are hidden, for each map: some, none, one, all."""
    mask = np.zeros((len(TIMESTEPS), 4, 4), dtype=bool)
    mask[0] = draws("hidden").random((4, 4)) < 0.5
    mask[2, 1, 3] = mask[3] = True
    return torch.from_numpy(mask)


def random_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random weights of a state dict's names and shapes; tables of positions stay as they are."""
    made = {}
    for name, value in state.items():
        # The two names of one tied tensor give one draw.
        drawn = draws(name.replace("Conv2d_0", "conv")).standard_normal(tuple(value.shape), dtype=np.float32)
        if name.endswith("pos_emb"):
            drawn = value.numpy()
        elif name.endswith(("initted", "cluster_size")):
            drawn = np.ones_like(drawn)
        elif name.endswith("embed"):
            drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        elif value.ndim > 1:
            drawn /= np.sqrt(np.prod(value.shape[1:]))
        else:
            drawn = 0.1 * drawn + (1 if name.endswith("weight") else 0)
        made[name] = torch.from_numpy(np.ascontiguousarray(drawn, dtype=np.float32))
    return made


def layout(state: dict[str, torch.Tensor]) -> str:
    """Names and shapes as one text."""
    return json.dumps({name: list(value.shape) for name, value in sorted(state.items())})


def kept(values: torch.Tensor) -> np.ndarray:
    """The part of maps that is stored."""
    return values.detach().numpy()[..., ::EVERY, ::EVERY].copy()


def surroundings() -> None:
    """What the reference needs that is not there; before its import."""
    find = importlib.util.find_spec
    hidden_packages = ("transformers", "accelerate", "xformers", "onnxruntime", "flax", "jax", "tensorflow")
    importlib.util.find_spec = lambda name, package=None: None if name in hidden_packages else find(name, package)
    utils: Any = types.ModuleType("fourm.utils")
    utils.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
    utils.denormalize = None  # of undo_std alone
    sys.modules["fourm.utils"] = utils


def reference(settings: dict[str, Any]) -> Any:
    """ml-4m's DiVAE of the settings, in evaluation mode, with our small sizes under our names for them."""
    from fourm.vq.models import uvit, vit_models
    from fourm.vq.models.unet import unet
    from fourm.vq.vqvae import DiVAE

    def small_vit(in_channels: int, resolution: int, patch_size: int, patch_proj: bool, post_mlp: bool) -> Any:
        return vit_models.ViTEncoder(
            in_channels=in_channels, resolution=resolution, patch_size=patch_size, dim_tokens=64, depth=1, num_heads=2,
            patch_proj=patch_proj, post_mlp=post_mlp,
        )  # fmt: skip

    vit_models.vit_64x1x2_enc = small_vit
    unet.unet_patched_32x1 = partial(
        unet.PatchedUNetCondCat, patch_size=4, model_channels=32, num_res_blocks=1, attention_resolutions=[4, 8],
        channel_mult=(1, 2, 2, 2),
    )  # fmt: skip
    for one in UVITS.values():
        name = one["dec_type"]
        extra, skips = name.endswith("_extraconv"), name.endswith("_longskip")
        made = partial(
            uvit.UViT, patch_size=4, block_out_channels=(32, 64, 128) if extra else (32, 64), layers_per_block=2,
            downsample_before_mid="_f16" in name and not extra, mid_dim=64, mid_num_heads=2,
            mid_layers=int(name.split("x")[1]) + skips, mid_use_long_skip=skips,
        )  # fmt: skip
        setattr(uvit, name, made)
    return DiVAE(**settings, sync_codebook=False).eval()


def scheduler(model: Any, name: str) -> Any:
    """ml-4m's scheduler of a model's settings: None for the model's own, which is its DDPM."""
    from fourm.vq.scheduling import DDIMScheduler

    if SAMPLED[name]["sampler"] == "ddpm":
        return None
    return DDIMScheduler(
        num_train_timesteps=1000, thresholding=model.thresholding, clip_sample=model.clip_sample,
        beta_schedule=model.beta_schedule, prediction_type=model.prediction_type,
        zero_terminal_snr=model.zero_terminal_snr,
    )  # fmt: skip


def loss(model: Any, kind: str) -> float:
    """The loss of ml-4m's training step (run_training_divae.py: train_one_epoch), which is not a function there."""
    clean, noise, timesteps = maps("clean", 3).clamp(-1, 1), maps("noise", 3), torch.tensor(TIMESTEPS)
    noisy = model.noise_scheduler.add_noise(clean, noise, timesteps)
    out, code_loss = model(clean, noisy, timesteps)
    if kind == "sample":
        target = clean
    elif kind == "v_prediction":
        target = model.noise_scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = noise
    if kind == "v_prediction-epsilon_loss":
        out = model.noise_scheduler.get_noise(noisy, out, timesteps)
    return (torch.nn.functional.mse_loss(out, target) + code_loss).item()


def main() -> None:
    """Run the reference and write divae.npz."""
    surroundings()
    from fourm.vq.scheduling import DDIMScheduler, DDPMScheduler

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for beta_schedule, zero in SCHEDULES:
        made = DDIMScheduler(beta_schedule=beta_schedule, zero_terminal_snr=zero)
        found[f"alphas {beta_schedule} {zero}"] = made.alphas_cumprod.numpy()
    for steps in STEPS:
        ddim, ddpm = DDIMScheduler(), DDPMScheduler()
        for spacing in SPACINGS:
            ddim.set_timesteps(steps, mode=spacing)
            found[f"timesteps {spacing} {steps}"] = ddim.timesteps.numpy().astype(np.int16)
        ddpm.set_timesteps(steps, mode="trailing")
        found[f"timesteps ddpm {steps}"] = ddpm.timesteps.numpy().astype(np.int16)

    model = reference(UNET)
    model.load_state_dict(random_state(model.state_dict()))
    clean = maps("clean", 3).clamp(-1, 1)
    with torch.no_grad():
        found["ids"] = model.tokenize(clean).numpy().astype(np.int16)
    ids = torch.from_numpy(found["ids"].astype(np.int64))
    for name, settings in {"unet": UNET, **UVITS}.items():
        model = reference(settings)
        model.load_state_dict(random_state(model.state_dict()))
        codes, noisy = model.tokens_to_embedding(ids), maps("noisy", settings["n_channels"])
        with torch.no_grad():
            found[name] = kept(model.decoder(noisy, torch.tensor(TIMESTEPS), codes))
            found[f"{name} hidden"] = kept(model.decoder(noisy, torch.tensor(TIMESTEPS), codes, cond_mask=hidden()))
    for name, settings in DECODED.items():
        model = reference(UNET | settings)
        model.load_state_dict(random_state(model.state_dict()))
        found[name] = kept(
            model.decode_tokens(
                ids[:2],
                timesteps=SAMPLED[name]["steps"],
                scheduler=scheduler(model, name),
                generator=torch.Generator().manual_seed(SEED),
                scheduler_timesteps_mode=SAMPLED[name]["spacing"],
            )
        )
    for kind in LOSSES:
        model = reference(UNET | {"prediction_type": kind.split("-")[0], "beta_schedule": "linear"})
        model.load_state_dict(random_state(model.state_dict()))
        found[f"loss {kind}"] = loss(model.train(), kind)
    for name, settings in DROPPED.items():
        model = reference(UNET | settings)
        model.load_state_dict(random_state(model.state_dict()))
        torch.manual_seed(SEED)
        found[f"loss {name}"] = loss(model.train(), "v_prediction")
    for name, settings in FULL.items():
        found[name] = layout(reference(settings).state_dict())
    found["note"] = (
        f"apple/ml-4m cda590fa with diffusers 0.20.0, torch {torch.__version__}; random weights, seed {SEED}"
    )
    path = Path(__file__).with_suffix("").with_name("divae.npz")
    np.savez_compressed(path, **found)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
