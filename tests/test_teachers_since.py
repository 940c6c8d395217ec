"""SigLIP 2 and DINOv3, each against the library that publishes it: the same function of whole photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from labelers import _checkpoints, _images, dinov3, siglip2
from labelers.dinov3 import DinoV3
from labelers.siglip2 import SigLip2
from tests.golden import make_dinov2
from tests.teachers import HALF, PHOTOS, SAMPLES, TOLERANCE, batch, error, run

# -- SigLIP 2 ---------------------------------------------------------------------------------------------------------


def siglip_model(**vision: int) -> torch.nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 8, "projection_size": 16})
    return SiglipModel(config).eval()


def test_siglip2_features_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = siglip_model(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    # A short text tower of another width is of no account: only `vision_model.*` is read of a published file.
    state = _checkpoints.randomised(model.state_dict(), seed=4)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path)
    processor = SiglipImageProcessorPil(resample=Image.Resampling.BILINEAR)
    pixels = processor(images=PHOTOS, return_tensors="pt")["pixel_values"]
    theirs = run(model.vision_model, pixel_values=pixels)
    tower = siglip2.network(_checkpoints.read(tmp_path / "model.safetensors", siglip2.PREFIX))
    ours = run(tower, pixel_values=batch(224, _images.INCEPTION, Image.Resampling.BILINEAR))
    assert error(ours.last_hidden_state, theirs.last_hidden_state) < TOLERANCE
    assert error(ours.pooler_output, theirs.pooler_output) < TOLERANCE
    for i, labels in enumerate(SigLip2(checkpoint=str(tmp_path)).load("cpu")(SAMPLES)):
        assert error(labels["SigLIP2-B16"].reshape(196, 128), theirs.last_hidden_state[i]) < HALF
        assert error(labels["SigLIP2-B16-global"], theirs.pooler_output[i]) < HALF


def test_every_published_tensor_of_siglip2_is_known() -> None:
    with torch.device("meta"):
        state = siglip_model().vision_model.state_dict()
        tower = siglip2.network(state)
    assert len(state) == 208
    assert sum(t.numel() for t in state.values()) == 92_884_224
    config = tower.config
    assert (config.num_attention_heads, config.image_size, config.layer_norm_eps) == (12, 224, 1e-6)
    assert config.hidden_act == "gelu_pytorch_tanh"


def test_siglip2_refuses_what_it_is_not(tmp_path: Path) -> None:
    state = _checkpoints.read(Path(SigLip2().tiny(tmp_path).checkpoint), siglip2.PREFIX)
    flat = state | {"embeddings.patch_embedding.weight": torch.zeros(32, 768)}
    with pytest.raises(ValueError, match=r"siglip2: expected .* a SigLIP of a fixed resolution"):
        siglip2.network(flat)
    with pytest.raises(ValueError, match=r"siglip2: .* 1 tensors missing: head\.probe"):
        siglip2.network({name: value for name, value in state.items() if name != "head.probe"})


# -- DINOv3 -----------------------------------------------------------------------------------------------------------


def dinov3_model(**sizes: int) -> torch.nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_dinov3", pretrained=False, num_classes=0, **sizes).eval()


@pytest.mark.parametrize("side", [224, 320])
def test_dinov3_features_are_those_of_timm(side: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = dinov3_model(embed_dim=128, depth=2, num_heads=2)
    state = _checkpoints.randomised(model.state_dict(), seed=5)
    model.load_state_dict(state)
    pixels = batch(side, _images.IMAGENET, Image.Resampling.BILINEAR)
    theirs = run(model.forward_features, pixels)
    assert error(run(dinov3.network(state, side), pixels), theirs) < TOLERANCE
    save_file(state, tmp_path / "model.safetensors")
    n = side // 16
    for labels, tokens in zip(DinoV3(checkpoint=str(tmp_path), side=side).load("cpu")(SAMPLES), theirs, strict=True):
        assert labels["DINOv3-B16"].shape == (n, n, 128)
        assert error(labels["DINOv3-B16"].reshape(n * n, 128), tokens[5:]) < HALF
        assert error(labels["DINOv3-B16-global"], tokens[0]) < HALF


@pytest.mark.parametrize("prefix", ["", "model."])
def test_dinov3_of_transformers_gives_the_same(prefix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    config.num_register_tokens = 4
    model = DINOv3ViTModel(config).eval()
    state = _checkpoints.randomised(model.state_dict(), seed=6)
    model.load_state_dict(state)
    published = {name.replace("model.layer.", f"{prefix}layer."): value for name, value in state.items()}
    save_file(published, tmp_path / "model.safetensors")
    pixels = batch(224, _images.IMAGENET, Image.Resampling.BILINEAR)
    theirs = run(model, pixels).last_hidden_state
    ours = run(dinov3.network(published, 224), pixels)
    assert ours.shape == theirs.shape == (2, 1 + 4 + 196, 128)
    assert error(ours, theirs) < TOLERANCE
    labels = DinoV3(checkpoint=str(tmp_path)).load("cpu")(SAMPLES)
    assert error(labels[1]["DINOv3-B16-global"], theirs[1, 0]) < HALF


def test_every_published_tensor_of_dinov3_is_known() -> None:
    with torch.device("meta"):
        state = dinov3_model().state_dict()
        trunk = dinov3.network(state, 224)
    assert len(state) == 162
    assert sum(t.numel() for t in state.values()) == 85_641_216
    assert {n: v.shape for n, v in trunk.state_dict().items()} == {n: v.shape for n, v in state.items()}
    assert trunk.blocks[0].attn.num_heads == 12
    assert trunk.num_prefix_tokens == 5


def test_dinov3_refuses_what_it_is_not(tmp_path: Path) -> None:
    state = _checkpoints.read(Path(DinoV3().tiny(tmp_path).checkpoint))
    with pytest.raises(ValueError, match=r"dinov3: .* found no reg_token"):
        dinov3.network(make_dinov2.random_state(), 224)
    with pytest.raises(ValueError, match="learned positions"):
        dinov3.network(state | {"pos_embed": torch.zeros(1, 1, 32)}, 224)
    with pytest.raises(ValueError, match="multiple of the patch of 16 pixels, got 220"):
        dinov3.network(state, 220)
    with pytest.raises(ValueError, match=r"1 tensors unexpected: blocks\.1\.attn\.q_bias"):
        dinov3.network(state | {"blocks.1.attn.q_bias": torch.zeros(32)}, 224)
