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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model import domains
from model.domains import Domain, Map
from model.tokenizers import Tokenizer, _files, _quantize
from model.tokenizers._mlp import BottleneckMLP, is_mlp, mlp_size
from model.tokenizers._vit import ViTEncoder, vit_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_ENCODER_HALF = ("cls_emb", "encoder", "quant_proj", "quantize")


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """ml-4m's constructor settings of the encoder half under its names, plus the domain and the seed.

    `enc_type` is `vit_s_enc`, `vit_b_enc`, `vit_l_enc`, `BottleneckMLP/B_<blocks>-Wi_<width>` for vectors, or, for
    sizes of one's own that ml-4m cannot load, `vit_<width>x<blocks>x<heads>_enc`. `quant_type` is a name of
    `_quantize.NAMES`. `image_size` and `patch_size` are in pixels; feature maps (`patch_proj=False`) have as many
    cells as their image has patches. An MLP has no use for either.
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
    quant_type: str = "lucid"
    codebook_size: int = 16384
    num_codebooks: int = 1  # heads of the quantizer: so many ids for each place
    latent_dim: int = 32
    norm_codes: bool = True
    norm_latents: bool = False
    ema_decay: float = 0.99
    threshold_ema_dead_code: float = 0.25
    code_replacement_policy: str = "batch_random"
    commitment_weight: float = 1.0
    kmeans_init: bool = False
    freeze_enc: bool = False  # the encoder half stays as it is and in evaluation mode, the codebook too
    undo_std: bool = False  # `tokenize` takes images standardised as for ImageNet classifiers
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_mlp(self.enc_type) and self.enc_size % self.patch_size:
            raise ValueError(f"image size {self.enc_size}, expected a multiple of the patch size {self.patch_size}")
        if isinstance(self.domain, domains.Semseg):
            if self.n_labels != self.domain.num_labels:
                raise ValueError(f"n_labels {self.n_labels}, expected {self.domain.num_labels} for the semseg domain")
        elif self.domain is not None and self.n_channels != self.domain.num_channels:
            expected = f"expected {self.domain.num_channels} for the {self.domain.name} domain"
            raise ValueError(f"n_channels {self.n_channels}, {expected}")

    @property
    def enc_size(self) -> int:
        """The image size the encoder's position table is made for."""
        return self.image_size_enc or self.image_size


