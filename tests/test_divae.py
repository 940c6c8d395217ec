"""The diffusion tokenizers against ml-4m on random weights, and what decoding and training them promise."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import domains, tokenizers
from model.loop import LoopConfig, fit
from model.tokenizers import _diffusion, controlnet, divae
from model.tokenizers._unet import unet_size
from model.tokenizers._uvit import uvit_size
from model.tokenizers.controlnet import VQControlNet
from model.tokenizers.divae import DiVAE, DiVAEConfig, published_divae
from model.tokenizers.vqvae import reconstruction_loss
from tests.golden import make_divae as golden

GOLDEN = np.load(Path(__file__).parent / "golden" / "divae.npz", allow_pickle=False)
TIMESTEPS = torch.tensor(golden.TIMESTEPS)
IDS = torch.from_numpy(GOLDEN["ids"].astype(np.int64))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_divae(settings: dict[str, Any], **more: Any) -> DiVAE:
    """With the reference's random weights."""
    model = DiVAE(DiVAEConfig(**settings, **more)).eval()
    model.load_state_dict(golden.random_state(model.state_dict()))
    return model


def apart(found: torch.Tensor, name: str) -> float:
    """The largest difference from the stored part of the reference's maps, of which the largest value is about 3."""
    expected = GOLDEN[name]
    assert found.shape[:2] == expected.shape[:2]
    assert np.abs(expected).max() > 0.5
    return float(np.abs(golden.kept(found) - expected).max())


# Parity with ml-4m.


@pytest.mark.parametrize("name", ["unet", *golden.UVITS])
def test_the_decoders_predict_what_4ms_do(name: str) -> None:
    settings = golden.UNET if name == "unet" else golden.UVITS[name]
    model = random_divae(settings)
    codes, noisy = model.quantize.lookup(IDS), golden.maps("noisy", settings["n_channels"])
    with torch.no_grad():
        assert apart(model.decoder(noisy, TIMESTEPS, codes), name) < 1e-5
        assert apart(model.decoder(noisy, TIMESTEPS, codes, golden.hidden()), f"{name} hidden") < 1e-5


def test_the_encoder_gives_4ms_ids() -> None:
    assert torch.equal(random_divae(golden.UNET).tokenize(golden.maps("clean", 3).clamp(-1, 1)), IDS)


@pytest.mark.parametrize("name", list(golden.DECODED))
def test_sampling_from_the_same_noise_gives_4ms_maps(name: str) -> None:
    model = random_divae(golden.UNET | golden.DECODED[name])
    generator = torch.Generator().manual_seed(golden.SEED)
    found = model.decode_tokens(IDS[:2], generator=generator, as_ml4m=True, **golden.SAMPLED[name])
    assert apart(found, name) < 1e-4


def test_five_steps_need_no_faithful_setting() -> None:
    model = random_divae(golden.UNET | golden.DECODED["ddim"])
    generator = torch.Generator().manual_seed(golden.SEED)
    assert apart(model.decode_tokens(IDS[:2], 5, generator), "ddim") < 1e-4


@pytest.mark.parametrize("kind", golden.LOSSES)
def test_the_loss_at_the_same_noise_is_4ms(kind: str) -> None:
    settings = golden.UNET | {"prediction_type": kind, "beta_schedule": "linear"}
    model = random_divae(settings, domain=domains.Rgb()).train()
    value, figures = model.loss_at(golden.maps("clean", 3).clamp(-1, 1), golden.maps("noise", 3), TIMESTEPS)
    assert value.item() == pytest.approx(float(GOLDEN[f"loss {kind}"]), rel=1e-5)
    assert figures["denoising"] + figures["commitment"] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("name", list(golden.DROPPED))
def test_the_same_codes_are_dropped_in_training_and_none_in_evaluation(name: str) -> None:
    model = random_divae(golden.UNET | golden.DROPPED[name], domain=domains.Rgb())
    clean, noise = golden.maps("clean", 3).clamp(-1, 1), golden.maps("noise", 3)
    values = []
    for seed in (golden.SEED, golden.SEED + 1):
        model.train().load_state_dict(golden.random_state(model.state_dict()))
        torch.manual_seed(seed)
        values.append(model.loss_at(clean, noise, TIMESTEPS)[0].item())
    assert values[0] == pytest.approx(float(GOLDEN[f"loss {name}"]), rel=1e-5)
    assert values[1] != values[0]
    assert model.eval().loss_at(clean, noise, TIMESTEPS)[0] == model.loss_at(clean, noise, TIMESTEPS)[0]


