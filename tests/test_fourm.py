"""FourM computes what apple/ml-4m computes; tests/golden/fourm.npz holds its answers (made by tests/fourm_golden.py).

The reference ran its own masking and model, in float32, on the weights that `fourm_golden.weight` draws by name.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from model.attention import attend
from model.checkpoint import (
    config_from_ml4m,
    from_pretrained,
    load_safetensors,
    ml4m_config,
    ml4m_spec,
    save_pretrained,
    save_safetensors,
)
from model.fourm import FourM, FourMConfig
from model.masking import MaskedSample, MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec
from tests import fourm_golden as golden

SPECS = tuple(ModalitySpec(name=name, **value) for name, value in golden.MODALITIES.items())
SPECS_OUT = tuple(spec for spec in SPECS if spec.is_target)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.GOLDEN, allow_pickle=False) as file:
        return dict(file)


def build(variant, **changes):
    config = FourMConfig(**golden.SIZE, **golden.VARIANTS[variant], **changes)
    model = FourM(config, SPECS, SPECS_OUT).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if golden.is_free(name):
                parameter.copy_(torch.from_numpy(golden.weight(name, tuple(parameter.shape))))
    return model


def reference_batch(stored, **kwargs):
    """The reference's masked batch as ours: kept tokens only, by the rules of its cat_encoder / cat_decoder_tensors."""
    rng = np.random.default_rng(2)
    samples = []
    for i in range(3):
        rgb = golden.values(rng)["rgb@64"]
        parts_in, parts_out, offset = [], [], 0
        for m, spec in enumerate(SPECS):
            masked = {k: stored[f"batch/{spec.name}/{k}"][i] for k in ("input_mask", "target_mask")}
            tensor = stored.get(f"batch/{spec.name}/tensor")
            kept_in, kept_out = np.flatnonzero(~masked["input_mask"]), np.flatnonzero(~masked["target_mask"])
            ids = np.zeros(16, int) if tensor is None else tensor[i]
            if spec.kind == "embeddings":
                ids = np.where(np.abs(ids).sum(axis=1) > 0, np.arange(len(ids)), -1)
            parts_in.append((ids[kept_in], kept_in if spec.is_grid else np.arange(len(kept_in)), m))
            if not spec.is_target:
                continue
            targets, num = ids[kept_out], len(kept_out)
            if spec.is_grid:
                part = (np.full(num, -1), targets, kept_out, np.full(num, offset + num), m)
            else:
                num = max(0, num - 1)
                rank = np.arange(num)
                rank_position = np.where(rank >= (spec.max_positions or spec.max_tokens), 0, rank)
                part = (targets[:-1], targets[1:], rank_position, offset + rank + 1, m)
            parts_out.append(part)
            offset += num
        columns = {f"enc_{k}": np.concatenate([p[j] for p in parts_in]) for j, k in enumerate(("ids", "pos"))}
        columns["enc_mod"] = np.concatenate([np.full(len(p[0]), p[2]) for p in parts_in])
        names = ("dec_ids", "dec_targets", "dec_pos", "dec_reach")
        columns |= {name: np.concatenate([p[j] for p in parts_out]) for j, name in enumerate(names)}
        columns["dec_mod"] = np.concatenate([np.full(len(p[1]), p[4]) for p in parts_out])
        dense = {"rgb@64": rgb, "t5_caption": stored["batch/t5_caption/tensor"][i]}
        samples.append(MaskedSample(**columns, dense=dense))
    return collate(samples, SPECS, golden.NUM_ENCODER, golden.NUM_DECODER, **kwargs)


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_state_dict_has_the_references_keys_and_shapes(stored, variant):
    wanted = json.loads(bytes(stored[f"{variant}/state"]))
    assert {name: list(tensor.shape) for name, tensor in build(variant).state_dict().items()} == wanted


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_logits_and_losses_are_the_references(stored, variant, trim):
    model, batch = build(variant), reference_batch(stored, trim=trim)
    with torch.no_grad():
        hidden = model.decode(batch, model.encode(batch))
        for name in golden.TARGETS:
            where = batch.dec_mod == batch.modalities.index(name)
            wanted = stored[f"{variant}/logits/{name}"]
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(model.logits(hidden[where], name) / scale, wanted / scale, atol=1e-5)
        out = model(batch)
    np.testing.assert_allclose(out.loss, stored[f"{variant}/loss"], rtol=1e-5)
    for name in golden.TARGETS:
        np.testing.assert_allclose(out.losses[name], stored[f"{variant}/loss/{name}"].squeeze(), rtol=1e-5)


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_gradients_are_the_references(stored, variant):
    model, batch = build(variant), reference_batch(stored)
    model(batch).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    with np.load(golden.GRADIENTS, allow_pickle=False) as file:
        wanted = {name.removeprefix(f"{variant}/"): file[name] for name in file.files if name.startswith(f"{variant}/")}
    assert {id(ours[name]) for name in wanted} == {id(gradient) for gradient in ours.values()}
    for name, theirs in wanted.items():
        found = golden.sampled(name, ours[name].numpy())
        # Relative to the largest entry; key biases have none but rounding.
        scale = float(np.maximum(theirs[1], 1e-4 * max(value[1] for value in wanted.values())))
        np.testing.assert_allclose(found[1:] / scale, theirs[1:] / scale, rtol=0, atol=1e-4, err_msg=name)
        assert found[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-4 * scale), name


