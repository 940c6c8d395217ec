"""Dense and global SigLIP 2 features (Tschannen et al. 2025), by transformers."""

from __future__ import annotations

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
    from torch import Tensor
    from transformers import SiglipVisionModel

FILE = "model.safetensors"
PREFIX = "vision_model."
HEADS = {1152: 16, 1536: 16}
"""Attention heads of the so400m and giant towers by width; the others have heads of 64 channels."""
HEAD_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class SigLip2(Labeler):
    """The patch tokens after the last norm and the pooled embedding of SigLIP 2: float16 (rows, cols, channels).

    (14, 14, 768) and (768,) for B/16 at 224 pixels; there is no class token, the embedding is that of the attention
    pooling head, which the text tower is trained against. Neither is normalised in length. The whole image is squeezed
    to the square, here as its authors do it: bilinear, and with "native" statistics (-1 to 1), the default, since no
    published tokenizer expects others. The checkpoint is one of a fixed resolution (not NaFlex).
    """

    inputs = ("rgb",)
    emits = ("SigLIP2-B16", "SigLIP2-B16-global")
    batch_size = 32
    gpus = 0.1

    checkpoint: str = "google/siglip2-base-patch16-224"
    normalisation: _images.Normalisation = "native"
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("siglip2", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, Apache-2.0."""
        return weights.describe(self.checkpoint, FILE, licence="Apache-2.0")

    def load(self, device: str) -> Loaded:
        """Read the image tower alone and put it on the device."""
        tower = network(_checkpoints.read(weights.resolve(self.checkpoint, FILE), PREFIX))
        side: Any = tower.config.image_size
        tower = _networks.placed(tower, device, self.precision, compiled=self.compiled)

        def features(pixels: Tensor) -> dict[str, Tensor]:
            found = tower(pixel_values=pixels)
            return {"SigLIP2-B16": found.last_hidden_state, "SigLIP2-B16-global": found.pooler_output}

        return _images.featured(
            features,
            side,
            _images.statistics(self.normalisation, _images.INCEPTION),
            device,
            _networks.dtype_on(device, self.precision),
            Image.Resampling.BILINEAR,
        )

    def tiny(self, folder: Path) -> SigLip2:
        """Two random blocks of width 32 for 64 pixels in the format of the published checkpoint."""
        file = folder / "siglip2.safetensors"
        if not file.exists():
            from safetensors.torch import save_file

            state = _checkpoints.randomised(_build(width=32, mlp=64, layers=2, patch=16, side=64).state_dict(), seed=0)
            save_file({f"{PREFIX}{name}": value for name, value in state.items()}, file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor]) -> SiglipVisionModel:
    """The image tower whose tensors these are (named without `vision_model.`), float32, on the CPU."""
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    if any(name not in state for name in names) or state[names[0]].ndim != 4:
        raise ValueError(f"siglip2: expected {names[0]} (c, 3, p, p) and {names[1]}: a SigLIP of a fixed resolution")
    width, _, patch, _ = state[names[0]].shape
    tower = _build(
        width=width,
        mlp=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        layers=_checkpoints.count(state, "encoder.layers."),
        patch=patch,
        side=round(state[names[1]].shape[0] ** 0.5) * patch,
    )
    _networks.fill(tower, state, "siglip2")
    return tower


def _build(*, width: int, mlp: int, layers: int, patch: int, side: int) -> SiglipVisionModel:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=HEADS.get(width, max(width // HEAD_WIDTH, 1)),
        patch_size=patch,
        image_size=side,
    )
    tower: SiglipVisionModel = SiglipVisionModel(config).eval().requires_grad_(False)
    return tower
