"""Attention without padding: the tokens of a batch lie in one row, and each group of them attends on its own.

A group is a run of queries and the run of keys that it sees: those of one sample, or of one modality of a sample. Each
query sees the first keys of its group, so that no mask of the whole row is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# Seconds as measured on one core of an AVX-512 machine in float32, forward and backward: of a call of the kernel, of a
# score and of moving an element, per channel; and by how much a mask slows the kernel down.
_CALL, _SCORE, _MOVED, _MASKED = 4e-4, 2e-10, 1e-9, 1.3

# G groups, N queries, M keys, T all queries, S all keys, H heads, K head width


def attend(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention, (B, H, N, K); `mask` is True where a query may look, broadcastable to (B, H, N, M).

    With `causal` in place of a mask, query i sees the keys 0 to i.
    """
    dtype = v_BHMK.dtype
    q_BHNK, k_BHMK, v_BHMK = _for_kernel(q_BHNK, k_BHMK, v_BHMK)
    # Autocast would undo what `_for_kernel` does.
    with torch.autocast("cpu", enabled=False):
        y_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK, attn_mask=mask, is_causal=causal)
    return y_BHNK.to(dtype)


def _for_kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
    """In float32 what is bfloat16 and trained on a CPU: the fused kernel's backward pass is slow in that."""
    slow = any(x.requires_grad and x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in inputs)
    return tuple(x.float() for x in inputs) if slow else inputs


@dataclass(frozen=True)
class Group:
    """So many queries over so many keys: query i sees all of them, or with `causal` i + 1, or the first `reach[i]`."""

    queries: int
    keys: int
    causal: bool = False
    reach: NDArray[np.int64] | None = None

    @classmethod
    def by_reach(cls, reach: NDArray[np.int64], keys: int) -> Group:
        """The group whose query i sees the first reach[i] keys; the numbers are kept only where no name says them."""
        if (reach == keys).all():
            return cls(len(reach), keys)
        if len(reach) == keys and bool((reach == np.arange(1, keys + 1)).all()):
            return cls(len(reach), keys, causal=True)
        return cls(len(reach), keys, reach=reach)

    @property
    def shape(self) -> tuple[int, int, bool, bool]:
        """Groups of one shape can go through a kernel together."""
        return self.queries, self.keys, self.causal, self.reach is not None

    @property
    def ends(self) -> NDArray[np.int64]:
        """How many keys each query sees (N,)."""
        if self.reach is not None:
            return self.reach
        return np.arange(1, self.queries + 1) if self.causal else np.full(self.queries, self.keys)


class Attend(Protocol):
    """Attention of queries to keys when it is settled who sees whom."""

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, /) -> Tensor:
        """Queries (T, H, K) over keys and values (S, H, K) to (T, H, K)."""


def planned(
    groups: Sequence[Group], device: torch.device, dtype: torch.dtype, channels: int, *, compiled: bool = False
) -> Attend:
    """How T queries see S keys, both in one row, group after group; made once for a batch and used by all layers.

    On the CPU each group is one call of the fused kernel, on slices; where groups are so small that calls cost more
    than padding, or inside a graph of torch.compile, which must not depend on their number, all are one call with
    masks, on queries and keys padded for that call alone. On CUDA in half precision all are one call of the
    variable-length kernel, if every query of a group sees all its keys or the keys are causal; in other precisions,
    and for other reaches, one call of FlexAttention. The CUDA ways are tested against their documented meaning only.
    """
    real = [group for group in groups if group.queries]
    if not (real and sum(group.keys for group in groups)):
        return Nothing()
    if device.type == "cuda":
        from model import kernels  # imports a compiler: hundreds of megabytes and seconds

        if dtype in (torch.float16, torch.bfloat16) and all(group.reach is None for group in groups):
            return kernels.ByLengths(groups, device)
        return kernels.ByBlocks(groups, device)
    if device.type == "cpu" and not compiled:
        fixed, rising = _costs(groups)
        if fixed <= rising * channels:
            return BySlices(groups, device)
    return ByPadding(groups, device)


