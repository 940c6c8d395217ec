"""Writes tests/golden/serialisers.json: what ml-4m makes of 1,000 random labels of each text-like modality.

    PYTHONPATH=ML4M:OLD:. python tests/golden/make_serialisers.py

Reference: github.com/apple/ml-4m at cda590f, `fourm/data/modality_transforms.py` and its 30k WordPiece file, run as
they are; ML4M is a checkout, OLD a folder with albumentations 1.4.0, qudida and einops (`pip install --no-deps
--target`). Every draw is fixed by the label's seed: of the reference by standing in for its `random.shuffle`,
`random.randint` and `torch.randperm` and seeding numpy, of ours by asking `draws` for the same. For each modality the
file has the sha256 of all strings, of all ids, and every 50th string in clear; of t5_caption the bytes of embeddings.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine import coco
from dataengine.geometry import Crop
from dataengine.modalities.metadata import KINDS

FILE = Path(__file__).with_name("serialisers.json")
NUM = 1000
IN_CLEAR = slice(7, None, 50)
SIDE = 224
GRID_EVERY = 10
"""Of so many labels of sam_instance one is asked on the grid."""


@dataclass(frozen=True)
class Label:
    """What a member says as JSON, its crop of an image of (h, w), the row that the crop is, and the seed of draws."""

    value: Any
    crop: Crop
    size: tuple[int, int]
    row: int
    seed: int

    @property
    def draws(self) -> np.random.Generator:
        """The source of all random choices of the serialisation."""
        return np.random.default_rng([77, self.seed])


def labels(name: str) -> Iterator[Label]:
    """The 1,000 labels of a modality."""
    for seed in range(NUM):
        rng = np.random.default_rng([seed, *name.encode()])
        height, width = (int(v) for v in rng.choice([64, 100, 224, 240, 333, 500], 2))
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        crop = Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, bool(rng.integers(2)))
        value, rows = _VALUES[name](rng, crop, (height, width))
        yield Label(value, crop, (height, width), int(rng.integers(rows)), seed)


_LETTERS = [*"abcXYZ 019.,'!?-", "é", "ß", "İ", "漢", "字", "😀", "\t", "\n", "  ", "\u200d", "=", "[", "]", "#"]
_WORDS = ["a", "Dog", "dining table", "hot dog", "BUS", "v0=12", "v1=1000", "[EOS]", "point", "naïve", "...", "don't"]


def _caption(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    texts = []
    for _ in range(int(rng.integers(1, 6))):
        words = [str(word) for word in rng.choice(_WORDS, int(rng.integers(0, 8)))]
        texts.append(" ".join([*words, "".join(rng.choice(_LETTERS, int(rng.integers(0, 12))))]))
    form = int(rng.integers(4))
    if form == 0:
        return ({"caption": texts[0], "url": "x"} if rng.integers(2) else texts[0]), 1
    return ([{"caption": t} if form == 1 or (form == 2 and rng.integers(2)) else t for t in texts]), len(texts)


def _interval(rng: np.random.Generator, low: int, extent: int, whole: int) -> tuple[float, float]:
    """Two ends in pixels within `whole`: some at the ends of the crop or the image, some at halves of bins."""
    edges = [0, low, low + extent, whole, *(low + extent * k / 1998 for k in rng.integers(0, 1998, 2)), *rng.random(3)]
    ends = [float(v) if i < 6 else float(v * whole) for i, v in enumerate(edges)]
    while True:
        a, b = sorted(rng.choice(ends, 2).tolist())
        if a < b:
            return a, b


def _det(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    instances = []
    for _ in range(int(rng.integers(0, 9))):
        x0, x1 = _interval(rng, crop.left, crop.width, size[1])
        y0, y1 = _interval(rng, crop.top, crop.height, size[0])
        box = [x0 / size[1], y0 / size[0], x1 / size[1], y1 / size[0]]
        score = float(rng.choice([0.6, 0.5999, 0, 1, rng.random(), rng.random(), 0.9]))
        instances.append({"boxes": box, "class_name": str(rng.choice(coco.THINGS)), "score": score, "area": 3})
    return {"instances": instances}, 1


def _metadata(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    value: dict[str, Any] = {}
    for i in rng.permutation(len(KINDS))[: int(rng.integers(0, len(KINDS) + 1))].tolist():
        kind = KINDS[i]
        if kind.is_whole:
            value[kind.key] = int(rng.choice([-1, 0, 31, 32, 998, 999, 1000, 31967, 31968, 10**6, rng.integers(3000)]))
        elif kind.rule == "edges":
            edge = float(rng.choice(kind.edges))
            value[kind.key] = float(rng.choice([edge, np.nextafter(edge, -9), np.nextafter(edge, 99), -1, 99]))
        else:
            at = kind.low + (kind.high - kind.low) * float(rng.choice([rng.random(), rng.integers(50) / 49, -1, 2]))
            value[kind.key] = int(at) if rng.integers(8) == 0 else float(at)
    return value, 1


def _color_palette(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    halves = rng.integers(0, 511, (7, 7, 3)) / 2
    return [{str(n): (halves[n - 1, :n] if n % 2 else rng.integers(0, 256, (n, 3))).tolist() for n in range(1, 8)}], 7


def _orientation(rng: np.random.Generator) -> np.ndarray:
    if rng.integers(2):
        matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        return (matrix * np.linalg.det(matrix)).round(int(rng.choice([3, 6, 15])))
    matrix = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    return matrix * np.linalg.det(matrix)


def _human_poses_tokens(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    count = int(rng.integers(0, 9))
    if not count:
        return [], 1
    sides = [
        (_interval(rng, crop.left, crop.width, size[1]), _interval(rng, crop.top, crop.height, size[0]))
        for _ in range(count)
    ]
    cameras = np.where(rng.integers(0, 6, (count, 3)), rng.uniform(-2, 3, (count, 3)), rng.choice([-1, 19, 30, -30]))
    betas = rng.normal(size=(count, 10)) * float(rng.choice([0.5, 3]))
    betas[rng.integers(count)] = rng.choice([-3.0, 3.0, 0.0, 1 / 333], 10)
    return {
        "bbox_xyxy": [[x0, y0, x1, y1] for (x0, x1), (y0, y1) in sides],
        "pred_cam": cameras.tolist(),
        "pred_smpl_params": {
            "global_orient": [[_orientation(rng).tolist()] for _ in range(count)],
            "body_pose": [[np.eye(3).tolist()] * 23] * count,
            "betas": betas.tolist(),
        },
        "pose_tokenized": rng.choice([0, 511, 512, 1023, *rng.integers(0, 1024, 4)], (count, 8)).tolist(),
    }, 1


def _polygon(rng: np.random.Generator) -> np.ndarray:
    """Corners int (n, 2): points and lines, stars that cross themselves, outlines of blobs."""
    kind = int(rng.integers(5))
    if kind < 2:
        return rng.integers(0, SIDE + 1, (int(rng.integers(1, 9)), 2))
    if kind == 2:
        return np.array([[0, 0], [SIDE, 0], [SIDE, SIDE - int(rng.integers(SIDE))], [0, SIDE]])
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for x, y, a, b in rng.integers((0, 0, 1, 1), (SIDE, SIDE, 90, 90), (4, 4)).tolist():
        cv2.ellipse(mask, (x, y), (a, b), int(rng.integers(180)), 0, 360, 1, -1)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return max(contours, key=len)[:, 0]


def _sam_instance_tokens(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    crops = []
    for _ in range(int(rng.integers(1, 3))):
        crops.append([])
        for _ in range(int(rng.integers(0, 10))):
            polygon = _polygon(rng)
            (xmin, ymin), (xmax, ymax) = polygon.min(axis=0).tolist(), polygon.max(axis=0).tolist()
            bbox = [ymin, xmin, min(ymax + 0.5, SIDE) if rng.integers(2) else ymax, xmax]
            tokens = rng.choice([0, 511, 512, 1023, *rng.integers(0, 1024, 12)], 16).tolist()
            crops[-1].append({"polygon": polygon.tolist(), "bbox": bbox, "tokens": tokens})
    return {"side": SIDE, "crops": crops}, len(crops)


def _t5_caption(rng: np.random.Generator, crop: Crop, size: tuple[int, int]) -> tuple[Any, int]:
    rows, tokens = int(rng.integers(1, 4)), int(rng.choice([1, 5, 76, 77, 78, 90]))
    mask = np.arange(tokens) < rng.integers(0, tokens + 1, rows)[:, None]
    return {"emb": rng.standard_normal((rows, tokens, 4)).astype(np.float16), "mask_valid": mask}, rows


_VALUES: dict[str, Callable[[np.random.Generator, Crop, tuple[int, int]], tuple[Any, int]]] = {
    "caption": _caption,
    "det": _det,
    "metadata": _metadata,
    "color_palette": _color_palette,
    "human_poses_tokens": _human_poses_tokens,
    "sam_instance_tokens": _sam_instance_tokens,
    "t5_caption": _t5_caption,
}
NAMES = tuple(_VALUES)
TEXTS = NAMES[:-1]


def digest(texts: list[Any]) -> str:
    """The sha256 of a list of strings or of lists of ids."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def query_points(label: Label) -> np.ndarray:
    """int (n, 2) distinct x, y of a label of sam_instance, in the order in which they are to be said."""
    if label.seed % GRID_EVERY == 0:
        steps = np.linspace(0, SIDE, 9)[1:-1].astype(int)
        points = [(x, y) for x in steps.tolist() for y in steps.tolist()]
    else:
        state = np.random.RandomState(label.seed)
        rows, columns = state.randint(0, SIDE, 7), state.randint(0, SIDE, 7)
        points = list(dict.fromkeys(zip(columns.tolist(), rows.tolist(), strict=True)))
    return np.array(points)[label.draws.permutation(len(points))]


