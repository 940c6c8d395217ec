"""Every preset of ml-4m and every option of its model: ours computes the same, forward and backward.

tests/golden/fourm_presets.npz holds the reference's answers (made by tests/golden/make_fourm_presets.py): the presets
with the depth and the heads they have, at small width, on a batch with the hard cases.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import _ml4m, parity
from model.checkpoint import ml4m_spec
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch
from tests.golden import make_fourm_presets as golden

# Every size, and every variant of one.
STATES = [name for name in _ml4m.PRESETS if "_base_" in name or name.endswith("d_swiglu_nobias")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stored():
    with np.load(golden.PRESETS, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def batch(stored):
    fields = {name: torch.from_numpy(stored[f"batch/{name}"].astype(np.int64)) for name in golden.FIELDS}
    rows = {
        kind: {
            name.split("/", 2)[2]: torch.from_numpy(value.astype(np.float32))
            for name, value in stored.items()
            if name.startswith(f"batch/{kind}/")
        }
        for kind in ("pixels", "embeddings")
    }
    return MaskedBatch(modalities=tuple(spec.name for spec in parity.SPECS), **fields, **rows)


def build(config):
    model = FourM(config, parity.SPECS, parity.SPECS_OUT)
    _ml4m.draw(model, tied=config.tie_embeddings, shared=config.share_modality_embeddings)
    return model


def near(found, wanted, tolerance):
    """Digests: the norm and projections relative to the norm, entries relative to the largest."""
    scale = np.abs(wanted[[0, 1, 0, 0, 1, 1, 1]])
    return bool((np.abs(found - wanted) <= tolerance * scale).all())


def check(model, batch, stored, name):
    found = parity.run(model, batch)
    wanted = dict(zip([spec.name for spec in parity.SPECS_OUT], stored[f"{name}/losses"], strict=True))
    assert {key: value.item() for key, value in found["losses"].items()} == pytest.approx(wanted, rel=1e-5)
    assert found["loss"].item() == pytest.approx(stored[f"{name}/loss"].item(), rel=1e-5)
    digests = [golden.digest(scores) for scores in found["logits"].values() if len(scores)]
    for mine, theirs in zip(digests, stored[f"{name}/logits"], strict=True):
        assert near(mine, theirs, 1e-5)
    names = json.loads(bytes(stored[f"{name}/names"]))
    gradients = dict(zip(names, stored[f"{name}/gradients"], strict=True))
    assert {id(found["gradients"][key]) for key in names} == {
        id(value) for value in found["gradients"].values() if value.abs().max()
    }
    floor = 1e-4 * max(value[1] for value in gradients.values())  # of key biases there is nothing but rounding
    for key, theirs in gradients.items():
        if theirs[1] > floor:
            assert near(golden.digest(found["gradients"][key]), theirs, 1e-4), key


@pytest.mark.parametrize("name", _ml4m.PRESETS)
def test_presets_are_the_references(stored, batch, name):
    check(build(parity.small_preset(name)[0]), parity.with_inputs(batch), stored, name)


@pytest.mark.parametrize("name", parity.OPTIONS)
def test_options_are_the_references(stored, batch, name):
    config = replace(parity.SMALL, **parity.OPTIONS[name])
    model = build(config)
    check(model, batch, stored, name)
    decoder = np.unpackbits(stored[f"{name}/decoder"], axis=-1)[..., : batch.dec_mod.shape[1]].astype(bool)
    assert parity.differing_pairs(model, batch, stored[f"{name}/encoder"], decoder) == 0
    # ml-4m's "token" loss weighs the tokens of a modality by the size of its vocabulary; ours does not.
    with torch.no_grad():
        out = model(batch, "token")
    weights = {spec.name: out.counts[spec.name] * spec.vocab_size for spec in parity.SPECS_OUT}
    weighted = sum(float(out.losses[key]) * weight for key, weight in weights.items()) / sum(weights.values())
    assert weighted == pytest.approx(stored[f"{name}/token"].item(), rel=1e-5)
    plain = sum(float(out.losses[key]) * count for key, count in out.counts.items()) / sum(out.counts.values())
    assert out.loss.item() == pytest.approx(plain, rel=1e-5)


def test_the_masks_of_options_differ_and_the_batch_has_the_hard_cases(stored, batch):
    masks = {name: stored[f"{name}/decoder"].tobytes() for name in ("registers", "causal", "not separated")}
    assert len(set(masks.values())) == 3
    inputs, targets = (batch.enc_mod >= 0).sum(1), (batch.dec_mod >= 0).sum(1)
    assert 0 in inputs
    assert 0 in targets
    assert len(set(inputs.tolist())) > 3
    held = {side: set(getattr(batch, f"{side}_mod").unique().tolist()) - {-1} for side in ("enc", "dec")}
    kinds = {side: {parity.SPECS[m].kind for m in members} for side, members in held.items()}
    assert kinds["enc"] == {"sequence", "pixels", "embeddings", "tokens"}
    assert kinds["dec"] == {"sequence", "tokens"}
    assert held["enc"] | held["dec"] == set(range(len(parity.SPECS) - 1))  # one modality nowhere
    t5 = batch.modalities.index("t5_caption")
    assert (batch.enc_ids[batch.enc_mod == t5] == -1).any()  # masked spans
    caption = batch.modalities.index("caption")
    ranks = batch.dec_pos[batch.dec_mod == caption]
    assert len(ranks) > int(ranks.max()) + 1


@pytest.mark.parametrize("name", STATES)
def test_the_states_of_presets_have_the_references_names_and_shapes(stored, name, monkeypatch):
    specs = [ml4m_spec(modality) for modality in _ml4m.MODALITIES]
    monkeypatch.setattr(FourM, "init_weights", lambda *_: None)  # there is nothing to fill on this device
    size, variant = name.split("_")[1], name.split("_", 4)[4]
    with torch.device("meta"):
        model = FourM(FourMConfig.preset(size, variant), specs, [spec for spec in specs if spec.is_target])
    wanted = json.loads(bytes(stored[f"{name}/state"]))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == wanted
