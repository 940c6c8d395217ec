"""Tokenising at scale: what shares a batch, what is computed in which precision, and what the columns hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dataengine import local, modalities
from dataengine.geometry import Crop, crops_of
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Dataset
from dataengine.modalities.human_poses import mirrored
from dataengine.modalities.sam_instance import record
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from dataengine.weights import mark_random
from labelers.dinov2_b14 import DinoV2
from model import domains
from model import tokenizers as models
from model.tokenizers import text
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import _encoder, commands, pack, tokenize, tokens  # noqa: F401  the commands register themselves
from pipelines.__main__ import app
from pipelines.tokenize import Choice, Tokenize, TokenizeFeatures, TokenizeGroup
from pipelines.tokenize_instances import TokenizeMasks, TokenizePoses, cropped, mask_in_box
from tests.fakes import Threshold, ingested, tree

SMALL = VQVAEConfig(
    image_size=32, patch_size=8, enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", codebook_size=64, latent_dim=8
)
MLP = {"enc_type": "BottleneckMLP/B_1-Wi_32", "dec_type": "BottleneckMLP/B_1-Wi_32", "quant_type": "memcodes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of each kind."""
    found = tmp_path_factory.mktemp("tokenizers")
    configs = {
        "rgb": replace(SMALL, domain=domains.Rgb(), post_mlp=True),
        "canny_edge": replace(SMALL, domain=domains.Edges(), n_channels=1),
        "DINOv2-B14": replace(
            SMALL, domain=domains.Features(channels=16), n_channels=16, patch_proj=False, image_size=70, patch_size=14
        ),
        "DINOv2-B14-global": replace(
            SMALL, domain=domains.Vector(channels=16), n_channels=16, num_codebooks=4, latent_dim=32, **MLP
        ),
        "human_poses": replace(
            SMALL, domain=domains.Poses(), n_channels=207, num_codebooks=8, latent_dim=32, codebook_size=1024, **MLP
        ),
        "sam_mask": replace(
            SMALL, domain=domains.SamMask(), n_channels=1, image_size=64, patch_size=16, codebook_size=1024
        ),
    }  # fmt: skip
    for name, config in configs.items():
        VQVAE(config).save(found / f"{name}.safetensors")
    return found


@dataclass(frozen=True, kw_only=True)
class Counted(Labeler):
    """DINOv2 that notes how many crops it is given at once."""

    inputs = ("rgb",)
    emits = ("DINOv2-B14", "DINOv2-B14-global")
    batch_size = 4

    inner: DinoV2

    seen = []  # noqa: RUF012  shared by all on purpose

    @property
    def side(self) -> int:
        return self.inner.side

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def weights(self) -> Any:
        return self.inner.weights()

    def load(self, device: str) -> Loaded:
        call = self.inner.load(device)

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            self.seen.append(len(samples))
            return call(samples)

        return run


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    return Counted(inner=replace(DinoV2(side=70), side=70).tiny(tmp_path_factory.mktemp("dino")))


