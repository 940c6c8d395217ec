"""Dense and global features of OpenCLIP's ViT-H/14 (Cherti et al. 2022): the twin of ImageBind with free weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataengine import weights
from dataengine.labeler import Labeler, Loaded
from dataengine.weights import Weights
from labelers import _checkpoints, _images, _networks, _openclip, imagebind_h14

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from torch import Tensor

FILE = "open_clip_model.safetensors"
KIND = _openclip.Kind(head_width=80)


@dataclass(frozen=True, kw_only=True)
class OpenClipH14(Labeler):
    """The patch tokens and the class token of OpenCLIP's ViT-H/14: float16 (rows, cols, 1280) and (1280,).

    Both as `imagebind_h14` takes them from ImageBind, with the same settings, (16, 16, 1280) at 224 pixels: ImageBind's
    image tower is said to be this one, frozen, and its weights allow no commercial use while these are MIT. Its own
    columns, since nobody has published whether a copy is exact; `twin_differences` tells where both files are at hand.
    One thing differs by design: the epsilon of the norms is 1e-5 here and 1e-6 there.
    """

    inputs = ("rgb",)
    emits = ("OpenCLIP-H14", "OpenCLIP-H14-global")
    batch_size = 32
    gpus = 0.25

    checkpoint: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    normalisation: _images.Normalisation = "imagenet"
    final_norm: bool = True
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("openclip_h14", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, MIT."""
        return weights.describe(self.checkpoint, FILE, licence="MIT")

    def load(self, device: str) -> Loaded:
        """Read the image tower alone and put it on the device."""
        tower = network(_checkpoints.read(weights.resolve(self.checkpoint, FILE), _openclip.PREFIX))
        side = tower.image_size[0]
        trunk = _openclip.trunk(tower, final_norm=self.final_norm)
        trunk = _networks.placed(trunk, device, self.precision, compiled=self.compiled)
        return _images.featured(
            _openclip.both(trunk, "OpenCLIP-H14"),
            side,
            _images.statistics(self.normalisation, _images.CLIP),
            device,
            _networks.dtype_on(device, self.precision),
        )

    def tiny(self, folder: Path) -> OpenClipH14:
        """Two random blocks of width 32 for 56 pixels in the format of the published checkpoint."""
        file = folder / "openclip_h14.safetensors"
        if not file.exists():
            from safetensors.torch import save_file

            shape = _openclip.Shape(side=56, patch=14, width=32, layers=2, mlp=128, out=16)
            state = _checkpoints.randomised(_openclip.blank(shape, KIND).state_dict(), seed=1)
            save_file({f"{_openclip.PREFIX}{name}": value for name, value in state.items()}, file)
            weights.mark_random(file, seed=1)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor]) -> VisionTransformer:
    """The image tower whose tensors these are (named without `visual.`), float32."""
    return _openclip.tower(state, KIND, "openclip_h14")


def twin_differences(imagebind: Path, openclip: Path) -> dict[str, float]:
    """By tensor the largest absolute difference of ImageBind's image tower and OpenCLIP's, given their files.

    About 1e-7 everywhere: they are twins, and columns of one may stand for the other's. Infinity for a tensor that only
    one of them has, or that has another shape.
    """
    own = _checkpoints.read(openclip, _openclip.PREFIX)
    return _openclip.differences(imagebind_h14.renamed(_checkpoints.read(imagebind)), own)
