"""Attention, MLP and norm of the 4M transformer; parameter names are those of ml-4m's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attend

# T queries and S keys of a whole batch in one row, D width, H heads, K head width

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
        if self.fc3 is None:
            return self.fc2(self.act(self.fc1(x)))
        parts = self.fc1(x), self.fc3(x)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._gated(*parts)
        # Two of the four widest activations of a block are made again in the backward pass, which costs next to
        # nothing: the product with fc2 is not, for what it needs is there by then. A compiler decides that itself.
        return checkpoint(self._gated, *parts, use_reentrant=False, preserve_rng_state=False)

    def _gated(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc2(self.act(a) * b)


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

    def forward(self, x_TD: Tensor, attend: Attend, context_SD: Tensor | None = None) -> Tensor:
        """(T, D); `attend` knows who sees whom."""
        if context_SD is None:
            q_THK, k_SHK, v_SHK = self._heads(self.qkv(x_TD), 3)
        else:
            (q_THK,) = self._heads(self.q(x_TD), 1)
            k_SHK, v_SHK = self._heads(self.kv(context_SD), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_THK = self.q_norm(q_THK).to(v_SHK.dtype)
            k_SHK = self.k_norm(k_SHK).to(v_SHK.dtype)
        return self.proj(attend(q_THK, k_SHK, v_SHK).flatten(1))

    def _heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        return packed.unflatten(-1, (parts, self.num_heads, -1)).unbind(1)


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

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(T, D) to (T, D)."""
        x = x + self.attn(self.norm1(x), attend)
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

    def forward(self, x: Tensor, context: Tensor, own: Attend, cross: Attend) -> Tensor:
        """(T, D) queries and (S, D) context to (T, D)."""
        x = x + self.self_attn(self.norm1(x), own)
        x = x + self.cross_attn(self.query_norm(x), cross, self.context_norm(context))
        return x + self.mlp(self.norm2(x))
