"""What ml-4m's trainers leave: `.pth` files of weights and command line, and ml-4m's names of what is tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model import domains, trainer_files
from model.domains import Domain

_RENAMED = {
    "quantizer_type": "quant_type",
    "encoder_type": "enc_type",
    "decoder_type": "dec_type",
    "input_size_enc": "image_size_enc",
    "input_size_dec": "image_size_dec",
    "input_size_sd": "image_size_sd",
    "quantizer_ema_decay": "ema_decay",
    "use_xformer": "enable_xformer",
}


def read(path: Path, *, ema: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings under their names in newer files, and weights: `model`, or `model_ema` if averaged ones are asked for.

    ValueError where a file holds anything but weights and arguments (`trainer_files.read`).
    """
    args, tensors = trainer_files.read(path, "model_ema" if ema else "model")
    return _settings(args, tensors), tensors


def _settings(args: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's settings of a trainer's arguments, and numbers of channels from the weights."""
    values = {name: value for name, value in args.items() if isinstance(value, bool | int | float | str)}
    name = str(values.get("domain", ""))
    values |= {new: values[old] for old, new in _RENAMED.items() if old in values}
    sizes = ("mask_size",) if "sam" in name else ("input_size", "input_size_max")
    size = next((values[size] for size in sizes if size in values), None)
    if size is not None:
        values["image_size"] = size
    if any(teacher in name for teacher in ("CLIP", "DINO", "ImageBind")):
        values["patch_proj"] = False
    if "cls_emb.weight" in tensors:
        values["n_labels"], values["n_channels"] = tensors["cls_emb.weight"].shape
    else:
        first = next((tensors[n] for n in ("encoder.linear_in.weight", "encoder.proj.weight") if n in tensors), None)
        if first is None or first.ndim < 2:
            raise ValueError("no encoder.proj.weight and no encoder.linear_in.weight, expected one of them")
        values["n_channels"] = first.shape[1]
    if any("controlnet" in key for key in tensors):
        values.setdefault("sd_path", "")
    return values


def domain(values: Mapping[str, Any]) -> Domain | None:
    """The domain of ml-4m's name for it, with its values and its loss; None for another, or one that does not fit.

    None, too, for images that are standardised as for classifiers: values of `domains.Rgb` are not.
    """
    name, channels = values.get("domain"), values.get("n_channels")
    if not isinstance(name, str) or not isinstance(channels, int):
        return None
    found: Domain | None = None
    if name == "rgb" and not values.get("imagenet_default_mean_and_std"):
        found = domains.Rgb()
    elif name == "depth":
        found = domains.Depth(mapping="standardised")
    elif name == "normal" and not values.get("standardize_surface_normals"):
        found = domains.Normal()
    elif name == "semseg_coco":
        found = domains.Semseg()
    elif name in ("canny_edge", "sam_edge"):
        found = domains.Edges(channels=3 if channels == 3 else 1, criterion="smooth_l1")
    elif name == "sam_mask":
        found = domains.SamMask()
    elif name == "human_poses":
        found = domains.Poses()
    elif name.endswith("-global"):
        found = domains.Vector(channels=channels)
    elif name in ("CLIP-B16", "DINOv2-B14", "ImageBind-H14"):
        found = domains.Features(channels=channels)
    labels = found.num_labels if isinstance(found, domains.Semseg) else None
    if found is None or values.get("n_labels") != labels or (labels is None and found.num_channels != channels):
        return None
    criterion = values.get("loss_fn")
    if criterion in found.criteria:
        found = domains.named(found.name, found.settings() | {"criterion": criterion})
    return found
