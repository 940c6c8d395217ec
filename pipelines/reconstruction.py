"""How far reconstructions are from their originals: each modality in its own metric, the best constant, a picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dataengine import modalities
from dataengine.modalities import Picture, human_poses
from model import domains, perceptual
from model.domains import Domain
from model.tokenizers import _quantize
from pipelines.evaluate import abs_rel, mean_angle, mean_iou

Values = Sequence[NDArray[Any]]
Figures = dict[str, float]

NEIGHBOURS = 10


class Usage(NamedTuple):
    """How a codebook is used by a set of ids: of `entries` codes `used` were seen; `perplexity` is of one codebook."""

    used: int
    entries: int
    perplexity: float

    @property
    def share(self) -> float:
        """The share of the codes that were seen."""
        return self.used / self.entries


def usage(ids: NDArray[np.int64], vocab_size: int, heads: int = 1) -> Usage:
    """Usage of ids (B, ...), or (B, heads, ...) where each of several heads has a codebook of its own."""
    parts = ids.reshape(len(ids), heads, -1).transpose(1, 0, 2)
    each = [_quantize.usage([torch.from_numpy(np.ascontiguousarray(part))], vocab_size) for part in parts]
    used, perplexity = sum(one.codes for one in each), float(np.mean([one.perplexity for one in each]))
    return Usage(used, heads * vocab_size, perplexity)


def figures(domain: Domain, made: Values, true: Values) -> Figures:
    """The metrics of a domain, the first one being its own: a name that says the unit, and the value."""
    found = _METRICS[type(domain)](np.stack(made), np.stack(true))
    if isinstance(domain, domains.Depth) and domain.mapping == "standardised":
        return {"standardised L1": float(np.abs(np.stack(made) - np.stack(true)).mean())}
    return found


def comparable(domain: Domain, values: Values) -> list[NDArray[Any]]:
    """Originals as what a perfect tokenizer gives back: standardised depth has no metres, masks are bool."""
    if isinstance(domain, domains.Depth) and domain.mapping == "standardised":
        return list(domain.to_network(values)[:, 0].numpy())
    if isinstance(domain, domains.SamMask):
        return [value.astype(bool) for value in values]
    return [value.astype(np.float32) if value.dtype == np.float16 else value for value in values]


def constant(domain: Domain, true: Values) -> NDArray[Any]:
    """The best constant for each place of the originals themselves, which is more than a constant can know."""
    stack = np.stack(true)
    if isinstance(domain, domains.Depth):
        return np.asarray(np.median(stack, axis=0))
    if isinstance(domain, domains.Semseg):
        return np.stack([(stack == c).sum(axis=0) for c in range(256)]).argmax(axis=0).astype(np.uint8)
    if isinstance(domain, (domains.Edges, domains.SamMask)):
        often = (stack > 0).mean(axis=0)
        tried = [often >= share for share in np.linspace(0.05, 0.5, 10)]
        best = max(tried, key=lambda on: figures(domain, [on.astype(stack.dtype)] * len(stack), true).popitem()[1])
        return best.astype(stack.dtype) * (255 if stack.dtype == np.uint8 else 1)
    mean = stack.mean(axis=0, dtype=np.float64)
    if isinstance(domain, (domains.Normal, domains.Poses)):
        # The nearest unit vectors, and the nearest rotations.
        return domain.from_network(_layout(domain, mean.astype(np.float32)))[0]
    if isinstance(domain, domains.Rgb):
        return np.rint(mean).astype(np.uint8)
    return mean.astype(np.float32)


def _layout(domain: Domain, mean: NDArray[np.float32]) -> torch.Tensor:
    tensor = torch.from_numpy(mean)[None]
    return tensor.permute(0, 3, 1, 2) if isinstance(domain, domains.Normal) else tensor[:, :, None, None]


def _rgb(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    a, b = (torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for v in (made, true))
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    found = {"PSNR, dB": float(psnr), "SSIM": float(ssim)}
    network = _lpips()
    if network is not None:
        with torch.no_grad():
            parts = zip((2 * a - 1).split(16), (2 * b - 1).split(16), strict=True)
            found["LPIPS (vgg)"] = sum(float(network(x, y)) * len(x) for x, y in parts) / len(a)
    return found


@functools.cache
def _lpips() -> torch.nn.Module | None:
    """LPIPS, where torchvision's weights of its backbone are."""
    return perceptual.Lpips("vgg") if perceptual.lpips_weights("vgg").exists() else None


