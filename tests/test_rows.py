"""Gradients of rows are whole gradients to the optimizer, and only where a table is looked up alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from model import optim, rows


class Words(nn.Module):
    """Two tables, of which one also gives the logits, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(50, 8, padding_idx=0), nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.tied.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out((self.table(ids) + self.tied(ids % 20)).tanh())


def ids_of(step: int) -> torch.Tensor:
    # Some occur twice, some never, some in one step alone, and there is padding.
    return torch.randint(0, 20 + step, (2, 7), generator=torch.Generator().manual_seed(step)) % 30


@pytest.mark.parametrize("limit", [1e-2, 1e9])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_training_by_rows_is_that_by_whole_gradients(limit: float, passes: int) -> None:
    torch.manual_seed(0)
    whole = Words()
    by_rows = copy.deepcopy(whole)
    first, second = (optim.adamw(m, 1e-2, 0.1, (0.9, 0.95)) for m in (whole, by_rows))
    for step in range(12):
        for part in range(passes):
            ids = ids_of(passes * step + part)
            nn.functional.cross_entropy(whole(ids).flatten(0, 1), ids.flatten() % 20).backward()
            with rows.looked_up(by_rows):
                nn.functional.cross_entropy(by_rows(ids).flatten(0, 1), ids.flatten() % 20).backward()
        assert by_rows.table.weight.grad is not None
        assert by_rows.table.weight.grad.is_sparse
        assert by_rows.tied.weight.grad is not None
        assert not by_rows.tied.weight.grad.is_sparse
        norms = [nn.utils.clip_grad_norm_(whole.parameters(), limit), rows.clip(by_rows.parameters(), limit)]
        torch.testing.assert_close(*norms)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(whole.state_dict().values(), by_rows.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, q in zip(whole.parameters(), by_rows.parameters(), strict=True):
        for key, value in first.state[p].items():
            torch.testing.assert_close(second.state[q][key], value, rtol=1e-5, atol=1e-8)


def test_outside_of_it_gradients_are_whole() -> None:
    model = Words()
    with pytest.raises(KeyError), rows.looked_up(model):
        raise KeyError
    model(ids_of(0)).sum().backward()
    assert model.table.weight.grad is not None
    assert not model.table.weight.grad.is_sparse


def test_a_norm_that_is_not_finite_is_told() -> None:
    model = Words()
    with rows.looked_up(model):
        (model(ids_of(0)) * float("inf")).sum().backward()
    assert not rows.clip(model.parameters(), 1.0).isfinite()
