from __future__ import annotations

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