def test_golden_batch_has_the_hard_cases(stored):
    """Padding on both sides, several modalities in the decoder, vectors with masked spans, wrapped positions."""
    batch = reference_batch(stored, trim=False)
    assert (batch.enc_mod < 0).any()
    assert (batch.dec_mod < 0).any()
    assert set(batch.dec_mod[batch.dec_mod >= 0].tolist()) == {0, 1, 4, 5}
    assert (batch.enc_ids[batch.enc_mod == 3] == -1).any()
    assert (stored["batch/caption/target_mask"] == 0).sum(1).max() > 6


def histogram(name, side, samples):
    m = golden.MASKED.index(name)
    counts = [int(((s.enc_mod, s.dec_mod)[side] == m).sum()) for s in samples]
    return np.bincount(counts, minlength=48)


@pytest.fixture(scope="module")
def many_masked():
    specs = tuple(spec for spec in SPECS if spec.name in golden.MASKED)
    components = tuple(
        MixtureComponent(
            weight=weight,
            input_alphas={name: alpha[i] for name, alpha in golden.ALPHAS_IN.items()},
            target_alphas={name: alpha[i] for name, alpha in golden.ALPHAS_OUT.items()},
            keep={name: keep[i] for name, keep in golden.KEEP.items()},
        )
        for i, weight in enumerate(golden.WEIGHTS)
    )
    config = MaskingConfig(components=components, input_tokens=golden.INPUT_TOKENS, target_tokens=golden.TARGET_TOKENS)
    sample, rng = golden.values(np.random.default_rng(1)), np.random.default_rng(7)
    return [mask_sample(rng, sample, specs, config) for _ in range(golden.NUM_DRAWS)]


