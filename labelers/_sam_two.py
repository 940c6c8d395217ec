"""Segment Anything 2's network as the generator of masks asks it, and a tiny one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labelers import _huggingface, _images, _networks
from labelers._sam_decoder import Decoder, Layer, Parts, Shared
from labelers._sam_generator import Prepared

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Sam2Config, Sam2Model

VIDEO = (
    *(r"^memory_", r"^mask_downsample", r"^object_pointer_proj", r"^temporal_positional_encoding_projection_layer"),
    *(r"^no_memory_positional_encoding$", r"^no_object_pointer$", r"^occlusion_spatial_embedding_parameter$"),
)
"""Tensors that follow a thing through a video: published with the others, of no use for one image."""


def network(checkpoint: str) -> Sam2Model:
    """The network for images of a checkpoint in transformers' layout, float32, on the CPU."""
    from transformers import Sam2Model

    return _huggingface.network(checkpoint, Sam2Model, "sam2", configuration=configuration(checkpoint), unused=VIDEO)


def configuration(checkpoint: str) -> Sam2Config:
    """That of the network for images; the published one is that of the network for videos, which contains it."""
    from transformers import Sam2Config, Sam2VideoConfig

    if _huggingface.document(checkpoint, _huggingface.CONFIG).get("model_type") != Sam2VideoConfig.model_type:
        return _huggingface.config(checkpoint, Sam2Config)
    video = _huggingface.config(checkpoint, Sam2VideoConfig)
    return Sam2Config(
        vision_config=video.vision_config,
        prompt_encoder_config=video.prompt_encoder_config,
        mask_decoder_config=video.mask_decoder_config,
    )


class Predictor:
    """The network as the generator of masks asks it; an image is squeezed to its square input."""

    def __init__(
        self, model: Sam2Model, device: str, precision: _networks.Precision = "float32", *, compiled: bool = False
    ) -> None:
        _networks.placed(model, device)
        self.model = model
        self.device = device
        self.dtype = _networks.dtype_on(device, precision)
        self.side = int(model.prompt_encoder.input_image_size)  # type: ignore[arg-type]
        self.decoder = Decoder(_parts(model), self.dtype)
        _networks.placed(model.vision_encoder, device, precision, compiled=compiled)
        # These two are applied to the encoder's maps before any point.
        model.mask_decoder.conv_s0.to(self.dtype)
        model.mask_decoder.conv_s1.to(self.dtype)

    def prepare(self, rgb: np.ndarray) -> Prepared:
        """Resized as transformers' image processor does."""
        return Prepared(_huggingface.resized(rgb, self.side, self.side), (rgb.shape[0], rgb.shape[1]))

    def encode(self, batch: Sequence[Prepared]) -> Shared:
        """Normalise on the device and encode, keeping the maps of higher resolution."""
        pixels = _images.normalised([image.pixels for image in batch], _images.IMAGENET, self.device)
        finest, finer, features = self.model.get_image_embeddings(pixels.to(self.dtype))
        return self.decoder.share(features, (finer, finest))

    def places(self, points: np.ndarray, image: Prepared) -> np.ndarray:
        """The centres of the pixels of the square."""
        placed: np.ndarray = points / image.size[::-1] + 0.5 / self.side
        return placed

    def code(self, places: Tensor) -> Tensor:
        """Sines and cosines of random waves."""
        codes: Tensor = self.model.prompt_encoder.shared_embedding(places)
        return codes

    def enlarge(self, logits: Tensor, image: Prepared) -> Tensor:
        """Straight to the size of the image."""
        import torch.nn.functional as F

        return F.interpolate(logits[None], image.size, mode="bilinear")[0]


def _parts(model: Sam2Model) -> Parts:
    import torch

    prompts, decoder = model.prompt_encoder, model.mask_decoder
    two_way = decoder.transformer
    own = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
    return Parts(
        layers=[
            Layer(
                self_attention=layer.self_attn,
                norm1=layer.layer_norm1,
                to_image=layer.cross_attn_token_to_image,
                norm2=layer.layer_norm2,
                mlp=layer.mlp,
                norm3=layer.layer_norm3,
                from_image=layer.cross_attn_image_to_token,
                norm4=layer.layer_norm4,
            )
            for layer in two_way.layers
        ],
        final=two_way.final_attn_token_to_image,
        final_norm=two_way.layer_norm_final_attn,
        num_heads=int(decoder.config.num_attention_heads),
        tokens=torch.cat([embedding.weight for embedding in own]),
        score=1,
        first_mask=2,
        score_head=decoder.iou_prediction_head,
        hypernetworks=list(decoder.output_hypernetworks_mlps),
        upscale1=decoder.upscale_conv1,
        upscale_norm=decoder.upscale_layer_norm,
        upscale2=decoder.upscale_conv2,
        position=model.get_image_wide_positional_embeddings()[0],
        no_mask=prompts.no_mask_embed.weight[0],
        point=prompts.point_embed.weight[1],
        no_point=prompts.not_a_point_embed.weight[0],
    )


def save_tiny(folder: Path, seed: int) -> Path:
    """A random network for 128 x 128 pixels as it is published, that for videos, and its weights file."""
    import torch
    from transformers import Sam2VideoConfig, Sam2VideoModel

    side, width = 128, 24
    config = Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "image_size": [side, side],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 12, 16, 20],
                "num_attention_heads_per_stage": [1, 2, 2, 2],
                "window_size_per_stage": [8, 4, 14, 7],
                "window_positional_embedding_background_size": [3, 3],
                "global_attention_blocks": [3],
                "mlp_ratio": 2.0,
            },
            "backbone_channel_list": [20, 16, 12, 8],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": width,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": side, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 32,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 16,
        },
        image_size=side,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=8,
        memory_attention_rope_feat_sizes=[8, 8],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=width,
        mask_downsampler_total_stride=4,
        memory_fuser_num_layers=1,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the waves of its position codes are no parameters
        model = Sam2VideoModel(config)
    return _huggingface.save_tiny(model, folder, seed, scale=2.0)