def priorities(label: Label, points: int, instances: int) -> np.ndarray:
    """float (points, instances): in which order the instances at each point are said."""
    return np.random.default_rng([78, label.seed]).random((points, instances))


def reference(name: str, label: Label) -> Any:
    """The string that ml-4m makes of a label, list of them for metadata, float32 (n, c) for t5_caption."""
    import fourm.data.modality_transforms as ml4m

    made = json.loads(json.dumps(label.value)) if name != "t5_caption" else label.value
    crop, draws = label.crop, label.draws
    settings: dict[str, Any] = {}
    if name == "sam_instance_tokens":
        made = _sam_sample(made)
        settings["point_order"] = "grid" if label.seed % GRID_EVERY == 0 else "random"
    transform = getattr(ml4m, _CLASSES[name])(**settings)
    _stand_in(ml4m, name, label, draws)
    made = transform.preprocess(made)
    box = (crop.top, crop.left, crop.height, crop.width)
    made = transform.image_augment(made, box, crop.hflip, label.size, (SIDE, SIDE), label.row)
    return transform.postprocess(made)


_CLASSES = {
    "caption": "CaptionTransform",
    "det": "DetectionTransform",
    "metadata": "MetadataTransform",
    "color_palette": "ColorPaletteTransform",
    "human_poses_tokens": "HumanPoseTransform",
    "sam_instance_tokens": "SAMInstanceTokTransform",
    "t5_caption": "CaptionEmbTransform",
}


