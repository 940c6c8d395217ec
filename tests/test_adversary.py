from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from model.adversary import Adversarial, Made, adversarial_loss
from model.loop import LoopConfig, fit

CONFIG = LoopConfig(
    steps=400,
    lr=1e-2,
    min_lr=1e-2,
    weight_decay=0.0,
    log_every=1,
    lr_scales=(("critic.", 0.5),),
    threads=1,
    progress=False,
)


def nets() -> tuple[nn.Linear, nn.Sequential]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def batch_at(number: int) -> Tensor:
    return torch.randn(32, 2, generator=torch.Generator().manual_seed(number))


def made(model: nn.Module, x: Tensor) -> Made:
    """The model's own loss is content with anything; only the critic knows that real values are around 3."""
    fake = model(x)
    return Made(0 * fake.mean(), fake, 3 + 0.1 * x[:, :1], {})


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_each_side_gets_the_gradient_of_its_own_loss() -> None:
    model, critic = nets()
    both, x = Adversarial(model, critic, made, weight=2.0), batch_at(0)
    both(x)[0].backward()
    ours, theirs = gradients(model), gradients(critic)
    both.zero_grad()
    (-2.0 * critic(model(x)).mean()).backward()
    torch.testing.assert_close(ours, gradients(model))
    both.zero_grad()
    fake, real = model(x).detach(), made(model, x).real
    ((1 + critic(fake)).relu().mean() + (1 - critic(real)).relu().mean()).backward()
    torch.testing.assert_close(theirs, gradients(critic))


def test_the_model_learns_from_the_critic_alone_once_it_starts(tmp_path: Path) -> None:
    both = Adversarial(*nets(), made, weight=1.0, start=50)
    before = both.model(batch_at(0)).mean().item()
    metrics = fit(both, batch_at, adversarial_loss, CONFIG, tmp_path).metrics
    assert metrics.keys() == {"loss", "lr", "grad_norm", "adversarial", "critic"}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert set(losses[:50]) == {0.0}
    assert 0.0 not in losses[50:]
    after = both.model(batch_at(0)).mean().item()
    assert before < 0
    assert abs(after - 3) < 0.5
    assert int(both.batches) == 400
