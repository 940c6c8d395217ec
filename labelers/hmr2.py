"""Poses and shapes of persons by HMR2.0 (4D-Humans, Goel et al. 2023)."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import weights
from dataengine.labeler import Labeler, Loaded, Staged
from dataengine.sample import Sample
from dataengine.weights import Weights
from labelers import _checkpoints, _images, _networks, _persons

if TYPE_CHECKING:
    from torch import Tensor

    from labelers._hmr2 import Hmr2 as Network

LICENCE = "MIT (code), research (SMPL)"
"""The weights have no licence of their own; they were trained on fits of SMPL and data for research."""
STUBS = (
    "yacs.config.CfgNode",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "typing.Any",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
    "builtins.str",
    "collections.defaultdict",
)
"""What may lie in the published file beside the tensors: its settings, as yacs, OmegaConf or Lightning saved them."""
PLACES = 5
"""Decimals of what is written."""


@dataclass(frozen=True, kw_only=True)
class Hmr2(Labeler):
    """The persons of `det` (score above `min_score`) as parameters of the SMPL body model: see the modality.

    `global_orient` (n, 1, 3, 3) and `body_pose` (n, 23, 3, 3) are rotation matrices, `betas` (n, 10) the shape,
    `pred_cam` (n, 3) the camera of each one's crop, `bbox_xyxy` (n, 4) its box in pixels; `[]` without persons. The
    body model itself is not needed. All persons of a batch of images go through the network together, at most `chunk`
    at once. `checkpoint` is the published archive (then the `.ckpt` in it is copied out once, beside it) or that file.
    """

    inputs = ("rgb", "det")
    emits = ("human_poses",)
    batch_size = 16
    gpus = 0.3

    checkpoint: str = "https://people.eecs.berkeley.edu/~jathushan/projects/4dhumans/hmr2_data.tar.gz"
    min_score: float = 0.5
    chunk: int = 64
    precision: _networks.Precision = "bfloat16"
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_score < 1 or self.chunk < 1:
            raise ValueError(
                f"hmr2: expected min_score in 0..1 and a chunk of at least 1, got {self.min_score} and {self.chunk}"
            )

    def weights(self) -> Weights:
        """The published weights: research."""
        return weights.describe(self.checkpoint, licence=LICENCE)

    def load(self, device: str) -> Loaded:
        """Read trunk and head, without the body model, and put them on the device."""
        from labelers import _hmr2

        network = _hmr2.network(_checkpoints.read(unpacked(weights.resolve(self.checkpoint)), stubs=STUBS))
        _networks.placed(network.backbone, device, self.precision, compiled=self.compiled)
        # Small beside the trunk, and it ends in differences from a mean body: half precision would round the rotations.
        _networks.placed(network.smpl_head, device, "float32")

        def prepare(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
            boxes = _persons.boxes_of(sample.values["det"], sample.size, self.min_score)
            return boxes, np.array([_persons.crop(sample.rgb, box) for box in boxes], dtype=np.float32)

        def label(prepared: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
            crops = [crop for _, of_image in prepared for crop in of_image]
            rotations, betas, cameras = _bodies(network, crops, self.chunk, device)
            ends = np.cumsum([len(boxes) for boxes, _ in prepared])
            return [
                {"human_poses": _value(boxes, *(a[end - len(boxes) : end] for a in (rotations, betas, cameras)))}
                for (boxes, _), end in zip(prepared, ends, strict=True)
            ]

        return Staged(prepare, label)

    def tiny(self, folder: Path) -> Hmr2:
        """A random network of width 16 in the format of the published checkpoint."""
        file = folder / "hmr2.ckpt"
        if not file.exists():
            import torch

            from labelers import _hmr2

            shape = _hmr2.Shape(width=16, depth=2, mlp=32, decoder=16, decoder_depth=2, decoder_mlp=16, decoder_inner=8)
            torch.save({"state_dict": _hmr2.random_state(shape, seed=5), "epoch": 0, "global_step": 0}, file)
            weights.mark_random(file, seed=5)
        return replace(self, checkpoint=str(file))


def unpacked(file: Path) -> Path:
    """The checkpoint itself: this file, or the one `.ckpt` in it when it is a tar, copied out of it once, beside it."""
    if not file.name.endswith((".tar", ".tar.gz", ".tgz")) and not _is_gzip(file):
        return file
    target = file.with_name(file.name + ".ckpt")
    if target.exists():
        return target
    try:
        with tarfile.open(file) as archive:
            found = [m for m in archive if m.isfile() and m.name.endswith(".ckpt")]
            if len(found) != 1:
                raise ValueError(f"{file.name}: expected one .ckpt in the archive, found {[m.name for m in found]}")
            stream = archive.extractfile(found[0])
            assert stream is not None
            # Only the bytes of that one member are taken, under a name of ours, and it appears when it is whole.
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
                try:
                    shutil.copyfileobj(stream, partial, 1 << 22)
                    partial.flush()
                    os.chmod(partial.name, stat.S_IMODE(file.stat().st_mode))  # a cache may be read by others
                    os.replace(partial.name, target)
                except BaseException:
                    os.unlink(partial.name)
                    raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file.name} is cut short, damaged or no tar archive: {error}; fetch it again") from error
    except OSError as error:
        raise OSError(
            f"{file.parent} cannot be written ({error.strerror}): unpack {file.name} elsewhere and name the .ckpt in "
            "it as checkpoint"
        ) from error
    return target


def _is_gzip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _bodies(
    network: Network, crops: Sequence[np.ndarray], chunk: int, device: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotations (n, 24, 3, 3), betas (n, 10) and cameras (n, 3) of n crops, float64."""
    import torch

    if not crops:
        return np.zeros((0, 24, 3, 3)), np.zeros((0, 10)), np.zeros((0, 3))
    with torch.inference_mode():
        parts = [network(_batch(crops[i : i + chunk], device)) for i in range(0, len(crops), chunk)]
        rotations, betas, cameras = (torch.cat(one).double().cpu().numpy() for one in zip(*parts, strict=True))
    return rotations, betas, cameras


def _batch(crops: Sequence[np.ndarray], device: str) -> Tensor:
    """Crops float32 (256, 192, 3) of 0..255 as a normalised batch (n, 3, 256, 192) on the device.

    Not as bytes: blurred crops have levels between them, and the traffic is nothing beside the network.
    """
    import torch

    pixels = torch.from_numpy(np.stack(crops))
    if device.startswith("cuda"):
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in _images.IMAGENET)
    return ((pixels.permute(0, 3, 1, 2) - mean) / std).contiguous()


def _value(boxes: np.ndarray, rotations: np.ndarray, betas: np.ndarray, cameras: np.ndarray) -> Any:
    """What is written of the persons of one image."""
    if len(boxes) == 0:
        return []
    rotations, betas, cameras = (a.round(PLACES) + 0.0 for a in (rotations, betas, cameras))
    return {
        "bbox_xyxy": boxes.astype(np.float64).round(2).tolist(),
        "pred_cam": cameras.tolist(),
        "pred_smpl_params": {
            "global_orient": rotations[:, :1].tolist(),
            "body_pose": rotations[:, 1:].tolist(),
            "betas": betas.tolist(),
        },
    }