@pytest.mark.parametrize(("beta_schedule", "zero"), golden.SCHEDULES)
@pytest.mark.parametrize("sampler", _diffusion.SAMPLERS)
def test_schedules_are_4ms(beta_schedule: str, zero: bool, sampler: str) -> None:
    made = _diffusion.scheduler(
        sampler, timesteps=1000, beta_schedule=beta_schedule, zero_terminal_snr=zero, prediction="v_prediction"
    )
    assert np.array_equal(made.alphas_cumprod.numpy(), GOLDEN[f"alphas {beta_schedule} {zero}"])
    assert (made.alphas_cumprod[-1] == 0) == zero


@pytest.mark.parametrize("steps", golden.STEPS)
@pytest.mark.parametrize("spacing", [*golden.SPACINGS, "ddpm"])
def test_timesteps_are_4ms_if_asked_and_else_as_many_as_asked(spacing: str, steps: int) -> None:
    def timesteps(as_ml4m: bool) -> np.ndarray:
        made = _diffusion.scheduler(
            "ddpm" if spacing == "ddpm" else "ddim", timesteps=1000, beta_schedule="linear", zero_terminal_snr=True,
            prediction="sample", spacing="trailing" if spacing == "ddpm" else spacing,
        )  # fmt: skip
        _diffusion.set_timesteps(made, steps, as_ml4m=as_ml4m)
        return made.timesteps.numpy()

    expected = GOLDEN[f"timesteps {spacing} {steps}"]
    assert np.array_equal(timesteps(as_ml4m=True), expected)
    own = timesteps(as_ml4m=False)
    assert len(own) == steps
    if 1000 % steps == 0 and spacing in ("trailing", "leading"):
        assert np.array_equal(own, expected)


def test_thirty_trailing_steps_are_thirty_one_in_4m() -> None:
    assert len(GOLDEN["timesteps trailing 30"]) == 31


@pytest.mark.parametrize("name", list(golden.FULL))
def test_published_sizes_have_4ms_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        model = DiVAE(DiVAEConfig(**golden.FULL[name]))
    assert json.loads(golden.layout(model.state_dict())) == json.loads(str(GOLDEN[name]))


def test_published_settings_are_those_of_the_layouts() -> None:
    found = published_divae()
    assert list(found) == ["rgb_16k", "depth_8k", "normal_8k", "edge_8k"]
    for name, golden_name in (("rgb_16k", "layout_rgb"), ("depth_8k", "layout_depth")):
        assert replace(found[name], domain=None) == DiVAEConfig(**golden.FULL[golden_name])
    assert (found["edge_8k"].image_size, found["edge_8k"].n_channels) == (512, 1)
    assert found["normal_8k"].codebook_size == 8192


# Decoding.


def test_the_same_ids_are_the_same_map_wherever_they_stand_in_a_batch() -> None:
    model = DiVAE.tiny()
    model.load_state_dict(golden.random_state(model.state_dict()))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (3, 4, 4))
    first = model.decode_batch(ids)
    torch.rand(5)
    second = model.decode_batch(ids[::-1])
    for a, b in zip(first, second[::-1], strict=True):
        # Kernels may sum a batch of another size in another order.
        assert np.abs(a.astype(int) - b).max() <= 1
    assert np.array_equal(model.decode(ids[1]), model.decode(ids[1]))
    assert np.abs(first[0].astype(int) - first[1]).max() > 8


def test_a_generator_decides_the_noise_and_the_samplers_differ() -> None:
    model = random_divae(golden.UNET | golden.DECODED["ddim_v"])

    def decoded(seed: int, **how: Any) -> torch.Tensor:
        return model.decode_tokens(IDS[:1], 3, torch.Generator().manual_seed(seed), **how)

    assert torch.equal(decoded(1), decoded(1))
    assert not torch.allclose(decoded(1), decoded(2), atol=0.01)
    assert not torch.allclose(decoded(1), decoded(1, sampler="ddpm"), atol=0.01)
    assert torch.equal(decoded(1, sampler="ddpm"), decoded(1, sampler="ddpm"))