def _depth(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    ratio = np.maximum(made / true, true / made)
    return {"abs-rel": abs_rel(made, true), "δ1": float((ratio < 1.25).mean())}


def _normal(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    return {"mean angle, degrees": mean_angle(made, true)}


def _semseg(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    return {"mIoU": mean_iou(made, true), "pixel accuracy": float((made == true).mean())}


def _edges(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    on, wanted = torch.from_numpy(made > 0), torch.from_numpy(true > 0)
    return {"F1": float(binary_f1_score(on.int(), wanted.int()))}


def _masks(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    each = [
        float(binary_jaccard_index(torch.from_numpy(a), torch.from_numpy(b))) for a, b in zip(made, true, strict=True)
    ]
    return {"mask IoU": float(np.mean(each))}


def _features(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    a, b = (v.astype(np.float64) for v in (made, true))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)
    return {"cosine": float(cosine.mean()), "kNN agreement": neighbours_kept(a, b)}


def neighbours_kept(made: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """The share of the (at most ten) nearest images by cosine that stay the nearest; grids are averaged first.

    Of n images 10 / (n - 1) stay by chance; NaN for fewer than three, where all do.
    """
    num = len(true)
    if num < 3:
        return float("nan")
    k = min(NEIGHBOURS, (num - 1) // 2)
    near = []
    for values in (made, true):
        vectors = values.reshape(num, -1, values.shape[-1]).mean(axis=1)
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        alike = vectors @ vectors.T
        np.fill_diagonal(alike, -np.inf)
        near.append(np.argsort(-alike, axis=1, kind="stable")[:, :k])
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*near, strict=True)]))


def _poses(made: NDArray[Any], true: NDArray[Any]) -> Figures:
    """Mean distance of the joints of a stick figure of ordinary proportions, upright and about its pelvis."""
    distances = []
    for a, b in zip(made, true, strict=True):
        joints = [human_poses.joint_positions(np.concatenate([np.eye(3)[None], v.reshape(-1, 3, 3)])) for v in (a, b)]
        distances.append(np.linalg.norm(joints[0] - joints[1], axis=1).mean())
    return {"mean joint error, m": float(np.mean(distances))}


_METRICS: dict[type[Domain], Callable[[NDArray[Any], NDArray[Any]], Figures]] = {
    domains.Rgb: _rgb,
    domains.Depth: _depth,
    domains.Normal: _normal,
    domains.Semseg: _semseg,
    domains.Edges: _edges,
    domains.SamMask: _masks,
    domains.Features: _features,
    domains.Vector: _features,
    domains.Poses: _poses,
}

LARGER_IS_BETTER = frozenset(
    {"PSNR, dB", "SSIM", "δ1", "mIoU", "pixel accuracy", "F1", "mask IoU", "cosine", "kNN agreement"}
)

BOUNDS: dict[str, tuple[str, float, str]] = {
    "normal": ("mean angle, degrees", 4.0, "DIODE"),
    "depth": ("standardised L1", 0.06, "DIODE"),
    "semseg": ("mIoU", 0.905, "COCO"),
    "poses": ("mean joint error, m", 0.0175, "3DPW, on SMPL's joints"),
}
"""What 4M-21's own tokenizers reach by domain (Bachmann et al. 2024, table 1, "tokenizer bound"), and on what data."""


def picture(
    modality: str, domain: Domain, value: NDArray[Any], rgb: NDArray[np.uint8], like: NDArray[Any] | None = None
) -> NDArray[np.uint8]:
    """How a value is shown, uint8 (h, w, 3); `rgb` is the image it belongs to.

    Colours of depth and of features follow the range of what is shown; with `like` they follow that of both, so that
    two pictures can be compared.
    """
    if isinstance(domain, domains.SamMask):
        return np.repeat((value.astype(np.uint8) * 255)[..., None], 3, axis=2)
    if isinstance(domain, domains.Poses):
        return _stick_figure(value)
    beside = isinstance(domain, (domains.Depth, domains.Features)) and like is not None
    if beside:
        assert like is not None
        value, rgb = np.concatenate([value, like], axis=1), np.concatenate([rgb, rgb], axis=1)
    if isinstance(domain, domains.Depth):
        value = _unit(value) if domain.mapping == "standardised" else np.clip(value, 0, 1).astype(np.float32)
    if isinstance(domain, (domains.Features, domains.Vector)):
        # All features are shown alike, those that are no modality, too.
        value = value.astype(np.float16)
        modality = "DINOv2-B14-global" if isinstance(domain, domains.Vector) else "DINOv2-B14"
    shown: Picture = modalities.load(modality).picture(value, rgb)
    assert shown.image is not None
    return np.ascontiguousarray(shown.image[:, : shown.image.shape[1] // 2]) if beside else shown.image


def _unit(depth: NDArray[Any]) -> NDArray[np.float32]:
    """Standardised depth, -2..2, as 0..1."""
    return np.asarray(np.clip((depth + 2) / 4, 0, 1), np.float32)


def _stick_figure(pose: NDArray[Any], side: int = 192) -> NDArray[np.uint8]:
    # The camera's y points down, and the figure at rest stands with its head at positive y.
    upright = np.diag([1.0, -1.0, -1.0])
    params = {
        "global_orient": [[upright.tolist()]],
        "body_pose": [pose.reshape(-1, 3, 3).tolist()],
        "betas": [[0.0] * 10],
    }
    value = {
        "bbox_xyxy": [[1.0, 1.0, side - 1.0, side - 1.0]],
        "pred_cam": [[0.85, 0.0, 0.0]],
        "pred_smpl_params": params,
    }
    shown = modalities.load("human_poses").picture(value, np.full((side, side, 3), 40, np.uint8)).image
    assert shown is not None
    return shown
