"""The image encoder of a FourM alone, as a vision transformer for transfer: what ml-4m's FMViT computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import checkpoint
from model.attention import attend
from model.blocks import Block
from model.embeddings import PixelEmbedding, sincos_2d
from model.fourm import FourM, FourMConfig
from model.spec import ModalitySpec

# B images, C channels, H and W pixels, N patches of an image, R registers, D width

Positions = Literal["interpolated", "recomputed"]


class ViT(nn.Module):
    """Patches of an image through the encoder of a FourM; parameters have FourM's names, those of FMViT.

    A square image of another size than that of `spec` gets positions of its own: "interpolated" ones are the fixed
    table resized (bicubic), so that they stay in the range of training; "recomputed" ones go on counting patches.
    Registers, which FMViT does not know, are used as FourM uses them, and are not among the features.
    """

    def __init__(
        self, config: FourMConfig, spec: ModalitySpec, *, positions: Positions = "interpolated", seed: int = 0
    ) -> None:
        super().__init__()
        if spec.kind != "pixels":
            raise ValueError(f"{spec.name}: kind {spec.kind}, expected pixels")
        if positions not in ("interpolated", "recomputed"):
            raise ValueError(f"positions {positions!r}, expected interpolated or recomputed")
        # The encoder of a FourM without decoder: names and first weights are its own.
        whole = FourM(replace(config, decoder_depth=0), [spec], [], seed=seed)
        self.config, self.spec, self.positions = config, spec, positions
        self.encoder_embeddings, self.encoder = whole.encoder_embeddings, whole.encoder
        self.encoder_norm = whole.encoder_norm
        if config.num_register_tokens:
            self.register_tokens = whole.register_tokens

    @classmethod
    def of(cls, model: FourM, name: str | None = None, *, positions: Positions = "interpolated") -> ViT:
        """A copy of a FourM's encoder, for the images `name`, or the only ones it takes."""
        spec = _images(model.specs_in, name)
        return cls._filled(model.state_dict(), model.config, spec, positions).train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        positions: Positions = "interpolated",
        ema: bool = False,
    ) -> ViT:
        """The encoder of what `FourM.from_pretrained` takes, in evaluation mode; no decoder is built."""
        state, config, specs_in, _ = checkpoint.read(source, ema=ema)
        return cls._filled(state, config, _images(specs_in, name), positions).eval()

    @classmethod
    def _filled(cls, state: Mapping[str, Tensor], config: FourMConfig, spec: ModalitySpec, positions: Positions) -> ViT:
        vit = cls(config, spec, positions=positions)
        missing = [key for key in vit.state_dict() if key not in state]
        if missing:
            raise ValueError(f"{missing} are not in the checkpoint, expected all weights of the encoder")
        vit.load_state_dict({key: state[key] for key in vit.state_dict()})
        return vit

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, N, D) of all patches, row by row, of `images` (B, C, H, H).

        uint8 are normalised with ImageNet's statistics, float ones are taken as normalised. H is a multiple of the
        patch size.
        """
        size, (batch, channels, height, width) = self.spec.patch_size, images.shape
        if channels != self.spec.channels or height != width or height % size:
            raise ValueError(
                f"images {tuple(images.shape)}, expected (B, {self.spec.channels}, H, H) with H a multiple of {size}"
            )
        side = height // size
        patches = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).flatten(3)
        embedding = self.encoder_embeddings[self.spec.name]
        assert isinstance(embedding, PixelEmbedding)
        rows = torch.arange(batch * side**2, device=images.device)
        content = embedding.content(patches.flatten(0, 2), rows).view(batch, side**2, -1)
        x_BND = content + self._places(embedding, side)
        if registers := self.config.num_register_tokens:
            x_BND = torch.cat([self.register_tokens.expand(batch, -1, -1).to(x_BND.dtype), x_BND], dim=1)
        num = x_BND.shape[1]
        own = _PerImage(batch)
        x_TD = x_BND.flatten(0, 1)
        for block in self.encoder:
            assert isinstance(block, Block)
            x_TD = block(x_TD, own)
        return self.encoder_norm(x_TD).view(batch, num, -1)[:, registers:]

    def pooled(self, images: Tensor) -> Tensor:
        """One vector (B, D) an image: the mean of the features of its patches."""
        return self(images).mean(dim=1)

    def _places(self, embedding: PixelEmbedding, side: int) -> Tensor:
        table = embedding.pos_emb
        if side != self.spec.side and self.positions == "recomputed":
            table = sincos_2d(side, self.config.dim).to(table)
        elif side != self.spec.side:
            grid = table.unflatten(1, (self.spec.side, -1)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
            table = grid.flatten(2).transpose(1, 2)
        return table + embedding.mod_emb


class _PerImage:
    """All tokens of an image see each other; all images have as many."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __call__(self, q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self.images, -1)).transpose(1, 2) for x in (q_THK, k_SHK, v_SHK))
        return attend(q, k, v).transpose(1, 2).flatten(0, 1)


def _images(specs: tuple[ModalitySpec, ...] | list[ModalitySpec], name: str | None) -> ModalitySpec:
    found = [spec for spec in specs if spec.kind == "pixels" and name in (None, spec.name)]
    if len(found) != 1:
        names = [spec.name for spec in specs if spec.kind == "pixels"]
        raise ValueError(f"images {name!r}, expected the name of one of the inputs that are images: {names}")
    return found[0]
