"""CLIP and DINOv2: the same function as other implementations of the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn import functional as F

from dataengine.sample import Sample
from labelers import _checkpoints, _images, _openclip, clip_b16, dinov2_b14
from labelers.clip_b16 import ClipB16
from labelers.dinov2_b14 import DinoV2

PHOTOS = [Sample("a", {"rgb": skimage.data.astronaut()}), Sample("b", {"rgb": skimage.data.chelsea()})]


def clip_state() -> dict[str, torch.Tensor]:
    shape = _openclip.Shape(width=128, layers=2, patch=16, side=64, mlp=256, out=24)
    return _checkpoints.randomised(_openclip.blank(shape, _openclip.Kind()).state_dict(), seed=1)


def transformers_clip(state: dict[str, torch.Tensor], activation: str) -> torch.nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, projection_dim=24, num_hidden_layers=2, num_attention_heads=2
    )
    config.image_size, config.patch_size, config.hidden_act = 64, 16, activation
    model = CLIPVisionModelWithProjection(config).eval()
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    mapped = {f"vision_model.{new}": state[old] for old, new in names.items()}
    for suffix in ("weight", "bias"):
        mapped[f"vision_model.pre_layrnorm.{suffix}"] = state[f"ln_pre.{suffix}"]
        mapped[f"vision_model.post_layernorm.{suffix}"] = state[f"ln_post.{suffix}"]
        for i in range(2):
            theirs, ours = f"vision_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
            for k, part in enumerate("qkv"):
                rows = state[f"{ours}attn.in_proj_{suffix}"].chunk(3)[k]
                mapped[f"{theirs}self_attn.{part}_proj.{suffix}"] = rows
            for old, new in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                mapped[f"{theirs}{new}.{suffix}"] = state[f"{ours}{old}.{suffix}"]
    mapped["visual_projection.weight"] = state["proj"].T
    missing, unexpected = model.load_state_dict(mapped, strict=False)
    assert [name for name in missing if "position_ids" not in name] == unexpected == []
    return model


@pytest.mark.parametrize("quick", [True, False])
def test_dense_clip_agrees_with_transformers(quick: bool) -> None:
    state = clip_state()
    tower = clip_b16.network(state, quick_gelu=quick)
    other = transformers_clip(state, "quick_gelu" if quick else "gelu")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        pooled, tokens = tower(pixels)
        theirs = other(pixel_values=pixels)
        last = other.vision_model.post_layernorm(theirs.last_hidden_state)
        dense = other.visual_projection(last)[:, 1:]
    torch.testing.assert_close(tokens @ tower.proj, dense, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, theirs.image_embeds, atol=2e-5, rtol=1e-4)


def test_clip_features_are_the_tokens_of_the_squeezed_image(tmp_path: Path) -> None:
    labeler = ClipB16(normalisation="native").tiny(tmp_path)
    got = [labels["CLIP-B16"] for labels in labeler.load("cpu")(PHOTOS)]
    tower = clip_b16.network(_checkpoints.read(Path(labeler.checkpoint), "visual."), quick_gelu=True)
    for sample, features in zip(PHOTOS, got, strict=True):
        assert features.dtype == np.float16
        assert features.shape == (14, 14, 16)
        image = np.asarray(Image.fromarray(sample.rgb).resize((224, 224), Image.Resampling.BICUBIC)) / 255.0
        image = (image - np.array(_images.CLIP[0])) / np.array(_images.CLIP[1])
        with torch.inference_mode():
            tokens = tower(torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None])[1] @ tower.proj
        np.testing.assert_allclose(features.reshape(196, 16), tokens[0].numpy(), atol=5e-3, rtol=2e-3)
    other = ClipB16(checkpoint=labeler.checkpoint).load("cpu")(PHOTOS)
    assert not np.allclose(other[0]["CLIP-B16"], got[0], atol=1e-2)


def test_the_published_clip_architecture_is_told_by_its_tensors() -> None:
    import open_clip
    from open_clip.model import _build_vision_tower

    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-B-16-quickgelu")
        published = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config["quick_gelu"])
        state = published.state_dict()
    tower = clip_b16.network(state, quick_gelu=True)
    assert len(state) == 152
    assert sum(t.numel() for t in state.values()) == 86_192_640
    assert {n: t.shape for n, t in tower.state_dict().items()} == {n: t.shape for n, t in state.items()}
    ours, theirs = tower.transformer.resblocks[0], published.transformer.resblocks[0]
    assert ours.attn.num_heads == theirs.attn.num_heads == 12
    assert type(ours.mlp.gelu) is type(theirs.mlp.gelu)
    assert ours.ln_1.eps == theirs.ln_1.eps


def test_a_torchscript_archive_is_refused_by_name(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "ViT-B-16.pt", "w") as archive:
        archive.writestr("ViT-B-16/constants.pkl", b"")
        archive.writestr("ViT-B-16/data.pkl", b"")
    with pytest.raises(ValueError, match=r"ViT-B-16\.pt is a TorchScript archive"):
        ClipB16(checkpoint=str(tmp_path / "ViT-B-16.pt")).load("cpu")


def test_clip_without_an_image_tower_is_refused(tmp_path: Path) -> None:
    torch.save({"text.a": torch.zeros(1)}, tmp_path / "text.pth")
    with pytest.raises(ValueError, match=r"expected tensors named visual\."):
        ClipB16(checkpoint=str(tmp_path / "text.pth")).load("cpu")
    with pytest.raises(ValueError, match=r"clip_b16: .* found no conv1\.weight"):
        clip_b16.network({"a": torch.zeros(1)}, quick_gelu=True)
    other = clip_state() | {"more": torch.zeros(1)}
    del other["transformer.resblocks.0.ln_1.bias"]
    with pytest.raises(
        ValueError, match=r"missing: transformer\.resblocks\.0\.ln_1\.bias.* 1 tensors unexpected: more"
    ):
        clip_b16.network(other, quick_gelu=True)
    with pytest.raises(ValueError, match="imagenet, native, inception, got 'half'"):
        ClipB16(normalisation="half")  # type: ignore[arg-type]


def dino_state(width: int = 128, side: int = 70) -> dict[str, torch.Tensor]:
    trunk = dinov2_b14._build(width=width, depth=2, mlp=2 * width, patch=14, side=side)
    return _checkpoints.randomised(trunk.state_dict(), seed=3) | {"mask_token": torch.zeros(1, width)}


def attention(x: torch.Tensor, state: dict[str, torch.Tensor], prefix: str, heads: int) -> torch.Tensor:
    n, tokens, width = x.shape
    qkv = F.linear(x, state[f"{prefix}qkv.weight"], state[f"{prefix}qkv.bias"])
    q, k, v = qkv.reshape(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.transpose(-2, -1)) * (width // heads) ** -0.5).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).reshape(n, tokens, width)
    return F.linear(mixed, state[f"{prefix}proj.weight"], state[f"{prefix}proj.bias"])


def reference_dino(pixels: torch.Tensor, state: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """DINOv2's forward pass at its own resolution, written from the paper with plain tensor operations."""
    width = state["cls_token"].shape[-1]
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    for i in range(2):
        block = f"blocks.{i}."
        x = x + state[f"{block}ls1.gamma"] * attention(norm(x, f"{block}norm1"), state, f"{block}attn.", heads)
        hidden = F.linear(norm(x, f"{block}norm2"), state[f"{block}mlp.fc1.weight"], state[f"{block}mlp.fc1.bias"])
        out = F.linear(F.gelu(hidden), state[f"{block}mlp.fc2.weight"], state[f"{block}mlp.fc2.bias"])
        x = x + state[f"{block}ls2.gamma"] * out
    return norm(x, "norm")


