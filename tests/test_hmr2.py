"""HMR2.0 against 4D-Humans: its network, what it sees of a photograph, its file, and what is written of a person."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch

from benchmarks._labelers_hmr2 import whole_image
from dataengine import modalities
from dataengine.geometry import Crop
from dataengine.modalities.human_poses import MIRRORED, joint_positions
from dataengine.sample import Sample
from labelers import _hmr2, _persons, hmr2
from labelers.hmr2 import Hmr2

GOLDEN = np.load(Path(__file__).parent / "golden" / "hmr2.npz", allow_pickle=False)
SEED = 11
SMALL = _hmr2.Shape(width=160, depth=2, mlp=320, decoder=96, decoder_depth=2, decoder_mlp=64, decoder_inner=128)
STEP = 8
COFFEE, CAT = skimage.data.coffee(), skimage.data.chelsea()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photographs() -> list[tuple[np.ndarray, list[list[float]]]]:
    """Those of golden/make_hmr2.py: small and large boxes, cut ones, wide ones; no image is square."""
    large = np.repeat(np.repeat(COFFEE, 3, axis=0), 3, axis=1)
    return [
        (COFFEE, [[210.3, 40.7, 270.9, 190.2], [5.5, 2.25, 580.75, 395.5]]),
        (CAT, [[0.0, 0.0, 120.5, 300.0]]),
        (large, [[300.2, 20.8, 800.6, 1190.4], [12.0, 100.0, 1790.0, 1100.0], [900.0, 500.0, 990.0, 700.0]]),
    ]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_network_computes_what_the_reference_does() -> None:
    network = _hmr2.network(_hmr2.random_state(SMALL, SEED))
    noise = torch.randn((3, 3, 256, 256), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        found = network(noise[..., 32:-32])
    for value, name in zip(found, ("rotations", "betas", "cameras"), strict=True):
        assert relative(value.numpy(), GOLDEN[f"noise/{name}"]) < 1e-5, name


def test_the_published_tensors_are_those_of_the_network() -> None:
    published = json.loads(str(GOLDEN["keys"]))
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in _hmr2.Hmr2(_hmr2.Shape()).state_dict().items()}
    assert ours == published
    assert len(published) == 503
    # Its own sizes are read off the tensors.
    state = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert _hmr2.shape_of(state) == _hmr2.Shape()


def test_crops_and_bodies_of_photographs_are_those_of_the_reference() -> None:
    crops = [_persons.crop(image, np.float32(box)) for image, boxes in photographs() for box in boxes]
    seen = np.stack(crops)[:, ::STEP, ::STEP].transpose(0, 3, 1, 2)
    mean, std = (255 * np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.abs(GOLDEN["photographs/crops"] * std + mean - seen).max() < 2e-4  # of 255 levels
    found = hmr2._bodies(_hmr2.network(_hmr2.random_state(SMALL, SEED)), crops, chunk=4, device="cpu")
    for value, name in zip(found, ("rotations", "betas", "cameras"), strict=True):
        assert relative(value, GOLDEN[f"photographs/{name}"]) < 1e-5, name


@pytest.mark.parametrize(
    "box",
    [
        *[(2, 60, 3 + w, 60 + 2 * w) for w in (40, 190, 280)],
        (0, 0, 900, 640),
        (700, 340, 900, 640),
        (450, 0, 500, 640),
        (0, 500, 900, 560),
    ],
)
def test_blurring_a_part_is_blurring_the_whole(box: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (640, 900, 3), dtype=np.uint8)
    one = np.float32(box) + np.float32(0.37) * np.float32([1, 1, -1, -1])
    found, expected = _persons.crop(image, one), whole_image(image, one)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 2e-4


def detections(*boxes: tuple[list[float], str, float]) -> dict[str, Any]:
    return {"instances": [{"boxes": b, "class_name": name, "score": score} for b, name, score in boxes]}


TWO = detections(
    ([0.35, 0.1, 0.45, 0.475], "person", 0.9),
    ([0.1, 0.1, 0.9, 0.9], "dog", 0.99),
    ([0.3, 0.3, 0.9, 0.9], "person", 0.5),
    ([0.01, 0.02, 0.97, 0.99], "person", 0.51),
)
NOBODY = detections(([0.1, 0.1, 0.9, 0.9], "dog", 0.99))
ONE = detections(([0.2, 0.1, 0.9, 0.9], "person", 0.7))
SAMPLES = [
    Sample("two", {"rgb": COFFEE, "det": TWO}),
    Sample("nobody", {"rgb": CAT, "det": NOBODY}),
    Sample("one", {"rgb": CAT, "det": ONE}),
]


def test_persons_of_all_images_go_through_the_network_together(tmp_path: Path) -> None:
    labeler = Hmr2().tiny(tmp_path)
    two, nobody, one = (found["human_poses"] for found in labeler.load("cpu")(SAMPLES))
    assert nobody == []
    assert two["bbox_xyxy"] == [[210.0, 40.0, 270.0, 190.0], [6.0, 8.0, 582.0, 396.0]]
    assert np.shape(two["pred_smpl_params"]["body_pose"]) == (2, 23, 3, 3)
    assert np.shape(one["pred_smpl_params"]["global_orient"]) == (1, 1, 3, 3)
    codec = modalities.load("human_poses")
    for sample, value in zip(SAMPLES, (two, nobody, one), strict=True):
        codec.check(value, sample.size)
    # By itself, and one person at a time.
    alone = Hmr2(checkpoint=labeler.checkpoint, chunk=1).load("cpu")
    for sample, value in zip(SAMPLES, (two, nobody, one), strict=True):
        (again,) = alone([sample])
        if value:
            for key in ("global_orient", "body_pose", "betas"):
                found, expected = (v["pred_smpl_params"][key] for v in (again["human_poses"], value))
                np.testing.assert_allclose(found, expected, atol=2e-5)
        else:
            assert again["human_poses"] == []


def test_what_is_written_is_what_the_network_gave_rounded(tmp_path: Path) -> None:
    labeler = Hmr2().tiny(tmp_path)
    network = _hmr2.network(torch.load(labeler.checkpoint)["state_dict"])
    box = _persons.boxes_of(ONE, CAT.shape[:2], 0.5)
    rotations, betas, cameras = hmr2._bodies(network, [_persons.crop(CAT, box[0])], 64, "cpu")
    value = labeler.load("cpu")(SAMPLES[2:])[0]["human_poses"]
    params = value["pred_smpl_params"]
    np.testing.assert_allclose(params["global_orient"], rotations[:, :1], atol=6e-6)
    np.testing.assert_allclose(params["body_pose"], rotations[:, 1:], atol=6e-6)
    np.testing.assert_allclose(params["betas"], betas, atol=6e-6)
    np.testing.assert_allclose(value["pred_cam"], cameras, atol=6e-6)


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class by the name of the one in the published file, which is not installed."""
    module = types.ModuleType("yacs.config")
    kind = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return kind