def make(dataset: Dataset, labelers: Sequence[Labeler]) -> int:
    """The number of cells made."""
    plan = plan_labels(dataset, [m for x in labelers for m in x.emits], labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    return plan.num_cells


def values(dataset: Dataset, column: str) -> list[Any]:
    codec = modalities.load(column)
    return [codec.decode(m.data) for shard in dataset.committed(column) for m in dataset.read(column, shard)]


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


OF_IMAGE = ["rgb", "DINOv2-B14", "DINOv2-B14-global"]


def test_a_group_gives_what_its_tokenizers_give_alone_and_runs_a_teacher_once(
    tmp_path: Path, folder: Path, dino: Counted
) -> None:
    alone, together = ingested(tmp_path, name="alone"), ingested(tmp_path, name="together")
    made = tokenize.labelers(folder, OF_IMAGE, [dino])
    make(alone, made)
    Counted.seen.clear()
    (group,) = tokenize.grouped(made)
    assert group.emits == ("tok_rgb@32", "tok_DINOv2-B14@70", "tok_DINOv2-B14_global")
    assert make(together, [group]) == 3 * 3
    # Ten images of two crops, never more at once than the feature network takes.
    assert sum(Counted.seen) == 20
    assert max(Counted.seen) == 4
    assert tree(tmp_path / "alone") == tree(tmp_path / "together")
    assert [v.shape for v in values(together, "tok_DINOv2-B14@70")] == [(2, 25)] * 10
    assert [v.shape for v in values(together, "tok_DINOv2-B14_global")] == [(2, 4)] * 10
    for column, random in (("tok_rgb@32", False), ("tok_DINOv2-B14_global", True)):
        there = together.commit(column, 0)
        assert there is not None
        assert there.provenance["random"] is random
        assert ("features" in there.provenance) is random
    assert there.provenance["grid"] == [4]
    assert there.provenance["vocab_size"] == 64


def test_a_tokenizer_can_join_later_and_the_others_stay(tmp_path: Path, folder: Path, dino: Counted) -> None:
    dataset = ingested(tmp_path)
    assert make(dataset, tokenize.grouped(tokenize.labelers(folder, OF_IMAGE[:2], [dino]))) == 6
    before = dataset.commit("tok_rgb@32", 0)
    assert make(dataset, tokenize.grouped(tokenize.labelers(folder, OF_IMAGE, [dino]))) == 3
    assert dataset.commit("tok_rgb@32", 0) == before


def test_a_map_that_failed_costs_its_own_tokens_alone(tmp_path: Path, folder: Path) -> None:
    dataset = ingested(tmp_path)
    make(dataset, [Threshold(fail_on=dataset.keys(0)[1:2])])
    make(dataset, tokenize.grouped(tokenize.labelers(folder, ["rgb", "canny_edge"], [])))
    edges, rgb = dataset.commit("tok_canny_edge@32", 0), dataset.commit("tok_rgb@32", 0)
    assert edges is not None
    assert rgb is not None
    assert edges.invalid == {dataset.keys(0)[1]: "input canny_edge is not valid"}
    assert rgb.invalid == {}


def test_only_tokenizers_of_the_same_columns_share_a_batch(folder: Path) -> None:
    members = tuple(tokenize.labelers(folder, ["rgb", "canny_edge"], []))
    with pytest.raises(ValueError, match="read the same columns"):
        TokenizeGroup(members=members)
    with pytest.raises(ValueError, match="of different columns, got tok_rgb@32, tok_rgb@32"):
        TokenizeGroup(members=members[:1] * 2)


@pytest.mark.parametrize(("counts", "at_once"), [([3] * 10, 64), ([10] * 7, 64), ([5, 5], 2), ([1], 64), ([2] * 8, 7)])
def test_the_same_crops_meet_whatever_the_batch(counts: list[int], at_once: int) -> None:
    parts = _encoder.calls(counts, at_once)
    crops = [i for part in parts for i in range(sum(counts))[part]]
    assert crops == list(range(sum(counts)))
    assert all(part.stop - part.start <= at_once for part in parts)
    # Twice the batch is the same calls twice, when there is a power of two of images.
    images = 1 << len(counts).bit_length()
    half = _encoder.calls([counts[0]] * images, at_once)
    both = _encoder.calls([counts[0]] * 2 * images, at_once)
    if len(half) > 1:
        assert [(p.start, p.stop) for p in both[: len(half)]] == [(p.start, p.stop) for p in half]


@pytest.mark.parametrize(
    "domain",
    [domains.Rgb(), domains.Edges(), domains.Edges(channels=3), domains.SamMask(), domains.Semseg(),
     domains.Semseg(classes=(2, 7, 99))],
)  # fmt: skip
def test_bytes_become_the_same_network_input_on_the_device(domain: domains.Domain) -> None:
    table = _encoder.byte_table(domain)
    assert table is not None
    known, entries = table
    rng = np.random.default_rng(0)
    shape = (8, 8, 3) if isinstance(domain, domains.Rgb) else (8, 8)
    maps = [rng.choice(np.flatnonzero(known), shape).astype(np.uint8) for _ in range(3)]
    found = _encoder.looked_up(torch.from_numpy(np.stack(maps)), torch.from_numpy(entries))
    wanted = domain.to_network(maps)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_what_is_no_byte_has_no_table() -> None:
    assert _encoder.byte_table(domains.Depth()) is None


def test_a_precision_is_what_a_device_can_do() -> None:
    for device, precision, wanted in (
        ("cuda:0", "float32", torch.float32),
        ("cuda", "float16", torch.float16),
        ("cpu", "float32", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
    ):
        assert _encoder.dtype_on(device, precision) is wanted  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'float16' on cpu, expected one of float32, bfloat16"):
        _encoder.dtype_on("cpu", "float16")


def test_half_precision_moves_few_tokens_and_leaves_the_last_layers_whole(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = [cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32)) for _ in range(64)]
    full, half = (
        _encoder.Encoder(str(folder / "rgb.safetensors"), "cpu", precision) for precision in ("float32", "bfloat16")
    )
    own = models.read(folder / "rgb.safetensors").encode_batch(images)
    assert np.mean(full(images).numpy() == own.reshape(64, -1)) > 0.999
    assert np.mean(half(images).numpy() == own.reshape(64, -1)) > 0.95
    weights = dict(half.tokenizer.named_parameters())
    assert weights["encoder.inner.blocks.0.mlp.fc1.weight"].dtype is torch.bfloat16
    assert weights["encoder.inner.post_mlp.fc1.weight"].dtype is torch.float32
    assert weights["quant_proj.weight"].dtype is torch.float32


def test_tokens_are_of_the_side_that_is_asked_for(folder: Path, dino: Counted) -> None:
    (made,) = tokenize.labelers(folder, ["tok_rgb@64"], [])
    assert isinstance(made, Tokenize)
    assert made.facts() == {"vocab_size": 64, "num_tokens": 64, "grid": [8, 8]}
    crops = np.array([[0, 0, 20, 20, 0], [0, 5, 20, 15, 1]])
    sample = Sample("a", {"rgb": np.full((20, 20, 3), 90, np.uint8), "crop_settings": crops})
    (output,) = made.load("cpu")([sample])
    assert output["tok_rgb@64"].shape == (2, 64)
    assert output["tok_rgb@64"].dtype == np.uint16
    (chosen,) = tokenize.labelers(folder, ["rgb"], [], Choice(side=16))
    assert chosen.emits == ("tok_rgb@16",)
    (odd,) = tokenize.labelers(folder, ["rgb@20"], [])
    with pytest.raises(ValueError, match="side 20, expected a multiple of the patch of 8"):
        odd.facts()
    with pytest.raises(ValueError, match=r"sees 70: set .*side=224"):
        tokenize.labelers(folder, ["tok_DINOv2-B14@224"], [dino])


def test_names_are_ours_or_those_of_ml4m(folder: Path, dino: Counted) -> None:
    made = tokenize.labelers(folder, ["tok_dinov2@70", "tok_dinov2_global", "rgb"], [dino], Choice(ml4m_names=True))
    assert [x.emits for x in made] == [("tok_dinov2@70",), ("tok_dinov2_global",), ("tok_rgb@32",)]
    ours = tokenize.labelers(folder, OF_IMAGE[1:], [dino])
    assert [x.identity() for x in made[:2]] == [x.identity() for x in ours]
    for modality in ("depth", "CLIP-B16", "ImageBind-H14-global", "sam_mask", "human_poses"):
        for ml4m in (False, True):
            assert tokens.modality_of(tokens.column(modality, 224, ml4m=ml4m))[0] == modality
    assert tokens.modality_of("tok_clip@448@v2") == ("CLIP-B16", 448)
    (edges,) = tokenize.labelers(folder, ["sam_edge"], [])
    assert isinstance(edges, Tokenize)
    assert (edges.emits, Path(edges.checkpoint).stem) == (("tok_sam_edge@32",), "canny_edge")


# -- poses and masks --------------------------------------------------------------------------------------------------


def test_every_person_has_the_tokens_of_the_pose_and_of_its_mirror_image(folder: Path) -> None:
    (own,) = tokenize.labelers(folder, ["human_poses"], [])
    assert isinstance(own, TokenizePoses)
    codec, rng = modalities.load("human_poses"), np.random.default_rng(0)
    people = [codec.example(rng, (40, 50)), [], codec.example(rng, (40, 50))]
    samples = [Sample(str(i), {"rgb": np.zeros((40, 50, 3), np.uint8), "human_poses": v}) for i, v in enumerate(people)]
    found = [output["human_poses_tokens"] for output in own.load("cpu")(samples)]
    tokenizer = models.read(folder / "human_poses.safetensors")
    for value, person in zip(found, people, strict=True):
        modalities.load("human_poses_tokens").check(value, (40, 50))
        if not person:
            assert value == []
            continue
        poses = np.array(person["pred_smpl_params"]["body_pose"])
        for key, turned in (("pose_tokenized", poses), ("pose_tokenized_mirrored", mirrored(poses))):
            ids = [tokenizer.encode(one.reshape(-1).astype(np.float32)).reshape(-1).tolist() for one in turned]
            assert value[key] == ids
        assert value["bbox_xyxy"] == person["bbox_xyxy"]
    (alone,) = own.load("cpu")(samples[1:2])
    assert alone["human_poses_tokens"] == []


def test_masks_are_cut_mirrored_and_tokenised_in_their_boxes(folder: Path) -> None:
    (own,) = tokenize.labelers(folder, ["sam_instance_tokens"], [])
    assert isinstance(own, TokenizeMasks)
    masks = np.zeros((3, 112, 224), bool)
    masks[0, 10:41, 20:61] = True  # within both crops
    masks[1, 50:101, 100:200] = True  # the second crop has a part of it
    masks[2, 3:5, 3:5] = True  # too small
    crops = np.array([[0, 0, 112, 112, 0], [0, 0, 112, 112, 1], [0, 112, 112, 112, 0]])
    value = {"rgb": np.zeros((112, 224, 3), np.uint8), "sam_instance": [record(m) for m in masks],
             "crop_settings": crops}  # fmt: skip
    (output,) = own.load("cpu")([Sample("a", value)])
    found = output["sam_instance_tokens"]
    modalities.load("sam_instance_tokens").check(found, (112, 224))
    first, mirror, right = found["crops"]
    # Twice the pixels of the crop; boxes are ymin, xmin, ymax, xmax of the centres of the outermost pixels.
    assert [i["bbox"] for i in first] == [[20, 40, 80, 120], [100, 200, 200, 224]]
    assert [i["bbox"] for i in mirror] == [[20, 104, 80, 184], [100, 0, 200, 24]]
    assert [i["bbox"] for i in right] == [[100, 0, 200, 174]]
    tokenizer = models.read(folder / "sam_mask.safetensors")
    for instance in (*first, *mirror, *right):
        mask = mask_in_box(np.array(instance["polygon"]))
        assert instance["tokens"] == tokenizer.encode(mask).reshape(-1).tolist()
        assert mask.mean() > 0.95  # a rectangle fills its box
    triangle = np.array([[0, 0], [100, 0], [0, 50]])
    assert mask_in_box(triangle)[:20, :20].all()
    assert not mask_in_box(triangle)[40:, 40:].any()


def test_a_polygon_is_cut_at_the_border_of_its_crop() -> None:
    diamond = np.array([[50, 0], [100, 50], [50, 100], [0, 50]], np.int32)
    (right,) = cropped([diamond], Crop(0, 50, 100, 50), 100)
    assert sorted(map(tuple, right.tolist())) == [(0, 0), (0, 100), (100, 50)]
    (flipped,) = cropped([diamond], Crop(0, 50, 100, 50, True), 100)
    assert sorted(map(tuple, flipped.tolist())) == [(0, 50), (100, 0), (100, 100)]
    # Not a corner of it is in there, and it is all that there is.
    (middle,) = cropped([diamond], Crop(40, 40, 20, 20), 100)
    assert sorted(map(tuple, middle.tolist())) == [(0, 0), (0, 100), (100, 0), (100, 100)]
    assert cropped([diamond], Crop(0, 0, 10, 10), 100) == []
    assert cropped([diamond[:2]], Crop(0, 0, 100, 100), 100, 0.0)
    assert cropped([np.array([[5, 5], [5, 9]], np.int32)], Crop(0, 0, 100, 100), 100) == []


# -- the command ------------------------------------------------------------------------------------------------------


def test_packed_behind_the_tokens_is_packed_after_them(tmp_path: Path, folder: Path) -> None:
    """The tokens of shards, and these packed in one run, are what two commands make; again there is nothing to do."""
    text_tokenizer = tmp_path / "text.json"
    text.train(["picture number one"], 4400, text_tokenizer)
    one, two = (ingested(tmp_path, name=name) for name in ("one", "two"))
    for dataset in (one, two):
        make(dataset, [Threshold()])
    common = ("rgb", "canny_edge", "--tokenizers", folder, "--runner", "local")
    options = ("--text-tokenizer", text_tokenizer, "--pixels", "16")
    run("tokenize", two.store.url, *common)
    run("pack", two.store.url, *options)
    run("tokenize", one.store.url, *common, "--pack", *options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert one.committed(pack.CELL) == one.committed("rgb")
    worker, tasks = pack.prepare(one, str(text_tokenizer), 16)
    assert tasks == []
    assert {c.name for c in worker.columns} >= {"rgb@16", "tok_rgb@32", "tok_canny_edge@32", "caption"}
    again = json.loads(run("tokenize", one.store.url, *common, "--pack", *options, "--json"))
    assert again["num_bytes"] == 0


def test_what_is_random_is_not_packed_behind(tmp_path: Path, folder: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    file = own / "rgb.safetensors"
    file.write_bytes((folder / "rgb.safetensors").read_bytes())
    mark_random(file, 0)
    dataset = ingested(tmp_path, count=2)
    plan = tokenize.plan_of(dataset, tokenize.labelers(own, []))
    from pipelines.pack_behind import to_pack

    assert to_pack(dataset, plan) == ["caption"]


def test_permissive_holds_tokenizers_and_feature_networks_to_their_licences(
    tmp_path: Path, folder: Path, dino: Counted
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    file = own / "rgb.safetensors"
    file.write_bytes((folder / "rgb.safetensors").read_bytes())
    dataset = ingested(tmp_path, count=2)
    made = tokenize.labelers(own, [])
    with pytest.raises(ValueError, match=r"refuses tokenize \(tok_rgb@32\) with .*whose licence is not known"):
        tokenize.plan_of(dataset, made, permissive=True)
    card = own / "rgb.safetensors.card.json"
    card.write_text('{"licence": "CC-BY-NC-4.0"}')
    with pytest.raises(ValueError, match=r"CC-BY-NC-4\.0, forbids commercial use"):
        tokenize.plan_of(dataset, made, permissive=True)
    card.write_text('{"licence": "Apache-2.0"}')
    assert tokenize.plan_of(dataset, made, permissive=True).num_cells == 1

    (fused,) = tokenize.labelers(folder, ["DINOv2-B14"], [Restricted(inner=dino.inner)])
    assert isinstance(fused, TokenizeFeatures)
    assert fused.weights().licence == "CC-BY-NC-SA-4.0"
    (folder / "DINOv2-B14.safetensors.card.json").write_text('{"licence": "MIT"}')
    try:
        with pytest.raises(ValueError, match=r"DINOv2-B14, DINOv2-B14-global\) with .*CC-BY-NC-SA-4.0, forbids"):
            tokenize.plan_of(dataset, [fused], permissive=True)
        run("tokenize", dataset.store.url, "rgb", "--permissive", "--tokenizers", folder, "--runner", "local", code=2)
    finally:
        (folder / "DINOv2-B14.safetensors.card.json").unlink()


@dataclass(frozen=True, kw_only=True)
class Restricted(Counted):
    """Features whose network may not be used commercially."""

    def weights(self) -> Any:
        return replace(super().weights(), licence="CC-BY-NC-SA-4.0", random=False)


def test_crops_are_those_of_ingest(tmp_path: Path, folder: Path) -> None:
    """The tokens of a row are those of that row's crop."""
    dataset = ingested(tmp_path, count=3)
    make(dataset, tokenize.labelers(folder, ["rgb"], []))
    tokenizer, codec = models.read(folder / "rgb.safetensors"), modalities.load("rgb")
    for rgb, settings, ids in zip(*(values(dataset, c) for c in ("rgb", "crop_settings", "tok_rgb@32")), strict=True):
        for crop, found in zip(crops_of(settings), ids, strict=True):
            own = tokenizer.encode(codec.crop(rgb, crop, rgb.shape[:2], 32)).reshape(-1)
            assert np.mean(own == found) > 0.9


def test_the_benchmark_runs_and_its_other_way_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tokenizers

    monkeypatch.setattr(tokenizers, "QUICK", tokenizers.Amount(scenes=2, crops=1, size=64, width=64, depth=1, rounds=1))
    found = tokenizers.measure(True, None)
    assert (found["theirs"], found["columns"], found["images"]) == ("restated", 7, 2)
    assert found["tokens_equal_to_theirs"] == 1.0
    assert all(way["wall"] > 0 and way["cpu"] > 0 for way in found["ratios"].values())
    assert min(found["tokens_equal_in_bfloat16"].values()) > 0.9
