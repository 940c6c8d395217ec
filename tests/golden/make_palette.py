"""Writes tests/golden/palette.npz: what PyPalette makes of photographs, and the palette that 4M-21 published.

    PYTHONPATH=PYPALETTE/pypalette:. python tests/golden/make_palette.py ML4M

Reference: github.com/adamgrieger/pypalette at d52a5c5 (MIT), plain Python, run with Python 3.11: from 3.12 on `sum`
adds floats more exactly, and a draw may fall on the neighbouring pixel. ML4M is a checkout of github.com/apple/ml-4m at
cda590f, of which notebooks/generation_4M-21.ipynb shows a photograph (cell 9) and five colours predicted for it (cell
15). Of the photograph only the mean colour and the number of pixels of each cell of 16 levels a channel are kept:
numbers, no picture.
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from labelers import color_palette

FILE = Path(__file__).with_name("palette.npz")
PHOTOS = {"astronaut": (64, 64), "coffee": (48, 72), "chelsea": (90, 60)}
"""Photographs and the heights and widths at which they are given to the reference."""
SEEDS = (0, 1, 2)


def pixels(name: str) -> np.ndarray:
    """A photograph as uint8 (h * w, 3)."""
    height, width = PHOTOS[name]
    photo = Image.fromarray(getattr(skimage.data, name)()).resize((width, height), Image.Resampling.BOX)
    return np.asarray(photo).reshape(-1, 3)


def reference() -> dict[str, np.ndarray]:
    """Centres float64 (seeds, k, 3) of each photograph and k, unrounded, and the mean colours."""
    from kmeans import KMeans
    from pypalette import average_color

    found = {}
    for name in PHOTOS:
        image = [tuple(int(level) for level in pixel) for pixel in pixels(name)]
        found[f"{name} 1"] = np.array(average_color(image))
        for k in range(2, color_palette.NUM_PALETTES + 1):
            centres = []
            for seed in SEEDS:
                random.seed(seed)
                centres.append(KMeans(image, k).get_colors())
            found[f"{name} {k}"] = np.array(centres)
    return found


def published(ml4m: Path) -> dict[str, np.ndarray]:
    """The colours predicted in ml-4m's notebook, and those of its photograph: means (cells, 3) and counts (cells,)."""
    cells = json.loads((ml4m / "notebooks" / "generation_4M-21.ipynb").read_text())["cells"]

    def picture(cell: int) -> np.ndarray:
        shown = [out["data"]["image/png"] for out in cells[cell]["outputs"] if "image/png" in out.get("data", {})]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown[0]))).convert("RGB"))

    swatches, counts = np.unique(picture(15)[600, 2120:2470], axis=0, return_counts=True)
    photo = picture(9).reshape(-1, 3)
    _, cell, count = np.unique(photo // 16, axis=0, return_inverse=True, return_counts=True)
    sums = [np.bincount(cell.ravel(), weights=photo[:, channel]) for channel in range(3)]
    means = np.stack(sums, axis=1) / count[:, None]
    return {"predicted": swatches[counts > 40], "photo": means.astype(np.float32), "photo counts": count}


if __name__ == "__main__":
    note = f"adamgrieger/pypalette d52a5c5 under Python {sys.version.split()[0]}; apple/ml-4m cda590f; seeds {SEEDS}"
    np.savez_compressed(FILE, note=np.array(note), **reference(), **published(Path(sys.argv[1])))
