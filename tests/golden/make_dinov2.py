"""Makes dinov2.npz with facebookresearch/dinov2, commit b8931f7bf91576930313be2c6d6af376033b35f0.

PYTHONPATH=.:CHECKOUT_OF_DINOV2 XFORMERS_DISABLED=1 python tests/golden/make_dinov2.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
import torch

from labelers import _checkpoints, dinov2_b14

WIDTH, DEPTH, HEADS, MLP, PATCH = 128, 2, 2, 512, 14
PUBLISHED_SIDE = 518
SEED = 11
EVERY = 5
"""Of the 257 tokens every fifth is kept."""


def photos() -> list[np.ndarray]:
    """512 x 512 and 300 x 451 pixels."""
    return [skimage.data.astronaut(), skimage.data.chelsea()]


def random_state() -> dict[str, torch.Tensor]:
    """Random tensors of a small DINOv2 under the published names, with positions for 37 x 37 patches."""
    trunk = dinov2_b14._build(width=WIDTH, depth=DEPTH, mlp=MLP, patch=PATCH, side=PUBLISHED_SIDE)
    return _checkpoints.randomised(trunk.state_dict(), SEED) | {"mask_token": torch.zeros(1, WIDTH)}


def main() -> None:
    """Run the reference on both photographs, at 224 pixels and at the 518 of its positions."""
    from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base
    from torchvision import transforms

    model = DinoVisionTransformer(
        img_size=PUBLISHED_SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        init_values=1.0,
        block_chunks=0,
    ).eval()
    model.load_state_dict(random_state())
    found = {}
    for side in (224, 518):
        preprocess = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        with torch.inference_mode():
            out = model.forward_features(torch.stack([preprocess(photo) for photo in photos()]))
        every = EVERY if side == 224 else 10 * EVERY
        found[f"cls_{side}"] = out["x_norm_clstoken"].numpy()
        found[f"patches_{side}"] = out["x_norm_patchtokens"][:, ::every].numpy()
    published = vit_base(img_size=518, patch_size=14, init_values=1.0, block_chunks=0).state_dict()
    np.savez_compressed(
        Path(__file__).with_name("dinov2.npz"),
        **found,
        published="\n".join(f"{name} {' '.join(map(str, value.shape))}" for name, value in published.items()),
        note=f"facebookresearch/dinov2 b8931f7, torch {torch.__version__}, width {WIDTH}, depth {DEPTH}, seed {SEED}",
    )


if __name__ == "__main__":
    main()