def published(tmp_path: Path, configuration: type) -> Path:
    """A checkpoint as Lightning wrote it: settings as objects beside the tensors."""
    settings = configuration(MODEL=configuration(IMAGE_SIZE=256))
    settings.frozen = True
    state = torch.load(Hmr2().tiny(tmp_path).checkpoint)["state_dict"]
    file = tmp_path / "epoch=35-step=1000000.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"cfg": settings}, "optimizer_states": []}, file)
    return file


def archive_of(files: dict[str, bytes], target: Path) -> Path:
    with tarfile.open(target, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target


def test_the_published_archive_is_read_without_its_classes_and_without_unpacking(
    tmp_path: Path, configuration: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = published(tmp_path, configuration).read_bytes()
    monkeypatch.delitem(sys.modules, "yacs.config")
    inside = "logs/train/multiruns/hmr2/0/checkpoints/epoch=35-step=1000000.ckpt"
    archive = archive_of({"../data/x.npz": b"no", inside: data}, tmp_path / "hmr2_data.tar.gz")
    labeler, plain = Hmr2(checkpoint=str(archive)), Hmr2().tiny(tmp_path)
    assert labeler.load("cpu")(SAMPLES) == plain.load("cpu")(SAMPLES)
    assert (tmp_path / "hmr2_data.tar.gz.ckpt").read_bytes() == data
    assert not (tmp_path.parent / "data").exists()
    weights = labeler.weights()
    assert weights.source == str(archive)
    assert "research" in weights.licence
    assert not list(tmp_path.glob("tmp*"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    nothing = archive_of({"readme.txt": b"hello"}, tmp_path / "hmr2_data.tar.gz")
    with pytest.raises(ValueError, match=r"expected one \.ckpt in the archive, found \[\]"):
        Hmr2(checkpoint=str(nothing)).load("cpu")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive_of({"a.ckpt": np.random.default_rng(0).bytes(99_999)}, cut).read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"cut\.tar\.gz is cut short"):
        Hmr2(checkpoint=str(cut)).load("cpu")
    assert not (tmp_path / "cut.tar.gz.ckpt").exists()
    torch.save({"state_dict": {"encoder.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"backbone\.patch_embed.*is missing, it has encoder\.weight"):
        Hmr2(checkpoint=str(tmp_path / "other.ckpt")).load("cpu")
    state = torch.load(Hmr2().tiny(tmp_path).checkpoint)["state_dict"]
    torch.save({"state_dict": {**state, "backbone.cls_token": torch.zeros(1)}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"1 tensors unexpected: backbone\.cls_token"):
        Hmr2(checkpoint=str(tmp_path / "more.ckpt")).load("cpu")


@pytest.mark.parametrize("settings", [{"min_score": 1.0}, {"chunk": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hmr2: expected min_score"):
        Hmr2(**settings)


def test_six_numbers_are_the_first_two_columns() -> None:
    # A quarter turn about z: x becomes y, y becomes -x.
    found = _hmr2.rotations(torch.tensor([0.0, 2, 0, -3, 1, 0]))
    assert found.tolist() == [[0, -1, 0], [1, 0, 0], [0, 0, 1]]


POSES = modalities.load("human_poses")
SIZE = (60, 100)


def poses(count: int = 1) -> dict[str, Any]:
    return POSES.example(np.random.default_rng(count), SIZE)


def test_a_mirror_mirrors_poses_and_cameras() -> None:
    value = poses()
    assert isinstance(value, dict)
    value["pose_tokenized"] = [[1] * 8] * 2
    value["score"] = [0.9, 0.8]
    POSES.check(value, SIZE)
    once = POSES.crop(value, Crop(0, 0, *SIZE, hflip=True), SIZE, 60)
    assert "pose_tokenized" not in once
    assert once["score"] == value["score"]
    np.testing.assert_allclose(np.array(once["pred_cam"]), np.array(value["pred_cam"]) * [1, -1, 1])
    # The mirrored stick figure is the mirror image of the stick figure, with left and right exchanged.
    for i in range(2):
        here, there = (
            joint_positions(
                np.array([*v["pred_smpl_params"]["global_orient"][i], *v["pred_smpl_params"]["body_pose"][i]])
            )
            for v in (value, once)
        )
        order = [0, *(joint + 1 for joint in MIRRORED)]
        np.testing.assert_allclose(there, here[order] * [-1, 1, 1], atol=1e-9)


def test_a_crop_cuts_boxes_and_leaves_out_who_is_not_in_it() -> None:
    value = poses()
    value["bbox_xyxy"] = [[10, 10, 30, 50], [60, 10, 90, 50]]
    left = POSES.crop(value, Crop(0, 0, 60, 50), SIZE, 100)
    np.testing.assert_allclose(left["bbox_xyxy"], [[20, 100 / 6, 60, 500 / 6]], atol=1e-6)
    assert left["pred_smpl_params"]["betas"] == value["pred_smpl_params"]["betas"][:1]
    POSES.check(left, (100, 100))
    assert POSES.crop(value, Crop(52, 0, 8, 8), SIZE, 100) == []
    assert POSES.crop([], Crop(0, 0, 8, 8), SIZE, 100) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox_xyxy": [[0, 0, 10, 10], [0, 0, 101, 10]]}, "within 100 x 60, got"),
        ({"bbox_xyxy": []}, "at least one person"),
        ({"pred_cam": [[1, 0, 0]]}, r"pred_cam: expected a list for 2 persons, got \(1, 3\)"),
        ({"pred_cam": [[1, 0], [1, 0]]}, r"expected \(2, 3\), got \(2, 2\)"),
        ({"pred_cam": [[1, 0, "x"], [1, 0, 0]]}, "pred_cam: expected lists of numbers"),
        ({"name": ["a", "b"]}, "name: expected lists of numbers"),
        ({"pose_tokenized": [[0] * 8, [1024] * 8]}, r"ids 0\.\.1023"),
        ({"pose_tokenized": [[0] * 8, [0.5] * 8]}, r"ids 0\.\.1023"),
    ],
)
def test_check_of_poses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POSES.check({**poses(), **change}, SIZE)


def test_matrices_that_are_no_rotations_are_refused() -> None:
    value = poses()
    value["pred_smpl_params"]["global_orient"][1] = [(-np.eye(3)).tolist()]
    with pytest.raises(ValueError, match="global_orient: expected rotation matrices"):
        POSES.check(value, SIZE)
    value["pred_smpl_params"]["global_orient"][1] = [(1.02 * np.eye(3)).tolist()]
    with pytest.raises(ValueError, match=r"global_orient: expected rotation matrices, got one 0\.04"):
        POSES.check(value, SIZE)
    with pytest.raises(ValueError, match="an empty list or a dict, got 1 items"):
        POSES.check([value], SIZE)


def test_the_empty_dict_of_ml4m_is_no_person() -> None:
    assert POSES.decode(b"{}") == []
    assert POSES.decode(b"[]") == []


def test_a_person_upright_and_facing_the_camera_is_drawn_so() -> None:
    # Half a turn about x takes the body's axes (left, up, forward) to the camera's (right, down, away).
    upright = np.tile(np.eye(3), (24, 1, 1))
    upright[0] = np.diag([1.0, -1, -1])
    joints = joint_positions(upright)
    head, foot, left_hand, right_hand = joints[15], joints[7], joints[22], joints[23]
    assert head[1] < joints[0, 1] < foot[1]
    assert right_hand[0] < 0 < left_hand[0]  # the person's left is at the right of the image
    assert 1.4 < foot[1] - head[1] < 1.8
    value = poses()
    value["pred_smpl_params"]["global_orient"] = [[upright[0].tolist()]] * 2
    value["pred_smpl_params"]["body_pose"] = [upright[1:].tolist()] * 2
    picture = POSES.picture(value, np.zeros((*SIZE, 3), dtype=np.uint8))
    assert picture.text == "2 persons"
    assert picture.image is not None
    for _, colour in picture.legend:
        assert (picture.image == colour).all(axis=2).any()
