"""A page that shows a dataset or a training run: data classes in, one self-contained HTML file out."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dataengine.modalities import Picture
from pipelines.visible import visible


@dataclass(frozen=True)
class Cell:
    """One modality of one sample; not `valid` is shown as "no label"; `note` becomes a badge ("random weights")."""

    modality: str
    picture: Picture
    valid: bool = True
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One sample: a cell for each column of its grid, in their order."""

    key: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Column:
    """One modality and what made it; `random` says that its network has random weights, so its values mean nothing."""

    name: str
    labeler: str = ""
    random: bool = False


@dataclass(frozen=True)
class Grid:
    """Samples down, modalities across; the first column stays in sight."""

    title: str
    text: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                expected = f"{len(self.columns)} (one a column of grid {self.title!r})"
                raise ValueError(f"row {row.key!r} has {len(row.cells)} cells, expected {expected}")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; columns of numbers and of hashes are recognised and set as such."""

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r}: row {row!r} has {len(row)} values, expected {len(self.header)}"
                )


@dataclass(frozen=True)
class Curve:
    """A named series, x ascending; points that are not finite (or not positive, on a log axis) are gaps."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.name!r} has {len(self.x)} x and {len(self.y)} y, expected as many")


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes; neighbouring plots of a page stand side by side."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_y: bool = False


Section = Grid | Table | Plot


@dataclass(frozen=True)
class Page:
    """What the page says; `facts` are its headline numbers as (name, value)."""

    title: str
    subtitle: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = ()


def render(page: Page, *, thumb: int | None = None) -> str:
    """The page as one HTML file that asks the network for nothing.

    Pictures are inlined at no more than `thumb` pixels a side. By default, the more there are, the fewer pixels each
    gets: a page of 900 photographs stays under 15 MB.
    """
    side = thumb or _thumb_side(page)
    if side < 1:
        raise ValueError(f"thumb is {thumb}, expected at least 1 pixel")
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().get_template("page.html.j2")
    html: str = template.render(
        page=page,
        blocks=list(_blocks(page.sections, side)),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        # The page's own script is the only one the browser may run, even if an escape were ever forgotten.
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
    )
    return html.strip() + "\n"


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader,
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    """What is put into the page: escaping keeps text from being markup, this keeps it from turning the page around."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _blocks(sections: Sequence[Section], side: int) -> Iterator[dict[str, Any]]:
    """What the template lays out: a grid, a table, or a run of neighbouring plots, each with an anchor for the menu."""
    plots: list[Plot] = []
    for index, section in enumerate((*sections, None)):
        if isinstance(section, Plot):
            plots.append(section)
            continue
        if plots:
            title = plots[0].title if len(plots) == 1 else "Curves"
            yield {"kind": "plots", "id": f"s{index - 1}", "title": title, "charts": [_chart(plot) for plot in plots]}
            plots = []
        if isinstance(section, Grid):
            rows = [(row.key, [_cell(cell, side) for cell in row.cells]) for row in section.rows]
            wide = [any(cell["wide"] for cell in column) for column in zip(*(cells for _, cells in rows), strict=True)]
            yield {
                "kind": "grid",
                "id": f"s{index}",
                "title": section.title,
                "grid": section,
                "rows": rows,
                "wide": wide,
            }
        elif isinstance(section, Table):
            styles = [_style([row[i] for row in section.rows]) for i in range(len(section.header))]
            yield {"kind": "table", "id": f"s{index}", "title": section.title, "table": section, "styles": styles}


# --- pictures ---------------------------------------------------------------------------------------------------------

TINY = 64
"""Images of at most this many pixels a side are grids of features: enlarged with hard pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """An inlined image: its data URI, its size in pixels, and whether it is to be enlarged with hard pixels."""

    uri: Markup
    width: int
    height: int
    tiny: bool


def _thumb_side(page: Page) -> int:
    grids = [section for section in page.sections if isinstance(section, Grid)]
    num_cells = sum(len(row.cells) for grid in grids for row in grid.rows)
    for limit, side in ((64, 512), (256, 384), (512, 256), (1000, 208)):
        if num_cells <= limit:
            return side
    return 144


def _cell(cell: Cell, side: int) -> dict[str, Any]:
    """A cell as the template needs it; the placeholder of a sample without a label is not shown."""
    picture = cell.picture if cell.valid else Picture()
    image = None if picture.image is None else thumbnail(picture.image, side)
    return {
        "cell": cell,
        "image": image,
        "quotes": [line for line in picture.text.splitlines() if line.strip()],
        "table": picture.table,
        "legend": picture.legend,
        "palette": image is None and bool(picture.legend),
        "wide": image is None and bool(picture.text or picture.table),
    }


