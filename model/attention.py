"""Attention without padding: the tokens of a batch lie in one row, and each group of them attends on its own.

A group is a run of queries and the run of keys that it sees: those of one sample, or of one modality of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# Seconds as measured on one core of an AVX-512 machine in float32, forward and backward: of a call of the kernel, of a
# score and of moving an element, per channel; and by how much a mask slows the kernel down.
_CALL, _SCORE, _MOVED, _MASKED = 1e-4, 2e-10, 1e-9, 1.3

# G groups, N queries, M keys, T all queries, S all keys, H heads, K head width


def attend(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention, (B, H, N, K); `mask` is True where a query may look, broadcastable to (B, H, N, M).

    With `causal` in place of a mask, query i sees the keys 0 to i.
    """
    if q_BHNK.device.type != "cpu" or q_BHNK.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK, attn_mask=mask, is_causal=causal)
    # The fused kernel's backward pass takes about five times as long as this in bfloat16 on CPUs with AMX.
    scores_BHNM = q_BHNK * q_BHNK.shape[-1] ** -0.5 @ k_BHMK.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores_BHNM.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, torch.finfo(scores_BHNM.dtype).min)
    return scores_BHNM.softmax(dim=-1).to(v_BHMK.dtype) @ v_BHMK


@dataclass(frozen=True)
class Group:
    """So many queries over so many keys, all of them, or as `mask` (N, M) says, or only those up to the own one."""

    queries: int
    keys: int
    causal: bool = False
    mask: NDArray[np.bool_] | None = None

    @classmethod
    def by_mask(cls, mask: NDArray[np.bool_]) -> Group:
        """The group of a mask (N, M), which is kept only where no name says the same."""
        queries, keys = mask.shape
        if mask.all():
            return cls(queries, keys)
        if queries == keys and bool((mask == np.tri(queries, dtype=bool)).all()):
            return cls(queries, keys, causal=True)
        return cls(queries, keys, mask=mask)

    @property
    def shape(self) -> tuple[int, int, bool, bool]:
        """Groups of one shape can go through a kernel together."""
        return self.queries, self.keys, self.causal, self.mask is not None


