"""The settings of the tokenizers of 4M-21 (Bachmann et al. 2024), which ml-4m publishes or has recipes for.

A name is the end of the id of a repository `EPFL-VILAB/4M_tokenizers_<name>`; `_224` alone is the first stage of the
same, at one resolution. Domains are ml-4m's: depth standardised crop by crop, its losses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from model import domains
from model.domains import Domain
from model.tokenizers._vq import VQConfig
from model.tokenizers.divae import published_divae
from model.tokenizers.vqvae import VQVAEConfig

C = TypeVar("C", bound=VQConfig)

_MLP = "BottleneckMLP/B_6-Wi_1024"


def published() -> dict[str, VQConfig]:
    """Settings by name.

    `threshold_ema_dead_code` is ml-4m's default; a trainer computes it of its batch (`dead_code_threshold`).
    """
    return {**_maps(), **_vectors(), **_diffusion()}


def resolutions(name: str, config: C, largest: int) -> dict[str, C]:
    """`<name>_224` and `<name>_224-<largest>`, whose position tables are of the largest size it was trained at."""
    return {
        f"{name}_224": replace(config, image_size=224),
        f"{name}_224-{largest}": replace(config, image_size=largest),
    }


def _maps() -> dict[str, VQConfig]:
    """ViT to ViT: classes, dense features, masks, and images of few codes."""
    vit = VQVAEConfig(enc_type="vit_b_enc", dec_type="vit_b_dec", post_mlp=True, codebook_size=8192, latent_dim=32)
    classes = domains.Semseg()
    semseg = replace(vit, domain=classes, n_labels=classes.num_labels, n_channels=64, codebook_size=4096)
    found: dict[str, VQConfig] = {}
    found |= resolutions("semseg_4k", semseg, 448)
    for name, channels, patch in (("CLIP-B16", 512, 16), ("DINOv2-B14", 768, 14), ("ImageBind-H14", 1280, 14)):
        features = domains.Features(channels=channels)
        config = replace(vit, domain=features, n_channels=channels, patch_proj=False, patch_size=patch)
        found |= resolutions(f"{name}_8k", config, 448)
    # Trained with the perceptual loss of a CLIP beside the squared error.
    found |= resolutions("rgb_1k", replace(vit, domain=domains.Rgb(), codebook_size=1024), 448)
    found["sam-instance_1k_64"] = replace(
        vit,
        domain=domains.SamMask(criterion="binary_cross_entropy"),
        n_channels=1,
        image_size=64,
        out_conv=True,
        codebook_size=1024,
        latent_dim=1024,
    )
    return found


def _vectors() -> dict[str, VQConfig]:
    """MLP to MLP: one vector into several ids, each of codes of its own; ml-4m's recipes say 8 where 4M has 16."""
    config = VQVAEConfig(enc_type=_MLP, dec_type=_MLP, quant_type="memcodes", codebook_size=8192, latent_dim=1024)

    def of(domain: Domain, codebooks: int) -> VQVAEConfig:
        channels = domain.num_channels
        assert channels is not None
        return replace(config, domain=domain, n_channels=channels, num_codebooks=codebooks)

    found: dict[str, VQConfig] = {}
    for name, channels in (("DINOv2-B14", 768), ("ImageBind-H14", 1280)):
        found[f"{name}-global_8k_16_224"] = replace(of(domains.Vector(channels=channels), 16), patch_size=14)
    found["human-poses_1k_8"] = replace(of(domains.Poses(), 8), codebook_size=1024)
    return found


def _diffusion() -> dict[str, VQConfig]:
    """ViT to a diffusion model: images, depth, normals, edges."""
    found: dict[str, VQConfig] = {}
    for name, config in published_divae().items():
        found |= resolutions(name, config, config.image_size)
    return found
