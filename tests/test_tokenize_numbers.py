"""In what precision tokens are computed, and what becomes of numbers that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataengine import local, modalities
from dataengine.labeler import Labeler, Loaded
from dataengine.manifest import Conflict, Dataset
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from model import domains
from model.tokenizers._mlp import BottleneckMLP
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import tokenize, verifying
from tests.fakes import ingested, tree

SMALL = VQVAEConfig(
    image_size=32, patch_size=8, enc_type="vit_32x1x2_enc", dec_type="vit_32x1x2_dec", codebook_size=64, latent_dim=8
)
MLP = {"enc_type": "BottleneckMLP/B_1-Wi_32", "dec_type": "BottleneckMLP/B_1-Wi_32", "quant_type": "memcodes"}
DENSE, GLOBAL = "DINOv2-B14", "DINOv2-B14-global"
CONFIGS = {
    "rgb": replace(SMALL, domain=domains.Rgb(), post_mlp=True),
    DENSE: replace(
        SMALL, domain=domains.Features(channels=4), n_channels=4, patch_proj=False, image_size=28, patch_size=14
    ),
    GLOBAL: replace(SMALL, domain=domains.Vector(channels=4), n_channels=4, num_codebooks=4, **MLP),
    "human_poses": replace(
        SMALL, domain=domains.Poses(), n_channels=207, num_codebooks=8, latent_dim=32, codebook_size=1024, **MLP
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Means(Labeler):
    """Features without a network: means of colours; of one image those of `fails` are not finite, or it raises."""

    inputs = ("rgb",)
    emits = (DENSE, GLOBAL)
    side = 28
    batch_size = 4

    image: str = ""
    fails: str = ""

    def load(self, device: str) -> Loaded:
        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            if self.fails == "both" and any(s.key == self.image for s in samples):
                raise ValueError("an odd image")
            return [self._features(sample) for sample in samples]

        return run

    def _features(self, sample: Sample) -> dict[str, Any]:
        means = [*sample.rgb.mean(axis=(0, 1)) / 255, sample.rgb.std() / 255]
        made = {DENSE: np.tile(np.array(means, np.float16), (2, 2, 1)), GLOBAL: np.array(means, np.float16)}
        if sample.key == self.image and self.fails in made:
            made[self.fails][..., 0] = np.inf
        return made


def folder(root: Path, names: Sequence[str], poisoned: str = "") -> Path:
    """Untrained tokenizers; the encoder of one gives no numbers."""
    root.mkdir()
    for name in names:
        model = VQVAE(CONFIGS[name])
        if name == poisoned:
            for parameter in model.encoder.parameters():
                torch.nn.init.constant_(parameter, torch.nan)
        model.save(root / f"{name}.safetensors")
    return root


def make(dataset: Dataset, labelers: Sequence[Labeler]) -> dict[str, dict[str, str]]:
    """What is not valid in each column, and why."""
    columns = [m for x in labelers for m in x.emits]
    plan = plan_labels(dataset, columns, labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    found: dict[str, dict[str, str]] = {column: {} for column in columns}
    for column in columns:
        for shard in dataset.committed(column):
            commit = dataset.commit(column, shard)
            assert commit is not None
            found[column] |= commit.invalid
    return found


@pytest.mark.parametrize("fails", [DENSE, GLOBAL, "both"])
def test_in_a_group_features_that_fail_cost_their_own_tokens_alone(tmp_path: Path, fails: str) -> None:
    files = folder(tmp_path / "files", ["rgb", DENSE, GLOBAL])
    alone, together = ingested(tmp_path, name="alone"), ingested(tmp_path, name="together")
    bad = together.keys(0)[1]
    labelers = tokenize.labelers(files, [], [Means(image=bad, fails=fails)])
    (group,) = tokenize.grouped(labelers)
    found = make(together, [group])
    assert make(alone, labelers) == found
    assert tree(tmp_path / "alone") == tree(tmp_path / "together")
    columns = {DENSE: "tok_DINOv2-B14@28", GLOBAL: "tok_DINOv2-B14_global"}
    lost = {column: modality for modality, column in columns.items() if fails in (modality, "both")}
    for column, invalid in found.items():
        why = "an odd image" if fails == "both" else f"{lost.get(column)}: expected finite values"
        assert list(invalid) == ([bad] if column in lost else [])
        assert all(text.startswith(f"ValueError: {why}") for text in invalid.values())


def test_latents_that_are_no_numbers_become_no_tokens_and_cost_no_other_column(tmp_path: Path) -> None:
    """The largest of what is no number is the first, which is an id like any other."""
    files = folder(tmp_path / "files", ["rgb", DENSE], poisoned="rgb")
    dataset = ingested(tmp_path, count=4)
    found = make(dataset, tokenize.grouped(tokenize.labelers(files, [], [Means()])))
    assert found["tok_DINOv2-B14@28"] == {}
    assert sorted(found["tok_rgb@32"]) == sorted(dataset.keys(0))
    assert all("FloatingPointError: tok_rgb@32: the tokenizer gave latents that are not finite" in why
               for why in found["tok_rgb@32"].values())  # fmt: skip


def test_poses_whose_latents_are_no_numbers_are_refused(tmp_path: Path) -> None:
    (own,) = tokenize.labelers(folder(tmp_path / "files", ["human_poses"], poisoned="human_poses"), [])
    people = modalities.load("human_poses").example(np.random.default_rng(0), (40, 50))
    sample = Sample("a", {"rgb": np.zeros((40, 50, 3), np.uint8), "human_poses": people})
    with pytest.raises(FloatingPointError, match="human_poses_tokens: the tokenizer gave latents that are not finite"):
        own.load("cpu")([sample])


def test_a_vocabulary_that_is_too_large_for_a_column_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "rgb.safetensors"
    VQVAE(replace(CONFIGS["rgb"], codebook_size=2**15 + 1)).save(file)
    dataset = ingested(tmp_path, count=2)
    with pytest.raises(ValueError, match=r"rgb\.safetensors: a vocabulary of 32769 ids, expected at most 32768"):
        tokenize.plan_of(dataset, tokenize.labelers(tmp_path, ["rgb"]))
    VQVAE(replace(CONFIGS["rgb"], codebook_size=2**15)).save(file)
    assert tokenize.plan_of(dataset, tokenize.labelers(tmp_path, ["rgb"])).num_cells == 1


def test_sums_of_the_mlp_are_not_rounded_under_autocast() -> None:
    mlp = BottleneckMLP(4, 4, (2, 8, 2)).requires_grad_(False)
    for module in (mlp.linear_in, mlp.blocks[0].block[2]):
        module.weight.zero_()
    mlp.linear_in.bias.fill_(1.0)
    mlp.blocks[0].block[2].bias.fill_(2**-10)  # bfloat16 knows no number between 1 and 1 + 2**-7
    seen: list[torch.Tensor] = []
    mlp.layernorms[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mlp(torch.zeros(1, 4, 1, 1))
    assert torch.equal(seen[0], torch.full((1, 1, 8), 1 + 2**-10))
    assert mlp.bfloat16()(torch.zeros(1, 4, 1, 1, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_tokens_are_made_without_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cuDNN would by default round what float32 convolutions multiply to TF32."""
    model = VQVAE.tiny()
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: pytest.fail("a convolution"))
    assert model.tokenize(torch.zeros(1, 3, 32, 32)).shape == (1, *model.grid)


