"""OpenCLIP's image tower, built from the shapes of its tensors: what CLIP, OpenCLIP-H and ImageBind share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labelers import _checkpoints, _networks

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
    from torch import Tensor

PREFIX = "visual."
"""Under which name OpenAI and LAION publish the image tower."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of an image tower: pixels of a side and a patch, channels inside, of its MLPs and of its embedding."""

    side: int
    patch: int
    width: int
    layers: int
    mlp: int
    out: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Shape:
        """Read off its tensors."""
        width, _, patch, _ = state["conv1.weight"].shape
        return cls(
            side=round((state["positional_embedding"].shape[0] - 1) ** 0.5) * patch,
            patch=patch,
            width=width,
            layers=_checkpoints.count(state, "transformer.resblocks."),
            mlp=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            out=state["proj"].shape[1],
        )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What of an image tower its tensors do not tell: channels of a head, activation, and epsilon of its norms."""

    head_width: int = 64
    quick_gelu: bool = False
    epsilon: float = 1e-5


def blank(shape: Shape, kind: Kind) -> VisionTransformer:
    """A tower of this shape that returns embedding and patch tokens, on torch's meta device: it has no values yet."""
    import torch
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    with torch.device("meta"):
        tower = VisionTransformer(
            image_size=shape.side,
            patch_size=shape.patch,
            width=shape.width,
            layers=shape.layers,
            heads=max(shape.width // kind.head_width, 1),
            mlp_ratio=shape.mlp / shape.width,
            output_dim=shape.out,
            act_layer=QuickGELU if kind.quick_gelu else torch.nn.GELU,
            norm_layer=functools.partial(LayerNorm, eps=kind.epsilon),
            output_tokens=True,
        )
    return tower.eval().requires_grad_(False)


def tower(state: Mapping[str, Tensor], kind: Kind, who: str) -> VisionTransformer:
    """The tower whose tensors these are (named without `visual.`), float32, where they are.

    It returns the embedding (n, out) and the patch tokens after the last norm (n, rows * cols, width). ValueError names
    the tensors that are missing or not its own.
    """
    needed = ("conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight")
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise ValueError(f"{who}: expected the tensors of an image tower, found no {', '.join(lacking)}")
    made = blank(Shape.of(state), kind).to_empty(device=state["proj"].device)
    _networks.fill(made, state, who)
    return made


def trunk(tower: VisionTransformer, *, final_norm: bool) -> VisionTransformer:
    """The same tower without its projection, and without its last norm if so said.

    It returns the class token (n, width) and the patch tokens (n, rows * cols, width) of the last block.
    """
    tower.prune_intermediate_layers(1, prune_norm=not final_norm, prune_head=True)
    return tower


def both(trunk: VisionTransformer, modality: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Patch tokens as a modality, and the class token as that modality's `-global`."""

    def features(pixels: Tensor) -> dict[str, Tensor]:
        cls, tokens = trunk(pixels)
        return {modality: tokens, f"{modality}-global": cls}

    return features


def differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """By name the largest absolute difference of the tensors of two towers; infinity where only one has it."""
    out = {}
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            out[name] = float("inf")
        else:
            out[name] = float((one[name].float() - other[name].float()).abs().max())
    return out
