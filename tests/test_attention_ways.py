"""Every way to attend group by group gives what each group gives alone, and no way needs a mask of the whole row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from model import attention, kernels
from model.attention import ByPadding, BySlices, Group

CPU = torch.device("cpu")
DENSE = [Group(5, 5), Group(5, 5), Group(1, 1), Group(7, 7)]
CAUSAL = [Group(6, 6, causal=True), Group(2, 2, causal=True)]
REACHING = [Group.by_reach(np.array([2, 3, 4, 4]), 4), Group.by_reach(np.array([1, 3, 3, 4]), 4)]
MIXED = [*DENSE, *REACHING, *CAUSAL]
CASES = {
    "dense": DENSE,
    "causal": CAUSAL,
    "both": [*DENSE, *CAUSAL, *DENSE],
    "cross": [Group(2, 5), Group(0, 3), Group(4, 1)],
    "reaching": MIXED,
}


def by_group(q, k, v, q_ends, k_ends, longest_q, longest_k, *, window_size):
    """What the GPU's variable-length kernel is documented to do."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    out = []
    for q_slice, k_slice in zip(*(map(slice, ends[:-1], ends[1:]) for ends in (q_ends, k_ends)), strict=True):
        q_part, k_part, v_part = (x.transpose(0, 1) for x in (q[q_slice], k[k_slice], v[k_slice]))
        assert q_part.shape[1] <= longest_q
        assert k_part.shape[1] <= longest_k
        causal = window_size == (-1, 0)
        out.append(F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=causal).transpose(0, 1))
    return torch.cat(out)


def sizes(groups):
    return sum(g.queries for g in groups), sum(g.keys for g in groups)


def drawn(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sizes(groups)
    return [torch.randn(n, 2, 8, generator=generator).requires_grad_() for n in (queries, keys, keys)]


def seen(groups):
    """The whole mask (T, S), which the code under test never makes."""
    mask = torch.zeros(sizes(groups), dtype=torch.bool)
    at_q = at_k = 0
    for group in groups:
        for i in range(group.queries):
            reach = group.keys if group.reach is None else int(group.reach[i])
            mask[at_q + i, at_k : at_k + (i + 1 if group.causal else reach)] = True
        at_q, at_k = at_q + group.queries, at_k + group.keys
    return mask


def exact(groups, q, k, v):
    scores = torch.einsum("qhk,shk->hqs", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqs,shk->qhk", scores.masked_fill(~seen(groups), -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("case", CASES)
def test_groups_attend_as_each_does_alone(case, monkeypatch):
    monkeypatch.setattr(kernels, "varlen_attn", by_group)
    groups = CASES[case]
    inputs = drawn(groups)
    wanted = exact(groups, *inputs)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    ways = [BySlices(groups, CPU), ByPadding(groups, CPU)]
    if all(group.reach is None for group in groups):
        ways.append(kernels.ByLengths(groups, CPU))
    for way in ways:
        found = way(*inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
        for gradient, one in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(gradient, one, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES)
def test_the_blocks_way_attends_alike(case):
    """Forward alone: FlexAttention has no backward pass on the CPU."""
    groups = CASES[case]
    inputs = [x.detach() for x in drawn(groups)]
    torch.testing.assert_close(kernels.ByBlocks(groups, CPU)(*inputs), exact(groups, *inputs), rtol=1e-6, atol=1e-6)


def test_blocks_hold_all_that_is_seen_and_little_more():
    rng = np.random.default_rng(0)
    groups = [
        Group.by_reach(np.sort(rng.integers(1, m + 1, n)), m) if i % 3 else Group(n, m)
        for i, (n, m) in enumerate(rng.integers((0, 1), (300, 301), (24, 2)))
    ]
    found = kernels.ByBlocks(groups, CPU).blocks
    mask = seen(groups)
    own = create_block_mask(lambda _b, _h, q, k: mask[q, k], None, None, *mask.shape, device="cpu").to_dense()
    dense = found.to_dense()
    assert dense.shape == own.shape
    assert bool((dense >= own).all())
    # Keys that no query of a block sees lie at most between two groups of it.
    assert int(dense.sum()) <= 1.2 * int(own.sum()) < 0.3 * own.numel()
    queries, keys = (torch.tensor(rng.integers(0, n, 2000)) for n in mask.shape)
    assert torch.equal(found.mask_mod(None, None, queries, keys), mask[queries, keys])


def test_reaches_that_have_a_name_are_not_kept():
    assert Group.by_reach(np.full(3, 5), 5) == Group(3, 5)
    assert Group.by_reach(np.arange(1, 4), 3) == Group(3, 3, causal=True)
    assert Group.by_reach(np.arange(1, 4), 5).reach is not None


def test_the_way_depends_on_device_precision_and_groups(monkeypatch):
    monkeypatch.setattr(kernels, "ByLengths", lambda *_: "lengths")
    monkeypatch.setattr(kernels, "ByBlocks", lambda *_: "blocks")
    cuda, half = torch.device("cuda"), torch.bfloat16
    assert attention.planned([*DENSE, *CAUSAL], cuda, half, 64) == "lengths"
    assert attention.planned([*DENSE, *CAUSAL], cuda, torch.float32, 64) == "blocks"
    assert attention.planned(MIXED, cuda, half, 64) == "blocks"
    large = [Group(200, 200), Group(20, 20)]
    assert isinstance(attention.planned(large, CPU, half, 64), BySlices)
    assert isinstance(attention.planned(large, CPU, half, 64, compiled=True), ByPadding)
    assert isinstance(attention.planned([Group(1, 1 + i % 2) for i in range(99)], CPU, half, 64), ByPadding)
    assert isinstance(attention.planned([Group(0, 3)], cuda, half, 64), attention.Nothing)
