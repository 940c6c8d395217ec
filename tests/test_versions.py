"""A second version of a column: beside the first, which it leaves as it is, and never read unless somebody says so."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from typer.testing import CliRunner

from dataengine import local, modalities, plugins, provenance, validate
from dataengine.labeler import Labeler
from dataengine.manifest import Conflict, Dataset
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from dataengine.versions import Versioned, offered
from pipelines import label, look, pack, page, tokenize
from pipelines.__main__ import app
from tests.fakes import Inverted, Threshold, ingested, tree

READS = {"sam_edge@v2": (("canny_edge", "canny_edge@v2"),)}


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def make(dataset: Dataset, wanted: Sequence[str], labelers: Sequence[Labeler]) -> int:
    """Label in this process; how many cells there were to do."""
    plan = plan_labels(dataset, wanted, labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    return plan.num_cells


def values(dataset: Dataset, column: str) -> list[np.ndarray]:
    codec = modalities.load(column)
    return [codec.decode(m.data) for shard in dataset.committed(column) for m in dataset.read(column, shard)]


@pytest.mark.parametrize(
    ("column", "modality", "version"),
    [
        ("depth", "depth", ""),
        ("depth@v2", "depth", "v2"),
        ("CLIP-B16@large_1", "CLIP-B16", "large_1"),
        ("tok_depth@224", "tok_depth@224", ""),
        ("tok_depth@224@v2", "tok_depth@224", "v2"),
        ("tok_dinov2_global@b-2", "tok_dinov2_global", "b-2"),
    ],
)
def test_a_version_has_the_codec_of_its_modality_under_its_own_name(column: str, modality: str, version: str) -> None:
    assert modalities.split(column) == (modality, version)
    plain, codec = modalities.load(modality), modalities.load(column)
    assert type(codec) is type(plain)
    assert (plain.name, codec.name) == (modality, column)
    value = codec.example(np.random.default_rng(0), (20, 30))
    codec.check(value, (20, 30))
    assert codec.encode(value) == plain.encode(value)


@pytest.mark.parametrize("name", ["depth@", "depth@2x", "depth@-v", "depth@v2@224", "depth@v.2", "depth@v2/x", "@v2"])
def test_names_that_could_be_taken_for_something_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected letters, digits.*begins with a letter"):
        modalities.load(name)


@pytest.mark.parametrize("name", ["canny_edge", "metadata", "dinov2_b14"])
def test_a_version_is_the_labeler_but_for_its_names(name: str, tmp_path: Path) -> None:
    inner = plugins.load("labelers", name, Labeler)().tiny(tmp_path)
    version = Versioned(inner=inner, column_version="v2")
    assert version.emits == tuple(f"{m}@v2" for m in inner.emits)
    assert version.inputs == inner.inputs
    assert provenance.of_labeler(version) == provenance.of_labeler(inner)
    own = {"emits", "load", "tiny", "adapted", "of_column"}
    for attribute in {a for a in dir(Labeler) if not a.startswith("_")} - own:
        mine, its = getattr(version, attribute), getattr(inner, attribute)
        assert (mine() if callable(mine) else mine) == (its() if callable(its) else its), attribute
    assert pickle.loads(pickle.dumps(version)) == version
    assert hash(version) == hash(Versioned(inner=inner, column_version="v2"))
    assert version.tiny(tmp_path).inner == inner.tiny(tmp_path)


def test_two_versions_side_by_side(tmp_path: Path) -> None:
    dataset, root = ingested(tmp_path), tmp_path / "root"
    run("label", root, "canny_edge", "--runner", "local")
    before = tree(root)
    second = ("label", root, "canny_edge@v2", "canny_edge.low=5", "canny_edge.high=10", "--runner", "local")
    run(*second)
    after = tree(root)
    assert {k: v for k, v in after.items() if "canny_edge@v2" not in k} == before
    assert sum("canny_edge@v2" in k for k in after) == 6
    run(*second)
    assert tree(root) == after
    assert validate.verify(dataset) == []
    assert dataset.orphans() == []
    one, two = dataset.commit("canny_edge", 0), dataset.commit("canny_edge@v2", 0)
    assert one is not None
    assert two is not None
    assert (one.provenance["labeler"], two.provenance["labeler"]) == ("canny_edge", "canny_edge")
    assert (one.provenance["settings"]["high"], two.provenance["settings"]["high"]) == (200.0, 10.0)
    assert one.spec != two.spec
    hard, soft = values(dataset, "canny_edge"), values(dataset, "canny_edge@v2")
    assert sum(v.sum() for v in soft) > sum(v.sum() for v in hard)
    with pytest.raises(Conflict, match="canny_edge@v2/shard-00000 was made with other settings"):
        label.plan(dataset, ["canny_edge@v2"], None, ["canny_edge.low=6"])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_status_page_and_other_readers_show_both(tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=4)
    make(dataset, ["canny_edge"], [Threshold()])
    make(dataset, ["canny_edge@v2"], offered([Threshold(level=9)], ["canny_edge@v2"], {}))
    shown = {s.modality: (s.shards, s.samples, s.labeler) for s in look.status(dataset)}
    assert shown["canny_edge"] == shown["canny_edge@v2"] == (1, 4, "fakes")
    html = page.render(look.page(dataset, 4))
    for column in ("canny_edge", "canny_edge@v2"):
        assert f">{column}<" in html
    url = str(tmp_path / "root/canny_edge@v2/shard-00000.tar")
    read = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [s["__key__"] for s in read] == list(dataset.keys(0))
    out = CliRunner().invoke(app, ["status", str(tmp_path / "root"), "--json"]).stdout
    assert [r["modality"] for r in json.loads(out)][-2:] == ["canny_edge", "canny_edge@v2"]


def test_a_version_is_read_only_by_those_that_say_so(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    candidates = [Threshold(), Inverted()]
    assert make(dataset, ["sam_edge"], candidates) == 6
    edges = [Threshold(level=9), Inverted()]
    both = ["canny_edge@v2", "sam_edge@v2"]
    assert make(dataset, both, offered(edges, both, READS)) == 6
    # A version that says nothing reads what its labeler reads, and what is derived from it does too.
    assert make(dataset, ["sam_edge@v3"], offered(candidates, ["sam_edge@v3"], {})) == 3
    for column, source in (("sam_edge@v2", "canny_edge@v2"), ("sam_edge@v3", "canny_edge"), ("sam_edge", "canny_edge")):
        record = dataset.commit(column, 0)
        assert record is not None
        assert record.provenance["inputs"] == [source]
        for made, of in zip(values(dataset, column), values(dataset, source), strict=True):
            assert np.array_equal(made, 255 - of)
    assert not all(map(np.array_equal, values(dataset, "sam_edge"), values(dataset, "sam_edge@v2")))
    # In one pass or in two, and planned from the command line: the same identity.
    assert make(dataset, ["sam_edge@v2"], offered(edges, ["sam_edge@v2"], READS)) == 0
    recipe = label.LabelRun(labelers=tuple(candidates))
    planned = label.plan(dataset, ["sam_edge@v2"], recipe, ["sam_edge@v2.canny_edge=canny_edge@v2"])
    assert (planned.num_cells, planned.num_done) == (0, 3)


def test_versions_in_a_recipe_take_settings_by_their_labeler(tmp_path: Path) -> None:
    dataset = ingested(tmp_path)
    canny = plugins.load("labelers", "canny_edge", Labeler)()
    recipe = label.LabelRun(labelers=(Versioned(inner=canny, column_version="soft"),))
    planned = label.plan(dataset, [], recipe, ["canny_edge.high=150"])
    assert planned.wanted == ("canny_edge@soft",)
    assert [x.identity()["settings"]["high"] for x in planned.labelers] == [150.0]


def test_an_optional_input_is_there_if_the_version_read_for_it_is() -> None:
    metadata = plugins.load("labelers", "metadata", Labeler)()
    there = ["rgb", "caption", "det@v2"]
    assert Versioned(inner=metadata, column_version="b").adapted(there).inputs == ("rgb", "caption")
    numbers = metadata.adapted(["rgb", "caption", "det"])
    version = Versioned(inner=numbers, column_version="b", reads=(("det", "det@v2"),))
    assert version.adapted(there).inputs == ("rgb", "caption", "det@v2")


@pytest.mark.parametrize(
    ("wanted", "setting", "said"),
    [
        ("depht@v2", "", r"nothing makes 'depht@v2'"),
        ("canny_edge@v2", "canny_edge@v2.depth=depth@v2", "does not read 'depth'; canny_edge reads: rgb"),
        (
            "sam_edge@v2",
            "sam_edge@v2.sam_instance=depth@v2",
            "a version of sam_instance in its place, and not 'depth@v2'",
        ),
        ("sam_edge@v2", "sam_edge@v2.sam_instance=sam_instance@v2", "nothing makes 'sam_instance@v2'"),
        ("sam_edge", "sam_edge@v2.sam_instance=sam_instance@v2", "sam_edge@v2 is told what to read, and is not among"),
        ("tok_depth@64", "tok_depth@64.depth=depth@v2", r"only a version can do so, as tok_depth@64@v2"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, wanted: str, setting: str, said: str) -> None:
    dataset = ingested(tmp_path, count=2)
    with pytest.raises(ValueError, match=said):
        label.plan(dataset, [wanted], None, [setting] if setting else [])


def test_a_version_is_tokenised_to_a_version_of_the_tokens(tmp_path: Path) -> None:
    from model import domains
    from model.tokenizers.vqvae import VQVAE

    config = replace(VQVAE.tiny().config, n_channels=1, domain=domains.Depth())
    VQVAE(config).save(tmp_path / "depth.safetensors")
    side = config.image_size
    for column in ("depth@v2", f"tok_depth@{side}@v2"):
        (made,) = tokenize.labelers(tmp_path, [column])
        assert (made.emits, made.inputs) == ((f"tok_depth@{side}@v2",), ("depth@v2", "crop_settings"))
    (plain,) = tokenize.labelers(tmp_path, [f"tok_depth@{side}"])
    assert (plain.emits, plain.inputs) == ((f"tok_depth@{side}",), ("depth", "crop_settings"))
    sample = Sample("a", {"rgb": np.zeros((20, 30, 3), np.uint8), "crop_settings": np.array([[0, 5, 20, 20, 0]])})
    sample.values["depth@v2"] = np.full((20, 30), 0.5, np.float32)
    (output,) = made.load("cpu")([sample])
    modalities.load(f"tok_depth@{side}@v2").check(output[f"tok_depth@{side}@v2"], (20, 30))


def test_nothing_is_trained_on_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ingested(tmp_path, count=2)
    make(dataset, ["canny_edge", "canny_edge@v2"], offered([Threshold()], ["canny_edge@v2"], {}))
    asked: list[str] = []
    monkeypatch.setattr(pack, "can_be_packed", lambda column: bool(asked.append(column)))
    pack.prepare(dataset, str(tmp_path / "text.json"), 0)
    assert asked == ["rgb", "caption", "crop_settings", "canny_edge"]
