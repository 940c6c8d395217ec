"""A VQ-VAE whose decoder is a diffusion model: ml-4m's DiVAE (Shi et al. 2022; Mizrahi et al. 2023, 4M).

B batch, C channels, H W pixels, L latent width, h w the token grid, T timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from model import domains
from model.domains import Map
from model.tokenizers import _diffusion
from model.tokenizers._unet import PatchedUNet, unet_size
from model.tokenizers._uvit import UViT, uvit_size
from model.tokenizers._vq import VQ, VQConfig

_EPSILON_LOSS = "-epsilon_loss"
_IN_RANGE = ("rgb", "normal", "edges")


@dataclass(frozen=True, kw_only=True)
class DiVAEConfig(VQConfig):
    """`VQConfig` and ml-4m's settings of the diffusion decoder, under its names.

    `dec_type` also takes `unet_patched_<width>x<blocks>` and `uvit_<channels>-<width>x<blocks>x<heads>_p4_f16` and so
    on, for sizes of one's own. `prediction_type` v_prediction-epsilon_loss is v_prediction with `epsilon_loss`, as
    ml-4m's trainer takes it apart too.
    """

    image_size_dec: int | None = None  # what a grid of `image_size` is decoded to
    dec_type: str = "unet_patched"
    num_train_timesteps: int = 1000
    cls_free_guidance_dropout: float = 0.0  # the share of maps that are trained without (all of) their codes
    masked_cfg: bool = False  # these keep a random number of codes, masked_cfg_low..masked_cfg_high
    masked_cfg_low: int = 0
    masked_cfg_high: int | None = None  # None: all codes
    scheduler: str = "ddpm"  # what ml-4m samples with unless told; see `DiVAE.decode_tokens`
    beta_schedule: str = "squaredcos_cap_v2"
    prediction_type: str = "v_prediction"
    epsilon_loss: bool = False  # the loss of a predicted velocity on the noise that follows from it
    clip_sample: bool = False
    thresholding: bool = True
    conditioning: str = "concat"  # of a UViT
    dec_transformer_dropout: float = 0.2  # of a UViT
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type.endswith(_EPSILON_LOSS):
            object.__setattr__(self, "prediction_type", self.prediction_type.removesuffix(_EPSILON_LOSS))
            object.__setattr__(self, "epsilon_loss", True)
        _diffusion.cosine_shift(self.beta_schedule)
        if self.prediction_type not in _diffusion.PREDICTIONS:
            known = f"{', '.join(_diffusion.PREDICTIONS)} or v_prediction{_EPSILON_LOSS}"
            raise ValueError(f"prediction_type {self.prediction_type!r}, expected {known}")
        if self.epsilon_loss and self.prediction_type != "v_prediction":
            raise ValueError(f"epsilon_loss with prediction_type {self.prediction_type!r}, expected v_prediction")
        if self.scheduler not in _diffusion.SAMPLERS:
            raise ValueError(f"scheduler {self.scheduler!r}, expected one of {', '.join(_diffusion.SAMPLERS)}")
        if not 0 <= self.cls_free_guidance_dropout <= 1:
            raise ValueError(f"cls_free_guidance_dropout {self.cls_free_guidance_dropout}, expected 0..1")
        if self.n_labels or (isinstance(self.domain, domains.Edges) and self.domain.criterion == "bce"):
            raise ValueError("a diffusion decoder denoises numbers, expected neither n_labels nor a loss on logits")

    @property
    def in_range(self) -> bool:
        """Whether maps lie in [-1, 1], so that sampling may hold them there; unknown domains count as in range.

        Standardised depth does not: ml-4m's default cuts it off at one deviation.
        """
        if isinstance(self.domain, domains.Depth):
            return self.domain.mapping == "fixed"
        return self.domain is None or self.domain.name in _IN_RANGE


class DiVAE(VQ):
    """ViT encoder, quantizer, and a UNet or UViT that denoises under the codes; state-dict keys are ml-4m's."""

    Config = DiVAEConfig
    config: DiVAEConfig

    def _build(self, config: VQConfig) -> None:
        assert isinstance(config, DiVAEConfig)
        super()._build(config)
        self.decoder: PatchedUNet | UViT
        if config.dec_type.startswith("uvit_"):
            size, dropout = uvit_size(config.dec_type), config.dec_transformer_dropout
            self.decoder = UViT(config.n_channels, config.latent_dim, size, config.conditioning, dropout)
        else:
            self.decoder = PatchedUNet(config.n_channels, config.latent_dim, unet_size(config.dec_type))

    @cached_property
    def _noise(self) -> _diffusion.Scheduler:
        """What adds noise in training."""
        return self._scheduler("ddpm")

    def _scheduler(self, sampler: str, spacing: str = "trailing", thresholding: bool = False) -> _diffusion.Scheduler:
        config = self.config
        return _diffusion.scheduler(
            sampler,
            timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            zero_terminal_snr=config.zero_terminal_snr,
            prediction=config.prediction_type,
            spacing=spacing,
            thresholding=thresholding,
            clip=config.clip_sample and config.in_range,
        )

    def _denoise(self, noisy: Tensor, timesteps: Tensor, codes: Tensor, masked: Tensor | None) -> Tensor:
        if noisy.shape[-2] % self.decoder.multiple or noisy.shape[-1] % self.decoder.multiple:
            raise ValueError(f"maps of {tuple(noisy.shape[-2:])} pixels, expected multiples of {self.decoder.multiple}")
        with _diffusion.exact(noisy.device):
            return self.decoder(noisy, timesteps, codes, masked)

    @torch.no_grad()
    def decode_tokens(
        self,
        ids: Tensor,
        steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance: float = 1.0,
        image_size: int | tuple[int, int] | None = None,
        *,
        sampler: str = "ddim",
        spacing: str = "trailing",
        thresholding: bool | None = None,
        as_ml4m: bool = False,
    ) -> Tensor:
        """Ids int64 (B, h, w) to maps (B, C, H, W) in network range, by `steps` steps of the sampler.

        Without a generator every map starts from the same noise, that of the tokenizer's seed, whatever its place in
        the batch: the same ids always give the same map. `guidance` above 1 leans on the codes (Ho and Salimans 2022)
        and needs a decoder trained with `cls_free_guidance_dropout`; `image_size` is what the grid of ids says.

        Trailing DDIM starts where training ends, at noise alone (Lin et al. 2023); ml-4m's own default is its file's
        `scheduler`, mostly "ddpm", which starts earlier and needs more steps. `as_ml4m` chooses the timesteps exactly
        as it does, see `_diffusion.set_timesteps`. `thresholding` None follows the file where maps lie in [-1, 1].
        """
        config = self.config
        if guidance != 1.0 and config.cls_free_guidance_dropout == 0:
            raise ValueError(f"guidance {guidance}, expected 1.0: the decoder was never trained without its codes")
        if thresholding is None:
            thresholding = config.thresholding and config.in_range
        made = self._scheduler(sampler, spacing, thresholding)
        _diffusion.set_timesteps(made, steps, as_ml4m=as_ml4m)
        if image_size is None:
            scale = config.patch_size * (config.image_size_dec or config.image_size) / config.image_size
            image_size = round(ids.shape[-2] * scale), round(ids.shape[-1] * scale)
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        if generator is None:
            generator = [torch.Generator().manual_seed(config.seed) for _ in range(len(ids))]
        codes = self.quantize.lookup(ids)
        hidden = torch.ones_like(codes[:, 0], dtype=torch.bool)

        def predict(maps: Tensor, timesteps: Tensor) -> Tensor:
            out = self._denoise(maps, timesteps, codes, None)
            if guidance == 1.0:
                return out
            alone = self._denoise(maps, timesteps, codes, hidden)
            return alone + guidance * (out - alone)

        return _diffusion.sample(made, predict, (len(ids), config.n_channels, height, width), generator, ids.device)

    def forward(
        self, x: Tensor, noisy: Tensor, timesteps: Tensor, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and noisy maps (B, C, H, W) and timesteps int64 (B,) to what the decoder predicts of these.

        Also the quantizer's loss and the ids (B, h, w). In training mode the codebook learns, and codes are dropped
        as the settings say unless `masked` (B, h, w) says which.
        """
        config = self.config
        codes, code_loss, ids = self.quantized(x)
        if masked is None and self.training and config.cls_free_guidance_dropout > 0:
            kept = (config.masked_cfg_low, config.masked_cfg_high) if config.masked_cfg else None
            masked = _diffusion.dropped(codes, config.cls_free_guidance_dropout, kept)
        return self._denoise(noisy, timesteps, codes, masked), code_loss, ids

    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The domain's loss of what the decoder predicts at random timesteps, plus the quantizer's.

        Noise, timesteps and dropped codes come from torch's random state.
        """
        noise = torch.randn(x.shape, device=x.device)  # not in the order of the memory, as randn_like
        timesteps = torch.randint(0, self.config.num_train_timesteps, (len(x),), device=x.device)
        return self.loss_at(x, noise, timesteps)

    def loss_at(self, x: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`training_loss` at given noise (B, C, H, W) and timesteps int64 (B,)."""
        noisy = self._noise.add_noise(x, noise, timesteps)
        out, code_loss, ids = self(x, noisy, timesteps)
        target = noise
        if self.config.epsilon_loss:
            # The noise that follows from a velocity v at x_t is sigma x_t + alpha v.
            out = self._noise.get_velocity(-noisy, out.float(), timesteps)
        elif self.config.prediction_type == "sample":
            target = x
        elif self.config.prediction_type == "v_prediction":
            target = self._noise.get_velocity(x, noise, timesteps)
        denoising = self.domain.loss(out, target)
        stats = {
            "denoising": float(denoising.detach()),
            "commitment": float(code_loss.detach()),
            "codes": float(len(ids.unique())),
        }
        return denoising + code_loss, stats

    @classmethod
    def tiny(cls) -> DiVAE:
        """32 x 32 rgb pixels to 4 x 4 tokens, and back by a narrow UNet that predicts the clean image."""
        config = DiVAEConfig(
            domain=domains.Rgb(),
            image_size=32,
            patch_size=8,
            enc_type="vit_64x1x2_enc",
            dec_type="unet_patched_32x1",
            post_mlp=True,
            codebook_size=64,
            latent_dim=16,
            threshold_ema_dead_code=0.05,
            beta_schedule="linear",
            prediction_type="sample",
        )
        return cls(config).eval()

    def examples(self) -> Sequence[Map]:
        """Four images of coloured stripes."""
        rng = np.random.default_rng(0)
        size = self.config.image_size
        rows = [rng.integers(0, 256, (size // 4, 1, 3), dtype=np.uint8) for _ in range(4)]
        return [np.broadcast_to(row.repeat(4, axis=0), (size, size, 3)).copy() for row in rows]


def published_divae() -> dict[str, DiVAEConfig]:
    """Settings of ml-4m's published diffusion tokenizers, each at the largest size it was trained at.

    By the names of its repositories; edge_8k is that of canny_edge and of sam_edge.
    """
    return {
        "rgb_16k": _published(domains.Rgb(), 16384),
        "depth_8k": _published(domains.Depth(mapping="standardised")),
        "normal_8k": _published(domains.Normal()),
        "edge_8k": _published(domains.Edges(criterion="smooth_l1"), image_size=512),
    }


def _published(domain: domains.Domain, codebook_size: int = 8192, image_size: int = 448) -> DiVAEConfig:
    channels = domain.num_channels
    assert channels is not None
    return DiVAEConfig(
        domain=domain,
        image_size=image_size,
        n_channels=channels,
        post_mlp=True,
        codebook_size=codebook_size,
        beta_schedule="linear",
        prediction_type="sample",
    )
