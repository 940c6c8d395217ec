"""The mask decoder of Segment Anything, 1 and 2, for many points of many images at once.

The same function as the published decoders', with the sums in another order. They repeat an image's tokens for every
point and project all of them in every attention: most of their work. Here

- what all points of an image share (the first layer's keys, values and queries of the image) is computed once;
- later on a projection of the many image tokens is moved to the few tokens of the point: q . (W k) = (W' q) . k;
- the score of a mask is known before the mask, so only points with a mask that is good enough are upscaled.
"""

# B images, P points of each, N = B * P, T tokens of a point, S = side * side tokens of an image, C channels,
# h heads, D their width together

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """The parts of one two-way layer, by role."""

    self_attention: Any
    norm1: Any
    to_image: Any
    norm2: Any
    mlp: Any
    norm3: Any
    from_image: Any
    norm4: Any


@dataclass(frozen=True)
class Parts:
    """A published decoder by its parts, whatever they are called: attentions have q_proj, k_proj, v_proj and an out.

    `tokens` (T - 2, C) are those that every point has; `first_mask` the place of the first mask's among them and
    `score` that of the score's. `to_image` etc. have `num_heads` heads.
    """

    layers: Sequence[Layer]
    final: Any
    final_norm: Any
    num_heads: int
    tokens: Tensor
    score: int
    first_mask: int
    score_head: Callable[[Tensor], Tensor]
    hypernetworks: Sequence[Callable[[Tensor], Tensor]]
    upscale1: nn.ConvTranspose2d
    upscale_norm: Any
    upscale2: nn.ConvTranspose2d
    position: Tensor
    """(C, side, side): that of the image tokens."""
    no_mask: Tensor
    """(C,): what is added to an image without a mask prompt."""
    point: Tensor
    """(C,): what marks a point as one of the thing."""
    no_point: Tensor
    """(C,): the token that ends the points."""


@dataclass(frozen=True)
class Shared:
    """What all points of some images share: tokens (B, S, C), and queries, keys and values of the first layer.

    `high` are SAM 2's features of higher resolution, (B, 4 S, C / 4) and (B, 16 S, C / 8) in the order of `upscale`.
    """

    source: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    high: tuple[Tensor, ...] = ()


