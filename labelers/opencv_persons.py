"""Boxes of persons by the people and face detectors that come with OpenCV and need no download."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample

WINDOW = (64, 128)
"""Width and height in pixels of what the detector looks at."""

SLOPE, MIDDLE = 4.0, 1.0
"""Score = sigmoid(SLOPE * (margin - MIDDLE)), so that 0.6, from which ml-4m counts, is a margin of 1.1. On the few
photographs it was set by, a standing person had 1.1 to 1.4, and what was taken for one (a wheel, a tower, a helmet) up
to 1.05."""

FACE_SLOPE, FACE_MIDDLE = 1.0, 4.6
"""The same for the margin of the face cascade: on those photographs a face had 6.3, engraved heads on coins 2 to 3.5,
and what was taken for a face (a flower, a cell) up to 0.8."""

FACES = "haarcascade_frontalface_default.xml"


@dataclass(frozen=True, kw_only=True)
class OpenCvPersons(Labeler):
    """Upright whole persons by HOG and a linear SVM (Dalal and Triggs 2005), and frontal faces by a Haar cascade (Viola
    and Jones 2001), as `{"instances": [...]}`.

    Each has `boxes` [x0, y0, x1, y1] in 0..1 of the image, `class_name` (always "person") and `score` (a monotone map
    of the detector's margin, see `MIDDLE`; not a probability); the best score is first. It needs no download: it
    sees persons of at least `96 / upscale` pixels of height and misses sitting, cut and crowded ones. A face is a
    person whose box is the face's own: no body is guessed around it; `faces=False` leaves them out.
    """

    inputs = ("rgb",)
    emits = ("det",)
    batch_size = 16
    alternative = True

    min_score: float = 0.05
    max_overlap: float = 0.5
    stride: int = 8
    scale_step: float = 1.05
    upscale: float = 1.0
    faces: bool = True

    def load(self, device: str) -> Loaded:
        """The detector's coefficients, which are part of OpenCV; the device is not used."""
        if not hasattr(cv2, "HOGDescriptor"):
            raise ImportError(
                f"opencv_persons: OpenCV {cv2.__version__} has no HOGDescriptor (5 moved it to the contrib build): "
                "pip install 'opencv-python-headless<5'"
            )
        hog = cv2.HOGDescriptor()
        hog.setSVMDetector(np.array(cv2.HOGDescriptor.getDefaultPeopleDetector(), np.float32))
        cascade = cv2.CascadeClassifier(str(Path(cv2.__file__).with_name("data") / FACES)) if self.faces else None

        def label(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            return [{"det": {"instances": self._detect(hog, cascade, sample.rgb)}} for sample in samples]

        return label

    def _detect(self, hog: Any, cascade: Any, rgb: np.ndarray) -> list[dict[str, Any]]:
        found = self._people(hog, rgb) + ([] if cascade is None else _face_boxes(cascade, rgb))
        # OpenCV's threads append as they finish: sorting makes the order, and what the suppression keeps, certain.
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        return self._kept([score for score, _ in found], [box for _, box in found])

    def _people(self, hog: Any, rgb: np.ndarray) -> list[tuple[float, list[float]]]:
        """Scores and boxes of all windows that look like a person."""
        # In colour, of which HOG takes the strongest gradient: on grey the margins of true persons fall by a third.
        image = rgb
        if self.upscale != 1:
            image = cv2.resize(rgb, None, fx=self.upscale, fy=self.upscale, interpolation=cv2.INTER_LINEAR)
        if image.shape[0] < WINDOW[1] or image.shape[1] < WINDOW[0]:
            return []
        # All windows, without OpenCV's grouping, which drops a person that few neighbouring windows agree on.
        windows, margins = hog.detectMultiScale(
            image,
            winStride=(self.stride, self.stride),
            padding=(2 * self.stride, 2 * self.stride),
            scale=self.scale_step,
            groupThreshold=0,
        )
        if len(windows) == 0:
            return []
        boxes = _person_boxes(np.asarray(windows, dtype=np.float64), image.shape[1], image.shape[0])
        scores = [_sigmoid(SLOPE * (float(margin) - MIDDLE)) for margin in np.ravel(margins)]
        return list(zip(scores, boxes.tolist(), strict=True))

    def _kept(self, scores: list[float], boxes: list[list[float]]) -> list[dict[str, Any]]:
        corners = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
        kept = cv2.dnn.NMSBoxes(corners, scores, self.min_score, self.max_overlap)
        return [
            {"boxes": [round(c, 5) for c in boxes[i]], "class_name": "person", "score": round(scores[i], 4)}
            for i in sorted(np.ravel(kept).astype(int).tolist())
            if boxes[i][2] > boxes[i][0] and boxes[i][3] > boxes[i][1]
        ]


def _person_boxes(windows: np.ndarray, width: int, height: int) -> np.ndarray:
    """Windows (n, 4) x y w h in pixels as person boxes (n, 4) x0 y0 x1 y1 in 0..1, within the image.

    The detector was trained on windows with a margin around the person; the shares are those of OpenCV's own example
    (samples/cpp/peopledetect.cpp).
    """
    x, y, w, h = windows.T
    boxes = np.stack([x + 0.1 * w, y + 0.07 * h, x + 0.9 * w, y + 0.87 * h], axis=1)
    return np.clip(boxes / [width, height, width, height], 0.0, 1.0)


def _face_boxes(cascade: Any, rgb: np.ndarray) -> list[tuple[float, list[float]]]:
    """Scores and boxes x0 y0 x1 y1 in 0..1 of frontal faces of at least 24 pixels."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    faces, _, margins = cascade.detectMultiScale3(
        grey, scaleFactor=1.1, minNeighbors=5, minSize=(24, 24), outputRejectLevels=True
    )
    if len(faces) == 0:
        return []
    x, y, w, h = np.asarray(faces, dtype=np.float64).T
    height, width = grey.shape
    boxes = np.stack([x, y, x + w, y + h], axis=1) / [width, height, width, height]
    scores = [_sigmoid(FACE_SLOPE * (float(margin) - FACE_MIDDLE)) for margin in np.ravel(margins)]
    return list(zip(scores, np.clip(boxes, 0.0, 1.0).tolist(), strict=True))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