class Groups:
    """How T queries see S keys, both in one row, group after group; made once for a batch and used by all layers.

    On the CPU each group is one call of the fused kernel, on slices. On a GPU in half precision all are one call of the
    variable-length kernel, if no group needs a mask. Else, and where groups are so small that calls cost more than
    padding, all are one call of the fused kernel with masks, on queries and keys padded for that call alone.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.groups, self.device = tuple(groups), device

    def attend(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        """(T, H, K)."""
        if not (len(q_THK) and len(k_SHK)):
            return q_THK
        if self.device.type == "cpu":
            by_slices = self._costs[0] <= self._costs[1] * q_THK.shape[1] * q_THK.shape[2]
            return (self._by_slices if by_slices else self._by_padding)(q_THK, k_SHK, v_SHK)
        if q_THK.dtype in (torch.float16, torch.bfloat16) and not any(group.mask is not None for group in self.groups):
            return self._by_lengths(q_THK, k_SHK, v_SHK)
        return self._by_padding(q_THK, k_SHK, v_SHK)

    @cached_property
    def _costs(self) -> tuple[float, float]:
        """Seconds on a CPU core, forward and backward: of the calls by slices, and per channel of what padding adds."""
        real = sum(group.queries * group.keys for group in self.groups)
        longest_q, longest_k = self._longest
        computed = len(self.groups) * longest_q * longest_k * _MASKED
        moved = len(self.groups) * (longest_q + 2 * longest_k)
        return _CALL * len(self._runs), _SCORE * (computed - real) + _MOVED * moved

    @property
    def _longest(self) -> tuple[int, int]:
        return max(group.queries for group in self.groups), max(group.keys for group in self.groups)

    def _by_slices(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        # split, not slices: its backward is one concatenation, that of a slice a whole tensor of zeros.
        q_parts = q_THK.split([count * group.queries for group, count, _ in self._runs])
        k_parts, v_parts = (x.split([count * group.keys for group, count, _ in self._runs]) for x in (k_SHK, v_SHK))
        done = []
        for (group, count, mask), q, k, v in zip(self._runs, q_parts, k_parts, v_parts, strict=True):
            if group.queries:
                q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
                done.append(attend(q, k, v, mask, group.causal).transpose(1, 2).flatten(0, 1))
        return torch.cat(done)

    @cached_property
    def _runs(self) -> list[tuple[Group, int, Tensor | None]]:
        """Neighbours of one shape together: one of them, how many, and their masks (count, 1, N, M)."""
        runs = []
        for _, members in groupby(self.groups, key=lambda group: group.shape):
            same = list(members)
            masks = [group.mask for group in same if group.mask is not None]
            mask = torch.from_numpy(np.stack(masks)[:, None]).to(self.device) if masks else None
            runs.append((same[0], len(same), mask))
        return runs

    def _by_lengths(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        done = []
        for causal, (q_index, k_index, q_ends, k_ends, longest_q, longest_k) in self._lengths.items():
            q, k, v = q_THK, k_SHK, v_SHK
            if len(self._lengths) > 1:
                q, k, v = (x.index_select(0, i) for x, i in ((q, q_index), (k, k_index), (v, k_index)))
            window = (-1, 0) if causal else (-1, -1)
            y = varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, window_size=window)
            assert isinstance(y, Tensor)
            done.append(y)
        if len(done) == 1:
            return done[0]
        order = torch.cat([index for index, *_ in self._lengths.values()])
        return torch.cat(done).index_select(0, order.argsort())

    @cached_property
    def _lengths(self) -> dict[bool, tuple[Tensor, Tensor, Tensor, Tensor, int, int]]:
        """Causal or not: which queries and keys, where each group of them ends, the longest group's lengths."""
        found = {}
        q_first, k_first = self._firsts
        for causal in sorted({group.causal for group in self.groups}):
            rows = [i for i, group in enumerate(self.groups) if group.causal == causal]
            parts: list[Tensor] = []
            ends: list[Tensor] = []
            longest: list[int] = []
            for first, lengths in (
                (q_first, [group.queries for group in self.groups]), (k_first, [group.keys for group in self.groups])
            ):  # fmt: skip
                index = np.concatenate([np.arange(first[i], first[i] + lengths[i]) for i in rows])
                parts.append(torch.from_numpy(index).to(self.device))
                until = [0, *accumulate(lengths[i] for i in rows)]
                ends.append(torch.tensor(until, dtype=torch.int32, device=self.device))
                longest.append(max(lengths[i] for i in rows))
            found[causal] = (parts[0], parts[1], ends[0], ends[1], longest[0], longest[1])
        return found

    def _by_padding(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        q_index, k_index, mask, back = self._padding
        q, k, v = (x[i].transpose(1, 2) for x, i in ((q_THK, q_index), (k_SHK, k_index), (v_SHK, k_index)))
        return attend(q, k, v, mask).transpose(1, 2).flatten(0, 1).index_select(0, back)

    @cached_property
    def _padding(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows of queries (G, N) and keys (G, M), who sees whom (G, 1, N, M), and where each query went (T,)."""
        longest_q, longest_k = self._longest
        q_first, k_first = self._firsts
        shape = (len(self.groups), longest_q, longest_k)
        q_index, k_index = np.zeros(shape[:2], np.int64), np.zeros((shape[0], longest_k), np.int64)
        mask, back = np.zeros(shape, bool), []
        for i, group in enumerate(self.groups):
            q_index[i, : group.queries] = q_first[i] + np.arange(group.queries)
            k_index[i, : group.keys] = k_first[i] + np.arange(group.keys)
            seen = np.tri(group.queries, group.keys, dtype=bool) if group.causal else group.mask
            mask[i, : group.queries, : group.keys] = True if seen is None else seen
            mask[i, group.queries :] = True  # what fills up sees something, for a row without keys has no softmax
            back.append(i * longest_q + np.arange(group.queries))
        arrays = (q_index, k_index, mask[:, None], np.concatenate(back))
        q_rows, k_rows, visible, places = (torch.from_numpy(array).to(self.device) for array in arrays)
        return q_rows, k_rows, visible, places

    @property
    def _firsts(self) -> tuple[list[int], list[int]]:
        return (
            [0, *accumulate(group.queries for group in self.groups)],
            [0, *accumulate(group.keys for group in self.groups)],
        )