def _sam_sample(value: dict[str, Any]) -> list[dict[str, Any]]:
    """As ml-4m reads it from its .npy."""
    return [
        {
            "points": [[np.array(i["polygon"], np.int32)[:, None]] for i in crop],
            "token_ids": np.array([i["tokens"] for i in crop], np.int64).reshape(-1, 16),
            "bbox": np.array([i["bbox"] for i in crop], np.float64).reshape(-1, 4),
        }
        for crop in value["crops"]
    ]


class _Random:
    """In place of the module `random` of the reference: its draws come from the label."""

    def __init__(self, name: str, label: Label, draws: np.random.Generator) -> None:
        self.name, self.label, self.draws = name, label, draws
        self.shuffled = -1

    def randint(self, low: int, high: int) -> int:
        """The row of the label, as the size of a palette."""
        return low + self.label.row

    def shuffle(self, things: list[Any]) -> None:
        """Of metadata by the permutation of the keys in order of id; of SAM first the points, then what each meets."""
        if self.name == "metadata":
            known = [kind.key for kind in KINDS if kind.key in things]
            things[:] = [known[i] for i in self.draws.permutation(len(known))]
            return
        self.shuffled += 1
        if self.shuffled == 0:
            self.num_points = len(things)
            things[:] = [things[i] for i in self.draws.permutation(len(things))]
            return
        instances = self.label.value["crops"][self.label.row]
        rank = priorities(self.label, self.num_points, len(instances))[self.shuffled - 1]
        # Two instances may have the same tokens and box, but then nobody sees which comes first.
        tags = [(i["tokens"], np.int32(i["bbox"]).tolist()) for i in instances]
        met = [(tokens.tolist(), np.int32(bbox).tolist()) for tokens, bbox in things]
        things[:] = [things[k] for k in np.argsort([rank[tags.index(tag)] for tag in met])]


def _stand_in(ml4m: Any, name: str, label: Label, draws: np.random.Generator) -> None:
    import torch

    ml4m.random = _Random(name, label, draws)
    ml4m.torch.randperm = lambda n: torch.tensor(draws.permutation(n))
    np.random.seed(label.seed)


def main() -> None:
    """Run the reference on all labels."""
    import fourm
    from tokenizers import Tokenizer

    trained = Path(fourm.__path__[0]) / "utils/tokenizer/trained/text_tokenizer_4m_wordpiece_30k.json"
    tokenizer = Tokenizer.from_file(str(trained))
    golden: dict[str, Any] = {"note": (__doc__ or "").split("\n\n")[2].replace("\n", " ")}
    for name in NAMES:
        found = [reference(name, label) for label in labels(name)]
        if name == "t5_caption":
            rows = [hashlib.sha256(emb[:77].numpy().astype("<f4").tobytes()).hexdigest() for emb in found]
            golden[name] = {"sha256": digest(rows)}
            continue
        lists = [chunks if isinstance(chunks, list) else [chunks] for chunks in found]
        ids = [[i for chunk in chunks for i in tokenizer.encode(chunk).ids] for chunks in lists]
        # Poses end in a blank, which no tokenizer sees.
        strings = [
            " ".join(chunks).rstrip(" ") if name == "human_poses_tokens" else " ".join(chunks) for chunks in lists
        ]
        golden[name] = {"sha256": digest(strings), "ids_sha256": digest(ids), "strings": strings[IN_CLEAR]}
    FILE.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