def firsts(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    """Where the queries and the keys of each group begin, and at last where they end."""
    return [0, *accumulate(group.queries for group in groups)], [0, *accumulate(group.keys for group in groups)]


def _costs(groups: Sequence[Group]) -> tuple[float, float]:
    """Seconds on a CPU core, forward and backward: of the calls by slices, and per channel of what padding adds."""
    real = sum(group.queries * group.keys for group in groups)
    longest_q, longest_k = _longest(groups)
    rows = 1 + max(_packed(groups))
    computed = rows * longest_q * longest_k * _MASKED
    moved = rows * (longest_q + 2 * longest_k)
    calls = sum(1 for _ in groupby(groups, key=lambda group: group.shape))
    return _CALL * calls, _SCORE * (computed - real) + _MOVED * moved


def _packed(groups: Sequence[Group]) -> list[int]:
    """The row of each group where neighbours share one, as long as it is no longer than the longest group."""
    longest_q, longest_k = _longest(groups)
    rows, row, queries, keys = [], 0, 0, 0
    for group in groups:
        queries, keys = queries + group.queries, keys + group.keys
        if queries > longest_q or keys > longest_k:
            row, queries, keys = row + 1, group.queries, group.keys
        rows.append(row)
    return rows


def _longest(groups: Sequence[Group]) -> tuple[int, int]:
    return max(group.queries for group in groups), max(group.keys for group in groups)


class Nothing:
    """No query, or no key: the queries themselves."""

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        return q_THK


class BySlices:
    """One call of the fused kernel for each run of neighbours of one shape."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.runs: list[tuple[Group, int, Tensor | None]] = []  # one of them, how many, their masks (count, 1, N, M)
        for _, members in groupby(groups, key=lambda group: group.shape):
            same = list(members)
            masks = [np.arange(group.keys) < group.ends[:, None] for group in same if group.reach is not None]
            mask = torch.from_numpy(np.stack(masks)[:, None]).to(device) if masks else None
            self.runs.append((same[0], len(same), mask))
        self.q_sizes = [count * group.queries for group, count, _ in self.runs]
        self.k_sizes = [count * group.keys for group, count, _ in self.runs]

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        # split, not slices: its backward is one concatenation, that of a slice a whole tensor of zeros.
        whole = zip(_for_kernel(q_THK, k_SHK, v_SHK), (self.q_sizes, self.k_sizes, self.k_sizes), strict=True)
        q_parts, k_parts, v_parts = (x.split(sizes) for x, sizes in whole)
        done = []
        for (group, count, mask), q, k, v in zip(self.runs, q_parts, k_parts, v_parts, strict=True):
            if group.queries:
                q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
                done.append(attend(q, k, v, mask, group.causal).transpose(1, 2).flatten(0, 1))
        return torch.cat(done).to(v_SHK.dtype)


class ByPadding:
    """One call of the fused kernel with masks, on rows of queries and keys as long as the longest group."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        longest_q, longest_k = _longest(groups)
        q_first, k_first = firsts(groups)
        rows = _packed(groups)
        shape = (1 + rows[-1], longest_q, longest_k)
        q_index, k_index = np.zeros(shape[:2], np.int64), np.zeros((shape[0], longest_k), np.int64)
        mask, back = np.zeros(shape, bool), []
        row, q_end, k_end = -1, 0, 0
        for i, group in enumerate(groups):
            q, k = (q_end, k_end) if rows[i] == row else (0, 0)
            row, q_end, k_end = rows[i], q + group.queries, k + group.keys
            q_index[row, q:q_end] = q_first[i] + np.arange(group.queries)
            k_index[row, k:k_end] = k_first[i] + np.arange(group.keys)
            mask[row, q:q_end, k:k_end] = np.arange(group.keys) < group.ends[:, None]
            back.append(row * longest_q + np.arange(q, q_end))
        mask |= ~mask.any(axis=2, keepdims=True)  # what fills up sees something, for a row without keys has no softmax
        arrays = (q_index, k_index, mask[:, None], np.concatenate(back))
        self.q_index, self.k_index, self.mask, self.back = (torch.from_numpy(array).to(device) for array in arrays)

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        rows = ((q_THK, self.q_index), (k_SHK, self.k_index), (v_SHK, self.k_index))
        q, k, v = (x[index].transpose(1, 2) for x, index in rows)
        return attend(q, k, v, self.mask).transpose(1, 2).flatten(0, 1).index_select(0, self.back)
