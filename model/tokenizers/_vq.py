"""What every VQ tokenizer shares: the encoder half, tokens of maps, and one file that holds settings and weights.

State-dict keys and settings have ml-4m's names (Mizrahi et al. 2023, 4M: `fourm/vq`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import domains, snapshots
from model.domains import Domain, Map
from model.tokenizers import Tokenizer, _files
from model.tokenizers._quantize import Quantizer
from model.tokenizers._vit import ViTEncoder, vit_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """ml-4m's constructor settings of the encoder half under its names, plus the domain and the seed.

    `enc_type` also takes `vit_<width>x<blocks>x<heads>_enc` for sizes of one's own, which ml-4m cannot load.
    `image_size` and `patch_size` are in pixels, or in cells of a feature map without `patch_proj`.
    """

    domain: Domain | None = None  # None: tensors only, no encode and decode of maps
    image_size: int = 224
    image_size_enc: int | None = None
    n_channels: int = 3  # with n_labels: the width of a class embedding
    n_labels: int | None = None
    enc_type: str = "vit_b_enc"
    patch_proj: bool = True
    post_mlp: bool = False
    patch_size: int = 16
    codebook_size: int = 16384
    latent_dim: int = 32
    norm_latents: bool = False
    ema_decay: float = 0.99
    threshold_ema_dead_code: float = 0.25
    commitment_weight: float = 1.0
    undo_std: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.enc_size % self.patch_size:
            raise ValueError(f"image size {self.enc_size}, expected a multiple of the patch size {self.patch_size}")
        if isinstance(self.domain, domains.Semseg) and self.n_labels != self.domain.num_labels:
            raise ValueError(f"n_labels {self.n_labels}, expected {self.domain.num_labels} for the semseg domain")

    @property
    def enc_size(self) -> int:
        """The image size the encoder's position table is made for."""
        return self.image_size_enc or self.image_size


class VQ(nn.Module, Tokenizer):
    """Encoder and quantizer. Subclasses add a decoder: `decode_tokens`, `training_loss` and their `Config`."""

    Config: ClassVar[type[VQConfig]]

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._build(config)

    def _build(self, config: VQConfig) -> None:
        """Make the layers, each drawing its weights from torch's random state, which is seeded."""
        patch = config.patch_size if config.patch_proj else None
        grid, size = config.enc_size // config.patch_size, vit_size(config.enc_type, "enc")
        self.cls_emb = nn.Embedding(config.n_labels, config.n_channels) if config.n_labels else None
        self.encoder = ViTEncoder(config.n_channels, patch, (grid, grid), size, config.post_mlp)
        self.quant_proj = nn.Conv2d(size[0], config.latent_dim, 1)
        self.quantize = Quantizer(
            config.codebook_size,
            config.latent_dim,
            decay=config.ema_decay,
            dead_threshold=config.threshold_ema_dead_code,
            commitment_weight=config.commitment_weight,
            norm_latents=config.norm_latents,
            seed=config.seed,
        )

    @property
    def vocab_size(self) -> int:
        """The number of ids: the size of the codebook."""
        return self.config.codebook_size

    @property
    def image_size(self) -> int:
        """The side of the maps it was made for, in pixels (cells of a feature map)."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the ids of one map of `image_size`: (rows, columns)."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def domain(self) -> Domain:
        """How maps become network input; ValueError for a tokenizer without one."""
        if self.config.domain is None:
            raise ValueError("this tokenizer has no domain, so it takes tensors only; expected load(path, domain=...)")
        return self.config.domain

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Network input (B, C, H, W) to codes (B, L, h, w), the quantizer's loss, and ids int64 (B, h, w)."""
        if self.config.undo_std:
            mean, std = x.new_tensor(IMAGENET_MEAN), x.new_tensor(IMAGENET_STD)
            x = 2 * (x * std[:, None, None] + mean[:, None, None]) - 1
        if self.cls_emb is not None:
            x = self.cls_emb(x).permute(0, 3, 1, 2)
        codes, loss, ids = self.quantize(self.quant_proj(self.encoder(x)))
        return codes, loss, ids

    def tokenize(self, x: Tensor) -> Tensor:
        """Network input (B, C, H, W), or classes int64 (B, H, W), to ids int64 (B, h, w); use in eval mode."""
        return self.quantized(x)[2]

    @abstractmethod
    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Ids int64 (B, h, w) to network output (B, C, H, W)."""

    @abstractmethod
    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What a training step minimises on network input, and figures for the log."""

    @torch.inference_mode()
    def encode_batch(self, values: Sequence[Map]) -> NDArray[np.int64]:
        """Ids (B, *grid) of maps of one size."""
        self.eval()
        return self.tokenize(self.domain.to_network(values).to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def decode_batch(self, ids: NDArray[np.integer[Any]]) -> list[Map]:
        """Maps from ids (B, *grid) in [0, vocab_size)."""
        self.eval()
        if ids.ndim != 1 + len(self.grid) or ids.size == 0 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"expected ids (b, h, w) in 0..{self.vocab_size - 1}, got {ids.shape}: {ids}")
        out = self.decode_tokens(torch.from_numpy(ids.astype(np.int64)).to(self._device))
        return self.domain.from_network(out)

    def encode(self, value: Map) -> NDArray[np.int64]:
        """Ids of one map."""
        return self.encode_batch([value])[0]

    def decode(self, ids: NDArray[np.integer[Any]]) -> Map:
        """The map of ids of shape `grid`."""
        return self.decode_batch(np.asarray(ids)[None])[0]

    @property
    def _device(self) -> torch.device:
        return self.quant_proj.weight.device

    def save(self, path: Path) -> None:
        """One safetensors file, its configuration in the header as ml-4m writes it: str(value) under each name."""
        header = _files.to_header(self.config)
        snapshots.write_file(Path(path), snapshots.safetensors_bytes(self.state_dict(), header))

    @classmethod
    def load(cls, path: Path, domain: Domain | None = None) -> Self:
        """The tokenizer of a file by `save` or by ml-4m, in eval mode; ValueError when it is of another class."""
        found = _files.read(Path(path), domain)
        if not isinstance(found, cls):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected a {cls.__name__}")
        return found
