"""Building a Segment Anything network from its tensors, and its masks as records."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labelers import _checkpoints

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from torch import Tensor

PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]
DECODER_HEADS = 8
"""The one number that no tensor shows; all published checkpoints have it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a network; the defaults are ViT-H."""

    image: int = 1024
    patch: int = 16
    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp: int = 5120
    window: int = 14
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    prompt: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_mlp: int = 2048
    masks: int = 3
    iou_depth: int = 3
    iou_width: int = 256


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """The sizes of the network whose tensors these are: blocks whose relative positions span the image are global."""
    _, side, _, width = state["image_encoder.pos_embed"].shape
    patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
    depth = _checkpoints.count(state, "image_encoder.blocks.")
    spans = [(state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
    return Shape(
        image=side * patch,
        patch=patch,
        width=width,
        depth=depth,
        heads=width // state["image_encoder.blocks.0.attn.rel_pos_h"].shape[1],
        mlp=state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0],
        window=min(spans) if min(spans) < side else 0,
        global_blocks=tuple(i for i, span in enumerate(spans) if span == side),
        prompt=state["prompt_encoder.no_mask_embed.weight"].shape[1],
        mask_channels=state["prompt_encoder.mask_downscaling.6.weight"].shape[1],
        decoder_depth=_checkpoints.count(state, "mask_decoder.transformer.layers."),
        decoder_mlp=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
        masks=state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        iou_depth=_checkpoints.count(state, "mask_decoder.iou_prediction_head.layers."),
        iou_width=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
    )


def build(shape: Shape) -> Sam:
    """A network of these sizes, of the package's parts, with their initial weights."""
    import torch
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    side = shape.image // shape.patch
    network = Sam(
        image_encoder=ImageEncoderViT(
            img_size=shape.image,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp / shape.width,
            out_chans=shape.prompt,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=shape.prompt,
            image_embedding_size=(side, side),
            input_image_size=(shape.image, shape.image),
            mask_in_chans=shape.mask_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=shape.prompt,
            transformer=TwoWayTransformer(
                depth=shape.decoder_depth,
                embedding_dim=shape.prompt,
                num_heads=DECODER_HEADS,
                mlp_dim=shape.decoder_mlp,
            ),
            num_multimask_outputs=shape.masks,
            iou_head_depth=shape.iou_depth,
            iou_head_hidden_dim=shape.iou_width,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
    return network.eval().requires_grad_(False)


def network(state: Mapping[str, Tensor]) -> Sam:
    """The network whose tensors these are, on the CPU; strict but for the pixel statistics, which are constants."""
    out = build(shape_of(state))
    out.load_state_dict({name: value for name, value in state.items() if not name.startswith("pixel_")})
    return out


def random_state(seed: int) -> dict[str, Tensor]:
    """The tensors of a random network for 64 x 64 pixels: one windowed and one global block of width 16.

    The weights are large, so that its masks depend on the query point and are several.
    """
    shape = Shape(
        image=64,
        patch=8,
        width=16,
        depth=2,
        heads=2,
        mlp=32,
        window=4,
        global_blocks=(1,),
        prompt=16,
        mask_channels=4,
        decoder_depth=2,
        decoder_mlp=32,
        iou_width=16,
    )
    state = _checkpoints.randomised(build(shape).state_dict(), seed, scale=3.0)
    last = f"mask_decoder.iou_prediction_head.layers.{shape.iou_depth - 1}."
    return state | {last + "weight": state[last + "weight"] * 0.002, last + "bias": state[last + "bias"] + 0.5}


def records(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The generator's masks with run lengths as records: exact boxes, no empty mask, largest first, one order."""
    from pycocotools import mask as coco_mask

    out = [
        {
            "size": [int(n) for n in mask["segmentation"]["size"]],
            "counts": mask["segmentation"]["counts"],
            # The package's own boxes end at the last pixel and are one pixel short on each axis.
            "bbox": [int(v) for v in coco_mask.toBbox(_encoded(mask["segmentation"]))],
            "area": int(mask["area"]),
            "predicted_iou": round(float(mask["predicted_iou"]), 4),
            "stability_score": round(float(mask["stability_score"]), 4),
            "point": [round(float(v), 2) for v in mask["point_coords"][0]],
        }
        for mask in found
        if mask["area"] > 0
    ]
    return sorted(out, key=lambda record: (-record["area"], record["bbox"], record["counts"]))


def _encoded(rle: Mapping[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].encode()}
