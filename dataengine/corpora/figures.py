"""Stick figures whose poses are exact: persons that stand, walk, sit, reach and bow, without a download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

import cv2
import numpy as np

from dataengine import modalities
from dataengine.corpora import Corpus, RawSample, Split
from dataengine.modalities.human_poses import NUM_BETAS, NUM_JOINTS

SALT = 0xF16  # keeps figure n apart from whatever else is drawn from seed n
MIN_SIZE = 32
MAX_PERSONS = 3
HIPS, KNEES, ANKLES, SHOULDERS, ELBOWS, COLLARS = (0, 1), (3, 4), (6, 7), (15, 16), (17, 18), (12, 13)
SPINE, NECK, HEAD = (2, 5, 8), 11, 14
"""Rows of `body_pose`; of two the left one is first."""
ACTS = {"stand": "standing", "walk": "walking", "sit": "sitting", "reach": "reaching out", "bow": "bowing"}


class Figures(Corpus):
    """`figures:COUNT?size=64&seed=0`: COUNT images of size x size pixels (64) with one to three persons, one a seed."""

    emits = ("human_poses",)

    def __init__(self, location: str) -> None:
        super().__init__(location)
        count, _, query = location.partition("?")
        settings = {"size": "64", "seed": "0", "count": count}
        given = parse_qsl(query, keep_blank_values=True)
        settings.update(given)
        known = {name for name, _ in given} <= {"size", "seed"}
        if not known or not all(value.isdecimal() for value in settings.values()):
            raise ValueError(f"figures:{location}: expected whole numbers as in figures:1000?size=64&seed=0")
        self.count, self.size, self.seed = (int(settings[name]) for name in ("count", "size", "seed"))
        if self.size < MIN_SIZE:
            raise ValueError(f"figures:{location}: expected a size of at least {MIN_SIZE} pixels, got {self.size}")

    def splits(self, shard_size: int) -> list[Split]:
        """Ranges of seeds."""
        if shard_size < 1:
            raise ValueError(f"figures: expected a shard size of at least 1, got {shard_size}")
        end = self.seed + self.count
        return [Split("seeds", i, min(i + shard_size, end)) for i in range(self.seed, end, shard_size)]

    def read(self, split: Split) -> Iterator[RawSample]:
        """Draw one split."""
        codec = modalities.load("human_poses")
        for seed in range(split.start, split.stop):
            rng = np.random.default_rng([seed, SALT])
            acts = [str(act) for act in rng.choice(list(ACTS), int(rng.integers(1, MAX_PERSONS + 1)))]
            persons = figures(rng, self.size, acts)
            ground = np.full((self.size, self.size, 3), rng.integers(40, 120, 3), np.uint8)
            drawn = codec.picture(persons, ground).image
            assert drawn is not None
            rgb = cv2.resize(drawn, (self.size, self.size), interpolation=cv2.INTER_AREA)
            yield RawSample(
                key=f"figure{seed:08d}",
                source=f"seed {seed}, {self.size} px",
                captions=(" and ".join(f"a person {ACTS[act]}" for act in acts),),
                values={"rgb": rgb, "human_poses": persons},
            )

    @classmethod
    def example(cls, folder: str) -> Figures:
        """Six small images; nothing is written."""
        return cls("6?size=32")


def figures(rng: np.random.Generator, size: int, acts: Sequence[str]) -> dict[str, Any]:
    """A value of `human_poses`: persons side by side in an image of `size` pixels, each at an act."""
    count = len(acts)
    width = size / count
    boxes = [[i * width, 0.0, (i + 1) * width, float(size)] for i in range(count)]
    turned = [_rotation((np.pi, 0, 0)) @ _rotation((0, rng.normal(0, 0.6), 0)) for _ in range(count)]
    return {
        "bbox_xyxy": boxes,
        "pred_cam": [[0.8, 0.0, 0.2]] * count,
        "pred_smpl_params": {
            "global_orient": [[one.round(6).tolist()] for one in turned],
            "body_pose": [pose(rng, act).round(6).tolist() for act in acts],
            "betas": [[0.0] * NUM_BETAS] * count,
        },
    }


def pose(rng: np.random.Generator, act: str) -> np.ndarray:
    """Rotations (23, 3, 3) of the joints of a person at an act; x is to its left, y up, z forward.

    Few numbers decide most of it, as in people; the rest is a small tremor of every joint.
    """
    angles = rng.normal(0, 0.04, (NUM_JOINTS, 3))
    phase, much = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0)
    for side, sign in enumerate((1, -1)):
        # Arms hang down instead of being stretched out aside.
        angles[SHOULDERS[side]] += (0, 0, -sign * (1.2 + rng.normal(0, 0.1)))
        angles[ELBOWS[side]] += (0, -sign * abs(rng.normal(0.2, 0.15)), 0)
        swing = np.sin(phase + side * np.pi) * much
        if act == "walk":
            angles[HIPS[side]] += (-0.7 * swing, 0, 0)
            angles[KNEES[side]] += (0.5 * much * (1 - np.cos(phase + side * np.pi)), 0, 0)
            angles[SHOULDERS[side]] += (0, 0.8 * sign * swing, 0)
        elif act == "sit":
            angles[HIPS[side]] += (-1.5 * much, 0, 0.2 * sign)
            angles[KNEES[side]] += (1.5 * much, 0, 0)
        elif act == "reach":
            angles[SHOULDERS[side]] += (0, 0, sign * rng.uniform(0, 2.4) * much)
            angles[COLLARS[side]] += (0, 0, 0.2 * sign * much)
        elif act == "bow":
            angles[SHOULDERS[side]] += (0.4 * much, 0, 0)
            angles[ANKLES[side]] += (-0.2 * much, 0, 0)
    for joint in SPINE:
        angles[joint] += (0.45 * much if act == "bow" else 0.05, 0.15 * np.sin(phase), 0)
    angles[NECK] += (0.1, 0.4 * np.cos(phase), 0)
    angles[HEAD] += (0.1, 0.3 * np.cos(phase), 0)
    return np.stack([_rotation(vector) for vector in angles])


def _rotation(vector: Any) -> np.ndarray:
    """The matrix of a rotation about a vector by its length (Rodrigues)."""
    return np.asarray(cv2.Rodrigues(np.asarray(vector, np.float64))[0])
