"""Poses and shapes of persons, as parameters of the SMPL body model."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import cv2
import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_boxes
from dataengine.modalities import Kind, Modality, Picture, _draw
from dataengine.modalities import _checks as expect

NUM_JOINTS = 23
NUM_BETAS = 10
NUM_TOKENS = 8
CODEBOOK = 1024
ORTHONORMAL = 0.01
"""How far R transposed times R may be from the identity, in any element: values are stored rounded."""

_SHAPES: dict[str, tuple[int, ...]] = {
    "bbox_xyxy": (4,),
    "pred_cam": (3,),
    "global_orient": (1, 3, 3),
    "body_pose": (NUM_JOINTS, 3, 3),
    "betas": (NUM_BETAS,),
    "pose_tokenized": (NUM_TOKENS,),
    "pose_tokenized_mirrored": (NUM_TOKENS,),
}
_PARAMS = ("global_orient", "body_pose", "betas")

MIRRORED = (1, 0, 2, 4, 3, 5, 7, 6, 8, 10, 9, 11, 13, 12, 14, 16, 15, 18, 17, 20, 19, 22, 21)
"""Which joint of `body_pose` takes the place of each when left and right change places (SMPL's order of joints)."""

_FLIP = np.outer((-1.0, 1.0, 1.0), (-1.0, 1.0, 1.0))

# A stick figure of ordinary proportions in the tree of SMPL's joints, in metres at rest: x to the person's left, y up,
# z forward. It is no part of any body model: it only shows where the rotations point.
_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
_BONES = (
    (0, 0, 0), (0.07, -0.09, 0), (-0.07, -0.09, 0), (0, 0.12, -0.02), (0.03, -0.38, 0), (-0.03, -0.38, 0),
    (0, 0.13, 0), (0, -0.41, -0.03), (0, -0.41, -0.03), (0, 0.06, 0), (0.02, -0.06, 0.12), (-0.02, -0.06, 0.12),
    (0, 0.21, -0.03), (0.08, 0.12, -0.02), (-0.08, 0.12, -0.02), (0, 0.09, 0.05), (0.11, 0.04, 0), (-0.11, 0.04, 0),
    (0.26, 0, 0), (-0.26, 0, 0), (0.25, 0, 0), (-0.25, 0, 0), (0.08, 0, 0), (-0.08, 0, 0),
)  # fmt: skip
_PELVIS = (0.0, -0.23, 0.03)
"""Metres from the origin that the camera refers to (in the chest) to the pelvis, about which everything turns."""
_SIDES = {"left": (255, 149, 0), "right": (0, 174, 239), "middle": (240, 240, 240)}
_ASPECT = 256 / 192
"""Height by width of what the network sees: the shape that a box is grown to."""


class HumanPoses(Modality):
    """`[]` without persons, else a dict of n persons as JSON, as ml-4m reads it.

    `bbox_xyxy` (n, 4): x0 y0 x1 y1 in pixels of the image. `pred_cam` (n, 3): scale s and shift tx, ty (metres, x
    right, y down) of a weak perspective camera of the square around the box once grown to 3:4: a point (X, Y, Z) lies
    at its centre + side * s / 2 * (X + tx, Y + ty). `pred_smpl_params`: `global_orient` (n, 1, 3, 3) and `body_pose`
    (n, 23, 3, 3), rotation matrices of the pelvis in the camera's frame (x right, y down, z away) and of the joints in
    their parents', and `betas` (n, 10), the shape. `pose_tokenized` (n, 8), ids 0..1023 of a tokenizer of `body_pose`,
    and `pose_tokenized_mirrored`, those of `mirrored(body_pose)`, come later; further lists of n numbers are kept.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"

    def encode(self, value: list[Any] | dict[str, Any]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[Any] | dict[str, Any]:
        """The dict, or the empty list (which ml-4m also writes as {})."""
        value = codecs.decode_json(data)
        if value in ([], {}):
            return []
        expect.dictionary(self.name, value, ("bbox_xyxy", "pred_cam", "pred_smpl_params"))
        found: dict[str, Any] = value
        return found

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """Shapes, boxes within the image and with an area, and matrices that are rotations."""
        if isinstance(value, list):
            if value:
                raise ValueError(f"{self.name}: expected an empty list or a dict, got {len(value)} items")
            return
        expect.dictionary(self.name, value, ("bbox_xyxy", "pred_cam", "pred_smpl_params"))
        expect.dictionary(f"{self.name} pred_smpl_params", value["pred_smpl_params"], _PARAMS)
        lists = {**{k: v for k, v in value.items() if k != "pred_smpl_params"}, **value["pred_smpl_params"]}
        if not isinstance(value["bbox_xyxy"], list) or not value["bbox_xyxy"]:
            raise ValueError(f"{self.name}: expected boxes of at least one person, got {value['bbox_xyxy']!r:.40}")
        count = len(value["bbox_xyxy"])
        arrays = {key: self._numbers(key, found, count) for key, found in lists.items()}
        self._check_boxes(arrays["bbox_xyxy"], size)
        for key in ("global_orient", "body_pose"):
            self._check_rotations(key, arrays[key].reshape(-1, 3, 3))
        for key in ("pose_tokenized", "pose_tokenized_mirrored"):
            tokens = arrays.get(key, np.zeros(0))
            if np.any((tokens != np.floor(tokens)) | (tokens < 0) | (tokens >= CODEBOOK)):
                raise ValueError(f"{self.name} {key}: expected ids 0..{CODEBOOK - 1}, got {tokens.tolist()!r:.80}")

    def _numbers(self, key: str, found: Any, count: int) -> np.ndarray:
        try:
            array = np.array(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} {key}: expected lists of numbers, {error}") from error
        if not isinstance(found, list) or array.shape[:1] != (count,):
            raise ValueError(f"{self.name} {key}: expected a list for {count} persons, got {array.shape}")
        wanted = (count, *_SHAPES[key]) if key in _SHAPES else array.shape
        if array.shape != wanted:
            raise ValueError(f"{self.name} {key}: expected {wanted}, got {array.shape}")
        expect.finite(f"{self.name} {key}", array)
        return array

    def _check_boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> None:
        height, width = size
        good = (boxes[:, :2] >= 0) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= (width, height))
        if not good.all():
            wrong = boxes[~good.all(axis=1)][0].tolist()
            raise ValueError(
                f"{self.name} bbox_xyxy: expected x0 < x1 and y0 < y1 within {width} x {height}, got {wrong}"
            )

    def _check_rotations(self, key: str, matrices: np.ndarray) -> None:
        off = np.abs(matrices.swapaxes(1, 2) @ matrices - np.eye(3)).max(axis=(1, 2))
        if off.max() > ORTHONORMAL or np.linalg.det(matrices).min() < 0:
            raise ValueError(f"{self.name} {key}: expected rotation matrices, got one {off.max():.3g} off orthonormal")

    def placeholder(self, size: tuple[int, int]) -> list[Any]:
        """No person."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """Two persons in random poses."""
        height, width = size
        rotations = _random_rotations(rng, 2 * (1 + NUM_JOINTS)).reshape(2, 1 + NUM_JOINTS, 3, 3)
        boxes = rng.uniform((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (2, 4)) * (width, height, width, height)
        cameras = rng.uniform((0.7, -0.1, -0.1), (1.1, 0.1, 0.5), (2, 3))
        return {
            # Whole pixels: mirroring twice is then exact.
            "bbox_xyxy": np.stack([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1).reshape(2, 4).tolist(),
            "pred_cam": cameras.round(5).tolist(),
            "pred_smpl_params": {
                "global_orient": rotations[:, :1].tolist(),
                "body_pose": rotations[:, 1:].tolist(),
                "betas": rng.normal(size=(2, NUM_BETAS)).round(5).tolist(),
            },
        }

    def crop(
        self, value: list[Any] | dict[str, Any], crop: Crop, size: tuple[int, int], side: int
    ) -> list[Any] | dict[str, Any]:
        """The persons of whom a part is left, boxes cut to it and in its pixels; a mirror mirrors the poses too.

        The camera stays that of the uncut box, as in ml-4m, which mirrors neither boxes nor poses. Tokens of a pose are
        not those of its mirror image: under a mirror they change places with those, or are gone where there are none.
        """
        if not isinstance(value, dict):
            return value
        height, width = size
        boxes = np.array(value["bbox_xyxy"], dtype=np.float64)
        found, kept = crop_boxes(boxes / [width, height, width, height], crop, height, width)
        if not kept.any():
            return []
        out: dict[str, Any] = {
            key: [one for one, keep in zip(lists, kept, strict=True) if keep]
            for key, lists in value.items()
            if key != "pred_smpl_params"
        }
        params = {key: np.array(value["pred_smpl_params"][key], dtype=np.float64)[kept] for key in _PARAMS}
        if crop.hflip:
            plain, mirror = "pose_tokenized", "pose_tokenized_mirrored"
            tokens = {mirror: out.pop(plain, None), plain: out.pop(mirror, None)}
            out |= {key: ids for key, ids in tokens.items() if ids is not None}
            # Adding zero turns -0.0 into 0.0.
            out["pred_cam"] = (np.array(out["pred_cam"]) * [1, -1, 1] + 0.0).tolist()
            params["global_orient"] = params["global_orient"] * _FLIP + 0.0
            params["body_pose"] = mirrored(params["body_pose"])
        return {
            **out,
            "bbox_xyxy": (found[kept] * side).round(6).tolist(),
            "pred_smpl_params": {key: array.tolist() for key, array in params.items()},
        }

    def picture(self, value: list[Any] | dict[str, Any], rgb: np.ndarray) -> Picture:
        """A box and a stick figure in the pose for each person, of ordinary proportions: the shape is not shown."""
        image, factor = _draw.canvas(rgb)
        count = len(value["bbox_xyxy"]) if isinstance(value, dict) else 0
        legend = tuple(_SIDES.items()) if count else ()
        for i in range(count):
            assert isinstance(value, dict)
            x0, y0, x1, y1 = (factor * v for v in value["bbox_xyxy"][i])
            image = _draw.rectangle(image, x0, y0, x1, y1, _draw.distinct(i))
            params = value["pred_smpl_params"]
            joints = joint_positions(np.array([*params["global_orient"][i], *params["body_pose"][i]]))
            scale, *shift = value["pred_cam"][i]
            side = max(y1 - y0, (x1 - x0) * _ASPECT)
            points = (joints[:, :2] + shift) * (scale * side / 2) + [(x0 + x1) / 2, (y0 + y1) / 2]
            _sticks(image, points)
        return Picture(image=image, text=f"{count} person{'' if count == 1 else 's'}", legend=legend)


def mirrored(body_pose: np.ndarray) -> np.ndarray:
    """The poses (n, 23, 3, 3) that the same persons have in a mirror."""
    turned: np.ndarray = body_pose[:, list(MIRRORED)] * _FLIP + 0.0
    return turned


def joint_positions(rotations: np.ndarray) -> np.ndarray:
    """Where the 24 joints of the stick figure are (24, 3), in metres in the camera's frame, by its rotations
    (24, 3, 3)."""
    turned = np.empty((len(_PARENTS), 3, 3))
    out = np.empty((len(_PARENTS), 3))
    turned[0], out[0] = rotations[0], _PELVIS
    for joint, parent in enumerate(_PARENTS[1:], start=1):
        turned[joint] = turned[parent] @ rotations[joint]
        out[joint] = out[parent] + turned[parent] @ _BONES[joint]
    return out


def _sticks(image: np.ndarray, points: np.ndarray) -> None:
    """Draw the bones in place; what lies absurdly far away is left out."""
    thick = max(2, math.ceil(max(image.shape[:2]) / 250))
    near = np.abs(points).max(axis=1) < 4 * max(image.shape[:2])
    for joint, parent in enumerate(_PARENTS):
        if parent >= 0 and near[joint] and near[parent]:
            other = MIRRORED[joint - 1] + 1
            colour = _SIDES["left" if other > joint else "right" if other < joint else "middle"]
            a, b = (tuple(int(v) for v in np.rint(points[k])) for k in (parent, joint))
            cv2.line(image, a, b, (0, 0, 0), thick + 2, cv2.LINE_AA)
            cv2.line(image, a, b, colour, thick, cv2.LINE_AA)


def _random_rotations(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rotation matrices (count, 3, 3), to 6 decimals."""
    q, _ = np.linalg.qr(rng.normal(size=(count, 3, 3)))
    q *= np.linalg.det(q)[:, None, None]
    rounded: np.ndarray = q.round(6) + 0.0
    return rounded
