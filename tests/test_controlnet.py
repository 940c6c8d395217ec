"""The ControlNet decoder against ml-4m on random weights, on a Stable Diffusion that is small and random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import domains, tokenizers
from model.tokenizers.controlnet import VQControlNet, VQControlNetConfig
from tests.golden import make_controlnet as golden
from tests.golden import make_divae

GOLDEN = np.load(Path(__file__).parent / "golden" / "controlnet.npz", allow_pickle=False)
IDS = torch.from_numpy(GOLDEN["ids"].astype(np.int64))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> VQControlNet:
    """With the reference's random weights."""
    config = VQControlNetConfig(**golden.SETTINGS, sd_size="tiny", domain=domains.Rgb())
    made = VQControlNet(config).eval()
    made.load_state_dict(make_divae.random_state(made.state_dict()))
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(make_divae.SEED)


def test_ids_and_images_are_4ms(model: VQControlNet) -> None:
    assert torch.equal(model.eval().tokenize(golden.images()), IDS)
    for name, control in (("decoded", 1.0), ("scaled", golden.SCALED)):
        found = model.decode_tokens(IDS[:2], golden.STEPS, seeded(), image_size=64, control=control)
        assert np.abs(make_divae.kept(found) - GOLDEN[name]).max() < 1e-4
    assert np.abs(GOLDEN["decoded"] - GOLDEN["scaled"]).max() > 0.1


def test_the_training_loss_is_4ms(model: VQControlNet) -> None:
    torch.manual_seed(make_divae.SEED)
    value, _ = model.train().training_loss(golden.images())
    assert value.item() == pytest.approx(float(GOLDEN["loss"]), rel=1e-5)
    value.backward()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "decoder" in name}
    assert trained == {"controlnet"}
    assert all(p.grad is None for p in model.vae.parameters())
    model.zero_grad(set_to_none=True)


def test_names_and_shapes_are_4ms_but_for_the_text_encoder(model: VQControlNet) -> None:
    def without_text(names: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: shape for name, shape in names.items() if not name.startswith("decoder.text_encoder.")}

    own = json.loads(make_divae.layout(model.state_dict()))
    assert without_text(own) == json.loads(str(GOLDEN["layout"]))
    with torch.device("meta"):
        full = VQControlNet(VQControlNetConfig(image_size=224, image_size_sd=512, codebook_size=1024))
    shapes = json.loads(make_divae.layout(full.state_dict()))
    held = {name: shape for name, shape in without_text(shapes).items() if name.startswith(("decoder.", "vae."))}
    assert held.pop("decoder.empty_str_encoding") == [1, 77, 768]
    assert held == json.loads(str(GOLDEN["stable_diffusion"]))
    assert shapes["decoder.text_encoder.text_model.encoder.layers.11.mlp.fc1.weight"] == [3072, 768]


def test_guidance_leans_away_from_stable_diffusion_alone(model: VQControlNet) -> None:
    model.eval()
    codes, noise = model.quantize.lookup(IDS[:1]), torch.randn(1, 4, 32, 32, generator=seeded())
    timesteps = torch.tensor([500])
    with torch.no_grad():
        shown, alone = model.decoder(noise, timesteps, codes), model.decoder(noise, timesteps, None)
        hidden = model.decoder(noise, timesteps, codes, torch.ones(1, 4, 4, dtype=torch.bool))
        nothing = model.decoder(noise, timesteps, codes, None, 0.0)
    assert torch.allclose(nothing, alone, atol=1e-5)
    assert (shown - hidden).abs().max() > 1e-3
    guided = model.decode_tokens(IDS[:1], 3, seeded(), 2.0)
    assert (guided - model.decode_tokens(IDS[:1], 3, seeded())).abs().max() > 1e-3
    # Even without conditioning dropout, unlike a DiVAE: Stable Diffusion is the unconditional model.
    assert model.config.cls_free_guidance_dropout == 0


def test_images_have_the_size_of_their_ids(model: VQControlNet) -> None:
    assert model.decode_tokens(IDS[:1], 2).shape == (1, 3, 32, 32)
    assert model.decode_tokens(torch.zeros(1, 4, 8, dtype=torch.long), 2).shape == (1, 3, 32, 64)
    assert model.config.denoised(32, 64) == (32, 64)


def test_a_file_holds_all_weights(model: VQControlNet, tmp_path: Path) -> None:
    model.eval().save(tmp_path / "file")
    found = tokenizers.read(tmp_path / "file")
    assert isinstance(found, VQControlNet)
    assert found.config == model.config
    assert torch.equal(found.decode_tokens(IDS[:1], 2), model.decode_tokens(IDS[:1], 2))


def test_training_begins_on_the_weights_of_a_pipeline(model: VQControlNet, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    parts = {"unet": model.decoder.unet, "vae": model.vae, "text_encoder": model.decoder.text_encoder["text_model"]}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "tokenizer")
    config = replace(model.config, sd_path=str(tmp_path), pretrained_cn=True)
    found = VQControlNet.on_stable_diffusion(config)
    expected = model.state_dict()
    for name, value in found.state_dict().items():
        if name.startswith(("decoder.unet.", "decoder.text_encoder.", "vae.")):
            assert torch.equal(value, expected[name]), name
    copied = found.decoder.controlnet.down_blocks.state_dict()
    assert all(torch.equal(value, model.decoder.unet.down_blocks.state_dict()[name]) for name, value in copied.items())
    assert not torch.equal(found.decoder.empty_str_encoding, VQControlNet(config).decoder.empty_str_encoding)
    # The ControlNet begins by adding nothing.
    noise, codes = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        both = (found.decoder(noise, torch.tensor([10]), codes), found.decoder(noise, torch.tensor([10]), None))
    assert torch.allclose(*both, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sd_size": "xl"}, r"sd_size 'xl', expected one of 1.5, tiny"),
        ({"n_channels": 1}, "n_channels 1, expected 3"),
        ({"cls_free_guidance_dropout": -0.1}, r"cls_free_guidance_dropout -0.1, expected 0..1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQControlNetConfig(**(golden.SETTINGS | settings))
