"""Segment Anything's image encoder with fused attention: the package's function without its matrices of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fuse(encoder: Any) -> None:
    """Give every block of the package's image encoder fused attention, in place; names and weights stay."""
    from torch import nn

    from labelers import _grid_attention

    class Attention(nn.Module):
        """Attention over a grid, with a bias by how far apart two places are in rows and in columns."""

        places: Tensor

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.num_heads = inner.num_heads
            self.qkv, self.proj = inner.qkv, inner.proj
            self.rel_pos_h, self.rel_pos_w = inner.rel_pos_h, inner.rel_pos_w
            height, width = ((len(table) + 1) // 2 for table in (self.rel_pos_h, self.rel_pos_w))
            self.register_buffer("places", _grid_attention.places(height, width), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            """Tokens (b, height, width, channels) of whole images or of windows."""
            b, height, width, channels = x.shape
            q, k, v = self.qkv(x).reshape(b, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            out = _grid_attention.attend(q, k, v, self.rel_pos_h, self.rel_pos_w, self.places)
            projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, height, width, channels))
            return projected

    for block in encoder.blocks:
        block.attn = Attention(block.attn)
