"""A ViT VQ-VAE for maps: the function and the checkpoints of ml-4m's VQVAE (Mizrahi et al. 2023, 4M)."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from model import domains, snapshots
from model.domains import Domain, Map
from model.tokenizers import Tokenizer
from model.tokenizers._quantize import Quantizer, Usage, usage
from model.tokenizers._vit import ViTDecoder, ViTEncoder, vit_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# ml-4m's settings that have one supported value here; a checkpoint that says otherwise is refused.
_FIXED = {"quant_type": "lucid", "num_codebooks": 1, "norm_codes": True, "code_replacement_policy": "batch_random"}


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """ml-4m's constructor settings under its names, plus the domain and the seed.

    `enc_type` and `dec_type` also take `vit_<width>x<blocks>x<heads>_enc` (or `_dec`) for sizes of one's own, which
    ml-4m cannot load. `image_size` and `patch_size` are in pixels, or in cells of a feature map without `patch_proj`.
    """

    domain: Domain | None = None  # None: tensors only, no encode and decode of maps
    image_size: int = 224
    image_size_enc: int | None = None
    image_size_dec: int | None = None
    n_channels: int = 3  # with n_labels: the width of a class embedding
    n_labels: int | None = None
    enc_type: str = "vit_b_enc"
    dec_type: str = "vit_b_dec"
    patch_proj: bool = True
    post_mlp: bool = False
    out_conv: bool = False
    patch_size: int = 16
    patch_size_dec: int | None = None
    codebook_size: int = 16384
    latent_dim: int = 32
    norm_latents: bool = False
    ema_decay: float = 0.99
    threshold_ema_dead_code: float = 0.25
    commitment_weight: float = 1.0
    undo_std: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for size, patch in ((self.enc_size, self.patch_size), (self.dec_size, self.patch_size_dec or self.patch_size)):
            if size % patch:
                raise ValueError(f"image size {size}, expected a multiple of the patch size {patch}")
        if isinstance(self.domain, domains.Semseg) and self.n_labels != self.domain.num_labels:
            raise ValueError(f"n_labels {self.n_labels}, expected {self.domain.num_labels} for the semseg domain")

    @property
    def enc_size(self) -> int:
        """The image size the encoder's position table is made for."""
        return self.image_size_enc or self.image_size

    @property
    def dec_size(self) -> int:
        """The image size the decoder's position table is made for."""
        return self.image_size_dec or self.image_size


