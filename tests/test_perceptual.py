"""Losses on what a network sees: closed forms on a network of one layer, and what cannot be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from model import perceptual
from model.critic import PatchCritic
from model.perceptual import Lpips, Perceptual


class Pixels(nn.Module):
    """Sees the standardised image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen(x).sum()


def loss(distance: str = "cosine", side: int = 8) -> Perceptual:
    return Perceptual(Pixels(), ["seen"], side=side, mean=(0.5,) * 3, std=(0.5,) * 3, distance=distance)


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_distance_is_a_mean_over_places_and_images() -> None:
    other = IMAGES.flip(0)
    # With these statistics the network sees the image in [-1, 1] as it is.
    cosine = 1 - nn.functional.cosine_similarity(IMAGES, other, dim=1).mean()
    torch.testing.assert_close(loss()(IMAGES, other), cosine)
    unit = [nn.functional.normalize(x, dim=1) for x in (IMAGES, other)]
    torch.testing.assert_close(loss("l1")(IMAGES, other), (unit[0] - unit[1]).abs().sum(dim=1).mean())
    # Not divided by the batch, as ml-4m's: twice the same pairs are as far apart.
    torch.testing.assert_close(loss()(IMAGES.repeat(2, 1, 1, 1), other.repeat(2, 1, 1, 1)), cosine)
    assert float(loss()(IMAGES, IMAGES)) == pytest.approx(0, abs=1e-6)


def test_gradients_reach_what_was_made_and_nothing_else() -> None:
    made, target = IMAGES.clone().requires_grad_(), IMAGES.flip(0).clone().requires_grad_()
    network = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Flatten(2))
    seen = Perceptual(network, ["0"], side=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    seen(made, target).backward()
    assert made.grad is not None
    assert float(made.grad.abs().sum()) > 0
    assert target.grad is None
    assert all(p.grad is None for p in network.parameters())


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="perceptual distance 'l3'"):
        loss("l3")
    with pytest.raises(ValueError, match=r"perceptual layers blocks\.9"):
        Perceptual(Pixels(), ["seen", "blocks.9"], side=8, mean=(0,), std=(1,))
    with pytest.raises(ValueError, match="LPIPS backbone 'resnet'"):
        perceptual.lpips_weights("resnet")


def test_lpips_says_which_weights_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vgg16-397923af"):
        Lpips("vgg")


def test_a_critic_sees_patches() -> None:
    critic = PatchCritic(1, width=8, layers=2).requires_grad_(False)
    maps = torch.zeros(2, 1, 64, 64)
    before = critic(maps)
    assert before.shape[:2] == (2, 1)
    maps[1, :, :8, :8] = 1
    changed = (critic(maps) - before).abs()
    assert float(changed[0].max()) == 0  # nothing of one map is seen in another
    assert float(changed[1, 0, 0, 0]) > 0
    with pytest.raises(ValueError, match="a critic of 0 layers"):
        PatchCritic(1, layers=0)
