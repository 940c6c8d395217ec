"""The best of many codes for each of many vectors, without ever holding all products at once.

N vectors, V codes, L latent width. Vectors must be finite: of what is no number every code is as near, so the first is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Products held at once: 8 MiB stay in a processor's cache, 256 MiB keep an accelerator busy.
_PRODUCTS = {"cpu": 2**21}
_PRODUCTS_ELSEWHERE = 2**26
# torch's maximum is vectorised and its argmax is not, so the maximum of blocks comes first.
_BLOCK = 128


@torch.no_grad()
def largest_product(z_NL: Tensor, codes_VL: Tensor) -> Tensor:
    """The ids (N,) int64 of the codes with the largest inner product with float32 vectors; the first of equals."""
    num, size = len(z_NL), len(codes_VL)
    width = -(-size // _BLOCK) * _BLOCK
    rows = max(1, min(num, _PRODUCTS.get(z_NL.device.type, _PRODUCTS_ELSEWHERE) // width))
    products = z_NL.new_full((rows, width), -torch.inf)
    ids = torch.empty(num, dtype=torch.int64, device=z_NL.device)
    codes_LV = codes_VL.T.contiguous()
    with _full_precision():
        for start in range(0, num, rows):
            part = z_NL[start : start + rows]
            torch.mm(part, codes_LV, out=products[: len(part), :size])
            blocks = products[: len(part)].view(len(part), -1, _BLOCK)
            best = blocks.amax(dim=-1).argmax(dim=-1)
            inside = blocks[torch.arange(len(part), device=best.device), best].argmax(dim=-1)
            ids[start : start + rows] = best * _BLOCK + inside
    return ids


@torch.no_grad()
def smallest_distance(z_NL: Tensor, codes_VL: Tensor) -> Tensor:
    """The ids (N,) int64 of the codes with the smallest Euclidean distance to float32 vectors; the first of equals."""
    # |z - e|^2 is smallest where z.e - |e|^2 / 2 is largest, which is a product of vectors with one more entry.
    half_V1 = -codes_VL.square().sum(dim=1, keepdim=True) / 2
    return largest_product(
        torch.cat([z_NL, torch.ones_like(z_NL[:, :1])], dim=1), torch.cat([codes_VL, half_V1], dim=1)
    )


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32, whatever the program chose: a rounded product gives other ids."""
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