class VQVAE(nn.Module, Tokenizer):
    """ViT encoder, cosine codebook, ViT decoder; state-dict keys are ml-4m's."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size if config.patch_proj else None
        patch_dec = (config.patch_size_dec or config.patch_size) if config.patch_proj else None
        grid, grid_dec = config.enc_size // config.patch_size, config.dec_size // (patch_dec or config.patch_size)
        enc, dec = vit_size(config.enc_type, "enc"), vit_size(config.dec_type, "dec")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.cls_emb = nn.Embedding(config.n_labels, config.n_channels) if config.n_labels else None
            self.encoder = ViTEncoder(config.n_channels, patch, (grid, grid), enc, config.post_mlp)
            self.quant_proj = nn.Conv2d(enc[0], config.latent_dim, 1)
            self.quantize = Quantizer(
                config.codebook_size,
                config.latent_dim,
                decay=config.ema_decay,
                dead_threshold=config.threshold_ema_dead_code,
                commitment_weight=config.commitment_weight,
                norm_latents=config.norm_latents,
                seed=config.seed,
            )
            out_channels = config.n_labels or config.n_channels
            self.decoder = ViTDecoder(
                out_channels, patch_dec, (grid_dec, grid_dec), dec, config.post_mlp, config.out_conv
            )
            self.post_quant_proj = nn.Conv2d(config.latent_dim, dec[0], 1)

    @property
    def vocab_size(self) -> int:
        """The size of the codebook."""
        return self.config.codebook_size

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (rows, columns) of a map of `image_size`."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def domain(self) -> Domain:
        """How maps become network input; ValueError for a tokenizer without one."""
        if self.config.domain is None:
            raise ValueError("this tokenizer has no domain, so it takes tensors only; expected load(path, domain=...)")
        return self.config.domain

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.config.undo_std:
            mean, std = x.new_tensor(IMAGENET_MEAN), x.new_tensor(IMAGENET_STD)
            x = 2 * (x * std[:, None, None] + mean[:, None, None]) - 1
        if self.cls_emb is not None:
            x = self.cls_emb(x).permute(0, 3, 1, 2)
        return self.quantize(self.quant_proj(self.encoder(x)))

    def tokenize(self, x: Tensor) -> Tensor:
        """Network input (B, C, H, W), or classes int64 (B, H, W), to ids int64 (B, h, w); use in eval mode."""
        return self._quantized(x)[2]

    def decode_tokens(self, ids: Tensor) -> Tensor:
        """Ids int64 (B, h, w) to network output (B, C, H, W)."""
        return self.decoder(self.post_quant_proj(self.quantize.lookup(ids)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, C, H, W), commitment loss, ids (B, h, w); in training mode the codebook learns."""
        codes, code_loss, ids = self._quantized(x)
        return self.decoder(self.post_quant_proj(codes)), code_loss, ids

    @torch.inference_mode()
    def encode_batch(self, values: Sequence[Map]) -> NDArray[np.int64]:
        """Ids (B, h, w) of maps of one size."""
        self.eval()
        return self.tokenize(self.domain.to_network(values).to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def decode_batch(self, ids: NDArray[np.integer[Any]]) -> list[Map]:
        """Maps from ids (B, h, w) in [0, vocab_size)."""
        self.eval()
        if ids.ndim != 3 or ids.size == 0 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"expected ids (b, h, w) in 0..{self.vocab_size - 1}, got {ids.shape}: {ids}")
        out = self.decode_tokens(torch.from_numpy(ids.astype(np.int64)).to(self._device))
        return self.domain.from_network(out)

    def encode(self, value: Map) -> NDArray[np.int64]:
        """Ids (h, w) of one map."""
        return self.encode_batch([value])[0]

    def decode(self, ids: NDArray[np.integer[Any]]) -> Map:
        """The map of ids (h, w)."""
        return self.decode_batch(np.asarray(ids)[None])[0]

    @property
    def _device(self) -> torch.device:
        return self.quant_proj.weight.device

    def save(self, path: Path) -> None:
        """One safetensors file, its configuration in the header as ml-4m writes it: str(value) under each name."""
        snapshots.write_file(Path(path), snapshots.safetensors_bytes(self.state_dict(), _to_metadata(self.config)))

    @classmethod
    def load(cls, path: Path, domain: Domain | None = None) -> VQVAE:
        """The tokenizer of a file by `save` or by ml-4m, in eval mode; ml-4m's files do not name their domain."""
        with safe_open(path, framework="pt") as file:
            config = _from_metadata(file.metadata() or {}, domain)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model = cls(config)
        model.load_state_dict(tensors)
        return model.eval()

    @classmethod
    def tiny(cls) -> VQVAE:
        """32 x 32 rgb pixels to 4 x 4 tokens."""
        config = VQVAEConfig(
            domain=domains.Rgb(),
            image_size=32,
            patch_size=8,
            enc_type="vit_64x1x2_enc",
            dec_type="vit_64x1x2_dec",
            post_mlp=True,
            codebook_size=64,
            latent_dim=16,
            threshold_ema_dead_code=0.05,
        )
        return cls(config).eval()

    def examples(self) -> list[Map]:
        """Four images of coloured stripes."""
        rng = np.random.default_rng(0)
        size = self.config.image_size
        rows = [rng.integers(0, 256, (size // 4, 1, 3), dtype=np.uint8) for _ in range(4)]
        return [np.broadcast_to(row.repeat(4, axis=0), (size, size, 3)).copy() for row in rows]


def reconstruction_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The domain's loss plus the commitment loss, on a batch of network input: what `model.loop.fit` minimises."""
    assert isinstance(model, VQVAE)
    out, code_loss, ids = model(batch)
    reconstruction = model.domain.loss(out, batch)
    stats = {
        "reconstruction": float(reconstruction.detach()),
        "commitment": float(code_loss.detach()),
        "codes": float(len(ids.unique())),
    }
    return reconstruction + code_loss, stats


def codebook_usage(model: VQVAE, ids: Sequence[NDArray[np.int64]]) -> Usage:
    """How many codes a set of ids uses, and their perplexity."""
    return usage((torch.from_numpy(part) for part in ids), model.vocab_size)


def dead_code_threshold(tokens_per_batch: int, codebook_size: int, share: float = 32.0) -> float:
    """ml-4m's rule: a code used less than 1/share of an even split of the batch is dead."""
    return tokens_per_batch / codebook_size / share


def _to_metadata(config: VQVAEConfig) -> dict[str, str]:
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "domain"}
    values |= {**_FIXED, "sync_codebook": False}
    if config.domain is not None:
        values |= {"domain": config.domain.name, "domain_settings": config.domain.settings()}
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> str:
    # YAML 1.1, which ml-4m reads this with, takes 1e-05 for a string.
    return np.format_float_positional(value, trim="0") if isinstance(value, float) else str(value)


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _from_metadata(metadata: Mapping[str, str], domain: Domain | None) -> VQVAEConfig:
    """The configuration in a file's header; names that only ml-4m's trainer needs are passed over."""
    values = {name: _literal(text) for name, text in metadata.items()}
    if not values:
        raise ValueError("no configuration in the header of the file, expected ml-4m's VQVAE settings")
    for name, supported in _FIXED.items():
        if values.get(name, supported) != supported:
            raise ValueError(f"{name} {values[name]!r}, expected {supported!r}: the only one implemented")
    if domain is None and "domain_settings" in values:
        domain = domains.named(values["domain"], values["domain_settings"])
    hints = get_type_hints(VQVAEConfig)
    settings = {f.name: values[f.name] for f in fields(VQVAEConfig) if f.name != "domain" and f.name in values}
    for name, value in settings.items():
        kinds = get_args(hints[name]) or (hints[name],)
        if not isinstance(value, (*kinds, int) if float in kinds else kinds):
            raise ValueError(f"{name} {value!r}, expected {hints[name]}")
    return VQVAEConfig(domain=domain, **settings)