class VQ(nn.Module, Tokenizer):
    """Encoder and quantizer. Subclasses add a decoder: `decode_tokens`, `training_loss` and their `Config`."""

    Config: ClassVar[type[VQConfig]]
    quantize: Any  # a module of `_quantize`

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._build(config)
        for part in self._frozen():
            part.requires_grad_(False).eval()

    def _build(self, config: VQConfig) -> None:
        """Make the layers, each drawing its weights from torch's random state, which is seeded."""
        self.cls_emb = nn.Embedding(config.n_labels, config.n_channels) if config.n_labels else None
        self.encoder, width = _encoder(config)
        self.quant_proj = nn.Conv2d(width, config.latent_dim, 1)
        self.quantize = _quantize.make(config)

    def _frozen(self) -> list[nn.Module]:
        """The encoder half if `freeze_enc`, else nothing."""
        if not self.config.freeze_enc:
            return []
        return [part for name, part in self.named_children() if name in _ENCODER_HALF]

    def train(self, mode: bool = True) -> Self:
        """As torch's, but a frozen encoder half stays in evaluation mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    @property
    def vocab_size(self) -> int:
        """The number of ids: the size of a codebook."""
        return int(self.quantize.vocab_size)

    @property
    def image_size(self) -> int:
        """The side of the maps it was made for, in pixels; of features, that of their image."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the ids of one map of `image_size`: (rows, columns), or (codebooks, rows, columns) of several.

        (1, 1) rows and columns for an MLP, which tokenises vectors.
        """
        config = self.config
        side = 1 if is_mlp(config.enc_type) else config.image_size // config.patch_size
        return (side, side) if config.num_codebooks == 1 else (config.num_codebooks, side, side)

    @property
    def domain(self) -> Domain:
        """How maps become network input; ValueError for a tokenizer without one."""
        if self.config.domain is None:
            raise ValueError("this tokenizer has no domain, so it takes tensors only; expected load(path, domain=...)")
        return self.config.domain

    def latents(self, x: Tensor) -> Tensor:
        """The domain's tensor (B, C, H, W) to what is quantized, (B, L, h, w)."""
        if self.cls_emb is not None:
            x = self.cls_emb(x).permute(0, 3, 1, 2)
        # As a product: of float32 convolutions cuDNN by default rounds the operands to TF32, which gives other ids.
        weight = self.quant_proj.weight.flatten(1)
        return F.linear(self.encoder(x).permute(0, 2, 3, 1), weight, self.quant_proj.bias).permute(0, 3, 1, 2)

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The domain's tensor (B, C, H, W) to codes (B, L, h, w), the quantizer's loss, and ids int64 (B, *grid)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_enc):
            codes, loss, ids = self.quantize(self.latents(x))
        return codes, loss, ids

    def tokenize(self, x: Tensor) -> Tensor:
        """Network input (B, C, H, W), or classes int64 (B, H, W), to ids int64 (B, *grid); use in eval mode.

        With `undo_std` it takes standardised images, as ml-4m's does; a domain's tensors never are, and
        `encode_batch` and training take them as they are.
        """
        if self.config.undo_std:
            mean, std = x.new_tensor(IMAGENET_MEAN), x.new_tensor(IMAGENET_STD)
            x = 2 * (x * std[:, None, None] + mean[:, None, None]) - 1
        return self.quantized(x)[2]

    @abstractmethod
    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Ids int64 (B, *grid) to network output (B, C, H, W)."""

    @abstractmethod
    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What a training step minimises on network input, and figures for the log."""

    @torch.inference_mode()
    def encode_batch(self, values: Sequence[Map]) -> NDArray[np.int64]:
        """Ids (B, *grid) of maps of one size."""
        self.eval()
        return self.quantized(self.domain.to_network(values).to(self._device))[2].cpu().numpy()

    @torch.inference_mode()
    def decode_batch(self, ids: NDArray[np.integer[Any]]) -> list[Map]:
        """Maps from ids (B, *grid) in [0, vocab_size)."""
        self.eval()
        if ids.ndim != 1 + len(self.grid) or ids.size == 0 or ids.min() < 0 or ids.max() >= self.vocab_size:
            axes = "b, heads, h, w" if len(self.grid) == 3 else "b, h, w"
            raise ValueError(f"expected ids ({axes}) in 0..{self.vocab_size - 1}, got {ids.shape}: {ids}")
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
        _files.save(self, Path(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder as on the Hugging Face hub, config.json and model.safetensors, for `read` and for ml-4m."""
        _files.save_pretrained(self, Path(folder))

    @classmethod
    def load(cls, path: Path, domain: Domain | None = None) -> Self:
        """The tokenizer of a file by `save` or by ml-4m, in eval mode; ValueError when it is of another class."""
        found = _files.read(path, domain)
        if not isinstance(found, cls):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected a {cls.__name__}")
        return found


class EncoderOnly(VQ):
    """The half that makes tokens, without a decoder: all that tokenising needs of a tokenizer of any class."""

    Config = VQConfig

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Always a ValueError."""
        raise ValueError("this tokenizer was read without its decoder; expected read(path) without encoder_only")

    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Always a ValueError."""
        raise ValueError("this tokenizer was read without its decoder, so it cannot be trained")

    @classmethod
    def tiny(cls) -> Self:
        """32 x 32 rgb pixels to 4 x 4 tokens."""
        config = VQConfig(image_size=32, patch_size=8, enc_type="vit_64x1x2_enc", codebook_size=64, latent_dim=16)
        return cls(config).eval()

    def examples(self) -> Sequence[Map]:
        """None, since nothing comes back."""
        return []


def _encoder(config: VQConfig) -> tuple[nn.Module, int]:
    """The encoder that `enc_type` names, and the width of what it gives."""
    if is_mlp(config.enc_type):
        size = mlp_size(config.enc_type)
        return BottleneckMLP(config.n_channels, size[1], size), size[1]
    patch = config.patch_size if config.patch_proj else None
    side, vit = config.enc_size // config.patch_size, vit_size(config.enc_type, "enc")
    return ViTEncoder(config.n_channels, patch, (side, side), vit, config.post_mlp), vit[0]
