from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from model import domains
from model.tokenizers.vqvae import VQVAEConfig

RNG = np.random.default_rng(0)
NORMALS = RNG.normal(size=(8, 8, 3)).astype(np.float32)
MAPS = {
    "rgb": RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8),
    "normal": NORMALS / np.linalg.norm(NORMALS, axis=2, keepdims=True),
    "depth": RNG.uniform(0.03, 1, (8, 8)).astype(np.float32),
    "edges": (RNG.uniform(size=(8, 8)) < 0.2).astype(np.uint8) * 255,
    "features": RNG.normal(size=(4, 4, 5)).astype(np.float32),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_survives_the_way_to_the_network_and_back(name: str) -> None:
    domain = domains.named(name, {"channels": 5} if name == "features" else None)
    x = domain.to_network([MAPS[name], MAPS[name]])
    assert x.dtype == torch.float32
    assert x.shape[0] == 2
    if name != "features":
        assert float(x.abs().max()) <= 1 + 1e-6
    back = domain.from_network(x)
    assert len(back) == 2
    assert back[1].dtype == MAPS[name].dtype
    np.testing.assert_allclose(back[1], MAPS[name], rtol=1e-5, atol=1e-6)
    assert float(domain.loss(x, x)) == pytest.approx(0, abs=1e-9)
    assert float(domain.loss(x, x)) < float(domain.loss(-x, x))


def test_semseg_shifts_by_one_and_unlabelled_is_zero() -> None:
    domain = domains.Semseg()
    values = np.array([[0, 132], [255, 5]], dtype=np.uint8)
    x = domain.to_network([values])
    assert x.tolist() == [[[1, 133], [0, 6]]]
    logits = torch.nn.functional.one_hot(x, 134).permute(0, 3, 1, 2).float() * 20
    assert np.array_equal(domain.from_network(logits)[0], values)
    assert float(domain.loss(logits, x)) < 1e-5
    with pytest.raises(ValueError, match=r"class 133, expected 0\.\.132 or 255"):
        domain.to_network([np.full((2, 2), 133, dtype=np.uint8)])


def test_semseg_can_be_narrowed_to_the_classes_of_a_corpus() -> None:
    domain = domains.Semseg(classes=(2, 119))
    assert domain.num_labels == 3
    values = np.array([[2, 119], [255, 2]], dtype=np.uint8)
    x = domain.to_network([values])
    assert x.tolist() == [[[1, 2], [0, 1]]]
    logits = torch.nn.functional.one_hot(x, 3).permute(0, 3, 1, 2).float()
    back = domain.from_network(logits)[0]
    assert back.dtype == np.uint8
    assert np.array_equal(back, values)
    with pytest.raises(ValueError, match=r"class 3, expected one of \(2, 119\) or 255"):
        domain.to_network([np.full((2, 2), 3, dtype=np.uint8)])
    with pytest.raises(ValueError, match="expected ascending ids"):
        domains.Semseg(classes=(119, 2))


def test_standardised_depth_is_4ms() -> None:
    depth = RNG.uniform(size=(10, 10)).astype(np.float32)
    x = domains.Depth(mapping="standardised").to_network([depth])[0, 0].numpy()
    kept = np.sort(depth.ravel())[10:90]
    np.testing.assert_allclose(x, (depth - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-6), rtol=1e-4, atol=1e-5)


def test_fixed_depth_is_logarithmic_and_clips_what_is_too_near() -> None:
    domain = domains.Depth(nearest=0.01)
    x = domain.to_network([np.array([[0.0, 0.01], [0.1, 1.0]], dtype=np.float32)])
    np.testing.assert_allclose(x[0, 0].numpy(), [[-1, -1], [0, 1]], atol=1e-6)
    np.testing.assert_allclose(domain.from_network(x)[0], [[0.01, 0.01], [0.1, 1.0]], rtol=1e-5)


def test_edges_take_cross_entropy_on_the_sign() -> None:
    domain = domains.Edges(criterion="bce")
    x = domain.to_network([MAPS["edges"]])
    expected = np.log1p(np.exp(-2.0))  # of a logit of size 2 with the right sign
    assert float(domain.loss(2 * x, x)) == pytest.approx(expected, rel=1e-5)


def test_normals_come_back_with_unit_length() -> None:
    back = domains.Normal().from_network(torch.tensor([0.0, 0.3, -0.4]).reshape(1, 3, 1, 1))
    np.testing.assert_allclose(back[0][0, 0], [0, 0.6, -0.8], atol=1e-6)


def test_masks_are_zeros_and_ones_of_either_type_and_logits_come_back() -> None:
    mask = RNG.uniform(size=(64, 64)) < 0.3
    x = domains.SamMask().to_network([mask])
    assert x.shape == (1, 1, 64, 64)
    assert torch.equal(x, domains.SamMask().to_network([mask.astype(np.uint8)]))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    back = domains.SamMask().from_network(x * 8 - 4)[0]
    assert back.dtype == np.bool_
    assert np.array_equal(back, mask)


