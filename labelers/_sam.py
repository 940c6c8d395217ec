"""Building a Segment Anything network from its tensors, and its masks as records."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from labelers import _checkpoints, _networks, _sam_encoder
from labelers._sam_decoder import Decoder, Layer, Parts, Shared
from labelers._sam_generator import Prepared

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
    _networks.fill(out, {name: value for name, value in state.items() if not name.startswith("pixel_")}, "sam")
    return out


class Predictor:
    """The network as the generator of masks asks it; the longest side of an image fits its input, the rest is 0."""

    def __init__(
        self, network: Sam, device: str, precision: _networks.Precision = "float32", *, compiled: bool = False
    ) -> None:
        _sam_encoder.fuse(network.image_encoder)
        network.to(device)
        self.device = device
        self.dtype = _networks.dtype_on(device, precision)
        self.encoder = _networks.placed(network.image_encoder, device, precision, compiled=compiled)
        self.side = int(network.image_encoder.img_size)
        self.codes = network.prompt_encoder.pe_layer
        self.decoder = Decoder(_parts(network), self.dtype)

    def prepare(self, rgb: np.ndarray) -> Prepared:
        """Resized by Pillow's antialiased bilinear filter, as the package does."""
        height, width = (max(int(n * (self.side / max(rgb.shape[:2])) + 0.5), 1) for n in rgb.shape[:2])
        resized = Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR)
        return Prepared(np.asarray(resized), rgb.shape[:2])

    def encode(self, batch: Sequence[Prepared]) -> Shared:
        """Normalise on the device, with zeros below and right of an image, and encode."""
        import torch

        canvas = torch.zeros(len(batch), self.side, self.side, 3, dtype=torch.uint8)
        for square, image in zip(canvas.numpy(), batch, strict=True):
            square[: image.pixels.shape[0], : image.pixels.shape[1]] = image.pixels
        if self.device.startswith("cuda"):
            canvas = canvas.pin_memory().to(self.device, non_blocking=True)
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        pixels = (canvas.permute(0, 3, 1, 2) - mean) / std
        for square, image in zip(pixels, batch, strict=True):
            square[:, image.pixels.shape[0] :] = 0
            square[:, :, image.pixels.shape[1] :] = 0
        return self.decoder.share(self.encoder(pixels.to(self.dtype)))

    def places(self, points: np.ndarray, image: Prepared) -> np.ndarray:
        """The centres of the pixels, by the scale of each axis after rounding."""
        (height, width), (h, w) = image.pixels.shape[:2], image.size
        placed: np.ndarray = (points * (width / w, height / h) + 0.5) / self.side
        return placed

    def code(self, places: Tensor) -> Tensor:
        """Sines and cosines of random waves."""
        codes: Tensor = self.codes._pe_encoding(places)
        return codes

    def enlarge(self, logits: Tensor, image: Prepared) -> Tensor:
        """To the size of the input, without what was added to the image, then to that of the image."""
        import torch.nn.functional as F

        (height, width), side = image.pixels.shape[:2], logits.shape[-1]
        factor = self.side // side
        if factor * side == self.side:
            # Only the part that is kept, and one further row and column, which its last pixels look at.
            rows, columns = (min(-(-n // factor) + 1, side) for n in (height, width))
            logits = F.interpolate(logits[None, :, :rows, :columns], scale_factor=float(factor), mode="bilinear")
        else:
            logits = F.interpolate(logits[None], (self.side, self.side), mode="bilinear")
        logits = logits[..., :height, :width]
        if image.size != (height, width):
            logits = F.interpolate(logits, image.size, mode="bilinear")
        return logits[0]


def _parts(network: Sam) -> Parts:
    import torch

    prompts, decoder = network.prompt_encoder, network.mask_decoder
    two_way = decoder.transformer
    return Parts(
        layers=[
            Layer(
                self_attention=layer.self_attn,
                norm1=layer.norm1,
                to_image=layer.cross_attn_token_to_image,
                norm2=layer.norm2,
                mlp=layer.mlp,
                norm3=layer.norm3,
                from_image=layer.cross_attn_image_to_token,
                norm4=layer.norm4,
            )
            for layer in two_way.layers
        ],
        final=two_way.final_attn_token_to_image,
        final_norm=two_way.norm_final_attn,
        num_heads=two_way.num_heads,
        tokens=torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]),
        score=0,
        first_mask=1,
        score_head=decoder.iou_prediction_head,
        hypernetworks=list(decoder.output_hypernetworks_mlps),
        upscale1=decoder.output_upscaling[0],
        upscale_norm=decoder.output_upscaling[1],
        upscale2=decoder.output_upscaling[3],
        position=prompts.get_dense_pe()[0],
        no_mask=prompts.no_mask_embed.weight[0],
        point=prompts.point_embeddings[1].weight[0],
        no_point=prompts.not_a_point_embed.weight[0],
    )


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
