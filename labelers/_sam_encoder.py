"""Segment Anything's image encoder with fused attention: the package's function without its matrices of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fuse(encoder: Any) -> None:
    """Give every block of the package's image encoder fused attention, in place; names and weights stay.

    The package adds to its N x N scores a term of the query and the key's row, and one of the query and the key's
    column. Both are products of a vector of the query with a row or column number as a one-hot vector, so here they go
    into the product of queries and keys, as further channels: the same sums, with nothing of N x N in memory.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Attention(nn.Module):
        """Attention over a grid, with a bias by how far apart two places are in rows and in columns."""

        places: Tensor

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.num_heads, self.scale = inner.num_heads, inner.scale
            self.qkv, self.proj = inner.qkv, inner.proj
            self.rel_pos_h, self.rel_pos_w = inner.rel_pos_h, inner.rel_pos_w
            height, width = ((len(table) + 1) // 2 for table in (self.rel_pos_h, self.rel_pos_w))
            places = torch.zeros(height, width, height + width)
            places[..., :height] += torch.eye(height)[:, None]
            places[..., height:] += torch.eye(width)
            self.register_buffer("places", places.flatten(0, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            """Tokens (b, height, width, channels) of whole images or of windows."""
            b, height, width, channels = x.shape
            n, heads = height * width, self.num_heads
            q, k, v = self.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            grid = q.reshape(b, heads, height, width, -1)
            rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _by_distance(self.rel_pos_h, height))
            columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _by_distance(self.rel_pos_w, width))
            queries = torch.cat([grid * self.scale, rows, columns], dim=-1).flatten(2, 3)
            keys = torch.cat([k, self.places.expand(b, heads, -1, -1)], dim=-1)
            # The flash kernels want values as wide as keys.
            values = F.pad(v, (0, height + width))
            out = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., : channels // heads]
            projected: Tensor = self.proj(out.transpose(1, 2).reshape(b, height, width, channels))
            return projected

    for block in encoder.blocks:
        block.attn = Attention(block.attn)


def _by_distance(table: Tensor, size: int) -> Tensor:
    """(size, size, channels): for the place of a query and that of a key the table's entry for their distance."""
    import torch

    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]
