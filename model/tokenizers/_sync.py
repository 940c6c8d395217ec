"""What a codebook needs of the other processes of a training run; every function is a no-op in a single process.

All are collective: each process of the default group calls them in the same order. N vectors, L latent width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if not _alone():
        dist.all_reduce(x)
    return x


def of_first(x: Tensor) -> Tensor:
    """The tensor of the first process, in place."""
    if not _alone():
        dist.broadcast(x, src=0)
    return x


def sample(z_NL: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Rows (num, L) drawn from the vectors of all processes, the same everywhere; repeated only where too few.

    They are those that one process would draw from the vectors of all, joined in the order of the ranks.
    """
    sizes = torch.tensor([len(z_NL)], device=z_NL.device)
    if not _alone():
        parts = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, sizes)
        sizes = torch.cat(parts)
    available = int(sizes.sum())
    if available >= num:
        drawn = torch.randperm(available, generator=generator)[:num]
    else:
        drawn = torch.randint(0, available, (num,), generator=generator)
    drawn = drawn.to(z_NL.device)
    if _alone():
        return z_NL[drawn]
    # Every process puts in the rows it has; the others add zero to them.
    drawn = of_first(drawn) - sizes[: dist.get_rank()].sum()
    here = (drawn >= 0) & (drawn < len(z_NL))
    rows = z_NL.new_zeros(num, z_NL.shape[1])
    rows[here] = z_NL[drawn[here]]
    return total(rows)
