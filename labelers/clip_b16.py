"""Dense CLIP features (Radford et al. 2021), by open_clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.weights import Weights
from labelers import _checkpoints, _images

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from torch import Tensor

FILE = "open_clip_model.safetensors"
HEAD_WIDTH = 64


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

    def __post_init__(self) -> None:
        if self.normalisation not in get_args(_images.Normalisation):
            raise ValueError(f"clip_b16: expected normalisation imagenet or native, got {self.normalisation!r}")

    def weights(self) -> Weights:
        """The published weights, MIT."""
        return weights.describe(self.checkpoint, FILE, licence="MIT")

    def load(self, device: str) -> Loaded:
        """Read the image tower alone and put it on the device."""
        import torch

        state = _checkpoints.read(weights.resolve(self.checkpoint, FILE), "visual.")
        tower = network(state, quick_gelu=self.quick_gelu)
        tower.to(device)
        statistics = _images.CLIP if self.normalisation == "native" else _images.IMAGENET

        def label(images: Sequence[Any]) -> list[dict[str, Any]]:
            with torch.inference_mode():
                _, tokens = tower(_images.normalised(images, statistics, device))
                dense = _images.grid(tokens @ tower.proj)
            return [{"CLIP-B16": features} for features in dense]

        return Staged(lambda sample: _images.squeezed(sample.rgb, tower.image_size[0]), label)

    def tiny(self, folder: Path) -> ClipB16:
        """One random block of width 32 in the format of the published checkpoint."""
        file = folder / "clip_b16.safetensors"
        if not file.exists():
            from safetensors.torch import save_file

            shape = {"width": 32, "layers": 1, "patch": 16, "image": 224, "mlp": 64, "out": 16}
            state = _checkpoints.randomised(_build(shape, quick_gelu=True).state_dict(), seed=0)
            save_file({f"visual.{name}": value.half() for name, value in state.items()}, file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor], *, quick_gelu: bool) -> VisionTransformer:
    """The image tower whose tensors these are (named without `visual.`), float32, on the CPU, returning all tokens."""
    width, _, patch, _ = state["conv1.weight"].shape
    side = round((state["positional_embedding"].shape[0] - 1) ** 0.5)
    shape = {
        "width": width,
        "layers": _checkpoints.count(state, "transformer.resblocks."),
        "patch": patch,
        "image": side * patch,
        "mlp": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "out": state["proj"].shape[1],
    }
    tower = _build(shape, quick_gelu=quick_gelu)
    tower.load_state_dict(dict(state))
    return tower


def _build(shape: Mapping[str, int], *, quick_gelu: bool) -> VisionTransformer:
    from open_clip.transformer import QuickGELU, VisionTransformer
    from torch import nn

    tower = VisionTransformer(
        image_size=shape["image"],
        patch_size=shape["patch"],
        width=shape["width"],
        layers=shape["layers"],
        heads=max(shape["width"] // HEAD_WIDTH, 1),
        mlp_ratio=shape["mlp"] / shape["width"],
        output_dim=shape["out"],
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        output_tokens=True,
    )
    return tower.eval().requires_grad_(False)