def test_a_column_is_of_one_precision_wherever_the_rest_of_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, dataset = folder(tmp_path / "files", ["rgb", DENSE]), ingested(tmp_path, count=6)

    def chosen(**how: Any) -> list[Labeler]:
        return tokenize.labelers(files, [], [Means()], tokenize.Choice(**how))

    for device, precision in (("cuda", "bfloat16"), ("cuda:1", "bfloat16"), ("cpu", "float32")):
        made = chosen(device=device)
        assert [x.identity()["settings"]["precision"] for x in made] == [precision] * 2
        assert [x.identity() for x in made] == [x.identity() for x in chosen(precision=precision)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen()[0].identity()["settings"]["precision"] == "bfloat16"
    assert chosen(precision="float16", device="cpu")[0].identity()["settings"]["precision"] == "float16"
    make(dataset, chosen(device="cpu"))
    with pytest.raises(Conflict, match="was made with other settings"):
        tokenize.plan_of(dataset, chosen(device="cuda"))


def test_tokens_of_any_precision_are_made_again_and_compared(tmp_path: Path) -> None:
    files, dataset = folder(tmp_path / "files", ["rgb"]), ingested(tmp_path, count=2)
    make(dataset, tokenize.labelers(files, [], [], tokenize.Choice(precision="bfloat16")))
    found = verifying.Verified(1.0)
    verifying.replay(dataset, found, 1.0, "cpu", tokenizers=str(files))
    assert [cell["outcome"] for cell in found.replayed if cell["modality"] == "tok_rgb@32"] == ["same"]
