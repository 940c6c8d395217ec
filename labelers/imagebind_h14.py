"""Dense and global ImageBind features (Girdhar et al. 2023): its own weights in open_clip's image tower."""

from __future__ import annotations

import re
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

KIND = _openclip.Kind(head_width=80, epsilon=1e-6)
UNUSED = re.compile(r"modality_(preprocessors|trunks|heads|postprocessors)\.(text|audio|depth|thermal|imu)\.")
"""The towers of the other modalities; the image tower's own postprocessor has no tensors."""

_STEM = "modality_preprocessors.vision."
_BLOCK = re.compile(r"modality_trunks\.vision\.blocks\.(\d+)\.")
_NAMES = {
    f"{_STEM}cls_token": "class_embedding",
    f"{_STEM}pos_embedding_helper.pos_embed": "positional_embedding",
    f"{_STEM}rgbt_stem.proj.1.weight": "conv1.weight",
    "modality_trunks.vision.pre_transformer_layer.0.weight": "ln_pre.weight",
    "modality_trunks.vision.pre_transformer_layer.0.bias": "ln_pre.bias",
    "modality_heads.vision.0.weight": "ln_post.weight",
    "modality_heads.vision.0.bias": "ln_post.bias",
    "modality_heads.vision.2.weight": "proj",
}
_PARTS = {"norm_1.": "ln_1.", "norm_2.": "ln_2.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}


@dataclass(frozen=True, kw_only=True)
class ImageBindH14(Labeler):
    """The patch tokens and the class token of ImageBind's image trunk: float16 (rows, cols, 1280) and (1280,).

    (16, 16, 1280) for ViT-H/14 at its 224 pixels; the whole image is squeezed to that square, see
    `labelers/_images.py`. The class token is the trunk's, of 1280 channels, not the embedding of 1024 (4M-21's choice).

    Two things about 4M-21's features are not published, so both are settings. `final_norm`: whether the norm at the
    head of the trunk comes before the features; with it they are what the embedding is projected from. `normalisation`:
    ml-4m's tokenizers were trained on images of ImageNet's statistics, "native" are CLIP's, which ImageBind has.

    The weights forbid commercial use. The tower began as OpenCLIP's and stayed frozen, so `openclip_h14` should compute
    the same from free weights; its `twin_differences` tells.
    """

    inputs = ("rgb",)
    emits = ("ImageBind-H14", "ImageBind-H14-global")
    batch_size = 32
    gpus = 0.25

    checkpoint: str = "https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth"
    normalisation: _images.Normalisation = "imagenet"
    final_norm: bool = True
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        _images.known("imagebind_h14", self.normalisation)

    def weights(self) -> Weights:
        """The published weights, for non-commercial use (repository CC-BY-NC-SA 4.0, model card CC-BY-NC 4.0)."""
        return weights.describe(self.checkpoint, licence="CC-BY-NC-SA-4.0")

    def load(self, device: str) -> Loaded:
        """Read the image tower alone (the file is mapped, the other modalities stay on the disk) and place it."""
        tower = network(_checkpoints.read(weights.resolve(self.checkpoint)))
        side = tower.image_size[0]
        trunk = _openclip.trunk(tower, final_norm=self.final_norm)
        trunk = _networks.placed(trunk, device, self.precision, compiled=self.compiled)
        return _images.featured(
            _openclip.both(trunk, "ImageBind-H14"),
            side,
            _images.statistics(self.normalisation, _images.CLIP),
            device,
            _networks.dtype_on(device, self.precision),
        )

    def tiny(self, folder: Path) -> ImageBindH14:
        """Two random blocks of width 32 for 56 pixels in the format of the published checkpoint."""
        file = folder / "imagebind_h14.pth"
        if not file.exists():
            import torch

            shape = _openclip.Shape(side=56, patch=14, width=32, layers=2, mlp=128, out=16)
            torch.save(random_state(shape, seed=0), file)
            weights.mark_random(file, seed=0)
        return replace(self, checkpoint=str(file))


def network(state: Mapping[str, Tensor]) -> VisionTransformer:
    """The image tower of a whole checkpoint, float32; ValueError names tensors that no ImageBind has."""
    return _openclip.tower(renamed(state), KIND, "imagebind_h14")


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the image tower by OpenCLIP's names; those of the other modalities are left out on purpose.

    ImageBind sees an image as a film of two equal frames, so its kernel of two frames is summed over them.
    """
    out, strange = {}, []
    for name, value in state.items():
        if UNUSED.match(name):
            continue
        if name in _NAMES:
            new = _NAMES[name]
        elif block := _BLOCK.match(name):
            new = f"transformer.resblocks.{block[1]}.{name[block.end() :]}"
            for theirs, ours in _PARTS.items():
                new = new.replace(theirs, ours)
        else:
            strange.append(name)
            continue
        if new == "conv1.weight":
            value = value.sum(2)
        elif new in ("class_embedding", "positional_embedding"):
            value = value.reshape(-1, value.shape[-1]).squeeze(0)
        out[new] = value.T if new == "proj" else value
    if strange or not out:
        found = f"{len(strange)} tensors unexpected: {', '.join(strange[:5])}" if strange else "no tensor of vision"
        raise ValueError(f"imagebind_h14: the checkpoint is not that of this network: {found}")
    return out


def random_state(shape: _openclip.Shape, seed: int) -> dict[str, Tensor]:
    """Random tensors of a small ImageBind under the published names, with two of another modality."""
    import torch

    blank = _openclip.blank(shape, KIND).state_dict()
    published = {ours: theirs for theirs, ours in _NAMES.items()}
    out = {}
    for name, value in blank.items():
        if name == "conv1.weight":
            value = value[:, :, None].expand(-1, -1, 2, -1, -1)
        elif name == "proj":
            value = value.T
        elif name in ("class_embedding", "positional_embedding"):
            value = value.reshape(1, -1, value.shape[-1])
        theirs = published.get(name, name.replace("transformer.resblocks", "modality_trunks.vision.blocks"))
        if name not in published:
            for their_part, our_part in _PARTS.items():
                theirs = theirs.replace(our_part, their_part)
        out[theirs] = value
    out["modality_heads.audio.0.weight"] = torch.empty(shape.width, device="meta")
    out["modality_postprocessors.text.1.log_logit_scale"] = torch.empty((), device="meta")
    return _checkpoints.randomised(out, seed)