def test_vectors_and_poses_are_columns_of_one_place() -> None:
    vector = RNG.normal(size=768).astype(np.float16)
    domain = domains.Vector(channels=768)
    x = domain.to_network([vector, vector])
    assert (x.shape, x.dtype) == ((2, 768, 1, 1), torch.float32)
    assert np.array_equal(domain.from_network(x)[1], vector.astype(np.float32))

    pose = Rotation.random(23, random_state=0).as_matrix().astype(np.float32).reshape(207)
    x = domains.Poses().to_network([pose])
    assert x.shape == (1, 207, 1, 1)
    np.testing.assert_allclose(domains.Poses().from_network(x)[0], pose, atol=1e-6)
    assert np.array_equal(domains.Poses(rotations=False).from_network(x * 2)[0], pose * 2)


def test_poses_come_back_as_the_nearest_rotations() -> None:
    noisy = np.eye(3)[None] + RNG.normal(size=(23, 3, 3)) * 0.3
    noisy[0, 0] *= -1  # a mirror is no rotation
    x = torch.from_numpy(noisy.astype(np.float32)).reshape(1, 207, 1, 1)
    back = domains.Poses().from_network(x)[0].reshape(23, 3, 3)
    # scipy's solution of the same problem: the rotation that aligns the rows of the identity with those of the matrix
    expected = [Rotation.align_vectors(m.T, np.eye(3))[0].as_matrix() for m in noisy]
    np.testing.assert_allclose(back, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (domains.Features(channels=3, criterion="mse"), F.mse_loss),
        (domains.Features(channels=3, criterion="l1"), F.l1_loss),
        (domains.Features(channels=3), F.smooth_l1_loss),
        (domains.Normal(criterion="cosine_1d"), lambda a, b: 1 - F.cosine_similarity(a, b, dim=1).mean()),
        (
            domains.Features(channels=3, criterion="cosine"),
            lambda a, b: 1 - (F.normalize(a.flatten(2), dim=2) * F.normalize(b.flatten(2), dim=2)).sum(2).mean(),
        ),
        (domains.Depth(smooth_at=0.5), lambda a, b: F.smooth_l1_loss(a, b, beta=0.5)),
        (domains.Depth(criterion="l1", smooth_at=0.5), F.l1_loss),
        (domains.Edges(criterion="smooth_l1"), F.smooth_l1_loss),
        (domains.Vector(channels=3), lambda a, b: 1 - F.cosine_similarity(a, b, dim=1).mean()),
        (domains.Poses(), F.smooth_l1_loss),
    ],
    ids=repr,
)
def test_losses_are_those_of_their_names(domain, expected) -> None:
    g = torch.Generator().manual_seed(0)
    out, target = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    assert float(domain.loss(out, target)) == pytest.approx(float(expected(out, target)), rel=1e-6)


def test_4ms_cross_entropy_of_masks_is_not_zero_when_all_is_right() -> None:
    x = domains.SamMask().to_network([RNG.uniform(size=(8, 8)) < 0.5])
    sure = (x * 2 - 1) * 100
    assert float(domains.SamMask().loss(sure, x)) == pytest.approx(0, abs=1e-6)
    theirs = domains.SamMask(criterion="binary_cross_entropy")
    assert float(theirs.loss(sure, x)) == pytest.approx(np.log1p(np.exp(-1)), rel=1e-5)
    p = 1 / (1 + np.exp(-0.7))
    one = torch.ones(1, 1, 1, 1)
    expected = np.log(np.exp(p) + np.exp(1 - p)) - p
    assert float(theirs.loss(0.7 * one, one)) == pytest.approx(expected, rel=1e-5)


def test_edges_may_be_three_equal_channels() -> None:
    domain = domains.Edges(channels=3)
    x = domain.to_network([MAPS["edges"]])
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(x[:, :1].expand_as(x), x)
    assert np.array_equal(domain.from_network(x)[0], MAPS["edges"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: domains.Rgb(criterion="bce"), "rgb criterion 'bce', expected one of mse, l1, smooth_l1"),
        (lambda: domains.SamMask().to_network([np.full((4, 4), 255, np.uint8)]), "value 255, expected 0 and 1"),
        (lambda: domains.Poses().to_network([np.zeros((23, 3, 3), np.float32)]), r"expected float32 \(207,\)"),
        (lambda: domains.Vector(channels=4).to_network([]), "no vectors"),
        (lambda: domains.Edges(channels=2), "2 channels, expected 1 or 3"),
        (lambda: domains.named("thermal"), "domain 'thermal', expected one of rgb"),
        (lambda: domains.named("depth", {"scale": 2}), "unknown settings"),
        (lambda: domains.Depth(mapping="linear"), "expected fixed or standardised"),
        (lambda: domains.Rgb().to_network([]), "no maps"),
        (lambda: domains.Rgb().to_network([np.zeros((4, 4, 3), np.float32)]), "expected uint8"),
        (lambda: domains.Depth().to_network([np.zeros((4, 4, 1), np.float32)]), r"expected float32 \(h, w\)"),
        (lambda: VQVAEConfig(image_size=100), "image size 100, expected a multiple of the patch size 16"),
        (lambda: VQVAEConfig(domain=domains.Semseg()), "n_labels None, expected 134"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
