"""Attention over a grid with decomposed relative positions (Li et al. 2022, MViTv2), fused: as in SAM and ViTDet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, places: Tensor) -> Tensor:
    """Queries, keys and values (b, heads, height * width, c) to (b, heads, height * width, c).

    `rows` (2 height - 1, c) and `columns` (2 width - 1, c) are the tables of the positions: to the scores is added what
    the product of the query, unscaled, with the entry for the distance in rows is, and for that in columns. Both are
    products of a vector of the query with a row or column number as a one-hot vector (`places`), so here they go into
    the product of queries and keys, as further channels: the same sums, with nothing of N x N in memory.
    """
    height, width = (len(rows) + 1) // 2, (len(columns) + 1) // 2
    grid = q.unflatten(2, (height, width))
    by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, _by_distance(rows, height))
    by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, _by_distance(columns, width))
    queries = torch.cat([grid * q.shape[-1] ** -0.5, by_row, by_column], dim=-1).flatten(2, 3)
    keys = torch.cat([k, places.expand(*k.shape[:2], -1, -1)], dim=-1)
    # The flash kernels want values as wide as keys.
    values = F.pad(v, (0, height + width))
    return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., : q.shape[-1]]


def places(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """float32 (height * width, height + width): the row and the column of each place, as one-hot vectors."""
    out = torch.zeros(height, width, height + width, device=device)
    out[..., :height] += torch.eye(height, device=device)[:, None]
    out[..., height:] += torch.eye(width, device=device)
    return out.flatten(0, 1)


def _by_distance(table: Tensor, size: int) -> Tensor:
    """(size, size, c): for the place of a query and that of a key the table's entry for their distance."""
    cells = torch.arange(size, device=table.device)
    return table[cells[:, None] - cells[None, :] + size - 1]
