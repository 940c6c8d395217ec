"""The loss on held-out data: always the same batches, weighted by what they count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model import figures
from model.evaluation import Heldout, Several, fixed
from model.masking import MaskingConfig, MixtureComponent


def ones(number: int) -> Tensor:
    return torch.ones(number + 1, 2)


def measured(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    value = model(x).mean()
    odd = len(x) % 2
    return value, {
        "loss/a": torch.tensor([len(x) ** 2, float(len(x))]),
        "loss/odd": torch.tensor([5.0 * odd, odd]),
        "loss/none": torch.tensor([torch.nan, 0.0]),
        "dtype": torch.tensor(float(model(x).dtype == torch.bfloat16)),
    }


def test_figures_are_means_over_what_was_counted() -> None:
    model = nn.Linear(2, 1)
    one = Heldout(name="web", batch_at=ones, num_batches=4, loss=measured, dtype="bfloat16")
    found = one(model, 100)
    assert found["eval/web/loss/a"] == pytest.approx((1 + 4 + 9 + 16) / (1 + 2 + 3 + 4))
    assert found["eval/web/loss/odd"] == 5.0
    assert "eval/web/loss/none" not in found
    assert found["eval/web/dtype"] == 1.0
    assert found["eval/web/loss"] == pytest.approx(float(model(ones(0)).detach()), rel=1e-2)
    assert Several((one,))(model, 200) == found
    with pytest.raises(ValueError, match="num_batches 0, expected at least 1"):
        Heldout(name="web", batch_at=ones, num_batches=0, loss=measured)


def test_fixed_budgets_draw_every_component_alike() -> None:
    parts = tuple(MixtureComponent(weight=w, input_alphas={"a": w}, target_alphas={"a": 1.0}) for w in (1.0, 0.5))
    masking = fixed(MaskingConfig(components=parts, input_tokens=(0, 256), target_tokens=(256, 256)))
    assert (masking.input_tokens, masking.target_tokens) == ((128, 128), (128, 128))
    assert [part.weight for part in masking.components] == [1.0, 1.0]
    assert [part.input_alphas["a"] for part in masking.components] == [1.0, 0.5]


def test_figures_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a figure of shape \(3,\), expected a scalar, or \(2,\)"):
        figures.read([{"x": torch.zeros(3)}])
    assert figures.read([{"x": 2}, {"y": torch.tensor(4), "x": torch.tensor([6.0, 3.0])}]) == [
        {"x": (2.0, 1.0)},
        {"y": (4.0, 1.0), "x": (6.0, 3.0)},
    ]
