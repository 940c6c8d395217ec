"""Adapters: they change nothing at first, train alone through the loop, and go into the weights without a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model import lora
from model.checkpoint import from_pretrained, save_pretrained
from model.fourm import FourM, FourMConfig
from model.loop import LoopConfig, fit
from model.masking import MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec
from tests import fourm_golden as golden

SPECS = tuple(ModalitySpec(name=name, **value) for name, value in golden.MODALITIES.items())
SPECS_OUT = tuple(spec for spec in SPECS if spec.is_target)


def small():
    return FourM(FourMConfig(**golden.SIZE), SPECS, SPECS_OUT, seed=1)


def batch_at(number):
    rng = np.random.default_rng(number)
    names = [spec.name for spec in SPECS]
    component = MixtureComponent(
        input_alphas=dict.fromkeys(names, 1.0), target_alphas=dict.fromkeys(golden.TARGETS, 1.0)
    )
    config = MaskingConfig(components=(component,), input_tokens=(4, 20), target_tokens=(4, 20))
    return collate([mask_sample(rng, golden.values(rng), SPECS, config) for _ in range(4)], SPECS, 20, 20)


def loss(model, batch):
    return model(batch).loss, {}


def hidden(model):
    with torch.no_grad():
        return model.decode(batch_at(99), model.encode(batch_at(99)))


def test_adapters_train_alone_are_kept_alone_and_merge_into_an_ordinary_checkpoint(tmp_path: Path) -> None:
    before = hidden(small())
    model = lora.adapted(small(), lora.LoRA(rank=2, alpha=4.0))
    assert torch.equal(hidden(model), before)
    base = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    config = LoopConfig(steps=8, lr=0.03, warmup_steps=0, device="cpu", log_every=8, progress=False)
    fit(model, batch_at, loss, config, tmp_path / "run")
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad}
    assert with_gradients
    assert all("lora_" in name for name in with_gradients)
    for name, value in base.items():
        assert torch.equal(model.get_parameter(name), value), name
    after = hidden(model)
    assert not torch.allclose(after, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapters")
    size = (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size
    assert size < 0.3 * sum(p.numel() * 4 for p in base.values())
    again = lora.load(small(), tmp_path / "adapters")
    assert torch.equal(hidden(again), after)
    whole = lora.merged(again)
    torch.testing.assert_close(hidden(whole), after, rtol=1e-4, atol=1e-5)
    assert {name: t.shape for name, t in whole.state_dict().items()} == {
        name: t.shape for name, t in small().state_dict().items()
    }
    save_pretrained(whole, tmp_path / "merged")
    assert torch.equal(hidden(from_pretrained(tmp_path / "merged")), hidden(whole))


def test_parts_and_packed_maps() -> None:
    model = lora.adapted(small(), lora.LoRA(rank=2, parts=("cross_attention",)))
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    # Two matrices in kv, one in q and proj; two blocks.
    assert sorted(shape for name, shape in found.items() if "lora_A" in name) == [(2, 32)] * 4 + [(4, 32)] * 2
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "scaling")}
    assert scales == {4.0}
    with pytest.raises(ValueError, match=r"parts \('heads',\), expected 1 or more of"):
        lora.LoRA(parts=("heads",))  # type: ignore[arg-type]


def test_adapters_start_from_the_seed_alone() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 7)
        state = lora.adapted(small(), lora.LoRA(rank=2), seed=seed).state_dict()
        return torch.cat([value.flatten() for name, value in state.items() if "lora_A" in name])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_the_first_phase_of_fine_tuning_leaves_the_blocks(tmp_path: Path) -> None:
    model = small()
    lora.train_only(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"mask_token", "decoder_proj_context.weight", "encoder_embeddings.rgb@64.proj.weight"} <= trained
    assert not any(name.startswith(("encoder.", "decoder.", "encoder_norm", "decoder_norm")) for name in trained)
    before = {name: value.clone() for name, value in model.named_parameters()}
    config = LoopConfig(steps=2, lr=0.01, warmup_steps=0, device="cpu", log_every=2, progress=False)
    fit(model, batch_at, loss, config, tmp_path / "frozen")
    assert {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))} == trained
    lora.train_only(model, None)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"\['encoder_embedding.rgb'\]: expected the start"):
        lora.train_only(model, ["encoder_embedding.rgb"])
