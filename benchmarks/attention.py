"""Attention on this machine's CPU, forward and backward: the fused kernel against plain products, by precision.

python benchmarks/attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {"nano encoder": (32, 3, 64, 64, 64), "nano decoder": (32, 3, 96, 96, 64), "cross": (32, 3, 96, 64, 64)}
REPEATS = 15


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype) @ v


def milliseconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        attention(*inputs).sum().backward()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {REPEATS}")
    print(f"{'shape':<14}{'dtype':<10}{'fused ms':>10}{'plain ms':>10}{'ratio':>8}")
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            sizes = (queries, keys, keys)
            inputs = [torch.randn(batch, heads, n, width).to(dtype).requires_grad_() for n in sizes]
            milliseconds(plain, inputs)
            fused = milliseconds(F.scaled_dot_product_attention, inputs)
            products = milliseconds(plain, inputs)
            kind = str(dtype).removeprefix("torch.")
            print(f"{name:<14}{kind:<10}{fused:>10.2f}{products:>10.2f}{fused / products:>8.2f}")


if __name__ == "__main__":
    main()