class Decoder:
    """Masks for points; the parts of a point are float32, those of an image of the dtype of the image's tokens."""

    def __init__(self, parts: Parts, dtype: Any) -> None:
        self.parts = parts
        self.dtype = dtype
        self.position = parts.position.flatten(1).T.contiguous()
        self.side = parts.position.shape[-1]

    def share(self, features: Tensor, high: tuple[Tensor, ...] = ()) -> Shared:
        """Prepare images for their points: features (B, C, side, side), and SAM 2's two of higher resolution."""
        first, heads = self.parts.layers[0], self.parts.num_heads
        source = features.float().flatten(2).transpose(1, 2) + self.parts.no_mask
        placed = source + self.position
        return Shared(
            source=source.to(self.dtype),
            queries=_split(first.from_image.q_proj(placed), heads).to(self.dtype),
            keys=_split(first.to_image.k_proj(placed), heads).to(self.dtype),
            values=_split(first.to_image.v_proj(source), heads).to(self.dtype),
            high=tuple(_children_first(x.to(self.dtype), self.side) for x in high),
        )

    def attend(self, shared: Shared, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points (B, P, C), as the prompt encoder's position code has them.

        Returns their scores (N, M), what makes a mask of pixels (N, M, C / 8), and the image as each point leaves it
        (N, S, C). M masks each: the three of a point that means several things.
        """
        import torch
        import torch.nn.functional as F

        parts = self.parts
        b, p, c = points.shape
        own = torch.stack([points + parts.point, parts.no_point.expand(b, p, c)], dim=2).flatten(0, 1)
        code = torch.cat([parts.tokens.expand(b * p, -1, -1), own], dim=1)
        tokens, image, placed = code, shared.source, shared.source
        for i, layer in enumerate(parts.layers):
            tokens = _within(layer.self_attention, tokens, code, parts.num_heads, first=i == 0)
            tokens = layer.norm1(tokens)
            asked = tokens + code
            if i == 0:
                seen = _merge(self._first_look(shared, layer.to_image.q_proj(asked)))
            else:
                seen = self._look(layer.to_image, asked, image, placed)
            tokens = layer.norm2(tokens + _out(layer.to_image)(seen))
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            keys = _split(layer.from_image.k_proj(tokens + code), parts.num_heads)
            brought = self._brought(layer.from_image, _split(layer.from_image.v_proj(tokens), parts.num_heads))
            if i == 0:
                weights = self._first_weights(shared, keys)
                before = shared.source[:, None].expand(b, p, -1, -1).flatten(0, 1)
            else:
                weights = self._weights(layer.from_image, keys, placed)
                before = image
            image = torch.baddbmm(before, weights, brought)
            norm = layer.norm4
            image = F.layer_norm(image, (c,), norm.weight.to(self.dtype), norm.bias.to(self.dtype), norm.eps)
            placed = image + self.position.to(self.dtype)
        seen = self._look(parts.final, tokens + code, image, placed)
        tokens = parts.final_norm(tokens + _out(parts.final)(seen))
        # The first mask is that of a point that means one thing, and not among those asked for.
        scores = parts.score_head(tokens[:, parts.score])[:, 1:]
        masks = tokens[:, parts.first_mask + 1 :]
        hyper = [net(masks[:, i]) for i, net in enumerate(parts.hypernetworks[1:])]
        return scores, torch.stack(hyper, dim=1), image

    def draw(self, image: Tensor, hyper: Tensor, high: tuple[Tensor, ...] = ()) -> Tensor:
        """Logits float32 (n, M, 4 * side, 4 * side) of some points: `image` (n, S, C) and `hyper` (n, M, C / 8).

        Every token becomes 2 x 2 and then each of them 2 x 2 pixels by products, without moving what lies in memory;
        only the masks are brought in order.
        """
        import torch.nn.functional as F

        parts, side = self.parts, self.side
        n, masks = hyper.shape[:2]
        x = _children(image, parts.upscale1)
        if high:
            x = x + high[0]
        norm = parts.upscale_norm
        x = F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        x = _children(F.gelu(x), parts.upscale2)
        if high:
            x = x + high[1]
        logits = F.gelu(x).flatten(1, -2) @ hyper.to(x.dtype).transpose(1, 2)
        # Token, pixel of its 2 x 2, pixel of that one's 2 x 2: rows are (row, i, k), columns (column, j, l).
        grid = logits.view(n, side, side, 2, 2, 2, 2, masks)
        return grid.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(n, masks, 4 * side, 4 * side).float()

    def _first_look(self, shared: Shared, q: Tensor) -> Tensor:
        import torch.nn.functional as F

        n, t, _ = q.shape
        b, heads = shared.keys.shape[:2]
        queries = _split(q.reshape(b, -1, q.shape[-1]), heads).to(self.dtype)
        seen = F.scaled_dot_product_attention(queries, shared.keys, shared.values)
        return seen.transpose(1, 2).reshape(n, t, heads, -1).transpose(1, 2).float()

    def _look(self, attention: Any, asked: Tensor, image: Tensor, placed: Tensor) -> Tensor:
        """What tokens (N, T, C) see of images (N, S, C): (N, T, D)."""
        import torch.nn.functional as F

        heads = self.parts.num_heads
        n, t, c = asked.shape
        q = _split(attention.q_proj(asked), heads)
        width = q.shape[-1]
        # The keys' bias adds the same to all scores of a query, so the softmax does not see it.
        carried = (q @ attention.k_proj.weight.view(heads, width, c)).flatten(1, 2)
        seen = F.scaled_dot_product_attention(
            carried.to(self.dtype)[:, None], placed[:, None], image[:, None], scale=width**-0.5
        )
        values = attention.v_proj.weight.view(heads, width, c).transpose(1, 2)
        return _merge(seen.float().view(n, heads, t, c) @ values) + attention.v_proj.bias

    def _first_weights(self, shared: Shared, keys: Tensor) -> Tensor:
        b, heads, s, width = shared.queries.shape
        n, _, t, _ = keys.shape
        of_image = keys.view(b, n // b, heads, t, width).permute(0, 2, 4, 1, 3).flatten(3)
        scores = shared.queries @ (of_image * width**-0.5).to(self.dtype)
        weights = scores.view(b, heads, s, n // b, t).softmax(dim=-1)
        return weights.permute(0, 3, 2, 1, 4).reshape(n, s, heads * t)

    def _weights(self, attention: Any, keys: Tensor, placed: Tensor) -> Tensor:
        """How much each image token heeds each token in each head: (N, S, h * T)."""
        import torch

        n, heads, t, width = keys.shape
        q = attention.q_proj
        scaled = keys * width**-0.5
        carried = (scaled @ q.weight.view(heads, width, -1)).flatten(1, 2).transpose(1, 2).to(self.dtype)
        bias = (scaled @ q.bias.view(heads, width, 1)).flatten(1).to(self.dtype)
        scores = torch.baddbmm(bias[:, None], placed, carried)
        return scores.view(n, -1, heads, t).softmax(dim=-1).flatten(2)

    def _brought(self, attention: Any, values: Tensor) -> Tensor:
        """What each token brings the image in each head: (N, h * T, C). Weights sum to 1, so a share of the bias is
        brought by each head."""
        heads, width = values.shape[1], values.shape[-1]
        out = _out(attention)
        weight = out.weight.T.view(heads, width, -1)
        return (values @ weight + out.bias / heads).flatten(1, 2).to(self.dtype)


def _within(attention: Any, tokens: Tensor, code: Tensor, heads: int, *, first: bool) -> Tensor:
    import torch.nn.functional as F

    asked = tokens if first else tokens + code
    q, k, v = (
        _split(project(x), heads)
        for project, x in ((attention.q_proj, asked), (attention.k_proj, asked), (attention.v_proj, tokens))
    )
    seen = F.scaled_dot_product_attention(q, k, v)
    out: Tensor = _out(attention)(_merge(seen))
    return out if first else tokens + out


def _out(attention: Any) -> Any:
    return attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj


def _split(x: Tensor, heads: int) -> Tensor:
    """(n, t, D) as (n, h, t, D / h)."""
    n, t, _ = x.shape
    return x.view(n, t, heads, -1).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _children(x: Tensor, convolution: nn.ConvTranspose2d) -> Tensor:
    """A 2 x 2 transposed convolution of stride 2 by a product: (n, ..., C) to (n, ..., 4, out), 4 is (row, column)."""
    weight, bias = convolution.weight.to(x.dtype), convolution.bias
    inner, out = weight.shape[:2]
    product = x @ weight.permute(0, 2, 3, 1).reshape(inner, 4 * out)
    return product.view(*x.shape[:-1], 4, out) + bias.to(x.dtype)  # type: ignore[union-attr]


def _children_first(x: Tensor, side: int) -> Tensor:
    """Features (B, c, k * side, k * side), k a power of 2, in the order that `_children` makes: (B, S, 4[, 4], c)."""
    b, c, height, _ = x.shape
    levels = (height // side).bit_length() - 1
    grid = x.view(b, c, side, *(2,) * levels, side, *(2,) * levels)
    rows, columns = range(2, 3 + levels), range(3 + levels, 4 + 2 * levels)
    order = [axis for pair in zip(rows, columns, strict=True) for axis in pair]
    return grid.permute(0, *order, 1).reshape(b, side * side, *(4,) * levels, c).contiguous()
