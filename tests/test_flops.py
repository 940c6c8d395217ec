"""Operations of FourM by the formula against those that torch counts, and what a log line makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import measuring
from model.blocks import Mlp
from model.flops import FourMWork, flops
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch, MaskedSample, collate
from model.measuring import Meter, Taken, Work
from model.spec import ModalitySpec

SPECS = (
    ModalitySpec(name="caption", kind="sequence", max_tokens=20, vocab_size=310),
    ModalitySpec(name="rgb", kind="pixels", max_tokens=16, patch_size=4),
    ModalitySpec(name="tok", kind="tokens", max_tokens=16, vocab_size=50),
)
OUT = (SPECS[0], SPECS[2])
TINY = replace(FourMConfig.preset("nano"), dim=32, encoder_depth=2, decoder_depth=3, num_heads=2)


def sample(modality: int, target: str) -> MaskedSample:
    """Eleven inputs of all modalities, eight targets of one."""
    enc_mod = np.array([0] * 3 + [1] * 6 + [2] * 2)
    rows = np.concatenate([np.arange(3), np.arange(6), np.arange(2)])
    places, causal = np.arange(8), target == "caption"
    image = np.zeros((16, 16, 3), np.uint8)
    return MaskedSample(
        enc_ids=rows, enc_mod=enc_mod, enc_pos=rows,
        dec_ids=places if causal else np.full(8, -1), dec_mod=np.full(8, modality), dec_pos=places,
        dec_targets=places, dec_reach=places + 1 if causal else np.full(8, 8), dense={"rgb": image},
    )  # fmt: skip


def batch(**padding: int) -> MaskedBatch:
    both = [sample(2, "tok"), sample(0, "caption")]
    return collate(both, SPECS, padding.get("inputs", 11), padding.get("targets", 8), trim=False)


@pytest.mark.parametrize(
    "changes", [{}, {"gated_mlp": False, "act": "GELU", "num_register_tokens": 2}, {"decoder_sep_mask": False}]
)
def test_a_forward_pass_takes_what_torch_counts(changes: dict[str, object]) -> None:
    config = replace(TINY, **changes)
    model = FourM(config, SPECS, OUT)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        loss = model(batch()).loss
    assert flops(config, SPECS, OUT, batch()) == counted.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        loss.backward()
    # Nobody asks for the gradient of pixels.
    pixels = 2 * 6 * 2 * 48 * config.dim
    assert counted.get_total_flops() == 2 * flops(config, SPECS, OUT, batch()) - pixels


def test_padding_is_no_work() -> None:
    work = FourMWork.of(FourM(TINY, SPECS, OUT), slots=40)
    assert work(batch()) == work(batch(inputs=20, targets=20))
    assert work(batch())[:3] == (2, 2 * (11 + 8), 80)
    assert work(batch()).flops == 3 * flops(TINY, SPECS, OUT, batch())


def test_figures_are_sums_over_processes_and_peaks_those_of_the_device() -> None:
    meter = Meter(torch.device("cpu"), torch.bfloat16, peak=1e12)
    taken = [Taken(2.0, 0.5, Work(4, 100, 200, 3e12), 10**9), Taken(2.0, 1.0, Work(4, 60, 200, 1e12), 2 * 10**9)]
    assert meter.figures(taken) == {
        "run/data_wait": 0.5, "run/memory_gb": 2.0, "run/samples_per_s": 4.0, "run/tokens_per_s": 80.0,
        "run/slots_per_s": 200.0, "run/tflops_per_s": 2.0, "run/mfu": 1.0,
    }  # fmt: skip
    assert "run/mfu" not in Meter(torch.device("cpu"), torch.float32).figures(taken)
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989.4e12, "Tesla T4": None}
    assert {name: measuring.peak_flops(name, torch.bfloat16) for name in names} == names
    assert measuring.peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12


def test_what_is_made_again_of_a_gate_is_no_product() -> None:
    """Its backward pass takes twice the operations of its forward pass, and applies the activation once more."""
    mlp, x = Mlp(8, 48, act="SiLU", gated=True, bias=True), torch.randn(5, 8, requires_grad=True)
    calls = []
    mlp.act.register_forward_hook(lambda *_: calls.append(1))
    with FlopCounterMode(display=False) as forward:
        y = mlp(x)
    with FlopCounterMode(display=False) as backward:
        y.square().sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops() > 0
    assert len(calls) == 2
    found = [x.grad, *(p.grad for p in mlp.parameters())]
    assert mlp.fc3 is not None
    plain = mlp.fc2(torch.nn.functional.silu(mlp.fc1(x)) * mlp.fc3(x)).square().sum()
    for one, other in zip(found, torch.autograd.grad(plain, [x, *mlp.parameters()]), strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        mlp(x)
    assert len(calls) == 3
