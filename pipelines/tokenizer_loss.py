"""What a tokenizer is trained on beside its own loss: perceptual distance, and a critic; both off unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model import perceptual
from model.adversary import Adversarial, Made, adversarial_loss
from model.critic import PatchCritic
from model.tokenizers._vq import VQ
from model.tokenizers.vqvae import VQVAE, reconstruction_loss

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class PerceptualLoss:
    """How a network sees the reconstruction: `network` is a name of timm, or `lpips-vgg`, `-alex`, `-squeeze`.

    `weight` does not depend on the batch size; see `model.perceptual.Perceptual` for what ml-4m's 1.0 is here.
    `checkpoint` is a file of the network's weights instead of those that timm downloads.
    """

    weight: float = 1.0
    network: str = "vit_base_patch16_clip_224.openai"
    layers: tuple[str, ...] = ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    distance: str = "cosine"
    checkpoint: str = ""

    def load(self) -> nn.Module:
        """The loss of (made, target) images in [-1, 1]."""
        if self.network.startswith("lpips-"):
            return perceptual.Lpips(self.network.removeprefix("lpips-"))
        return perceptual.of_timm(self.network, self.layers, distance=self.distance, checkpoint=self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class AdversarialLoss:
    """A critic of patches that joins in after `start` batches; `lr_scale` is its share of the learning rate."""

    weight: float = 0.1
    start: int = 10_000
    width: int = 64
    layers: int = 3
    lr_scale: float = 1.0


def trained(
    model: VQ, seeing: PerceptualLoss | None, against: AdversarialLoss | None, seed: int
) -> tuple[nn.Module, Loss]:
    """What the loop trains, the tokenizer or the tokenizer and its critic, and the loss it trains it with.

    ValueError for a loss that needs the reconstruction, of a tokenizer whose decoder makes none in training.
    """
    if seeing is None and against is None:
        return model, reconstruction_loss
    if not isinstance(model, VQVAE):
        raise ValueError(f"a perceptual or adversarial loss of a {type(model).__name__}, expected of a VQVAE")
    channels = model.domain.num_channels
    if seeing is not None and model.domain.name not in ("rgb", "normal"):
        raise ValueError(f"a perceptual loss of {model.domain.name}, expected of maps of three channels in [-1, 1]")
    if against is not None and (channels is None or not model.config.patch_proj or model.grid[-1] == 1):
        raise ValueError(f"an adversarial loss of {model.domain.name}, expected of maps of pixels with channels")
    seen = _Seen(None if seeing is None else seeing.load(), 0.0 if seeing is None else seeing.weight)
    if against is None:
        return model, seen
    assert channels is not None
    critic = PatchCritic(channels, width=against.width, layers=against.layers, seed=seed)
    return Adversarial(model, critic, seen.made, weight=against.weight, start=against.start), adversarial_loss


def tokenizer_in(module: nn.Module) -> VQ:
    """The tokenizer itself of what the loop trains."""
    inner = module.model if isinstance(module, Adversarial) else module
    assert isinstance(inner, VQ)
    return inner


class _Seen:
    """The domain's loss, the quantizer's, and how a network sees the difference."""

    def __init__(self, network: nn.Module | None, weight: float) -> None:
        self.network, self.weight = network, weight

    def made(self, model: nn.Module, x: Tensor) -> Made:
        assert isinstance(model, VQVAE)
        out, code_loss, ids = model(x)
        reconstruction = model.domain.loss(out, x)
        figures = {
            "reconstruction": float(reconstruction.detach()),
            "commitment": float(code_loss.detach()),
            "codes": float(len(ids.unique())),
        }
        total = reconstruction + code_loss
        if self.network is not None:
            seen = self.network(out, x)
            figures["perceptual"] = float(seen.detach())
            total = total + self.weight * seen
        return Made(total, out, x, figures)

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        made = self.made(model, x)
        return made.loss, made.metrics
