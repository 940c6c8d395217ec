"""Attention, MLP and norm of the 4M transformer; parameter names are those of ml-4m's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, N queries, M keys, D width, H heads, K head width

ACTIVATIONS: dict[str, type[nn.Module]] = {"GELU": nn.GELU, "SiLU": nn.SiLU}


class LayerNorm(nn.Module):
    """Layer norm with eps 1e-6; without a learned bias the zeros are a buffer, which ml-4m checkpoints contain."""

    bias: Tensor

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        if bias:
            self.bias = nn.Parameter(torch.zeros(dim))
        else:
            self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the last axis."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


class Mlp(nn.Module):
    """fc2(act(fc1 x)), or fc2(act(fc1 x) * fc3 x) with two thirds of the hidden width if gated (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int, *, act: str, gated: bool, bias: bool) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3) if gated else hidden
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.fc3 = nn.Linear(dim, hidden, bias=bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        hidden = self.act(self.fc1(x))
        return self.fc2(hidden if self.fc3 is None else hidden * self.fc3(x))


def attend(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, (B, H, N, K); `mask` is True where a query may look, broadcastable to (B, H, N, M)."""
    if q_BHNK.device.type != "cpu" or q_BHNK.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK, attn_mask=mask)
    # The fused kernel's backward pass takes about five times as long as this in bfloat16 on CPUs with AMX.
    scores_BHNM = q_BHNK * q_BHNK.shape[-1] ** -0.5 @ k_BHMK.transpose(-2, -1)
    if mask is not None:
        scores_BHNM = scores_BHNM.masked_fill(~mask, torch.finfo(scores_BHNM.dtype).min)
    return scores_BHNM.softmax(dim=-1).to(v_BHMK.dtype) @ v_BHMK


class Attention(nn.Module):
    """Multi-head attention of queries to the same tokens (`qkv`) or to a context (`q`, `kv`)."""

    def __init__(
        self, dim: int, num_heads: int, *, cross: bool, bias: bool, proj_bias: bool, qk_norm: bool, norm_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        if cross:
            self.q = nn.Linear(dim, dim, bias=bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.q_norm = LayerNorm(dim // num_heads, bias=norm_bias) if qk_norm else None
        self.k_norm = LayerNorm(dim // num_heads, bias=norm_bias) if qk_norm else None

    def forward(self, x_BND: Tensor, mask: Tensor | None, context_BMD: Tensor | None = None) -> Tensor:
        """(B, N, D); `mask` is True where a query may look, broadcastable to (B, H, N, M)."""
        if context_BMD is None:
            q_BHNK, k_BHMK, v_BHMK = self._heads(self.qkv(x_BND), 3)
        else:
            (q_BHNK,) = self._heads(self.q(x_BND), 1)
            k_BHMK, v_BHMK = self._heads(self.kv(context_BMD), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHNK = self.q_norm(q_BHNK).to(v_BHMK.dtype)
            k_BHMK = self.k_norm(k_BHMK).to(v_BHMK.dtype)
        y_BHNK = attend(q_BHNK, k_BHMK, v_BHMK, mask)
        return self.proj(y_BHNK.transpose(1, 2).reshape(x_BND.shape))

    def _heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        batch, tokens, width = packed.shape
        split = packed.view(batch, tokens, parts, self.num_heads, width // (parts * self.num_heads))
        return split.permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """Pre-norm transformer block of the encoder."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, act: str, gated: bool, qk_norm: bool,
        qkv_bias: bool, proj_bias: bool, mlp_bias: bool, norm_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim, bias=norm_bias)
        self.attn = Attention(
            dim, num_heads, cross=False, bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm, norm_bias=norm_bias
        )
        self.norm2 = LayerNorm(dim, bias=norm_bias)
        self.mlp = Mlp(dim, hidden, act=act, gated=gated, bias=mlp_bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm transformer block of the decoder: self-attention, cross-attention, MLP."""

    def __init__(
        self, dim: int, num_heads: int, hidden: int, *, act: str, gated: bool, qk_norm: bool,
        qkv_bias: bool, proj_bias: bool, mlp_bias: bool, norm_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim, bias=norm_bias)
        self.self_attn = Attention(
            dim, num_heads, cross=False, bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm, norm_bias=norm_bias
        )
        self.query_norm = LayerNorm(dim, bias=norm_bias)
        self.context_norm = LayerNorm(dim, bias=norm_bias)
        self.cross_attn = Attention(
            dim, num_heads, cross=True, bias=qkv_bias, proj_bias=proj_bias, qk_norm=qk_norm, norm_bias=norm_bias
        )
        self.norm2 = LayerNorm(dim, bias=norm_bias)
        self.mlp = Mlp(dim, hidden, act=act, gated=gated, bias=mlp_bias)

    def forward(self, x: Tensor, context: Tensor, self_mask: Tensor | None, cross_mask: Tensor | None) -> Tensor:
        """(B, N, D) queries and (B, M, D) context to (B, N, D)."""
        x = x + self.self_attn(self.norm1(x), self_mask)
        x = x + self.cross_attn(self.query_norm(x), cross_mask, self.context_norm(context))
        return x + self.mlp(self.norm2(x))
