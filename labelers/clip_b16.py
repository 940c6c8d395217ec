"""Dense CLIP features (Radford et al. 2021), by open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dataengine import weights
from dataengine.labeler import Labeler, Loaded
from dataengine.weights import Weights
from labelers import _checkpoints, _images, _networks, _openclip

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from torch import Tensor

FILE = "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ClipB16(Labeler):
    """The patch tokens of CLIP's image tower in the space of its embeddings: float16 (rows, cols, channels).

    `ln_post(tokens) @ proj`, not normalised (ml-4m's choice): (14, 14, 512) for ViT-B/16. The whole image is squeezed
    to the network's square input, see `labelers/_images.py`. `normalisation` defaults to ImageNet's statistics although
    they are not CLIP's own ("native"), because ml-4m's tokenizers of these features were trained so. The architecture
    is read off the checkpoint; open_clip and OpenAI name the tensors alike (`visual.*`). `quick_gelu` belongs to
    OpenAI's weights, not to LAION's.
    """

    inputs = ("rgb",)
    emits = ("CLIP-B16",)
    batch_size = 32
    gpus = 0.1

    checkpoint: str = "timm/vit_base_patch16_clip_224.openai"
    normalisation: _images.Normalisation = "imagenet"
    quick_gelu: bool = True
    # OpenAI trained and published these weights in half precision, which keeps three more bits than bfloat16.
    precision: _networks.Precision = "float16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("clip_b16", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, MIT."""
        return weights.describe(self.checkpoint, FILE, licence="MIT")

    def load(self, device: str) -> Loaded:
        """Read the image tower alone and put it on the device."""
        state = _checkpoints.read(weights.resolve(self.checkpoint, FILE), _openclip.PREFIX)
        tower = network(state, quick_gelu=self.quick_gelu)
        side = tower.image_size[0]
        tower = _networks.placed(tower, device, self.precision, compiled=self.compiled)
        return _images.featured(
            lambda pixels: {"CLIP-B16": dense(tower, pixels)},
            side,
            _images.statistics(self.normalisation, _images.CLIP),
            device,
            _networks.dtype_on(device, self.precision),
        )

    def tiny(self, folder: Path) -> ClipB16:
        """One random block of width 32 in the format of the published checkpoint."""
        file = folder / "clip_b16.safetensors"
        if not file.exists():
            from safetensors.torch import save_file

            shape = _openclip.Shape(side=224, patch=16, width=32, layers=1, mlp=64, out=16)
            state = _checkpoints.randomised(_openclip.blank(shape, _openclip.Kind()).state_dict(), seed=0)
            save_file({f"{_openclip.PREFIX}{name}": value.half() for name, value in state.items()}, file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor], *, quick_gelu: bool) -> VisionTransformer:
    """The image tower whose tensors these are (named without `visual.`), float32, on the CPU, returning all tokens."""
    return _openclip.tower(state, _openclip.Kind(quick_gelu=quick_gelu), "clip_b16")


def dense(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """The patch tokens of a normalised batch in the space of the embeddings: (n, rows * cols, out)."""
    _, tokens = tower(pixels)
    projected: Tensor = tokens @ tower.proj
    return projected
