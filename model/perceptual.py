"""Losses on what a pretrained network sees in two images rather than on their pixels. B batch, N places, D width."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES = ("cosine", "l1")


class Perceptual(nn.Module):
    """The distance of two batches of images in [-1, 1], summed over layers of a network of timm.

    cosine: one minus the cosine of the features of each place; l1: the absolute difference of features of unit length,
    summed over channels. Both are means over places, class token included, and over images.

    ml-4m's loss of this kind is also divided by the number of images, so that its weight falls with the batch; here a
    weight means the same at any batch size. That of ml-4m's recipe, 1.0 at 64 images a GPU, is 1/64 here.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        distance: str = "cosine",
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise ValueError(f"perceptual distance {distance!r}, expected {' or '.join(DISTANCES)}")
        known = {name for name, _ in network.named_modules()}
        if not layers or not set(layers) <= known:
            unknown = sorted(set(layers) - known)
            raise ValueError(f"perceptual layers {', '.join(unknown) or 'none'}, expected modules such as blocks.2")
        self.network = network.eval().requires_grad_(False)
        self.layers, self.side, self.distance = tuple(layers), side, distance
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self._seen: dict[str, Tensor] = {}
        for name in self.layers:
            network.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self._seen[name] = out

        return hook

    def features(self, x: Tensor) -> list[Tensor]:
        """What the layers give (B, N, D) for images (B, 3, H, W) in [-1, 1], squeezed to the network's size."""
        x = ((x + 1) / 2 - self.mean) / self.std
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        self._seen.clear()
        # oneDNN's bfloat16 convolutions return wrong values on CPUs with AMX (seen with torch 2.15).
        with torch.autocast("cpu", enabled=False) if x.device.type == "cpu" else nullcontext():
            self.network(x.float())
        found = [self._seen[name] for name in self.layers]
        self._seen.clear()
        return [f.flatten(2).transpose(1, 2) if f.ndim == 4 else f for f in found]

    def forward(self, made: Tensor, target: Tensor) -> Tensor:
        """The mean distance, a scalar; gradients reach `made` alone."""
        if self.mean.device != made.device:
            self.to(made.device)
        with torch.no_grad():
            wanted = self.features(target)
        distances = []
        for a, b in zip(self.features(made), wanted, strict=True):
            a, b = a.float(), b.float()
            if self.distance == "cosine":
                distances.append(1 - F.cosine_similarity(a, b, dim=-1).mean())
            else:
                distances.append((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().sum(-1).mean())
        return torch.stack(distances).sum()


class Lpips(nn.Module):
    """LPIPS (Zhang et al. 2018) of two batches of images in [-1, 1], by torchmetrics; the mean, a scalar."""

    def __init__(self, backbone: str = "vgg") -> None:
        super().__init__()
        if not lpips_weights(backbone).exists():
            raise FileNotFoundError(
                f"LPIPS needs {lpips_weights(backbone)}, the ImageNet weights of torchvision, expected to be there"
            )
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.net = LearnedPerceptualImagePatchSimilarity(backbone).net.requires_grad_(False)  # type: ignore[arg-type]

    def forward(self, made: Tensor, target: Tensor) -> Tensor:
        """Values outside of [-1, 1] are cut off."""
        if next(self.net.parameters()).device != made.device:
            self.to(made.device)
        distance: Tensor = self.net(made.clamp(-1, 1), target, normalize=False)
        return distance.mean()


_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def lpips_weights(backbone: str) -> Path:
    """Where torchvision keeps the weights of an LPIPS backbone; the file may not be there."""
    if backbone not in _BACKBONES:
        raise ValueError(f"LPIPS backbone {backbone!r}, expected one of {', '.join(_BACKBONES)}")
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONES[backbone]


def of_timm(name: str, layers: Sequence[str], *, distance: str = "cosine", checkpoint: str = "") -> Perceptual:
    """`Perceptual` on a network of timm and its published weights, or those of a file.

    ml-4m's is `of_timm("vit_base_patch16_clip_224.openai", ["blocks.2", "blocks.5", "blocks.8", "blocks.11"])`.
    """
    import timm
    from timm.data import resolve_model_data_config

    network = timm.create_model(name, pretrained=not checkpoint, checkpoint_path=checkpoint)
    about = resolve_model_data_config(network)
    return Perceptual(
        network, layers, side=about["input_size"][-1], mean=about["mean"], std=about["std"], distance=distance
    )
