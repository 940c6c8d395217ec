"""In what precision tokens are computed, and what becomes of numbers that are none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.tokenizers._mlp import BottleneckMLP
from model.tokenizers.vqvae import VQVAE


def test_sums_of_the_mlp_are_not_rounded_under_autocast() -> None:
    mlp = BottleneckMLP(4, 4, (2, 8, 2)).requires_grad_(False)
    for module in (mlp.linear_in, mlp.blocks[0].block[2]):
        module.weight.zero_()
    mlp.linear_in.bias.fill_(1.0)
    mlp.blocks[0].block[2].bias.fill_(2**-10)  # bfloat16 knows no number between 1 and 1 + 2**-7
    seen: list[torch.Tensor] = []
    mlp.layernorms[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mlp(torch.zeros(1, 4, 1, 1))
    assert torch.equal(seen[0], torch.full((1, 1, 8), 1 + 2**-10))
    assert mlp.bfloat16()(torch.zeros(1, 4, 1, 1, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_tokens_are_made_without_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN would by default round what float32 convolutions multiply to TF32."""
    model = VQVAE.tiny()
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: pytest.fail("a convolution"))
    assert model.tokenize(torch.zeros(1, 3, 32, 32)).shape == (1, *model.grid)
