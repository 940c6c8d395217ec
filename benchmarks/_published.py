"""Parameters and operations of the published networks, counted on torch's meta device: no weights, no memory, no GPU.

Each network is built by the code that loads it, in the published size. Two operations a multiplication with addition;
only matrix products, convolutions and attention count, as in `torch.utils.flop_counter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

POINTS = 32 * 32
"""Queries of SAM an image."""
CHUNK = 64
CAPTION = 24
"""Tokens of a caption."""


@dataclass(frozen=True)
class Size:
    """Of one network: its parameters, and the operations for one image (one person, one caption)."""

    parameters: int
    flop: int


def sizes() -> dict[str, Size]:
    """By labeler, those of its published network at its own input size."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer, which no counter looks into
    try:
        with torch.inference_mode():
            return {name: count() for name, count in COUNTS.items()}
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _size(network: torch.nn.Module, *calls: tuple[int, Callable[[], Any]]) -> Size:
    """The operations of some calls, each so many times."""
    total = 0
    for times, call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        total += times * counter.get_total_flops()
    return Size(sum(p.numel() for p in network.parameters()), total)


def _image(side: int, width: int | None = None) -> torch.Tensor:
    return torch.empty(1, 3, side, width or side)


def _sam() -> Size:
    from labelers import _sam as sam

    net = sam.build(sam.Shape())
    grid = net.image_encoder.img_size // net.image_encoder.patch_embed.proj.kernel_size[0]
    width = net.prompt_encoder.embed_dim

    def decode() -> None:
        net.mask_decoder(
            image_embeddings=torch.empty(1, width, grid, grid),
            image_pe=torch.empty(1, width, grid, grid),
            sparse_prompt_embeddings=torch.empty(CHUNK, 2, width),  # a point, and that there is no box
            dense_prompt_embeddings=torch.empty(CHUNK, width, grid, grid),
            multimask_output=True,
        )

    return _size(net, (1, lambda: net.image_encoder(_image(1024))), (POINTS // CHUNK, decode))


def _vitdet() -> Size:
    from labelers import _vitdet as vitdet
    from labelers import _vitdet_heads as heads
    from labelers._vitdet_random import Shape

    of = Shape()
    sides = [of.grid if (i + 1) % of.every == 0 else of.window for i in range(of.depth)]
    net = vitdet.Transformer(of.width, of.heads, of.hidden, of.patch, of.grid, sides)
    backbone = vitdet.Backbone(net, of.channels)
    proposals = heads.ProposalHead(of.channels, 2)
    box = heads.BoxHead(of.channels, [of.channels] * of.convolutions, [of.full])
    whole = torch.nn.ModuleList([backbone, proposals, box, box, box])
    maps = [torch.empty(1, of.channels, 256 >> i, 256 >> i) for i in range(5)]
    found = _size(
        whole,
        (1, lambda: backbone(_image(1024))),
        (1, lambda: [proposals(m) for m in maps]),
        (len(heads.WEIGHTS), lambda: box(torch.empty(1000, of.channels, 7, 7))),
    )
    # The three heads have weights of their own.
    return Size(found.parameters + 2 * sum(p.numel() for p in box.parameters()), found.flop)


def _mask2former() -> Size:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12, image_size=384,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    net = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=133)).eval()
    return _size(net, (1, lambda: net(pixel_values=_image(800, 1088))))


def _omnidata(channels: int) -> Size:
    from labelers import _omnidata as omnidata

    net = omnidata.runnable(omnidata._build(omnidata.Shape(channels=channels)))
    return _size(net, (1, lambda: net(_image(384))))


def _hmr2() -> Size:
    from labelers import _hmr2 as hmr2

    net = hmr2.Hmr2(hmr2.Shape())
    return _size(net, (1, lambda: net(_image(*hmr2.INPUT))))


def _tower(width: int, layers: int, patch: int, out: int) -> Size:
    from open_clip.transformer import VisionTransformer

    heads = width // (64 if width < 1280 else 80)
    net = VisionTransformer(
        image_size=224, patch_size=patch, width=width, layers=layers, heads=heads, mlp_ratio=4.0, output_dim=out
    ).eval()
    return _size(net, (1, lambda: net(_image(224))))


def _dinov2() -> Size:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=224, patch_size=14, num_classes=0, init_values=1.0).eval()
    return _size(net, (1, lambda: net.forward_features(_image(224))))


def _t5() -> Size:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    net = T5EncoderModel(T5Config.from_dict({**sizes, "feed_forward_proj": "gated-gelu"})).eval()
    return _size(net, (1, lambda: net(input_ids=torch.ones(1, CAPTION, dtype=torch.long))))


def _without_values(count: Callable[..., Size], *args: Any, fake: bool = False) -> Callable[[], Size]:
    def counted() -> Size:
        # The meta device; where a network makes tensors on the CPU by name, fake ones, which know no values either.
        with FakeTensorMode() if fake else torch.device("meta"):
            return count(*args)

    return counted


COUNTS: Mapping[str, Callable[[], Size]] = {
    "sam": _without_values(_sam),
    "vitdet": _without_values(_vitdet),
    "mask2former": _without_values(_mask2former, fake=True),
    "omnidata_depth": _without_values(_omnidata, 1),
    "omnidata_normal": _without_values(_omnidata, 3),
    "imagebind_h14": _without_values(_tower, 1280, 32, 14, 1024),
    "dinov2_b14": _without_values(_dinov2),
    "clip_b16": _without_values(_tower, 768, 12, 16, 512),
    "hmr2": _without_values(_hmr2),
    "t5": _without_values(_t5),
}
