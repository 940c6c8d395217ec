"""A tokenizer's encoder on a device: values to ids in bounded batches, in the precision that is asked for.

Weights of linear layers are kept in the lower precision and products computed in it; norms, sums, positions and the
quantizer stay in float32. No convolution is ever computed in bfloat16: on CPUs with AMX oneDNN's is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import domains, tokenizers
from model.domains import Domain
from model.tokenizers._vq import VQ
from pipelines.tokens import AT_ONCE_ON_CPU, Exact


class Encoder:
    """A tokenizer of a file, without its decoder, on a device."""

    def __init__(self, file: str, device: str, precision: Exact = "float32", *, compiled: bool = False) -> None:
        self.tokenizer = tokenizers.read(file, encoder_only=True).requires_grad_(False).to(device)
        self.domain, self.device = self.tokenizer.domain, torch.device(device)
        dtype = dtype_on(device, precision)
        if compiled and self.device.type == "cuda":
            self.tokenizer.encoder.compile()
        if dtype != torch.float32:
            _halve(self.tokenizer, dtype)
        self._upload = _uploader(self.domain, self.device)

    @torch.inference_mode()
    def __call__(self, values: Sequence[Any]) -> Tensor:
        """Ids (n, tokens) of maps of one size or of vectors, on the device: it may still be computing.

        They are -1 where a value's latents are not finite, for the nearest code would look like any other.
        """
        if self.device.type == "cuda":
            return self._ids(values)
        # What a few maps take stays in a processor's caches.
        parts = range(0, len(values), AT_ONCE_ON_CPU)
        return torch.cat([self._ids(values[at : at + AT_ONCE_ON_CPU]) for at in parts])

    def _ids(self, values: Sequence[Any]) -> Tensor:
        latents = self.tokenizer.latents(self._upload(values))
        finite = latents.isfinite().flatten(1).all(dim=1)
        ids = self.tokenizer.quantize(torch.where(finite[:, None, None, None], latents, 0))[2]
        return torch.where(finite[:, None], ids.flatten(1), -1)


def not_finite(who: str) -> str:
    """What is wrong where ids are -1."""
    return (
        f"{who}: the tokenizer gave latents that are not finite, expected finite ones: a precision of more range "
        "(bfloat16 or float32) may help"
    )


def dtype_on(device: str, precision: Exact) -> torch.dtype:
    """The torch dtype of a precision; ValueError for one that the device does not compute in."""
    names = ("float32", "bfloat16", "float16") if device.startswith("cuda") else ("float32", "bfloat16")
    if precision not in names:
        raise ValueError(f"precision {precision!r} on {device}, expected one of {', '.join(names)}")
    found: torch.dtype = getattr(torch, precision)
    return found


class _Mixed(nn.Module):
    """A network under autocast that gives float32."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype):
            out: Tensor = self.inner(x)
        return out.float()


def _halve(tokenizer: VQ, dtype: torch.dtype) -> None:
    """Compute the encoder's products in a dtype; its last MLP stays in float32, as in ml-4m."""
    kept = getattr(tokenizer.encoder, "post_mlp", None)
    exact = set() if kept is None else set(kept.modules())
    for module in tokenizer.encoder.modules():
        if isinstance(module, nn.Linear) and module not in exact:
            # As autocast would for every batch anew.
            module.to(dtype)
    tokenizer.encoder = _Mixed(tokenizer.encoder, dtype)


def _uploader(domain: Domain, device: torch.device) -> Any:
    """What makes network input of values on a device; to a GPU bytes cross as bytes, all from pinned memory."""
    if device.type != "cuda":
        return domain.to_network
    table = byte_table(domain)
    if table is None:
        return lambda values: domain.to_network(values).pin_memory().to(device, non_blocking=True)
    known, there = table[0], torch.from_numpy(table[1]).to(device)

    def upload(values: Sequence[Any]) -> Tensor:
        stacked = np.stack([v.view(np.uint8) if v.dtype == np.bool_ else v for v in values])
        if stacked.dtype != np.uint8 or not known[stacked].all():
            domain.to_network(values)  # says what is wrong
            raise ValueError(f"{domain.name}: expected bytes, got {stacked.dtype}")
        return looked_up(torch.from_numpy(stacked).pin_memory().to(device, non_blocking=True), there)

    return upload


def byte_table(domain: Domain) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a domain of bytes: which of the 256 it knows, and what network input each becomes, (256,) or (256, channels).

    None for the others. It is read off `to_network` itself, so that both ways give the same numbers.
    """
    if not isinstance(domain, domains.Rgb | domains.Edges | domains.SamMask | domains.Semseg):
        return None
    known, rows = np.zeros(256, bool), []
    colour = isinstance(domain, domains.Rgb)
    for byte in range(256):
        value = np.full((1, 1, 3) if colour else (1, 1), byte, np.uint8)
        try:
            made = domain.to_network([value])[0].flatten().numpy()
            known[byte] = True
        except ValueError:
            made = None
        rows.append(made)
    first = next(made for made in rows if made is not None)
    table = np.stack([np.zeros_like(first) if made is None else made for made in rows])
    # A colour's three channels are equal functions of three bytes; the others' channels are all made of one byte.
    return known, table[:, 0] if colour or isinstance(domain, domains.Semseg) else table


def looked_up(stacked: Tensor, table: Tensor) -> Tensor:
    """Network input from bytes (n, h, w) or (n, h, w, 3) by a table of `byte_table`."""
    found = table[stacked.long()]
    return found.permute(0, 3, 1, 2).contiguous() if found.ndim == 4 else found


def calls(counts: Sequence[int], at_once: int) -> list[slice]:
    """Which crops of a batch, `counts` of them of each image, are in a network together, `at_once` at most.

    Whole images, a power of two of them where one has not too many crops: with batches of any power of two, the same
    crops meet, whoever else tokenises beside. A network rounds by whom it is given together.
    """
    ends = np.concatenate([[0], np.cumsum(counts)]).tolist()
    images = 1 << int(math.log2(max(1, at_once // max([1, *counts]))))
    wholes = [(ends[i], ends[min(i + images, len(counts))]) for i in range(0, len(counts), images)]
    return [slice(at, min(at + at_once, stop)) for start, stop in wholes for at in range(start, stop, at_once)]
