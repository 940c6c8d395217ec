"""The network of HMR2.0 (Goel et al. 2023): a vision transformer, and a decoder of one token that reads a body off it.

Parts are named as in the published checkpoint, so that its tensors need no renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from labelers import _checkpoints, _networks

# B persons, N patches, D width of the trunk, C width of the decoder.

NUM_JOINTS, NUM_BETAS = 24, 10
HEAD_WIDTH = 80
DECODER_HEAD_WIDTH = 64
"""Widths of one attention head, which no tensor shows."""
PATCH = 16
PADDING = 2
INPUT = (256, 192)

DROPPED = ("smpl.", "discriminator.", "initialized")
"""What a checkpoint holds besides: the body model's own tensors and what only the training needed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network; the defaults are those of HMR2.0b."""

    width: int = 1280
    depth: int = 32
    mlp: int = 5120
    decoder: int = 1024
    decoder_depth: int = 6
    decoder_mlp: int = 1024
    decoder_inner: int = 512


class Trunk(nn.Module):
    """ViT over 256 x 192 pixels: (B, 3, 256, 192) to (B, N, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, rows, cols = shape.width, INPUT[0] // PATCH, INPUT[1] // PATCH
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * cols, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, stride=PATCH, padding=PADDING)})
        heads = max(width // HEAD_WIDTH, 1)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=shape.mlp / width, qkv_bias=True, norm_layer=norm) for _ in range(shape.depth)
        )
        self.last_norm = norm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch tokens, normalised."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        # There is no class token, but its position was kept and is added to all.
        x = x + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.last_norm(x)
        return out


class SelfAttention(nn.Module):
    """Attention of the one token to itself, which is its own value whatever query and key are."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """(B, 1, C) to (B, 1, C)."""
        value = self.to_qkv.weight.chunk(3)[2]
        out: Tensor = self.to_out[0](F.linear(x, value))
        return out


class CrossAttention(nn.Module):
    """Attention of the token to the patches."""

    def __init__(self, width: int, inner: int, context: int) -> None:
        super().__init__()
        self.heads = max(inner // DECODER_HEAD_WIDTH, 1)
        self.to_kv = nn.Linear(context, 2 * inner, bias=False)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, 1, C) and (B, N, D) to (B, 1, C)."""
        key, value = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.to_out[0](read)
        return out


class FeedForward(nn.Module):
    """Two layers with a GELU between; the numbers of `net` count the dropouts that are not there."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.Linear(width, hidden), "3": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        """(B, 1, C) to (B, 1, C)."""
        out: Tensor = self.net["3"](F.gelu(self.net["0"](x)))
        return out


class PreNorm(nn.Module):
    """A part behind a normalisation of its input."""

    def __init__(self, width: int, part: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = part

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """The input plus what the part makes of it."""
        out: Tensor = x + self.fn(self.norm(x), context)
        return out


class Layer(nn.ModuleList):
    """The three parts of a layer of the decoder, which have only numbers for names."""

    def __init__(self, shape: Shape) -> None:
        width, inner = shape.decoder, shape.decoder_inner
        super().__init__(
            [
                PreNorm(width, SelfAttention(width, inner)),
                PreNorm(width, CrossAttention(width, inner, shape.width)),
                PreNorm(width, FeedForward(width, shape.decoder_mlp)),
            ]
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, 1, C) and (B, N, D) to (B, 1, C)."""
        for part in self:
            x = part(x, context)
        return x


