"""FourM's layers compile into one graph each, for batches of any size, and compute what they do without."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from model.fourm import FourM, FourMConfig
from model.masking import MaskingConfig, MixtureComponent, collate, mask_sample
from model.spec import ModalitySpec

SPECS = (
    ModalitySpec(name="grid", kind="tokens", max_tokens=16, vocab_size=40),
    ModalitySpec(name="other", kind="tokens", max_tokens=16, vocab_size=40),
    ModalitySpec(name="text", kind="sequence", max_tokens=12, vocab_size=300),
)
# The compiler looks for a gradient of every tensor that enters a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SIZE = {"dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}
NAMES = [spec.name for spec in SPECS]


def batches(num):
    """Batches of unlike lengths and numbers of groups."""
    rng = np.random.default_rng(0)
    component = MixtureComponent(input_alphas=dict.fromkeys(NAMES, 0.5), target_alphas=dict.fromkeys(NAMES, 0.5))
    config = MaskingConfig(components=(component,), input_tokens=(2, 24), target_tokens=(3, 28))
    for n in range(num):
        samples = []
        for _ in range(2 + n % 4):
            values = {"grid": rng.integers(0, 40, 16), "other": rng.integers(0, 40, 16)}
            samples.append(
                mask_sample(rng, values | {"text": rng.integers(210, 300, rng.integers(2, 12)).tolist()}, SPECS, config)
            )
        yield collate(samples, SPECS, 24, 28)


@pytest.fixture
def fresh():
    """No graphs before, none left after."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_one_graph_without_breaks_for_batches_of_any_size(fresh):
    torch.set_num_threads(1)
    model = FourM(FourMConfig(**SIZE, qk_norm=True, num_register_tokens=1), SPECS, SPECS, seed=1)
    plain = copy.deepcopy(model)
    # What a backend makes of the graphs takes it minutes on a CPU; the graphs and their guards are the same.
    model.compile(backend="eager", fullgraph=True)
    graphs = []
    for batch in batches(10):
        for network in (model, plain):
            network.zero_grad(set_to_none=True)
            network(batch).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        whole = max(float(g.abs().max()) for g in wanted.values())
        for name, gradient in wanted.items():
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * whole, name
    assert not counters["graph_break"]
    assert graphs[0] == 2
    assert graphs[-1] <= 4  # lengths that happen to be equal in one batch are the exception, not one graph a batch
    assert graphs[-1] == graphs[4]


def test_a_compiled_model_is_saved_under_the_same_names(fresh):
    model = FourM(FourMConfig(**SIZE), SPECS, SPECS)
    names = list(model.state_dict())
    model.compile(backend="eager")
    assert list(model.state_dict()) == names
