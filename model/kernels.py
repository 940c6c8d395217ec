"""Attention over groups of unlike lengths by kernels of the GPU: see `model.attention`.

Not part of that module because importing these kernels imports torch's compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from model.attention import Group, firsts

_BLOCK = 128  # queries and keys of a block, FlexAttention's own

# N queries, T all queries, S all keys, H heads, K head width


class ByLengths:
    """The variable-length kernel, once for the groups that see all their keys and once for the causal ones."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        q_first, k_first = firsts(groups)
        parts: list[tuple[bool, Tensor, Tensor, Tensor, Tensor, int, int]] = []
        order = []
        for causal in sorted({group.causal for group in groups}):
            rows = [i for i, group in enumerate(groups) if group.causal == causal]
            found: list[Any] = [causal]
            lengths = [[groups[i].queries for i in rows], [groups[i].keys for i in rows]]
            for first, sizes in zip((q_first, k_first), lengths, strict=True):
                index = np.concatenate([first[i] + np.arange(n) for i, n in zip(rows, sizes, strict=True)])
                found.append(torch.from_numpy(index).to(device))
            order.append(found[1])
            found += [torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=device) for sizes in lengths]
            # Rounded up: a bound does, and a graph that holds the number stays the same for most batches.
            found += [-(-max(sizes) // _BLOCK) * _BLOCK for sizes in lengths]
            parts.append(tuple(found))
        self.parts = parts
        self.back = torch.cat(order).argsort()

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K); half precision."""
        done = []
        for causal, q_index, k_index, q_ends, k_ends, longest_q, longest_k in self.parts:
            q, k, v = q_THK, k_SHK, v_SHK
            if len(self.parts) > 1:
                q, k, v = (x.index_select(0, i) for x, i in ((q, q_index), (k, k_index), (v, k_index)))
            window = (-1, 0) if causal else (-1, -1)
            y = varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, window_size=window)
            assert isinstance(y, Tensor)
            done.append(y)
        return done[0] if len(done) == 1 else torch.cat(done).index_select(0, self.back)


class ByBlocks:
    """FlexAttention: each query sees the keys from `first` up to `end`, and only blocks that some query sees are read.

    The kernel's own mask of blocks is made from each block's first and last key, never from a mask of T by S.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        q_first, k_first = firsts(groups)
        begins = np.repeat(k_first[:-1], [group.queries for group in groups])
        ends = begins + np.concatenate([group.ends for group in groups])
        starts = np.arange(0, q_first[-1], _BLOCK)
        low = np.minimum.reduceat(begins, starts) // _BLOCK
        # Where no query of a block sees anything the range is empty, not negative.
        high = np.maximum(-(-np.maximum.reduceat(ends, starts) // _BLOCK), low)
        columns = -(-k_first[-1] // _BLOCK)
        indices = np.minimum(low[:, None] + np.arange(columns), columns - 1)
        first, end = (torch.from_numpy(array).to(device) for array in (begins, ends))

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[query]) & (key < end[query])

        self.blocks = BlockMask.from_kv_blocks(
            torch.from_numpy(high - low).to(device, torch.int32)[None, None],
            torch.from_numpy(indices).to(device, torch.int32)[None, None],
            BLOCK_SIZE=_BLOCK,
            mask_mod=seen,
            seq_lengths=(q_first[-1], k_first[-1]),
        )

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_SHK, v_SHK))
        # On its own the kernel is a plain product with a mask of all; only compiled is it sparse.
        plain = torch.compiler.is_compiling() or q.device.type == "cpu"
        y = (flex_attention if plain else _fused())(q, k, v, block_mask=self.blocks)
        assert isinstance(y, Tensor)
        return y[0].transpose(0, 1)


@cache
def _fused() -> Any:
    return torch.compile(flex_attention, dynamic=True)
