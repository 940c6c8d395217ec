"""Poses and shapes of persons, with the tokens of their poses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from dataengine import codecs
from dataengine.geometry import Crop, crop_boxes
from dataengine.modalities import Kind, Picture, Piece, TextLike
from dataengine.modalities import _checks as expect
from dataengine.modalities._text import BOX, INT, NUM_BINS, chunks, quoted, spelled, unbinned, unspelled, until_end
from dataengine.modalities.human_poses import CODEBOOK, NUM_BETAS, NUM_JOINTS, NUM_TOKENS, ORTHONORMAL, HumanPoses

SIDE = 224
"""Pixels of the crop in which `parse` gives boxes, as ml-4m shows them."""

_GROUPS = {"pose": NUM_TOKENS, "global": 9, "camera": 3, "shape": NUM_BETAS}
_SCALES = {"global": (499.5, 499.5), "camera": (49.95, 49.95), "shape": (166.5, 499.5)}
"""Bins are scale * x + offset (ml-4m's convert_humanposes_to_string): 0..999 is -1..1, -1..19 and -3..3."""
_CAMERA = (-1.0, 19.0)
_BIN = re.compile(f"v0={INT}")
_PIECES = 1 + len(_GROUPS)
_PLAIN, _MIRROR = "pose_tokenized", "pose_tokenized_mirrored"


class HumanPosesTokens(TextLike):
    """The value of `human_poses` with `pose_tokenized` (n, 8): ids 0..1023 of a tokenizer of `body_pose`; as JSON.

    `pose_tokenized_mirrored`, the ids of `human_poses.mirrored(body_pose)`, is what mirrored crops take; without it
    these keep the ids of the pose that is not mirrored, as ml-4m does. `body_pose` may be absent (a text has none of
    it); tokens stand for it. Boxes are floats.

    Three things differ from ml-4m's text, unless `faithful`: a mirrored crop mirrors box, camera, orientation and pose
    (ml-4m leaves all as they were); what lies outside of the 1000 bins, betas beyond -3..3 above all, is in the last of
    them (ml-4m writes words like `v0=-33`, which no vocabulary has, and which break the 39 words of a person); and who
    only touches the crop from outside is not in it.
    """

    kind: ClassVar[Kind] = "instances"
    suffix: ClassVar[str] = "json"
    choice: ClassVar[Literal["crop", "any"]] = "crop"
    max_tokens: ClassVar[int] = 275
    packs_as: ClassVar[str] = "human_poses"
    faithful: ClassVar[bool] = False
    """Whether the text is ml-4m's in every case, its errors included."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._poses = HumanPoses(name)

    def encode(self, value: list[Any] | dict[str, Any]) -> bytes:
        """Compact JSON."""
        return codecs.encode_json(value)

    def decode(self, data: bytes) -> list[Any] | dict[str, Any]:
        """The dict, or the empty list (which ml-4m also writes as {})."""
        return self._poses.decode(data)

    def check(self, value: Any, size: tuple[int, int]) -> None:
        """As `human_poses`, and tokens."""
        if isinstance(value, dict):
            expect.dictionary(self.name, value, ("bbox_xyxy", "pred_cam", "pred_smpl_params", _PLAIN))
            if not isinstance(value["bbox_xyxy"], list):
                raise ValueError(f"{self.name}: expected a list of boxes, got {type(value['bbox_xyxy']).__name__}")
        self._poses.check(_complete(value), size)

    def placeholder(self, size: tuple[int, int]) -> list[Any]:
        """No person."""
        return []

    def example(self, rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
        """Two persons in random poses with random tokens."""
        tokens = rng.integers(0, CODEBOOK, (2, 2, NUM_TOKENS)).tolist()
        return {**self._poses.example(rng, size), _PLAIN: tokens[0], _MIRROR: tokens[1]}

    def crop(
        self, value: list[Any] | dict[str, Any], crop: Crop, size: tuple[int, int], side: int
    ) -> list[Any] | dict[str, Any]:
        """As `human_poses`; the tokens of a mirrored crop are the mirrored ones."""
        if not isinstance(value, dict):
            return value
        both = _MIRROR in value
        full = _complete(value) if both else {**_complete(value), _MIRROR: value[_PLAIN]}
        out = self._poses.crop(full, crop, size, side)
        if isinstance(out, dict):
            if not both:
                del out[_MIRROR]
            if "body_pose" not in value["pred_smpl_params"]:
                del out["pred_smpl_params"]["body_pose"]
        return out

    def variants(
        self, value: list[Any] | dict[str, Any], crops: Sequence[Crop], size: tuple[int, int]
    ) -> list[list[Piece]]:
        """For each crop five pieces a person: `human` and the box, then pose, global, camera and shape; or `none`."""
        return [self._persons(value, crop, size) if isinstance(value, dict) else ["none"] for crop in crops]

    def _persons(self, value: dict[str, Any], crop: Crop, size: tuple[int, int]) -> list[Piece]:
        boxes, kept = self._boxes(np.array(value["bbox_xyxy"], dtype=np.float64), crop, size)
        mirror = crop.hflip and not self.faithful
        tokens = value[_MIRROR if mirror and _MIRROR in value else _PLAIN]
        camera = np.array(value["pred_cam"], dtype=np.float64)
        orient = np.array(value["pred_smpl_params"]["global_orient"], dtype=np.float64).reshape(-1, 9)
        if mirror:
            camera = camera * [1, -1, 1]
            orient = orient * [1, -1, -1, -1, 1, 1, -1, 1, 1]
        bins = {
            "global": self._bins("global", orient),
            "camera": self._bins("camera", np.clip(camera, *_CAMERA)),
            "shape": self._bins("shape", np.array(value["pred_smpl_params"]["betas"], dtype=np.float64)),
        }
        corners = np.rint(boxes * (NUM_BINS - 1)).astype(np.int64).tolist()
        pieces: list[Piece] = []
        for i in np.flatnonzero(kept).tolist():
            pieces.append(" ".join(["human", *(f"v{axis}={v}" for axis, v in enumerate(corners[i]))]))
            pieces.append(" ".join(["pose", *spelled([int(token) for token in tokens[i]])]))
            pieces += [" ".join([group, *(f"v0={v}" for v in lists[i])]) for group, lists in bins.items()]
        return pieces or ["none"]

    def _boxes(self, pixels: np.ndarray, crop: Crop, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        height, width = size
        shares = pixels / [width, height, width, height]
        if not self.faithful:
            return crop_boxes(shares, crop, height, width)
        origin, extent = [crop.left, crop.top] * 2, [crop.width, crop.height] * 2
        moved = (shares * [width, height, width, height] - origin) / extent
        pairs = moved.reshape(-1, 2, 2)
        outside: np.ndarray = np.all(pairs < 0, axis=1) | np.all(pairs > 1, axis=1)
        return np.clip(moved, 0, 1), ~np.any(outside, axis=1)

    def _bins(self, group: str, numbers: np.ndarray) -> list[list[int]]:
        scale, offset = _SCALES[group]
        bins = np.rint(scale * numbers + offset).astype(np.int64)
        found: list[list[int]] = (bins if self.faithful else np.clip(bins, 0, NUM_BINS - 1)).tolist()
        return found

    def assemble(self, pieces: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Sequence[int]]:
        """Person by person as they are, the four groups of each in an order of their own."""
        if len(pieces) < _PIECES:
            return list(pieces)
        out: list[Sequence[int]] = []
        for head in range(0, len(pieces), _PIECES):
            out += [pieces[head], *(pieces[head + 1 + i] for i in rng.permutation(len(_GROUPS)).tolist())]
        return out

    def parse(self, text: str) -> tuple[list[Any] | dict[str, Any], list[str]]:
        """The persons of a text, those aside of whom something is wrong; boxes in pixels of a crop of side 224.

        Without `body_pose`: a pose tokenizer makes it of `pose_tokenized`. An orientation that is no rotation is a
        complaint, and the nearest rotation its value.
        """
        before, said = chunks(until_end(text).split(), "human")
        if not said and before == ["none"]:
            return [], []
        complaints = []
        if before or not said:
            complaints.append(f"expected 'none', or 'human' first, got {quoted(' '.join(before))}")
        persons = []
        for number, words in enumerate(said, start=1):
            try:
                person = _person(words)
            except ValueError as error:
                complaints.append(f"person {number}: {error}")
                continue
            matrix = person["global"]
            if np.abs(matrix.T @ matrix - np.eye(3)).max() > ORTHONORMAL or np.linalg.det(matrix) < 0:
                complaints.append(f"person {number}: expected a rotation after 'global', took the nearest one")
                person["global"] = _rotation(matrix)
            persons.append(person)
        if not persons:
            return [], complaints
        params = {"global_orient": [[p["global"].tolist()] for p in persons], "betas": [p["shape"] for p in persons]}
        value = {"bbox_xyxy": [p["box"] for p in persons], "pred_cam": [p["camera"] for p in persons]}
        return {**value, "pred_smpl_params": params, _PLAIN: [p["pose"] for p in persons]}, complaints

    def picture(self, value: list[Any] | dict[str, Any], rgb: np.ndarray) -> Picture:
        """As `human_poses`; persons without `body_pose` stand at rest."""
        return self._poses.picture(_complete(value), rgb)


def _complete(value: Any) -> Any:
    """The value with a `body_pose` at rest where it has none, so that it is one of `human_poses`."""
    params = value.get("pred_smpl_params") if isinstance(value, dict) else None
    if not isinstance(params, dict) or "body_pose" in params:
        return value
    rest = np.tile(np.eye(3), (len(value["bbox_xyxy"]), NUM_JOINTS, 1, 1)).tolist()
    return {**value, "pred_smpl_params": {**params, "body_pose": rest}}


def _person(words: Sequence[str]) -> dict[str, Any]:
    """Box, pose, global (3, 3), camera and shape of the words after `human`; ValueError if these are not that."""
    match = BOX.fullmatch(" ".join(words[:4]))
    if match is None:
        raise ValueError(f"expected v0= v1= v2= v3= after 'human', got {quoted(' '.join(words[:4]))}")
    corners = [int(v) for v in match.groups()]
    if corners[0] > corners[2] or corners[1] > corners[3]:
        raise ValueError(f"expected x0 <= x1 and y0 <= y1, got {quoted(match[0])}")
    out: dict[str, Any] = {"box": [SIDE * v for v in unbinned(corners)]}
    at = 4
    while at < len(words):
        group = words[at]
        if group not in _GROUPS or group in out:
            wanted = " or ".join(repr(g) for g in _GROUPS if g not in out) or "'human'"
            raise ValueError(f"expected {wanted}, got {quoted(' '.join(words[at : at + 3]))}")
        found = words[at + 1 : at + 1 + _GROUPS[group]]
        out[group] = unspelled(found, NUM_TOKENS) if group == "pose" else _numbers(group, found)
        at += 1 + _GROUPS[group]
    missing = [group for group in _GROUPS if group not in out]
    if missing:
        raise ValueError(f"expected {' and '.join(map(repr, missing))}, got {quoted(' '.join(words[-3:]))} last")
    out["global"] = np.array(out["global"]).reshape(3, 3)
    return out


def _numbers(group: str, words: Sequence[str]) -> list[float]:
    matches = [_BIN.fullmatch(word) for word in words]
    bins = [int(match[1]) for match in matches if match]
    if len(words) != _GROUPS[group] or len(bins) != len(words):
        raise ValueError(f"expected {_GROUPS[group]} of v0= after {group!r}, got {quoted(' '.join(words))}")
    scale, offset = _SCALES[group]
    return [(v - offset) / scale for v in bins]


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation nearest to a matrix (3, 3) (Kabsch 1976)."""
    left, _, right = np.linalg.svd(matrix)
    left[:, 2] *= np.sign(np.linalg.det(left @ right))
    nearest: np.ndarray = left @ right
    return nearest
