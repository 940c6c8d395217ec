"""Noise schedules and samplers of the diffusion decoders: diffusers' DDPM and DDIM under ml-4m's settings.

diffusers is needed to decode and to train, not to tokenise. T timesteps, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Scheduler: TypeAlias = Any  # DDIMScheduler or DDPMScheduler: diffusers' attributes have no types

BETA_SCHEDULES = ("linear", "squaredcos_cap_v2")  # and shifted_cosine:<shift>
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SAMPLERS = ("ddim", "ddpm")
SPACINGS = ("trailing", "linspace", "leading")


def library() -> ModuleType:
    """diffusers; ImportError that names the extra where it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"diffusion decoders need diffusers: pip install '.[diffusion]' ({error})") from error
    return diffusers


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Holds the convolutions of a decoder on a CPU to float32.

    oneDNN's bfloat16 convolutions return wrong values on CPUs with AMX (seen with torch 2.15).
    """
    return torch.autocast("cpu", enabled=False) if device.type == "cpu" else nullcontext()


def dropped(codes: Tensor, share: float, kept: tuple[int, int | None] | None) -> Tensor:
    """Which codes (B, h, w) of (B, L, h, w) a step of training hides, drawn from torch's random state.

    All of a `share` of the maps, or, of these, all but a random number `kept` from low to high, None for all. ml-4m
    calls low and high the bounds of the hidden codes, and keeps so many.
    """
    num, _, h, w = codes.shape
    maps = torch.bernoulli(torch.full((num,), share, device=codes.device)).bool()[:, None, None].expand(num, h, w)
    if kept is None:
        return maps
    low, high = kept
    count = torch.randint(low, (h * w if high is None else high) + 1, (num,), device=codes.device)
    order = torch.rand(num, h * w, device=codes.device).argsort(dim=1)
    return maps & (order >= count[:, None]).view(num, h, w)


def cosine_shift(beta_schedule: str) -> float | None:
    """The shift of `shifted_cosine:<shift>`, None for the other schedules; ValueError for a name that is neither."""
    kind, _, shift = beta_schedule.partition(":")
    if kind != "shifted_cosine":
        if beta_schedule not in BETA_SCHEDULES:
            raise ValueError(
                f"beta_schedule {beta_schedule!r}, expected {', '.join(BETA_SCHEDULES)} or shifted_cosine:<shift>"
            )
        return None
    try:
        value = float(shift)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"beta_schedule {beta_schedule!r}, expected a positive number as the shift")
    return value


def shifted_cosine(timesteps: int, shift: float) -> Tensor:
    """Cumulative alphas (T,): the cosine schedule with its log-SNR lowered by 2 log(shift), the last one 0.

    Below 1 less noise at the same time, for a decoder whose condition says much (Hoogeboom et al. 2023, eq. 3).
    """
    time = torch.linspace(0, 1, timesteps).to(torch.float64)
    log_snr = -2 * (torch.tan(torch.pi * time / 2).log() + math.log(shift))
    alphas = log_snr.clamp(-15, 15).float().sigmoid()
    alphas[-1] = 0.0
    return alphas


def scheduler(
    sampler: str,
    *,
    timesteps: int,
    beta_schedule: str,
    zero_terminal_snr: bool,
    prediction: str,
    spacing: str = "trailing",
    thresholding: bool = False,
    clip: bool = False,
) -> Scheduler:
    """diffusers' scheduler of ml-4m's settings: beta from 1e-4 to 0.02 where linear, at most 0.999 where cosine.

    `thresholding` and `clip` both hold the predicted clean map to [-1, 1] at every step of sampling.
    """
    diffusers = library()
    for name, value, known in (("sampler", sampler, SAMPLERS), ("spacing", spacing, SPACINGS)):
        if value not in known:
            raise ValueError(f"{name} {value!r}, expected one of {', '.join(known)}")
    shift = cosine_shift(beta_schedule)
    kind = diffusers.DDIMScheduler if sampler == "ddim" else diffusers.DDPMScheduler
    made: Scheduler = kind(
        num_train_timesteps=timesteps,
        beta_schedule="linear" if shift else beta_schedule,
        rescale_betas_zero_snr=zero_terminal_snr and not shift,
        prediction_type=prediction,
        timestep_spacing=spacing,
        thresholding=thresholding,
        clip_sample=clip,
    )
    if shift:
        # A product of betas would round what is given here exactly; the samplers use nothing else.
        made.alphas_cumprod = shifted_cosine(timesteps, shift)
    return made


def set_timesteps(made: Scheduler, steps: int, *, as_ml4m: bool = False) -> None:
    """Choose the timesteps of sampling in `steps` steps.

    diffusers takes exactly `steps` of them. ml-4m's whole-number strides take more where `steps` does not divide T
    (31 of 1000 for 30, trailing), its linspace rounds half-way cases up, and its DDPM is always "leading";
    `as_ml4m` does the same. Where `steps` divides T, trailing and leading are the same in both.
    """
    total, spacing = made.config.num_train_timesteps, made.config.timestep_spacing
    if not 1 <= steps <= total:
        raise ValueError(f"steps {steps}, expected 1..{total}, the timesteps of training")
    made.set_timesteps(steps)
    if as_ml4m:
        leading = type(made).__name__ == "DDPMScheduler"
        made.timesteps = torch.from_numpy(_timesteps_of_ml4m(total, steps, "leading" if leading else spacing))
    last = made.alphas_cumprod[made.timesteps[0]]
    if made.config.prediction_type == "epsilon" and float(last) == 0:
        raise ValueError(
            f"prediction epsilon from timestep {int(made.timesteps[0])}, which is noise alone: the map divides by 0; "
            "expected spacing leading, zero_terminal_snr False or another prediction"
        )


def _timesteps_of_ml4m(total: int, steps: int, spacing: str) -> NDArray[np.int64]:
    stride = total // steps
    if spacing == "trailing":
        return np.arange(total, 0, -stride) - 1
    if spacing == "linspace":
        return np.linspace(total, 1, steps).round().astype(np.int64) - 1
    return (np.arange(steps) * stride)[::-1].copy()


def sample(
    made: Scheduler,
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """From noise of `shape`, float32 on `device`, to what `predict(maps, timesteps (B,))` makes of it step by step.

    Noise is drawn on the generators' device, so that a seed of the CPU means the same on every device; a list holds
    one generator per map, and then a map does not depend on those beside it.
    """
    from diffusers.utils.torch_utils import randn_tensor

    maps = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    # PNDM draws nothing.
    extra = {} if type(made).__name__ == "PNDMScheduler" else {"generator": generator}
    for timestep in made.timesteps:
        out = predict(maps, timestep.to(device).expand(shape[0]))
        maps = made.step(out.float(), timestep, maps, **extra).prev_sample
    return maps