def test_the_size_is_that_of_the_ids_or_as_asked() -> None:
    model = random_divae(golden.UNET)
    ids = torch.zeros(1, 6, 4, dtype=torch.long)
    assert model.decode_tokens(ids, 1).shape == (1, 3, 96, 64)
    assert model.decode_tokens(ids, 1, image_size=32).shape == (1, 3, 32, 32)
    assert model.decode_tokens(ids, 1, image_size=(64, 32)).shape == (1, 3, 64, 32)
    larger = DiVAE(replace(model.config, image_size_dec=128))
    assert larger.decode_tokens(torch.zeros(1, 4, 4, dtype=torch.long), 1).shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match=r"maps of \(48, 64\) pixels, expected multiples of 32"):
        model.decode_tokens(ids, 1, image_size=(48, 64))
    with pytest.raises(ValueError, match=r"maps of \(40, 64\) pixels, expected multiples of 16"):
        random_divae(golden.UVITS["uvit"]).decode_tokens(ids, 1, image_size=(40, 64))


def test_maps_are_held_to_minus_one_to_one_only_where_they_lie_there() -> None:
    settings = golden.UNET | {"n_channels": 1, "beta_schedule": "linear", "prediction_type": "sample"}

    def largest(domain: domains.Domain | None, **how: Any) -> float:
        return float(random_divae(settings, domain=domain).decode_tokens(IDS[:1], 2, **how).abs().max())

    for domain in (None, domains.Depth(mapping="fixed"), domains.Edges()):
        assert largest(domain) <= 1
    free = largest(domains.Depth(mapping="standardised"))
    assert free > 1.5
    assert largest(None, thresholding=False) == free
    assert largest(domains.Depth(mapping="standardised"), thresholding=True) <= 1


def test_guidance_leans_on_the_codes_and_needs_a_decoder_that_knows_their_absence() -> None:
    settings = golden.UNET | {"prediction_type": "sample", "thresholding": False}
    model = random_divae(settings, cls_free_guidance_dropout=0.1)

    def one_step(guidance: float) -> torch.Tensor:
        # Predicting the clean map in one step, the sampler returns what the decoder says of pure noise.
        generator = [torch.Generator().manual_seed(i) for i in range(4)]
        return model.decode_tokens(IDS, 1, generator, guidance)

    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    noise = torch.cat([torch.randn(1, 3, 64, 64, generator=g) for g in generator])
    codes, last = model.quantize.lookup(IDS), torch.full((4,), 999)
    hidden = torch.ones(4, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        shown, alone = model.decoder(noise, last, codes), model.decoder(noise, last, codes, hidden)
    assert torch.allclose(one_step(1.0), shown, atol=1e-5)
    assert torch.allclose(one_step(3.0), alone + 3 * (shown - alone), atol=1e-4)
    with pytest.raises(ValueError, match=r"guidance 3.0, expected 1.0: the decoder was never trained without"):
        random_divae(settings).decode_tokens(IDS, 1, guidance=3.0)


def test_noise_alone_cannot_be_divided_by_its_share_of_the_map() -> None:
    model = random_divae(golden.UNET | {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="prediction epsilon from timestep 999, which is noise alone"):
        model.decode_tokens(IDS, 5)
    assert model.decode_tokens(IDS[:1], 5, spacing="leading").isfinite().all()
    with pytest.raises(ValueError, match=r"steps 1001, expected 1..1000"):
        model.decode_tokens(IDS, 1001)


# Training.


def test_training_draws_from_torchs_state_and_stays_in_float32_convolutions_on_cpus() -> None:
    model = DiVAE.tiny()
    model.load_state_dict(golden.random_state(model.state_dict()))
    x = model.domain.to_network(model.examples())

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.training_loss(x)[0].item()

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(0)
    assert rounded == pytest.approx(loss(0), rel=0.05)


def test_a_resumed_training_takes_the_same_steps(tmp_path: Path) -> None:
    config = replace(DiVAE.tiny().config, cls_free_guidance_dropout=0.5, masked_cfg=True)
    values = DiVAE.tiny().examples()
    batch = domains.Rgb().to_network(values)
    loop = LoopConfig(steps=6, lr=1e-3, log_every=1, checkpoint_every=3, keep_checkpoints=3, progress=False, threads=1)

    def losses(out: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]

    whole = DiVAE(config)
    fit(whole, lambda step: batch, reconstruction_loss, loop, tmp_path / "whole")
    broken = tmp_path / "broken"

    def breaking(step: int) -> torch.Tensor:
        if step == 4:
            raise RuntimeError("cut")
        return batch

    with pytest.raises(RuntimeError, match="cut"):
        fit(DiVAE(config), breaking, reconstruction_loss, loop, broken)
    resumed = DiVAE(config)
    fit(resumed, lambda step: batch, reconstruction_loss, loop, broken)
    assert losses(broken) == losses(tmp_path / "whole")
    assert len(set(losses(broken))) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_tiny_one_learns_four_images(tmp_path: Path) -> None:
    model = DiVAE.tiny()
    values = model.examples()
    batch = model.domain.to_network(values)
    loop = LoopConfig(steps=50, lr=3e-3, warmup_steps=10, log_every=50, progress=False, threads=1)
    fit(model, lambda step: batch, reconstruction_loss, loop, tmp_path)
    decoded = model.decode_batch(model.encode_batch(values))
    error = np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(values, decoded, strict=True)])
    assert error < 30  # of 255, where the mean colour leaves about 64


