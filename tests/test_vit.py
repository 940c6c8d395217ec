"""The image encoder alone: ml-4m's FMViT, what FourM encodes when it sees every patch, and images of other sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import _ml4m, parity
from model.checkpoint import ml4m_spec, save_pretrained
from model.embeddings import sincos_2d
from model.fourm import FourM, FourMConfig
from model.masking import MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec
from model.vit import ViT
from tests.golden import make_fourm_presets as golden

RGB = ml4m_spec("rgb@224")
SMALL = ModalitySpec(name="rgb@64", kind="pixels", max_tokens=16)
TOKENS = ModalitySpec(name="tok", kind="tokens", max_tokens=4, vocab_size=9)


def settings(variant, **changes):
    names = {"dim": 32, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2}
    return FourMConfig(**{**vars(FourMConfig.preset("nano", variant)), **names, **changes})


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_features_are_those_of_ml4ms_vit(variant):
    model = ViT(settings(variant), RGB).eval()
    _ml4m.draw(model)
    with torch.no_grad():
        features = model(golden.images(224))
    assert features.shape == (2, 196, 32)
    found = np.stack([golden.digest(row) for row in features.numpy().reshape(-1, 32)[::7]])
    with np.load(golden.PRESETS, allow_pickle=False) as file:
        wanted = file[f"vit/{variant}"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("registers", [0, 3])
def test_it_is_the_encoder_of_a_fourm_that_sees_every_patch(registers):
    whole = FourM(settings("swiglu_nobias", num_register_tokens=registers), [SMALL], [TOKENS], seed=2).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    component = MixtureComponent(input_alphas={"rgb@64": 1.0}, target_alphas={"tok": 1.0})
    config = MaskingConfig(components=(component,), input_tokens=(16, 16), target_tokens=(4, 4))
    rng = np.random.default_rng(0)
    batch = collate([mask_sample(rng, {"rgb@64": image, "tok": np.arange(4)}, [SMALL, TOKENS], config)],
                    [SMALL, TOKENS], 16, 4)  # fmt: skip
    vit = ViT.of(whole)
    with torch.no_grad():
        features = vit(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        kept = whole.encode(batch).tokens[registers:]
        place = whole.encoder_embeddings["rgb@64"].place(batch.enc_pos[0])
        wanted = whole.decoder_proj_context(features[batch.enc_pos[0]]) + place
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-5)


def test_it_is_read_from_checkpoints_and_pools(tmp_path):
    whole = FourM(settings("gelu"), [SMALL, TOKENS], [TOKENS], seed=4).eval()
    save_pretrained(whole, tmp_path)
    vit = ViT.from_pretrained(tmp_path)
    assert not vit.training
    assert not any(name.startswith("decoder") for name in vit.state_dict())
    images = golden.images(64)
    with torch.no_grad():
        assert torch.equal(vit(images), ViT.of(whole)(images))
        torch.testing.assert_close(vit.pooled(images), vit(images).mean(1))
    vit.pooled(images).square().mean().backward()
    assert all(p.grad is not None for p in vit.parameters())
    assert all(p.grad is None for p in whole.parameters())


def test_other_sizes():
    model = ViT(replace(parity.SMALL), SMALL, seed=1)
    images = golden.images(96)
    bicubic = model._places(model.encoder_embeddings["rgb@64"], 6)[0] - model.encoder_embeddings["rgb@64"].mod_emb[0]
    assert bicubic.shape == (36, 32)
    corners = sincos_2d(4, 32)[0][[0, 3, 12, 15]]
    # The corners of the grid stay where they were, about; places beyond those of training do not occur.
    assert (bicubic[[0, 5, 30, 35]] - corners).abs().max() < 0.35
    assert model(images).shape == (2, 36, 32)
    further = ViT(replace(parity.SMALL), SMALL, positions="recomputed", seed=1)
    counted = further._places(further.encoder_embeddings["rgb@64"], 6) - further.encoder_embeddings["rgb@64"].mod_emb
    torch.testing.assert_close(counted, sincos_2d(6, 32))
    with torch.no_grad():
        assert torch.equal(further(golden.images(64)), model(golden.images(64)))
        assert not torch.allclose(further(images), model(images), atol=1e-3)


def test_what_is_no_square_image_is_refused():
    model = ViT(replace(parity.SMALL), SMALL)
    for shape in ((1, 3, 64, 80), (1, 1, 64, 64), (1, 3, 72, 72)):
        with pytest.raises(ValueError, match="H a multiple of 16"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match="kind tokens, expected pixels"):
        ViT(replace(parity.SMALL), TOKENS)
    with pytest.raises(ValueError, match="positions 'learned'"):
        ViT(replace(parity.SMALL), SMALL, positions="learned")  # type: ignore[arg-type]
    whole = FourM(replace(parity.SMALL), [SMALL, replace(SMALL, name="rgb@32", max_tokens=4)], [TOKENS])
    with pytest.raises(ValueError, match=r"images None, expected the name of .*\['rgb@64', 'rgb@32'\]"):
        ViT.of(whole)
    assert ViT.of(whole, "rgb@32").spec.max_tokens == 4
