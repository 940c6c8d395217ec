"""Dense and global DINOv2 features (Oquab et al. 2023), by timm's vision transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataengine import weights
from dataengine.labeler import Labeler, Loaded
from dataengine.weights import Weights
from labelers import _checkpoints, _images, _networks

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

HEAD_WIDTH = 64
OFFSET = 0.1


@dataclass(frozen=True, kw_only=True)
class DinoV2(Labeler):
    """The normalised patch tokens and class token of DINOv2: float16 (rows, cols, channels) and (channels,).

    (16, 16, 768) and (768,) for ViT-B/14 at `side` 224 pixels. The whole image is squeezed to that square, see
    `labelers/_images.py`; ImageNet's statistics, by default, are DINOv2's own. The checkpoint has the names of the
    published one; the architecture is read off it.
    """

    inputs = ("rgb",)
    emits = ("DINOv2-B14", "DINOv2-B14-global")
    batch_size = 32
    gpus = 0.1

    checkpoint: str = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    side: int = 224
    normalisation: _images.Normalisation = "imagenet"
    # Trained in half precision by its authors, which keeps three more bits than bfloat16.
    precision: _networks.Precision = "float16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("dinov2_b14", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return weights.describe(self.checkpoint, licence="Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the network, fit its positions to `side`, and put it on the device."""
        trunk = network(_checkpoints.read(weights.resolve(self.checkpoint)), self.side)
        trunk = _networks.placed(trunk, device, self.precision, compiled=self.compiled)

        def features(pixels: Tensor) -> dict[str, Tensor]:
            tokens = trunk(pixels)
            return {"DINOv2-B14": tokens[:, 1:], "DINOv2-B14-global": tokens[:, 0]}

        return _images.featured(
            features,
            self.side,
            _images.statistics(self.normalisation, _images.IMAGENET),
            device,
            _networks.dtype_on(device, self.precision),
        )

    def tiny(self, folder: Path) -> DinoV2:
        """Two random blocks of width 16, published for 5 x 5 patches, in the format of the published checkpoint."""
        file = folder / "dinov2_b14.pth"
        if not file.exists():
            import torch

            state = _checkpoints.randomised(_build(width=16, depth=2, mlp=64, patch=14, side=70).state_dict(), seed=0)
            state["mask_token"] = torch.zeros(1, 16)
            torch.save(state, file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor], side: int) -> VisionTransformer:
    """The network whose tensors these are, for square inputs of `side` pixels; float32, on the CPU.

    It returns all tokens after the last norm, the class token first: (n, 1 + rows * cols, width).
    """
    lacking = [name for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight") if name not in state]
    if lacking:
        raise ValueError(f"dinov2_b14: expected the tensors of a DINOv2, found no {', '.join(lacking)}")
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        raise ValueError("dinov2_b14: expected a checkpoint without registers and SwiGLU (ViT-S, B or L)")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if side % patch:
        raise ValueError(f"dinov2_b14: expected a side that is a multiple of the patch of {patch} pixels, got {side}")
    trunk = _build(
        width=width,
        depth=_checkpoints.count(state, "blocks."),
        mlp=state["blocks.0.mlp.fc1.weight"].shape[0],
        patch=patch,
        side=side,
    )
    # Stands for hidden patches in training; nothing is hidden here.
    kept = {name: value for name, value in state.items() if name != "mask_token"}
    _networks.fill(trunk, kept | {"pos_embed": positions(state["pos_embed"], side // patch)}, "dinov2_b14")
    return trunk


def positions(published: Tensor, size: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, c) for `size` x `size` patches, as the reference interpolates them.

    Bicubic by the factor (size + 0.1) / n, not to the size: libraries that resize to the size differ by one per cent in
    the features (facebookresearch/dinov2, interpolate_offset = 0.1).
    """
    from torch.nn import functional as F

    cls, patches = published[:, :1], published[:, 1:].float()
    n = round(patches.shape[1] ** 0.5)
    if n == size:
        return published
    square = patches.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    factor = (size + OFFSET) / n
    square = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    if square.shape[-2:] != (size, size):
        raise ValueError(f"dinov2_b14: positions of {n} x {n} gave {tuple(square.shape[-2:])}, expected {size}")
    return _cat(cls, square.permute(0, 2, 3, 1).reshape(1, size * size, -1))


def _cat(cls: Tensor, patches: Tensor) -> Tensor:
    import torch

    return torch.cat([cls.float(), patches], dim=1)


def _build(*, width: int, depth: int, mlp: int, patch: int, side: int) -> VisionTransformer:
    from timm.models.vision_transformer import VisionTransformer

    trunk = VisionTransformer(
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=max(width // HEAD_WIDTH, 1),
        mlp_ratio=mlp / width,
        init_values=1.0,
        num_classes=0,
        global_pool="",  # all tokens
    )
    return trunk.eval().requires_grad_(False)
