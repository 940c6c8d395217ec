"""A VQ-VAE whose decoder is Stable Diffusion 1.5 held by a ControlNet: ml-4m's VQControlNet (Mizrahi et al. 2023, 4M).

Stable Diffusion (Rombach et al. 2022) stays as it is; the ControlNet (Zhang et al. 2023) learns what the codes of the
tokens say. All networks are diffusers' own, and the text encoder, of which the empty prompt is all that is used,
transformers'. B batch, H W pixels, L latent width, h w the token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import domains
from model.domains import Map
from model.tokenizers import _diffusion
from model.tokenizers._vq import VQ, VQConfig

_PROMPT = 77  # tokens of CLIP's text encoder
_FACTORS = {"1.5": 8, "tiny": 2}
"""Pixels per latent of each size of Stable Diffusion."""


@dataclass(frozen=True, kw_only=True)
class VQControlNetConfig(VQConfig):
    """`VQConfig` and ml-4m's settings of the decoder, under its names; `sd_size` is ours.

    `sd_path` is the folder or the id of a diffusers pipeline with Stable Diffusion's weights, which only
    `VQControlNet.on_stable_diffusion` opens: a tokenizer's file has all weights.
    """

    sd_path: str = "runwayml/stable-diffusion-v1-5"
    sd_size: str = "1.5"  # or tiny, for tests
    image_size_sd: int | None = None  # the shorter side of all that is denoised; 512 is what 1.5 was trained at
    pretrained_cn: bool = False  # begin the ControlNet as a copy of Stable Diffusion's encoder
    cls_free_guidance_dropout: float = 0.0  # the share of images that are trained without (all of) their codes
    masked_cfg: bool = False
    masked_cfg_low: int = 0
    masked_cfg_high: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sd_size not in _FACTORS:
            raise ValueError(f"sd_size {self.sd_size!r}, expected one of {', '.join(_FACTORS)}")
        if self.n_channels != 3 or self.n_labels:
            raise ValueError(
                f"n_channels {self.n_channels}, expected 3 without n_labels: Stable Diffusion makes images"
            )
        if not 0 <= self.cls_free_guidance_dropout <= 1:
            raise ValueError(f"cls_free_guidance_dropout {self.cls_free_guidance_dropout}, expected 0..1")

    def denoised(self, height: int, width: int) -> tuple[int, int]:
        """The size in latents at which an image of so many pixels is made."""
        side = (self.image_size_sd or self.image_size) / _FACTORS[self.sd_size]
        return round(side * height / min(height, width)), round(side * width / min(height, width))


class ControlledDiffusion(nn.Module):
    """Noisy latents and timesteps to the noise in them, under codes; parameter names are ml-4m's."""

    def __init__(self, size: str, latent_dim: int) -> None:
        super().__init__()
        diffusers = _diffusion.library()
        from transformers import CLIPTextConfig, CLIPTextModel

        widths = (320, 640, 1280, 1280) if size == "1.5" else (32, 32)
        text = 768 if size == "1.5" else 32
        shape: dict[str, Any] = {
            "block_out_channels": widths,
            "down_block_types": ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
            "layers_per_block": 2 if size == "1.5" else 1,
            "attention_head_dim": 8,  # diffusers' name for the number of heads
            "cross_attention_dim": text,
        }
        up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1)
        self.unet = diffusers.UNet2DConditionModel(sample_size=64, up_block_types=up, **shape)
        prompt = (
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            if size == "1.5"
            else CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
        )
        self.text_encoder = nn.ModuleDict({"text_model": CLIPTextModel(prompt)})
        self.controlnet = diffusers.ControlNetModel(
            conditioning_channels=latent_dim, conditioning_embedding_out_channels=(latent_dim, 32, 96, 256), **shape
        )
        for layer in self.controlnet.controlnet_cond_embedding.blocks:
            layer.stride = (1, 1)  # codes are as coarse as latents already, unlike diffusers' images
        self.empty_str_encoding = nn.Parameter(torch.randn(1, _PROMPT, text), requires_grad=False)
        for part in (self.unet, self.text_encoder):
            part.requires_grad_(False)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, codes: Tensor | None, masked: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Codes (B, L, h, w) of which `masked` (B, h, w) is not seen; None: Stable Diffusion alone."""
        text = self.empty_str_encoding.expand(len(noisy), -1, -1)
        if codes is None:
            return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        if masked is not None:
            codes = codes.masked_fill(masked[:, None], 0.0)
        codes = F.interpolate(codes, noisy.shape[-2:], mode="nearest")
        down, middle = self.controlnet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            controlnet_cond=codes,
            conditioning_scale=scale,
            return_dict=False,
        )
        return self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]


class VQControlNet(VQ):
    """ViT encoder, quantizer, and a ControlNet on frozen Stable Diffusion; state-dict keys are ml-4m's."""

    Config = VQControlNetConfig
    config: VQControlNetConfig

    def _build(self, config: VQConfig) -> None:
        assert isinstance(config, VQControlNetConfig)
        super()._build(config)
        self.decoder = ControlledDiffusion(config.sd_size, config.latent_dim)
        widths = (128, 256, 512, 512) if config.sd_size == "1.5" else (32, 32)
        self.vae = (
            _diffusion.library()
            .AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                layers_per_block=2 if config.sd_size == "1.5" else 1,
                latent_channels=4,
                sample_size=512,
            )
            .requires_grad_(False)
        )

    @classmethod
    def on_stable_diffusion(cls, config: VQControlNetConfig) -> Self:
        """One to be trained: Stable Diffusion's weights from `sd_path`, and its encoding of the empty prompt.

        The encoder half is random: it is loaded, or trained, by itself.
        """
        diffusers = _diffusion.library()
        from transformers import CLIPTextModel, CLIPTokenizer

        model = cls(config)
        path, decoder = config.sd_path, model.decoder
        unet = diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        decoder.unet.load_state_dict(unet.state_dict())
        model.vae.load_state_dict(diffusers.AutoencoderKL.from_pretrained(path, subfolder="vae").state_dict())
        text = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").eval()
        decoder.text_encoder["text_model"].load_state_dict(text.state_dict())
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        ids = tokenizer("", padding="max_length", max_length=_PROMPT, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            decoder.empty_str_encoding.copy_(text(ids)[0])
        if config.pretrained_cn:
            for name in ("conv_in", "time_embedding", "down_blocks", "mid_block"):
                getattr(decoder.controlnet, name).load_state_dict(getattr(unet, name).state_dict())
        return model

    @cached_property
    def _noise(self) -> _diffusion.Scheduler:
        """What adds noise in training."""
        return self._scheduler()

    @staticmethod
    def _scheduler() -> _diffusion.Scheduler:
        """Stable Diffusion 1.5's own (Liu et al. 2022, PNDM)."""
        return _diffusion.library().PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        )

    @torch.no_grad()
    def decode_tokens(
        self,
        ids: Tensor,
        steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance: float = 1.0,
        image_size: int | tuple[int, int] | None = None,
        *,
        control: float = 1.0,
    ) -> Tensor:
        """Ids int64 (B, h, w) to images (B, 3, H, W) in [-1, 1], by `steps` steps of PNDM (and one more).

        Made with `image_size_sd` as the shorter side, then resized to what the grid of ids says, or to `image_size`.
        `guidance` above 1 leans on the codes, against Stable Diffusion alone; `control` scales what the ControlNet
        adds. Without a generator every image starts from the same noise, that of the tokenizer's seed.
        """
        config, side = self.config, self.config.patch_size
        height, width = ids.shape[-2] * side, ids.shape[-1] * side
        shape = (len(ids), 4, *config.denoised(height, width))
        if generator is None:
            generator = [torch.Generator().manual_seed(config.seed) for _ in range(len(ids))]
        codes = self.quantize.lookup(ids)

        def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
            out = self._denoise(latents, timesteps, codes, None, control)
            if guidance == 1.0:
                return out
            alone = self._denoise(latents, timesteps, None)
            return alone + guidance * (out - alone)

        made = self._scheduler()
        made.set_timesteps(steps)
        latents = _diffusion.sample(made, predict, shape, generator, ids.device)
        with _diffusion.exact(ids.device):
            images = self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        wanted = image_size if isinstance(image_size, tuple) else (image_size or height, image_size or width)
        if images.shape[-2:] == wanted:
            return images
        return F.interpolate(images, wanted, mode="bicubic", antialias=True).clamp(-1, 1)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, codes: Tensor | None, *rest: Any) -> Tensor:
        with _diffusion.exact(noisy.device):
            out: Tensor = self.decoder(noisy, timesteps, codes, *rest)
        return out

    def forward(
        self, x: Tensor, noisy: Tensor, timesteps: Tensor, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), noisy latents and timesteps int64 (B,) to the predicted noise.

        Also the quantizer's loss and the ids (B, h, w). In training mode codes are dropped as the settings say unless
        `masked` (B, h, w) says which.
        """
        config = self.config
        codes, code_loss, ids = self.quantized(x)
        if masked is None and self.training and config.cls_free_guidance_dropout > 0:
            kept = (config.masked_cfg_low, config.masked_cfg_high) if config.masked_cfg else None
            masked = _diffusion.dropped(codes, config.cls_free_guidance_dropout, kept)
        return self._denoise(noisy, timesteps, codes, masked), code_loss, ids

    def training_loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The domain's loss of the predicted noise in the latents of the images, plus the quantizer's.

        Latents, noise, timesteps and dropped codes are drawn from torch's random state.
        """
        size = [side * _FACTORS[self.config.sd_size] for side in self.config.denoised(*x.shape[-2:])]
        with torch.no_grad(), _diffusion.exact(x.device):
            large = F.interpolate(x, size, mode="bilinear", align_corners=False)
            clean = self.vae.encode(large).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn(clean.shape, device=x.device)  # not in the order of the memory, as randn_like
        timesteps = torch.randint(0, self._noise.config.num_train_timesteps, (len(x),), device=x.device)
        out, code_loss, ids = self(x, self._noise.add_noise(clean, noise, timesteps), timesteps)
        denoising = self.domain.loss(out, noise)
        stats = {
            "denoising": float(denoising.detach()),
            "commitment": float(code_loss.detach()),
            "codes": float(len(ids.unique())),
        }
        return denoising + code_loss, stats

    @classmethod
    def tiny(cls) -> VQControlNet:
        """32 x 32 rgb pixels to 4 x 4 tokens, and back by a very small Stable Diffusion of random weights."""
        config = VQControlNetConfig(
            domain=domains.Rgb(),
            image_size=32,
            patch_size=8,
            enc_type="vit_64x1x2_enc",
            post_mlp=True,
            codebook_size=64,
            latent_dim=16,
            sd_size="tiny",
        )
        return cls(config).eval()

    def examples(self) -> Sequence[Map]:
        """Four images of coloured stripes."""
        rng = np.random.default_rng(0)
        size = self.config.image_size
        rows = [rng.integers(0, 256, (size // 4, 1, 3), dtype=np.uint8) for _ in range(4)]
        return [np.broadcast_to(row.repeat(4, axis=0), (size, size, 3)).copy() for row in rows]
