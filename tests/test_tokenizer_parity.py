"""Tokenizers against ml-4m's own code, by golden values: see golden/make_tokenizers.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.tokenizers import _files
from model.tokenizers._published import published
from model.tokenizers._vq import EncoderOnly
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from tests.golden import make_tokenizers as golden

GOLDEN = np.load(Path(__file__).parent / "golden" / "tokenizers.npz", allow_pickle=False)
KEYS = [(name, size) for name, (_, sizes) in golden.SMALL.items() for size in sizes]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str) -> VQVAE:
    model = VQVAE(VQVAEConfig(**golden.SMALL[name][0]))
    model.load_state_dict(golden.random_state(model.state_dict()))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size"), KEYS, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value))
)
def test_tokens_and_reconstructions_are_4ms(name: str, size: tuple[int, int]) -> None:
    model, x, key = small(name), golden.inputs(name, size), f"{name} {size[0]}x{size[1]}"
    with torch.inference_mode():
        ids = model.tokenize(x)
        out = model.decode_tokens(ids)
    expected = GOLDEN[f"{key} ids"]
    assert len(np.unique(expected)) > 4
    assert ids.dtype == torch.int64
    assert np.array_equal(ids.numpy(), expected)
    assert tuple(out.shape) == tuple(GOLDEN[f"{key} shape"])
    wanted = GOLDEN[f"{key} out"]
    error = np.abs(out.flatten()[:: golden.EVERY].numpy() - wanted).max()
    assert error < 1e-5 * np.abs(wanted).max()
    if size == golden.SMALL[name][1][0]:
        assert ids.shape[1:] == model.grid


@pytest.mark.parametrize("name", [key.removeprefix("layout ") for key in GOLDEN.files if key.startswith("layout ")])
def test_the_published_settings_have_the_weights_of_4ms_recipes(name: str) -> None:
    config = published()[name]
    assert isinstance(config, VQVAEConfig)
    with torch.device("meta"):
        state = VQVAE(config).state_dict()
    assert golden.layout(state).splitlines() == GOLDEN[f"layout {name}"].tobytes().decode().splitlines()


def test_every_published_tokenizer_without_diffusion_is_held_to_its_layout() -> None:
    plain = {name for name, config in published().items() if isinstance(config, VQVAEConfig)}
    assert plain == {key.removeprefix("layout ") for key in GOLDEN.files if key.startswith("layout ")}


@pytest.mark.parametrize("name", published())
def test_published_settings_survive_a_header_and_fit_their_domain(name: str) -> None:
    config = published()[name]
    with torch.device("meta"):
        encoder = EncoderOnly(
            EncoderOnly.Config(**{f: getattr(config, f) for f in EncoderOnly.Config.__dataclass_fields__})
        )
    assert _files.to_config(EncoderOnly.Config, _files.parsed(_files.header(encoder)), None) == encoder.config
    num_tokens = {"sam-instance_1k_64": 16, "human-poses_1k_8": 8}
    side = config.image_size // config.patch_size
    assert np.prod(encoder.grid) == (16 if "-global" in name else num_tokens.get(name, side * side))
