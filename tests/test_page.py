"""The page, as data and as Chromium shows it."""

from __future__ import annotations

import base64
import io
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from dataengine.modalities import Picture
from pipelines import page as pages
from pipelines.page import Cell, Column, Curve, Grid, Page, Plot, Row, Table, render, thumbnail
from tests import browser as browsers

CAPTION = "a <script>document.title = 'owned'</script> & \"quoted\" caption"
CLASSES = ("sky", "person", "grass", "building-other-merged", "wall-brick", "dog", "car")


def photos() -> list[tuple[str, np.ndarray]]:
    names = ("astronaut", "coffee", "chelsea", "rocket")
    return [(f"photos/{name}", getattr(skimage.data, name)()) for name in names]


def semantic(image: np.ndarray) -> Picture:
    """Bands of brightness as if they were classes."""
    colours = np.array([cv2.cvtColor(np.uint8([[[i * 25, 150, 220]]]), cv2.COLOR_HSV2RGB)[0, 0] for i in range(7)])
    ids = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 31) // 37
    legend = tuple((name, (int(r), int(g), int(b))) for name, (r, g, b) in zip(CLASSES, colours, strict=True))
    return Picture(colours[ids].astype(np.uint8), legend=tuple(legend[i] for i in np.unique(ids)))


def pictures(image: np.ndarray) -> dict[str, Picture]:
    """One picture a modality, made from the image with a few lines of numpy."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    edges = np.repeat(cv2.Canny(grey, 80, 160)[..., None], 3, 2)
    smooth = cv2.GaussianBlur(grey, (0, 0), 9).astype(np.float32)
    depth = cv2.cvtColor(cv2.applyColorMap(smooth.astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    across, down = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    normal = np.stack([-across, down, np.full_like(smooth, 12)], 2)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    grid = cv2.resize(image, (14, 14), interpolation=cv2.INTER_AREA)[..., ::-1].copy()
    colours = [tuple(int(v) for v in c) for c in cv2.resize(image, (5, 1), interpolation=cv2.INTER_AREA)[0]]
    boxed = cv2.rectangle(image.copy(), (40, 40), (200, 220), (255, 143, 31), 5)
    facts = {"original_image_height": str(image.shape[0]), "colorfulness": "37.2", "brightness": f"{grey.mean():.1f}"}
    facts |= {"semantic_diversity": "5", "walkability": "0.31", "num_humans": "1", "geometric_complexity": "0.74"}
    return {
        "rgb": Picture(image),
        "caption": Picture(
            text=f"{CAPTION}\na second caption of the same photograph, rather longer than the first one"
        ),
        "depth": Picture(depth),
        "normal": Picture(((normal + 1) / 2 * 255).astype(np.uint8)),
        "semseg": semantic(image),
        "canny_edge": Picture(edges),
        "sam_edge": Picture(edges[:, ::-1].copy()),
        "det": Picture(boxed, legend=(("person 0.93", (255, 143, 31)), ("dog 0.41", (30, 120, 220)))),
        "metadata": Picture(table=tuple(facts.items())),
        "color_palette": Picture(legend=tuple(("#{:02x}{:02x}{:02x}".format(*c), c) for c in colours)),
        "CLIP-B16": Picture(grid),
        "DINOv2-B14": Picture(np.roll(grid, 1, 2)),
        "DINOv2-B14-global": Picture(image[:48, :256].copy(), text="768 values, norm 42.1"),
        "tok_depth@224": Picture(table=(("crops", "10"), ("tokens", "196"), ("vocabulary", "8192"))),
    }


RANDOM = ("depth", "CLIP-B16")
LABELERS = {"rgb": "ingested", "depth": "dpt(checkpoint=tiny)", "canny_edge": "canny(low=80, high=160)"}


def samples() -> Grid:
    rows = []
    for index, (key, image) in enumerate(photos()):
        cells = [
            Cell(name, picture, valid=not (index == 2 and name == "semseg"), note="random weights" * (name == "depth"))
            for name, picture in pictures(image).items()
        ]
        rows.append(Row(key, tuple(cells)))
    columns = tuple(
        Column(cell.modality, LABELERS.get(cell.modality, "vit_b"), cell.modality in RANDOM) for cell in cells
    )
    return Grid("Samples", "Every modality of the first samples of shard 00000.", columns, tuple(rows))


def demo() -> Page:
    rng = np.random.default_rng(0)
    steps = np.arange(2000)
    losses = [2 + 6 * np.exp(-steps / (200 + 90 * i)) + 0.15 * rng.standard_normal(2000) for i in range(5)]
    names = ("rgb", "caption", "depth", "semseg", "CLIP-B16")
    curves = tuple(Curve(n, tuple(steps.tolist()), tuple(y.tolist())) for n, y in zip(names, losses, strict=True))
    few = Curve("validation", (0.0, 500.0, 1000.0, 1500.0, 2000.0), (9.1, 4.0, math.nan, 2.9, 2.4))
    commits = tuple(
        (m, "shard-00000", str(1200 + 37 * i), f"{0.2 * i + 1:.1f} MB", f"{i + 17:064x}"[::-1], "committed")
        for i, m in enumerate(pictures(photos()[0][1]))
    )
    header = ("modality", "shard", "samples", "size", "sha256", "state")
    refused = (
        ("bad/0001.jpg", "decode", "truncated after 1,203 of 8,120 bytes"),
        ("bad/b.png", "gate", "bomb: 9·10⁸ px"),
    )
    return Page(
        "Four photographs, fourteen modalities",
        "A demonstration data set: labels are real, networks of orange columns have random weights.",
        (("Samples", "4"), ("Modalities", "14"), ("Shards", "1"), ("Committed cells", "14 / 14"), ("Quarantined", "2"),
         ("Labelled in", "12.4 s"), ("Final loss", "2.41")),
        (
            samples(),
            Plot("Loss by modality", "step", "cross-entropy, nats", curves),
            Plot("Validation", "step", "cross-entropy, nats", (few, curves[0]), log_y=True),
            Table("Commits", "What readers and resume trust.", header, commits),
            Table("Quarantine", "What was refused, and why.", ("key", "stage", "reason"), refused),
        ),
    )  # fmt: skip


# --- as data ----------------------------------------------------------------------------------------------------------


def test_same_page_same_bytes() -> None:
    page = Page("t", sections=(samples(),))
    assert render(page) == render(page)


def test_a_page_of_nothing_is_valid() -> None:
    curve = Curve("none", (), ())
    empty = (Grid("g", "", (Column("rgb"),), ()), Table("t", "", ("a",), ()), Plot("p", "x", "y", (curve,)))
    html = render(Page("empty", sections=(*empty, Plot("q", "x", "y", ()))))
    assert html.startswith("<!doctype html>")
    assert html.count("Nothing here yet.") == 2
    assert html.count("No points yet.") == 2
    assert "Nothing to show yet." in render(Page("empty"))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="row 'k' has 0 cells, expected 1"):
        Grid("g", "", (Column("rgb"),), (Row("k", ()),))
    with pytest.raises(ValueError, match="has 1 values, expected 2"):
        Table("t", "", ("a", "b"), (("1",),))
    with pytest.raises(ValueError, match="has 2 x and 1 y"):
        Curve("c", (1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match=r"float64 \(4, 4\), expected uint8"):
        thumbnail(np.zeros((4, 4)), 8)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        render(Page("t"), thumb=-1)


def decoded(uri: str) -> tuple[str, np.ndarray]:
    match = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", uri)
    assert match
    return match[1], np.asarray(Image.open(io.BytesIO(base64.b64decode(match[2]))).convert("RGB"))


def test_flat_colours_are_inlined_exactly() -> None:
    picture = semantic(photos()[1][1]).image
    assert picture is not None
    kind, back = decoded(thumbnail(picture, 10_000).uri)
    assert kind == "png"
    np.testing.assert_array_equal(back, picture)


def test_photographs_shrink_and_keep_their_shape() -> None:
    coffee = photos()[1][1]  # 400 × 600
    shown = thumbnail(coffee, 300)
    kind, back = decoded(shown.uri)
    assert (kind, shown.width, shown.height, shown.tiny) == ("jpeg", 300, 200, False)
    expected = cv2.resize(coffee, (300, 200), interpolation=cv2.INTER_AREA)
    assert np.abs(back.astype(float) - expected).mean() < 4
    tiny = thumbnail(np.zeros((14, 14, 3), np.uint8), 300)
    assert (tiny.width, tiny.height, tiny.tiny) == (14, 14, True)


def test_the_placeholder_of_an_invalid_cell_is_not_inlined() -> None:
    cell = Cell("rgb", Picture(photos()[0][1]), valid=False)
    html = render(Page("t", sections=(Grid("g", "", (Column("rgb"),), (Row("k", (cell,)),)),)))
    assert "data:image" not in html
    assert "no label" in html


def test_markup_from_the_data_is_text() -> None:
    evil = "<b onclick='x'>\"</b>"
    cell = Cell(evil, Picture(text=evil, table=((evil, evil),), legend=((evil, (1, 2, 3)),)), note=evil)
    sections = (
        Grid(evil, evil, (Column(evil, evil, True),), (Row(evil, (cell,)),)),
        Table(evil, evil, (evil,), ((evil,),)),
        Plot(evil, evil, evil, (Curve(evil, (1.0,), (1.0,)),)),
    )
    assert "<b onclick" not in render(Page(evil, evil, ((evil, evil),), sections))


@pytest.mark.parametrize(
    ("values", "style"),
    [
        (("1", "2.5", "–", "1,203"), "number"),
        (("1.2 MB", "3 %", "12.4 s"), "number"),
        (("0.27!", "(14.3)", "(58.8!)", "-"), "number"),
        (("4f5c2a9be1", "0" * 64), "code"),
        (("tok_depth@224/shard-00000.tar",), "code"),
        (("committed", "12"), "short"),
        (("truncated after 1,203 of 8,120 bytes", "12"), ""),
        (("", ""), ""),
    ],
)
def test_columns_of_tables_are_recognised(values: tuple[str, ...], style: str) -> None:
    assert pages._style(values) == style


def test_ticks_are_round_and_inside() -> None:
    assert pages._ticks(0, 2000) == [0, 500, 1000, 1500, 2000]
    assert pages._ticks(-0.3, 0.9) == pytest.approx([-0.25, 0, 0.25, 0.5, 0.75])
    assert pages._log_ticks(-3.5, 1.2) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert all(2 <= tick <= 3 for tick in pages._log_ticks(math.log10(2), math.log10(3)))
    assert [pages.label(v) for v in (0, 1e4, 12_500, 2e6, -0.04, 3e-5)] == ["0", "10k", "12.5k", "2M", "−0.04", "3e−05"]


def test_gaps_break_a_curve_and_spikes_survive_thinning() -> None:
    chart = pages._chart(Plot("p", "x", "y", (Curve("c", (0, 1, 2, 3), (1, 0, 2, math.inf)),), log_y=True))
    (curve,) = chart["curves"]
    assert curve["line"].count("M") == 2
    assert curve["last"] == "2"
    y = np.zeros(100_000)
    y[77_777] = 1
    (curve,) = pages._chart(Plot("p", "x", "y", (Curve("c", tuple(range(100_000)), tuple(y)),)))["curves"]
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", curve["line"])[1:]]
    assert len(heights) <= pages.MAX_POINTS
    assert min(heights) < 100 < 900 < max(heights)


def test_big_page() -> None:
    """64 samples × 14 modalities, each photograph another: under 15 MB."""
    rng = np.random.default_rng(0)
    kinds = [pictures(image) for _, image in photos()]

    def varied(picture: Picture) -> Picture:
        if picture.image is None or min(picture.image.shape[:2]) < 300:
            return picture
        top, left = rng.integers(0, 100, 2)
        crop = picture.image[top : top + 256, left : left + 256]
        return Picture(crop.copy(), picture.text, picture.table, picture.legend)

    rows = [Row(f"k{i}", tuple(Cell(m, varied(p)) for m, p in kinds[i % 4].items())) for i in range(64)]
    grid = Grid("Samples", "", tuple(Column(name) for name in kinds[0]), tuple(rows))
    start = time.perf_counter()
    html = render(Page("big", sections=(grid,)))
    print(f"{len(html) / 1e6:.1f} MB in {time.perf_counter() - start:.2f} s")
    assert len(html) < 15e6


# --- as Chromium shows it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if not browsers.CHROMIUM.exists():
        pytest.skip(f"no Chromium at {browsers.CHROMIUM}")
    with browsers.chromium_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(demo()), encoding="utf-8")
    return path


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(chromium: Any, document: Path, tmp_path: Path, width: int, scheme: str) -> None:
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else trouble.append(request.url)
    )
    tab.goto(document.as_uri())

    images = tab.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(images) == 4 * 10 - 1  # four of fourteen modalities have no image, one label is missing
    assert min(images) > 0
    assert tab.evaluate("[...document.images].every(i => i.alt)")

    assert tab.title() == "Four photographs, fourteen modalities"
    assert CAPTION in tab.inner_text("blockquote >> nth=0")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    badge = tab.locator("thead .badge.random").first
    badge.scroll_into_view_if_needed()
    assert badge.is_visible()
    assert tab.locator("thead .badge.random").count() == len(RANDOM)
    assert tab.locator(".absent", has_text="no label").count() == 1
    too_small = """[...document.querySelectorAll("body *")].filter(e => [...e.childNodes].some(
        n => n.nodeType === 3 && n.data.trim()) && !e.closest("script")
        && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML)"""
    assert tab.evaluate(too_small) == []

    tab.evaluate("scrollTo(0, 0)")
    screenshot = tab.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
    shot = Image.open(io.BytesIO(screenshot)).convert("RGB")
    assert shot.getcolors(2000) is None  # more than 2000 colours: the pictures are there
    ground = max(shot.getpixel((2, 200)))
    assert ground > 200 if scheme == "light" else ground < 60
    assert trouble == []
    tab.close()


@pytest.mark.browser
def test_a_click_enlarges_and_arrows_walk(chromium: Any, document: Path) -> None:
    tab = chromium.new_page(viewport={"width": 1400, "height": 900})
    tab.goto(document.as_uri())
    tab.locator(".open").nth(2).click()
    heading, viewer = tab.locator("#viewer-title"), tab.locator("#viewer")
    assert viewer.is_visible()
    assert heading.inner_text() == "depth"
    assert viewer.locator(".viewer-bar .badge.random").is_visible()
    assert viewer.locator("img").last.bounding_box()["width"] > 400
    assert viewer.locator("input").is_visible()
    tab.keyboard.press("ArrowRight")
    assert heading.inner_text() == "normal"
    assert not viewer.locator(".viewer-bar .badge.random").is_visible()
    tab.keyboard.press("ArrowDown")
    assert "photos/coffee" in viewer.locator(".viewer-title p").inner_text()
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    assert heading.inner_text() == "caption"
    assert viewer.locator("img").get_attribute("alt") == "rgb of photos/coffee"
    tab.keyboard.press("Escape")
    assert not viewer.is_visible()
    tab.close()


@pytest.mark.browser
def test_the_legend_of_a_plot_reads_values_off(chromium: Any, document: Path) -> None:
    tab = chromium.new_page(viewport={"width": 1400, "height": 900})
    tab.goto(document.as_uri())
    value = tab.locator(".curves").first.locator("b").first
    last = float(value.inner_text())
    canvas = tab.locator(".canvas").first
    canvas.hover(position={"x": 3, "y": 50})
    assert float(value.inner_text()) > last + 3
    tab.mouse.move(5, 5)
    assert float(value.inner_text()) == last
    tab.close()
