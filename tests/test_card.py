"""The dataset card: what it says, that its snippet runs, and that nothing in a dataset can be more than text in it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from dataengine.manifest import Dataset, Quarantined
from dataengine.weights import Weights
from pipelines import card
from tests.fakes import Inverted, Threshold, ingested
from tests.instants import label

HOSTILE = (
    "`x` <script>alert(1)</script> | [a](javascript:x) ![i](http://e/i.png) **b** \n# h\n---\n\x1b[0m {{ 7 * 7 }} {% x"
)


@dataclass(frozen=True, kw_only=True)
class Network(Threshold):
    """Edges by a network under some licence."""

    licence: str = "MIT"
    untrained: bool = False
    source: str = "https://user:secret@host/weights.pth?token=hidden"

    def weights(self) -> Weights:
        return Weights(self.source, "ab" * 32, self.licence, self.untrained)


def shown(text: str) -> str:
    """The HTML of the Markdown, of whose links, tags and tables a reader would see."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text.split("---\n", 2)[2]))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Ten images in three shards; two Canny labels failed, and so did what was made from them."""
    dataset = ingested(tmp_path)
    bad = dataset.keys(1)[:2]
    label(dataset, ["sam_edge"], Network(fail_on=bad), Inverted())
    dataset.write_quarantine(1, [Quarantined("k", "a.jpg", "decode", "truncated", "cut"), ] * 2)  # fmt: skip
    return dataset