class Decoder(nn.Module):
    """One query token, always the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.to_token_embedding = nn.Linear(1, shape.decoder)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1, shape.decoder))
        layers = nn.ModuleList(Layer(shape) for _ in range(shape.decoder_depth))
        self.transformer = nn.ModuleDict({"layers": layers})

    def forward(self, context: Tensor) -> Tensor:
        """(B, N, D) to (B, C)."""
        # The input of the embedding is zero, so that only its bias is left.
        x = (self.to_token_embedding.bias + self.pos_embedding).expand(len(context), -1, -1)
        layers: Any = self.transformer["layers"]
        for layer in layers:
            x = layer(x, context)
        return x[:, 0]


class Head(nn.Module):
    """The decoder and what is read off its token, as differences from a mean body."""

    init_body_pose: Tensor
    init_betas: Tensor
    init_cam: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.transformer = Decoder(shape)
        self.decpose = nn.Linear(shape.decoder, 6 * NUM_JOINTS)
        self.decshape = nn.Linear(shape.decoder, NUM_BETAS)
        self.deccam = nn.Linear(shape.decoder, 3)
        self.register_buffer("init_body_pose", torch.zeros(1, 6 * NUM_JOINTS))
        self.register_buffer("init_betas", torch.zeros(1, NUM_BETAS))
        self.register_buffer("init_cam", torch.zeros(1, 3))

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to rotations (B, 24, 3, 3), betas (B, 10) and camera (B, 3)."""
        token = self.transformer(context)
        pose = self.decpose(token) + self.init_body_pose
        return (
            rotations(pose.unflatten(-1, (NUM_JOINTS, 6))),
            self.decshape(token) + self.init_betas,
            self.deccam(token) + self.init_cam,
        )


class Hmr2(nn.Module):
    """Crops of persons, normalised (B, 3, 256, 192), to rotations (B, 24, 3, 3), betas (B, 10) and camera (B, 3)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.backbone = Trunk(shape)
        self.smpl_head = Head(shape)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk in its own precision, the head in its."""
        context = self.backbone(pixels.to(self.backbone.pos_embed.dtype))
        found: tuple[Tensor, Tensor, Tensor] = self.smpl_head(context.to(self.smpl_head.init_cam.dtype))
        return found


def rotations(six: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of six numbers (..., 6) each: the first three and the last three, made orthonormal,
    are the first two columns (Zhou et al. 2019; others that use the six take them in turns)."""
    first, second = six.unflatten(-1, (2, 3)).unbind(-2)
    x = F.normalize(first, dim=-1)
    y = F.normalize(second - (x * second).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1)


def kept(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint without those that are not needed to label (`DROPPED`)."""
    return {name: value for name, value in state.items() if not name.startswith(DROPPED)}


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """The sizes of the network whose tensors these are; ValueError when they are of another one."""
    layer = "smpl_head.transformer.transformer.layers."
    try:
        return Shape(
            width=state["backbone.patch_embed.proj.weight"].shape[0],
            depth=_checkpoints.count(state, "backbone.blocks."),
            mlp=state["backbone.blocks.0.mlp.fc1.weight"].shape[0],
            decoder=state["smpl_head.transformer.pos_embedding"].shape[-1],
            decoder_depth=_checkpoints.count(state, layer),
            decoder_mlp=state[f"{layer}0.2.fn.net.0.weight"].shape[0],
            decoder_inner=state[f"{layer}0.1.fn.to_q.weight"].shape[0],
        )
    except KeyError as error:
        raise ValueError(
            f"hmr2: the checkpoint is not that of this network: {error.args[0]} is missing, "
            f"it has {', '.join(list(state)[:5]) or 'nothing'}"
        ) from error


def network(state: Mapping[str, Tensor]) -> Hmr2:
    """The network whose tensors these are, float32, on the CPU."""
    needed = kept(state)
    with torch.device("meta"):
        made = Hmr2(shape_of(needed))
    made.to_empty(device="cpu")
    _networks.fill(made, needed, "hmr2")
    return made.eval().requires_grad_(False)


def random_state(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Seeded random tensors by their published names, with some beside them that a checkpoint holds besides."""
    with torch.device("meta"):
        names = Hmr2(shape).state_dict()
    state = _checkpoints.randomised(names, seed)
    # Positions that matter and a mean body that is one: rotations near the identity.
    state["backbone.pos_embed"] *= 5
    mean = torch.tensor((1.0, 0, 0, 0, 1, 0)).repeat(NUM_JOINTS)
    state["smpl_head.init_body_pose"] = mean + 0.1 * state["smpl_head.init_body_pose"]
    state["smpl_head.init_cam"] = torch.tensor([[0.9, 0.0, 0.0]])
    return state | {
        "smpl.betas": torch.zeros(1, 10),
        "discriminator.D_conv1.weight": torch.zeros(1, 9, 1, 1),
        "initialized": torch.tensor(False),
    }