# Settings and files.


def test_sizes_have_names() -> None:
    assert unet_size("unet_patched") == (256, 3)
    assert unet_size("unet_patched_64x2") == (64, 2)
    assert (uvit_size("uvit_l_p4_f16").dim, uvit_size("uvit_l_p4_f16_longskip").depth) == (1024, 25)
    assert uvit_size("uvit_b_p4_f16_extraconv").channels == (128, 256, 512)
    assert [uvit_size(f"uvit_h_p4_f{f}").multiple for f in (8, 16)] == [8, 16]
    for name in ("unet_patched_48x1", "unet_patched_0x1", "unet"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            unet_size(name)
    for name in ("uvit_b_p4_f8_extraconv", "uvit_b_p8_f16", "uvit_16-64x1x2_p4_f16", "uvit_32-64x1x3_p4_f16"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            uvit_size(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "quadratic"}, "beta_schedule 'quadratic', expected linear, squaredcos_cap_v2"),
        ({"beta_schedule": "shifted_cosine:-1"}, "beta_schedule 'shifted_cosine:-1', expected a positive number"),
        ({"prediction_type": "x0"}, "prediction_type 'x0', expected sample, epsilon, v_prediction"),
        ({"prediction_type": "sample-epsilon_loss"}, "epsilon_loss with prediction_type 'sample'"),
        ({"scheduler": "pndm"}, "scheduler 'pndm', expected one of ddim, ddpm"),
        ({"cls_free_guidance_dropout": 2}, r"cls_free_guidance_dropout 2, expected 0..1"),
        ({"dec_type": "uvit_b_p4_f16", "conditioning": "add"}, "conditioning 'add', expected concat or xattn"),
        ({"domain": domains.Edges(criterion="bce"), "n_channels": 1}, "a diffusion decoder denoises numbers"),
        ({"domain": domains.Semseg(), "n_labels": 134}, "a diffusion decoder denoises numbers"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiVAE(DiVAEConfig(**(golden.UNET | settings)))


def test_4ms_trainers_way_of_asking_for_a_loss_on_the_noise() -> None:
    config = DiVAEConfig(prediction_type="v_prediction-epsilon_loss")
    assert (config.prediction_type, config.epsilon_loss) == ("v_prediction", True)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("settings", [golden.UNET, golden.UVITS["uvit"], golden.UVITS["uvit_xattn"]])
def test_a_file_says_that_it_holds_a_divae(settings: dict[str, Any], tmp_path: Path) -> None:
    model = random_divae(settings, prediction_type="sample", beta_schedule="shifted_cosine:0.5")
    model.save(tmp_path / "file.safetensors")
    found = tokenizers.read(tmp_path / "file.safetensors")
    assert isinstance(found, DiVAE)
    assert found.config == model.config
    assert torch.equal(found.decode_tokens(IDS[:1], 2), model.decode_tokens(IDS[:1], 2))


def test_without_diffusers_tokens_are_made_and_decoding_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import of it now fails
    for module in (_diffusion, divae, controlnet):
        spec = importlib.util.spec_from_file_location("fresh", str(module.__file__))
        assert spec is not None
        assert spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "fresh", fresh)
        spec.loader.exec_module(fresh)
    assert {"controlnet", "divae"} <= set(tokenizers.names())
    model = DiVAE.tiny()
    ids = model.encode(model.examples()[0])
    assert ids.shape == (4, 4)
    message = re.escape("diffusion decoders need diffusers: pip install '.[diffusion]'")
    for needs in (lambda: model.decode(ids), lambda: model.training_loss(torch.zeros(1, 3, 32, 32)), VQControlNet.tiny):
        with pytest.raises(ImportError, match=message):
            needs()