def test_the_header_is_what_the_hub_reads(dataset: Dataset) -> None:
    found = card.facts(dataset, "CC-BY-4.0")
    made = DatasetCard(card.render(found, "My edges"))
    header = made.data.to_dict()
    assert header["pretty_name"] == "My edges"
    assert (header["license"], header["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert header["task_categories"] == ["image-to-text"]
    assert {"webdataset", "pseudo-labels"} <= set(header["tags"])
    assert "random-weights" not in header["tags"]


def test_what_the_records_say_is_in_the_card(dataset: Dataset) -> None:
    found = card.facts(dataset)
    assert (found["num_images"], found["num_shards"], found["smallest"], found["largest"]) == (10, 3, 3, 4)
    columns = {c["name"]: c for c in found["columns"]}
    assert list(columns) == ["rgb", "caption", "crop_settings", "canny_edge", "sam_edge"]
    assert (columns["canny_edge"]["failed"], columns["canny_edge"]["maker"]) == (2, "test_card")
    assert found["shards"][1] == {"name": "shard-00001", "samples": 3, "failed": [2, 2]}
    assert found["failures"] == [
        {"column": "canny_edge", "reason": "RuntimeError: cannot label this", "count": 2},
        {"column": "sam_edge", "reason": "input canny_edge is not valid", "count": 2},
    ]
    assert found["quarantine"] == [{"stage": "decode", "reason": "truncated", "count": 2}]
    assert found["sources"][0] == {"corpus": dataset.plan.corpus, "images": 10, "refused": 0}
    page = shown(card.render(found))
    for text in (
        "RuntimeError: cannot label this",
        "truncated",
        "ab" * 32,
        "?token=***; too_many=100",
        "20.00",
        "MIT",
        "numpy ",
    ):
        assert text in page
    assert page.count("<table>") == 7
    assert "RANDOM WEIGHTS" not in page


def test_two_cards_of_one_dataset_are_the_same(dataset: Dataset) -> None:
    assert card.render(card.facts(dataset)) == card.render(card.facts(Dataset(dataset.store.url)))


def test_random_weights_are_called_so_loudly(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    label(dataset, ["sam_edge"], Network(untrained=True), Inverted())
    found = card.facts(dataset)
    assert found["random"] == ["canny_edge", "sam_edge"]
    text = card.render(found)
    assert "> **RANDOM WEIGHTS.** `canny_edge`, `sam_edge`" in text
    assert text.count("**(RANDOM WEIGHTS)**") == 2
    assert "random-weights" in DatasetCard(text).data.to_dict()["tags"]
    assert "depth" not in text


def test_the_snippet_of_the_card_runs(dataset: Dataset) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", card.render(card.facts(dataset)), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=dataset.store.base, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    keys = [line.split()[0] for line in done.stdout.splitlines()]
    bad = set(dataset.keys(1)[:2])
    assert keys == [k for shard in range(3) for k in dataset.keys(shard) if k not in bad]
    assert "'canny_edge': 'Image'" in done.stdout
    assert "'caption': 'list'" in done.stdout


@pytest.mark.parametrize(
    ("images", "weights", "expected", "said"),
    [
        ("", "MIT", {"license": "unknown"}, "The licence of the images is not known"),
        ("MIT", "Apache-2.0", {"license": "mit"}, "allows any use"),
        ("MIT", "CC-BY-NC 4.0", {"license": "cc-by-nc-4.0"}, "NO COMMERCIAL USE: the licence of canny"),
        ("", "Omnidata EULA", {"license": "other", "license_name": "omnidata-eula"}, "NO COMMERCIAL USE"),
        ("CC-BY-SA 4.0", "MIT", {"license": "cc-by-sa-4.0"}, "shared alike"),
        ("MIT", "of somebody", {"license": "other", "license_name": "of-somebody"}, "is not known"),
    ],
)
def test_the_strictest_licence_is_the_cards(
    tmp_path: Path, images: str, weights: str, expected: dict[str, str], said: str
) -> None:
    dataset = ingested(tmp_path, count=2)
    label(dataset, ["canny_edge"], Network(licence=weights))
    text = card.render(card.facts(dataset, images))
    header = DatasetCard(text).data.to_dict()
    assert {k: v for k, v in header.items() if k.startswith("license")} == expected
    assert said in re.sub(r"<[^>]+>", "", shown(text))


def hostile(value: Any) -> Any:
    """The facts with every text that comes from outside replaced."""
    if isinstance(value, dict):
        ours = ("kind", "suffix", "commercial", "licence_terms", "project_version", "name", "column")
        return {k: v if k in ours else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_nothing_from_the_dataset_is_more_than_text(dataset: Dataset) -> None:
    calm = card.facts(dataset)
    found = hostile(calm) | {"labels": calm["labels"], "random": calm["random"]}
    text = card.render(found, HOSTILE)
    page = shown(text)
    for tag in ("<script", '<a href="j', "<img", "<strong>b", "<em>"):
        assert tag not in page
    ordinary = shown(card.render(calm, "name"))
    for tag in ("<tr>", "<td>", "<h1>", "<h2>", "<hr", "<table>"):
        assert page.count(tag) == ordinary.count(tag), tag
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in text
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["pretty_name"] == HOSTILE


def test_no_credentials_are_in_a_card(dataset: Dataset) -> None:
    record = dataset.commit("rgb", 0)
    assert record is not None
    made = {**record.provenance, "ingest": "parquet:https://user:geheim@host/x?sig=abc"}
    dataset.store.remove("commits/rgb/shard-00000.json")
    dataset.record(replace(record, provenance=made))
    found = card.facts(dataset)
    for secret in ("secret", "hidden", "geheim", "abc"):
        assert secret not in re.sub("ab" * 32, "", card.render(found) + str(found))
    assert "host/weights.pth" in card.render(found)


def test_a_card_takes_the_place_of_an_older_one_at_once(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    for text in ("one", "two"):
        card.write(file, text)
        assert file.read_text() == text
    with pytest.raises(UnicodeEncodeError):
        card.write(file, "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    assert file.read_text() == "two"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (12_000_000, "10M<n<100M"), (10**12, "n>1T")],
)
def test_sizes_are_the_hubs_categories(count: int, expected: str) -> None:
    assert card._size_category(count) == expected