def thumbnail(image: np.ndarray, side: int) -> Thumbnail:
    """An RGB image uint8 (h, w, 3) at no more than `side` pixels a side, as a PNG or a JPEG, whichever is smaller."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"a picture of {image.dtype} {image.shape}, expected uint8 (h, w, 3) with pixels")
    height, width = image.shape[:2]
    tiny = max(height, width) <= TINY
    scale = side / max(height, width)
    if scale < 1:
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    kind, data = _encode(np.ascontiguousarray(image))
    return Thumbnail(Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}"), width, height, tiny)


def _encode(image: np.ndarray) -> tuple[str, bytes]:
    # Photographs have tens of thousands of colours and are never smaller as PNG: counting spares the attempt.
    colours = Image.fromarray(image).getcolors(4096)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    if colours is None:
        return "jpeg", cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, 85))[1].tobytes()
    png = _png(image, colours)
    jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, 92, *sampling))[1].tobytes()
    return ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)


def _png(image: np.ndarray, colours: list[tuple[int, Any]]) -> bytes:
    picture = Image.fromarray(image)
    if len(colours) <= 256:
        # Indexed colours are exact here (there are no more than the palette holds) and a third of the bytes.
        packed = image.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        palette, indices = np.unique(packed, return_inverse=True)
        picture = Image.fromarray(indices.reshape(packed.shape).astype(np.uint8))
        picture.putpalette(
            np.stack([palette >> 16 & 255, palette >> 8 & 255, palette & 255], 1).astype(np.uint8).tobytes()
        )
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=6)
    return out.getvalue()


# --- tables -----------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(  # also in parentheses, or with a mark behind it
    r"\(?[-+−]?[\d,_ ]*\.?\d+([eE][-+]?\d+)?\s?(%|×|x|[kMGT]?i?B|[num]?s|min|h|[a-zA-Z]+/s)?!?\)?|[-–—]|nan|inf|"
)
_CODE = re.compile(
    r"(?=.*\d)[0-9a-fA-F]{7,}|(sha256:)[0-9a-f]+|\S+/\S+|\S+\.(tar|json|jsonl|jpg|png|npy|arrow)|\S+@\d+|"
)


def _style(values: Sequence[str]) -> str:
    """How to set a column of a table: "number" (right, tabular), "code" (monospace), "short" (never broken) or ""."""
    if not any(values):
        return ""
    for style, pattern in (("code", _CODE), ("number", _NUMBER)):
        if all(pattern.fullmatch(value) for value in values):
            return style
    return "short" if max(map(len, values)) <= 28 else ""


# --- plots ------------------------------------------------------------------------------------------------------------

SPAN = 1000
"""Side of the square that curves are drawn in; the browser stretches it, the labels beside it are text of the page."""

MAX_POINTS = 800


def _chart(plot: Plot) -> dict[str, Any]:
    """A plot in units of the drawing: ticks as (place, label), curves as SVG paths with their last values."""
    transform = np.log10 if plot.log_y else np.asarray
    series = [_drawable(curve, plot.log_y) for curve in plot.curves]
    points = [(x[ok], transform(y[ok])) for x, y, ok in series]
    filled = [(x, y) for x, y in points if x.size]
    chart: dict[str, Any] = {"plot": plot, "empty": not filled, "curves": [], "x_ticks": [], "y_ticks": []}
    if not filled:
        return chart
    x_low, x_high = _limits([x for x, _ in filled], 0.0)
    y_low, y_high = _limits([y for _, y in filled], 0.05)
    y_values = _log_ticks(y_low, y_high) if plot.log_y else _ticks(y_low, y_high)
    chart["x_ticks"] = [(f"{(v - x_low) / (x_high - x_low):.2%}", label(v)) for v in _ticks(x_low, x_high)]
    chart["y_ticks"] = [(f"{(float(transform(v)) - y_low) / (y_high - y_low):.2%}", label(v)) for v in y_values]
    for curve, (x, y, ok) in zip(plot.curves, series, strict=True):
        with np.errstate(invalid="ignore", divide="ignore"):
            across = (x - x_low) / (x_high - x_low) * SPAN
            up = SPAN - (transform(y) - y_low) / (y_high - y_low) * SPAN
        chart["curves"].append({"name": curve.name, **_drawing(across, up, y, ok)})
    return chart


def _drawable(curve: Curve, log_y: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    ok = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log_y))
    return x, y, ok


def _drawing(across: np.ndarray, up: np.ndarray, values: np.ndarray, ok: np.ndarray) -> dict[str, Any]:
    """One curve: a line broken at gaps, dots where points are few, points to read values off, and the last value."""
    if not ok.any():
        return {"line": "", "dots": "", "points": "", "last": "–"}
    shown = [i for i in _thinned(values, ok) if ok[i]]
    gaps = np.cumsum(~ok)  # equal between two points when no gap lies between them: then one stroke joins them
    joined = [False, *(gaps[i] == gaps[j] for i, j in itertools.pairwise(shown))]
    line = "".join(f"{'L' if on else 'M'}{across[i]:.1f} {up[i]:.1f}" for i, on in zip(shown, joined, strict=True))
    dots = "".join(f"M{across[i]:.1f} {up[i]:.1f}h0" for i in shown) if len(shown) <= 40 else ""
    points = " ".join(f"{across[i]:.1f}:{label(values[i], 4)}" for i in shown)
    return {"line": line, "dots": dots, "points": points, "last": label(values[shown[-1]], 4)}


def _thinned(values: np.ndarray, ok: np.ndarray) -> list[int]:
    """Indices of at most MAX_POINTS points: the last, and of each stretch the lowest and the highest: spikes stay."""
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    safe = np.where(ok, values, np.nan)
    keep = {int(np.flatnonzero(ok)[-1])}
    for part in np.array_split(np.arange(len(values)), MAX_POINTS // 2 - 1):
        if ok[part].any():
            keep |= {int(part[np.nanargmin(safe[part])]), int(part[np.nanargmax(safe[part])])}
    return sorted(keep)


def _limits(arrays: Sequence[np.ndarray], margin: float) -> tuple[float, float]:
    values = np.concatenate(arrays)
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = abs(high) / 2 or 0.5
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) between the limits, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, given by their exponents."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        ticks = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return [value for value in _ticks(10**low, 10**high, 4) if value > 0]


def label(value: float, digits: int = 3) -> str:
    """A number as an axis says it: `12.5k`, `0.04`, `3e−05`, with a true minus sign."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.{digits + 1}g}{suffix}".replace("-", "−")
    return f"{value:.{max(digits, 4)}g}".replace("-", "−")
