"""Dense and global DINOv3 features (Siméoni et al. 2025), by timm's vision transformer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dataengine import weights
from dataengine.labeler import Labeler, Loaded
from dataengine.weights import Weights
from labelers import _checkpoints, _images, _networks

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from torch import Tensor

FILE = "model.safetensors"
HEAD_WIDTH = 64

_TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "layer.": "blocks.",
    ".layer_scale1.lambda1": ".gamma_1",
    ".layer_scale2.lambda1": ".gamma_2",
    ".attention.o_proj.": ".attn.proj.",
    ".attention.q_proj.bias": ".attn.q_bias",
    ".attention.v_proj.bias": ".attn.v_bias",
    ".mlp.up_proj.": ".mlp.fc1.",
    ".mlp.down_proj.": ".mlp.fc2.",
}
_QUERY = re.compile(r"(.*)\.attention\.q_proj\.weight")


@dataclass(frozen=True, kw_only=True)
class DinoV3(Labeler):
    """The normalised patch tokens and class token of DINOv3: float16 (rows, cols, channels) and (channels,).

    (14, 14, 768) and (768,) for ViT-B/16 at `side` 224 pixels; the four register tokens are left out. The whole image
    is squeezed to that square as its authors do it, bilinear; ImageNet's statistics are its own. Positions are rotary,
    so any multiple of the patch will do for `side`. The tensors have timm's names (the default, which is not gated) or
    those of transformers (`facebook/dinov3-vitb16-pretrain-lvd1689m`); the architecture is read off them. No tokenizer
    of 4M-21 expects these features.
    """

    inputs = ("rgb",)
    emits = ("DINOv3-B16", "DINOv3-B16-global")
    batch_size = 32
    gpus = 0.1
    gate = (
        "the default checkpoint is open, under the DINOv3 licence; for facebook/dinov3-vitb16-pretrain-lvd1689m accept "
        "that licence on its page on the hub and log in (`hf auth login`)"
    )

    checkpoint: str = "timm/vit_base_patch16_dinov3.lvd1689m"
    side: int = 224
    normalisation: _images.Normalisation = "imagenet"
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("dinov3", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, under the DINOv3 licence."""
        return weights.describe(self.checkpoint, FILE, licence="DINOv3-license")

    def load(self, device: str) -> Loaded:
        """Read the network, compute its positions for `side`, and put it on the device."""
        trunk = network(_checkpoints.read(weights.resolve(self.checkpoint, FILE)), self.side)
        rope: Any = trunk.rope
        positions = rope.get_embed()
        trunk = _networks.placed(trunk, device, self.precision, compiled=self.compiled)
        # Sines and cosines stay float32, as in the reference: what is rotated takes the network's precision after.
        rope.pos_embed_cached = positions.to(device)

        def features(pixels: Tensor) -> dict[str, Tensor]:
            tokens = trunk(pixels)
            return {"DINOv3-B16": tokens[:, trunk.num_prefix_tokens :], "DINOv3-B16-global": tokens[:, 0]}

        return _images.featured(
            features,
            self.side,
            _images.statistics(self.normalisation, _images.IMAGENET),
            device,
            _networks.dtype_on(device, self.precision),
            Image.Resampling.BILINEAR,
        )

    def tiny(self, folder: Path) -> DinoV3:
        """Two random blocks of width 32 in the format of the published checkpoint."""
        file = folder / "dinov3.safetensors"
        if not file.exists():
            from safetensors.torch import save_file

            blank = _build(width=32, depth=2, mlp=64, patch=16, registers=4, biased=False, side=64)
            save_file(_checkpoints.randomised(blank.state_dict(), seed=0), file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor], side: int) -> Eva:
    """The network whose tensors these are, for square inputs of `side` pixels; float32, on the CPU.

    It returns all tokens after the last norm, class token and registers first: (n, 1 + 4 + rows * cols, width).
    """
    if "embeddings.patch_embeddings.weight" in state:
        state = _renamed(state)
    lacking = [
        name for name in ("reg_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight") if name not in state
    ]
    if lacking or "pos_embed" in state:
        found = f"found no {', '.join(lacking)}" if lacking else "found learned positions (pos_embed)"
        raise ValueError(f"dinov3: expected the tensors of a DINOv3 (ViT-S, B or L), {found}")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if side % patch:
        raise ValueError(f"dinov3: expected a side that is a multiple of the patch of {patch} pixels, got {side}")
    trunk = _build(
        width=width,
        depth=_checkpoints.count(state, "blocks."),
        mlp=state["blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        registers=state["reg_token"].shape[1],
        biased="blocks.0.attn.q_bias" in state,
        side=side,
    )
    _networks.fill(trunk, state, "dinov3")
    return trunk


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for the tensors as transformers has them: queries, keys and values become one matrix."""
    import torch

    # Stands for hidden patches in training; nothing is hidden here.
    state = {n.removeprefix("model."): v for n, v in state.items() if n != "embeddings.mask_token"}
    out = {}
    for name, value in state.items():
        if query := _QUERY.fullmatch(name):
            parts = [state[f"{query[1]}.attention.{part}_proj.weight"] for part in "qkv"]
            name, value = f"{query[1]}.attn.qkv.weight", torch.cat(parts)
        elif name.endswith((".attention.k_proj.weight", ".attention.v_proj.weight")):
            continue
        for theirs, ours in _TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        out[name] = value
    return out


def _build(*, width: int, depth: int, mlp: int, patch: int, registers: int, biased: bool, side: int) -> Eva:
    from functools import partial

    from timm.models.eva import Eva
    from torch.nn import LayerNorm

    trunk = Eva(
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=max(width // HEAD_WIDTH, 1),
        mlp_ratio=mlp / width,
        qkv_bias=biased,
        init_values=1.0,
        num_classes=0,
        global_pool="",  # all tokens
        num_reg_tokens=registers,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_fc_norm=False,
        norm_layer=partial(LayerNorm, eps=1e-5),
    )
    return trunk.eval().requires_grad_(False)