@pytest.mark.parametrize("side", [0, 1], ids=["inputs", "targets"])
@pytest.mark.parametrize("name", golden.MASKED)
def test_masking_has_the_references_distribution(stored, many_masked, name, side):
    ours, theirs = histogram(name, side, many_masked), stored[f"counts/{name}"][side]
    if name == "rgb@64" and side == 1:
        return  # pixels are no target here; the reference's mask of them goes nowhere
    assert ours.sum() == theirs.sum() == golden.NUM_DRAWS
    both = np.stack([ours, theirs])
    common = both.sum(axis=0) >= 20
    table = np.concatenate([both[:, common], both[:, ~common].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    assert table.shape[1] > 5
    assert stats.chi2_contingency(table).pvalue > 1e-3


def trainable_batch(num=4, seed=0):
    rng = np.random.default_rng(seed)
    names = [spec.name for spec in SPECS]
    component = MixtureComponent(
        input_alphas=dict.fromkeys(names, 1.0), target_alphas=dict.fromkeys(golden.TARGETS, 1.0)
    )
    config = MaskingConfig(components=(component,), input_tokens=(4, 20), target_tokens=(4, 20))
    return collate([mask_sample(rng, golden.values(rng), SPECS, config) for _ in range(num)], SPECS, 20, 20)


def test_bf16_autocast_trains_every_used_parameter():
    model, batch = build("qknorm"), trainable_batch(16)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    out.loss.backward()
    with torch.no_grad():
        exact = model(batch).loss
    assert out.loss.dtype == torch.float32
    assert abs(out.loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_sample_without_inputs_is_finite_and_equals_more_padding():
    rng = np.random.default_rng(0)
    component = MixtureComponent(input_alphas={"caption": 1.0}, target_alphas={"tok_depth@64": 1.0})
    config = MaskingConfig(components=(component,), input_tokens=(0, 0), target_tokens=(5, 5))
    samples = [mask_sample(rng, golden.values(rng), SPECS, config)]
    model = build("swiglu_nobias")
    losses = [model(collate(samples, SPECS, 6, 9, trim=trim)).loss.item() for trim in (True, False)]
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_sample_does_not_see_its_neighbours():
    model = build("swiglu_nobias")
    rng = np.random.default_rng(0)
    component = MixtureComponent(
        input_alphas=dict.fromkeys(golden.MODALITIES, 1.0), target_alphas=dict.fromkeys(golden.TARGETS, 1.0)
    )
    config = MaskingConfig(components=(component,), input_tokens=(4, 20), target_tokens=(4, 20))
    samples = [mask_sample(rng, golden.values(rng), SPECS, config) for _ in range(3)]
    with torch.no_grad():
        together = collate(samples, SPECS, 20, 20)
        hidden = model.decode(together, model.encode(together))
        for i, sample in enumerate(samples):
            alone = collate([sample], SPECS, 20, 20)
            length = len(sample.dec_ids)
            own = model.decode(alone, model.encode(alone))[0, :length]
            torch.testing.assert_close(hidden[i, :length], own, rtol=1e-4, atol=1e-4)


def test_token_loss_is_the_mean_over_targets():
    model, batch = build("gelu"), trainable_batch()
    mod, token = model(batch), model(batch, loss="token")
    total = sum(mod.losses[name] * count for name, count in mod.counts.items())
    torch.testing.assert_close(token.loss, total / int((batch.dec_mod >= 0).sum()))
    torch.testing.assert_close(mod.loss, sum(mod.losses.values()) / len(golden.TARGETS))
    with pytest.raises(ValueError, match="loss 'mean'"):
        model(batch, loss="mean")


def test_weights_come_from_the_seed_alone():
    config = FourMConfig(**golden.SIZE)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (FourM(config, SPECS, SPECS_OUT, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight")) or not torch.equal(a, c)
    assert first.mask_token.std().item() == pytest.approx(0.02, rel=0.5)


def test_presets():
    base = FourMConfig.preset("base")
    assert (base.dim, base.encoder_depth, base.num_heads, base.gated_mlp, base.norm_bias) == (768, 12, 12, True, False)
    gelu = FourMConfig.preset("tiny", "gelu")
    assert (gelu.act, gelu.gated_mlp, gelu.qkv_bias) == ("GELU", False, True)
    assert FourMConfig.preset("nano").dim == 192
    with pytest.raises(ValueError, match="preset 'huge'"):
        FourMConfig.preset("huge")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_pretrained_round_trip(tmp_path, variant, tied):
    model = build(variant, tie_embeddings=tied)
    if not tied:
        with torch.no_grad():
            model.decoder_embeddings["caption"].to_logits.weight.add_(1)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.specs_in == model.specs_in
    batch = trainable_batch()
    assert torch.equal(model(batch).loss, again(batch).loss)
    state, config = load_safetensors(tmp_path / "model.safetensors")
    assert config == ml4m_config(model) == json.loads((tmp_path / "config.json").read_text())
    assert set(state) == set(model.state_dict())


def test_the_header_is_what_ml4m_parses(tmp_path):
    model = build("swiglu_nobias")
    save_safetensors(model, tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert header["domains_out"] == str(golden.TARGETS)
    assert header["norm_bias"] == "False"
    assert "format" not in header
    assert "tie_embeddings" not in header


def test_an_ml4m_checkpoint_loads_by_its_names_and_without_the_second_copy_of_shared_tensors(tmp_path):
    specs = [dataclasses.replace(ml4m_spec(name)) for name in ("color_palette", "rgb@224", "tok_depth@224")]
    config = FourMConfig(dim=16, encoder_depth=1, decoder_depth=1, num_heads=2)
    model = FourM(config, specs, [s for s in specs if s.is_target])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: t for name, t in state.items() if not name.startswith("decoder_emb") or "mod_emb" not in name}
    header = {name: str(value) for name, value in (ml4m_config(model) | {"use_act_checkpoint": False}).items()}
    save_file(state, tmp_path / "ml4m.safetensors", metadata=header)
    again = from_pretrained(tmp_path / "ml4m.safetensors")
    assert again.config.tie_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    del state["encoder_norm.weight"]
    save_file(state, tmp_path / "ml4m.safetensors", metadata=header)
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder_norm\.weight"):
        from_pretrained(tmp_path / "ml4m.safetensors")


def test_settings_that_would_change_the_function_are_refused():
    config = {"act_layer": "SiLU", "norm_bias": False, "image_size": 224, "drop_path_rate_encoder": 0.0}
    assert config_from_ml4m(config, tied=False).qkv_bias
    with pytest.raises(ValueError, match="drop_path_rate_encoder"):
        config_from_ml4m(config | {"drop_path_rate_encoder": 0.1}, tied=False)
    with pytest.raises(ValueError, match="rotary"):
        config_from_ml4m(config | {"rotary": True}, tied=False)
    with pytest.raises(ValueError, match="tok_unheard@224: not a modality of ml-4m"):
        ml4m_spec("tok_unheard@224")


def test_unknown_modalities_are_named():
    batch = trainable_batch()
    model = FourM(FourMConfig(**golden.SIZE), SPECS[1:], SPECS_OUT)
    with pytest.raises(ValueError, match="caption: not an input"):
        model(batch)
    with pytest.raises(ValueError, match=r"specs_out has \['rgb@64'\]"):
        FourM(FourMConfig(**golden.SIZE), SPECS, [SPECS[2]])


@pytest.mark.parametrize("trained", [False, True])
def test_attention_in_bfloat16_is_rounded_as_its_inputs_are(trained: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 3, 5, 8, generator=generator).bfloat16().requires_grad_(trained) for _ in range(3)]
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.6
    mask[..., 0] = True
    for seen in (None, mask):
        exact = attend(*(x.detach().float() for x in inputs), seen)
        with torch.autocast("cpu", torch.bfloat16):
            found = attend(*inputs, seen)
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), exact, atol=0.02)
