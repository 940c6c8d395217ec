"""Gradients of embedding tables as the rows that were looked up, and an AdamW to which they are whole gradients.

Of a small FourM most parameters are tables, of which a batch touches some hundred rows. A whole gradient, zero but for
those, is memory and time for nothing: here it exists for one table at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def looked_up(model: nn.Module) -> Iterator[None]:
    """Within it, every table that is looked up and used for nothing else, as for logits, gets a gradient of rows."""
    modules = list(model.modules())
    used = Counter(id(parameter) for module in modules for parameter in module.parameters(recurse=False))
    tables = [m for m in modules if isinstance(m, nn.Embedding) and used[id(m.weight)] == 1 and not m.sparse]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """The norm of all gradients together, which are scaled down in place if it is above `limit`."""
    held = [p for p in parameters if p.grad is not None]
    for p in held:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # equal rows together, or the norm would be that of the parts
    if not any(p.grad is not None and p.grad.is_sparse for p in held):
        return nn.utils.clip_grad_norm_(held, limit)
    values = [p.grad._values() if p.grad.is_sparse else p.grad for p in held if p.grad is not None]
    norm = nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which also takes gradients of rows: a table that has one is updated whole, decay and all."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        held = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        rows = [(p, grad) for p, grad in held if grad.is_sparse]
        if not rows:
            return super().step(closure)
        for p, _ in rows:
            p.grad = None
        loss = super().step(closure)
        for p, _ in held:
            p.grad = None
        for p, grad in rows:
            p.grad = grad.to_dense()
            super().step()
            p.grad = None
        for p, grad in held:
            p.grad = grad
        return loss
