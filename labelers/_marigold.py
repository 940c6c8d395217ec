"""A Marigold pipeline of diffusers, put together from the files of a published folder: nothing it names is fetched or
run, and every tensor is used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataengine import weights
from labelers import _checkpoints, _huggingface, _networks

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model_index.json"
VOCABULARY = "tokenizer/vocab.json"
PROMPT = ("<|startoftext|>", "<|endoftext|>")
"""The tokens of an empty prompt, the only one there is."""
CELL = 8
"""How many pixels a side of a latent pixel has."""

_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How diffusers named the attention of a VAE before 0.14, and does now."""
_OLD_NAMES = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")


def files(variant: str) -> list[str]:
    """The names of the files that are read, the index first. A `variant` names those in half precision ("fp16")."""
    dot = f".{variant}" if variant else ""
    return [
        INDEX,
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        f"text_encoder/model{dot}.safetensors",
        VOCABULARY,
        "unet/config.json",
        f"unet/diffusion_pytorch_model{dot}.safetensors",
        "vae/config.json",
        f"vae/diffusion_pytorch_model{dot}.safetensors",
    ]


def pipeline(checkpoint: str, variant: str, who: str) -> Any:
    """A `MarigoldNormalsPipeline` on the CPU in float32, without text encoder: its answer to the empty prompt is kept.

    ValueError when the folder is that of another pipeline, or tensors are missing, unexpected or of another shape.
    """
    diffusers = _networks.require(who, "diffusers", "diffusion")
    index = _document(checkpoint, INDEX)
    if index.get("_class_name") != "MarigoldNormalsPipeline":
        raise ValueError(
            f"{who}: expected {INDEX} of a MarigoldNormalsPipeline, {checkpoint} has {index.get('_class_name')!r}"
        )
    scheduler = _document(checkpoint, "scheduler/scheduler_config.json")
    if scheduler.get("_class_name") != "DDIMScheduler":
        # Others draw noise between the steps, for the batch and not for an image.
        raise ValueError(f"{who}: expected a DDIMScheduler, {checkpoint} has {scheduler.get('_class_name')!r}")
    _, _, _, encoder, _, _, unet, _, vae = files(variant)
    made = diffusers.MarigoldNormalsPipeline(
        unet=_network(diffusers.UNet2DConditionModel, checkpoint, "unet/config.json", unet, who),
        vae=_network(diffusers.AutoencoderKL, checkpoint, "vae/config.json", vae, who),
        scheduler=diffusers.DDIMScheduler.from_config(scheduler),
        text_encoder=None,
        tokenizer=None,
        prediction_type="normals",
        use_full_z_range=index.get("use_full_z_range", True),
        default_denoising_steps=index.get("default_denoising_steps"),
        default_processing_resolution=index.get("default_processing_resolution"),
    )
    made.empty_text_embedding = _empty_prompt(checkpoint, encoder, who)
    made.set_progress_bar_config(disable=True)
    return made


def network(
    checkpoint: str, variant: str, who: str, device: str, precision: _networks.Precision, steps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Pixels (n, 3, h, w) in 0..1 and noise (n, 4, h / 8, w / 8) to normals (n, 3, h, w), on the device.

    In Marigold's axes: x right, y up, z to the observer.
    """
    import torch

    made = pipeline(checkpoint, variant, who)
    dtype = _networks.dtype_on(device, precision)
    for part in (made.unet, made.vae):
        # Not its own `to`, which warns of layers that are to stay in float32 when there are none.
        torch.nn.Module.to(part, device=device, dtype=dtype)

    def run(pixels: Tensor, noise: Tensor) -> Tensor:
        normals: Tensor = made(
            pixels,
            num_inference_steps=steps,
            processing_resolution=0,
            match_input_resolution=False,
            batch_size=len(pixels),
            latents=noise.to(dtype),
            output_type="pt",
            return_dict=False,
        )[0]
        return normals

    return run


def save_tiny(folder: Path, seed: int) -> None:
    """A folder of random networks of width 8, laid out as the published one, and marked random."""
    from transformers import CLIPTextConfig, CLIPTextModel

    diffusers = _networks.require("marigold_normal", "diffusers", "diffusion")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    sizes = {"vocab_size": 2, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 4}
    tokens = {"num_hidden_layers": 1, "num_attention_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    encoder = CLIPTextModel(CLIPTextConfig.from_dict({**sizes, **tokens}))
    for number, part in enumerate((unet, vae, encoder)):
        part.load_state_dict(_checkpoints.randomised(part.state_dict(), seed + number))
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / VOCABULARY).write_text(json.dumps({token: i for i, token in enumerate(PROMPT)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    (folder / INDEX).write_text(
        json.dumps(
            {
                "_class_name": "MarigoldNormalsPipeline",
                "_diffusers_version": diffusers.__version__,
                "default_denoising_steps": 4,
                "default_processing_resolution": 768,
                "prediction_type": "normals",
                "scheduler": ["diffusers", "DDIMScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "use_full_z_range": True,
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )
    weights.mark_random(folder / INDEX, seed)


def _document(checkpoint: str, name: str) -> dict[str, Any]:
    return _huggingface.document(checkpoint, name)


def _network(kind: Any, checkpoint: str, config: str, file: str, who: str) -> Any:
    import torch

    settings = _document(checkpoint, config)
    if settings.get("_class_name", kind.__name__) != kind.__name__:
        raise ValueError(f"{who}: expected {config} of a {kind.__name__}, found {settings['_class_name']!r}")
    with torch.device("meta"):
        made = kind.from_config(settings)
    made.to_empty(device="cpu")  # there are no buffers, and `fill` leaves no parameter empty
    state = _checkpoints.read(_huggingface.part(checkpoint, file))
    renamed = {_OLD_NAMES.sub(lambda found: _OLD[found[1]], name): value for name, value in state.items()}
    _networks.fill(made, renamed, f"{who} ({file})")
    return made.eval().requires_grad_(False)


def _empty_prompt(checkpoint: str, file: str, who: str) -> Tensor:
    """What the text encoder makes of no text: (1, 2, width)."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = _document(checkpoint, VOCABULARY)
    if not set(PROMPT) <= set(vocabulary):
        raise ValueError(f"{who}: expected {' and '.join(PROMPT)} in {VOCABULARY} of {checkpoint}")
    encoder = _huggingface.network(
        str(_huggingface.part(checkpoint, file)),
        CLIPTextModel,
        f"{who} ({file})",
        configuration=CLIPTextConfig.from_dict(_document(checkpoint, "text_encoder/config.json")),
        unused=(r"\.position_ids$",),  # 0, 1, 2, ..., which older versions stored
    )
    with torch.inference_mode():
        found: Tensor = encoder(torch.tensor([[vocabulary[token] for token in PROMPT]])).last_hidden_state.clone()
    return found