def test_dinov2_agrees_with_plain_tensor_operations() -> None:
    state = dino_state()
    pixels = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        ours = dinov2_b14.network(state, 70).forward_features(pixels)
        theirs = reference_dino(pixels, state, heads=2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_positions_are_interpolated_by_the_reference_factor() -> None:
    published = torch.randn(1, 1 + 37 * 37, 8, generator=torch.Generator().manual_seed(5))
    got = dinov2_b14.positions(published, 16)
    assert got.shape == (1, 257, 8)
    torch.testing.assert_close(got[:, 0], published[:, 0])
    square = published[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 256, 8)
    assert not torch.allclose(got[:, 1:], resized, atol=1e-3)
    # Output cell i of bicubic interpolation by a stated factor samples at (i + 0.5) / factor - 0.5 of the input.
    ramp = torch.arange(37.0).view(1, 37, 1, 1).expand(1, 37, 37, 1).reshape(1, 37 * 37, 1)
    along = dinov2_b14.positions(torch.cat([torch.zeros(1, 1, 1), ramp], 1), 16)[0, 1:].reshape(16, 16)[:, 8]
    expected = (torch.arange(16) + 0.5) * (37 / 16.1) - 0.5
    # The kernel of torch bends a line by up to 0.05; the positions of a resize to 16 are off by 0.19 at the far end.
    torch.testing.assert_close(along[2:-2], expected[2:-2], atol=0.06, rtol=0)
    assert dinov2_b14.positions(published, 37) is published


def test_the_published_dinov2_layout_loads(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = dinov2_b14._build(width=768, depth=12, mlp=3072, patch=14, side=518).state_dict()
    assert len(state) == 2 + 2 + 12 * 14 + 2
    assert state["pos_embed"].shape == (1, 1370, 768)
    labeler = DinoV2().tiny(tmp_path)
    with_block_two = {n: t for n, t in torch.load(labeler.checkpoint, weights_only=True).items() if ".1." not in n}
    assert {n.replace("blocks.0", "blocks.i") for n in with_block_two} == {
        n.replace("blocks.0", "blocks.i") for n in state if "blocks" not in n or "blocks.0." in n
    } | {"mask_token"}


def test_dinov2_emits_grid_and_class_token(tmp_path: Path) -> None:
    for labels in DinoV2().tiny(tmp_path).load("cpu")(PHOTOS):
        assert labels["DINOv2-B14"].shape == (16, 16, 16)
        assert labels["DINOv2-B14-global"].shape == (16,)
        assert labels["DINOv2-B14"].dtype == labels["DINOv2-B14-global"].dtype == np.float16


def test_dinov2_refuses_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="without registers"):
        dinov2_b14.network(dino_state() | {"register_tokens": torch.zeros(1, 4, 128)}, 224)
    with pytest.raises(ValueError, match="multiple of the patch"):
        dinov2_b14.network(dino_state(), 220)
    broken = {name: value for name, value in dino_state().items() if not name.startswith("blocks.0.")}
    with pytest.raises((KeyError, ValueError)):
        dinov2_b14.network(broken, 224)


def test_features_are_aligned_with_the_image() -> None:
    rgb = np.zeros((100, 300, 3), np.uint8)
    rgb[:, 200:] = 255
    batch = _images.normalised([_images.squeezed(rgb, 224)], _images.IMAGENET, "cpu")
    bright = batch[0, 0] > 0
    assert bright[:, 155:].all()
    assert not bright[:, :140].any()
