"""The ViT encoder and decoder of a VQ-VAE, with the parameter names of ml-4m's checkpoints.

B batch, D width, N tokens, H heads, K head width, C channels, h w the token grid, p patch side in pixels.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend

_NAMED = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}


def vit_size(name: str, end: str) -> tuple[int, int, int]:
    """Width, number of blocks and number of heads of `vit_{s,b,l}_<end>` or `vit_<width>x<blocks>x<heads>_<end>`."""
    named = re.fullmatch(rf"vit_([sbl])_{end}", name)
    if named:
        return _NAMED[named[1]]
    custom = re.fullmatch(rf"vit_(\d+)x(\d+)x(\d+)_{end}", name)
    if not custom:
        raise ValueError(
            f"{name!r}, expected vit_s_{end}, vit_b_{end}, vit_l_{end} or vit_<width>x<blocks>x<heads>_{end}"
        )
    dim, depth, heads = (int(part) for part in custom.groups())
    if dim % 4 or dim % heads:
        raise ValueError(f"{name!r}: width {dim}, expected a multiple of 4 and of the {heads} heads")
    return dim, depth, heads


def sincos_2d(h: int, w: int, dim: int) -> Tensor:
    """The fixed position table (1, D, h, w) of MoCo v3 (Chen et al. 2021), in ml-4m's channel order: row, column."""
    omega = 1.0 / 10000.0 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows = (torch.arange(h, dtype=torch.float32)[:, None] * omega)[:, None, :].expand(h, w, -1)
    cols = (torch.arange(w, dtype=torch.float32)[:, None] * omega)[None, :, :].expand(h, w, -1)
    table = torch.cat([rows.sin(), rows.cos(), cols.sin(), cols.cos()], dim=-1)
    return table.permute(2, 0, 1)[None].contiguous()


class Mlp(nn.Module):
    """Two linear layers around an activation; (..., D) to (..., D)."""

    def __init__(self, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = act
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Applied to every token alone."""
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Full self-attention with biases; (B, N, D) to (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Every token sees every token."""
        B, N, D = x_BND.shape
        q_BHNK, k_BHNK, v_BHNK = self.qkv(x_BND).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out_BHNK = attend(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(out_BHNK.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """A pre-norm transformer block; (B, N, D) to (B, N, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the MLP, each added to its input."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvNeXtBlock(nn.Module):
    """A ConvNeXt block (Liu et al. 2022) at full resolution, against seams between patches; (B, C, H, W) kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """The input plus a small learned correction."""
        update = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        update = self.gamma * self.pwconv2(self.act(self.pwconv1(update)))
        return x + update.permute(0, 3, 1, 2)


class _Trunk(nn.Module):
    """What encoder and decoder share: frozen positions, blocks, and the optional pointwise MLP after them."""

    def __init__(self, dim: int, depth: int, heads: int, grid: tuple[int, int], post_mlp: bool) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(sincos_2d(*grid, dim), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-6) if post_mlp else None
        self.post_mlp = Mlp(dim, nn.Tanh()) if post_mlp else None

    def _positions(self, h: int, w: int) -> Tensor:
        table: Tensor = self.pos_emb
        if table.shape[-2:] != (h, w):
            table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def _pointwise(self, x: Tensor) -> Tensor:
        if self.post_mlp is None or self.norm_mlp is None:
            return x
        return x + self.post_mlp(self.norm_mlp(x))


class ViTEncoder(_Trunk):
    """Maps (B, C, h·p, w·p), or a feature map (B, C, h, w) where patch_size is None, to tokens (B, D, h, w)."""

    def __init__(
        self, channels: int, patch_size: int | None, grid: tuple[int, int], size: tuple[int, int, int], post_mlp: bool
    ) -> None:
        super().__init__(*size, grid=grid, post_mlp=post_mlp)
        patch = patch_size or 1
        self.proj = nn.Conv2d(channels, size[0], kernel_size=patch, stride=patch)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Float tokens; in float32 after the pointwise MLP, which ml-4m keeps out of autocast."""
        patch = self.proj.kernel_size[0]
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(f"maps of {tuple(x.shape[-2:])} pixels, expected multiples of the patch size {patch}")
        # The convolution as a matrix product: oneDNN's bfloat16 kernel for 8 x 8 patches of 8 channels returns wrong
        # values on CPUs with AMX (seen with torch 2.15; the test compares the two precisions).
        x = F.pixel_unshuffle(x, patch)
        h, w = x.shape[-2:]
        x = F.linear(x.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)
        x = self.blocks(x + self._positions(h, w))
        if self.post_mlp is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = self._pointwise(x.float())
        return x.transpose(1, 2).unflatten(2, (h, w))


class ViTDecoder(_Trunk):
    """Maps tokens (B, D, h, w) to (B, C, h·p, w·p), or to (B, C, h, w) where patch_size is None."""

    def __init__(
        self,
        channels: int,
        patch_size: int | None,
        grid: tuple[int, int],
        size: tuple[int, int, int],
        post_mlp: bool,
        out_conv: bool,
    ) -> None:
        super().__init__(*size, grid=grid, post_mlp=post_mlp)
        self.patch = patch_size or 1
        self.out_proj = nn.Linear(size[0], channels * self.patch**2)
        self.out_conv = nn.Sequential(ConvNeXtBlock(channels), ConvNeXtBlock(channels)) if out_conv else None
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Values in the units of the training data, not clipped."""
        h, w = x.shape[-2:]
        x = self.blocks(x.flatten(2).transpose(1, 2) + self._positions(h, w))
        x = self.out_proj(self._pointwise(x))
        # (c ph pw) within a token is pixel_shuffle's channel order.
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (h, w)), self.patch)
        return x if self.out_conv is None else self.out_conv(x)


def _initialise(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero biases, q, k and v each as a layer of their own, as in ml-4m and MAE."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if name.endswith("qkv"):
            bound = (6.0 / (layer.weight.shape[0] // 3 + layer.weight.shape[1])) ** 0.5
            nn.init.uniform_(layer.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
