"""How much faster all image-like tokenizers of a sample are than ml-4m's way of running them, side by side.

python -m benchmarks.tokenizers [--quick] [--reference DIR] [--json]

Both begin with the same labels of the same scenes and end with the same token arrays on a disk. Ours: one group of
labelers over shards, everything read and decoded once, crops shared, DINOv2 run once for its dense and its global
tokens. Theirs (save_vq_tokens.py): one pass over the images for each tokenizer; every crop cut from a copy by Pillow,
images of each pass in batches of 64, a teacher in front of each tokenizer of features, one .npy an image.

With `--reference DIR`, a checkout of ml-4m (which needs einops beside our packages), their tokenizers are ml-4m's own
`VQVAE`, strictly loaded from our weights. Without it `theirs` says "restated": their steps on our layers, with their
plain attention and their one-hot quantizer. Weights are random, and the codes are noisy latents of other scenes. The
two take turns, one thread each; ratios are of the fastest round of each, by the clock and by the processor's time,
which other programs disturb less. Loading is not counted.

`equal_precision` is float32 against float32; `bfloat16` is ours with `precision=bfloat16`, with the share of tokens
that are the same as in float32. `quantizer` is the quantizer alone. `feeding` is our reading, decoding and cutting.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import _report
from benchmarks._save_vq_tokens import DENSE, GLOBAL, SIDE, Theirs
from dataengine import local, modalities
from dataengine.geometry import crops_of
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.sample import Sample
from dataengine.work import Task, Work
from labelers import _checkpoints, _images, dinov2_b14
from labelers.canny_edge import Canny
from labelers.dinov2_b14 import DinoV2
from model import domains
from model.tokenizers.vqvae import VQVAE, VQVAEConfig
from pipelines import tokenize
from pipelines._encoder import Encoder
from pipelines.tokens import Precision

MAPS = {"rgb": (16384, 3), "depth": (8192, 1), "normal": (8192, 3), "semseg": (4096, 64), "canny_edge": (8192, 1)}
"""Codes and channels."""


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    scenes: int
    crops: int
    size: int
    width: int
    depth: int
    rounds: int

    @property
    def vit(self) -> str:
        """The name of the encoders' size."""
        return f"vit_{self.width}x{self.depth}x{self.width // 64}"


FULL = Amount(scenes=4, crops=2, size=320, width=768, depth=12, rounds=2)
QUICK = Amount(scenes=3, crops=2, size=160, width=192, depth=2, rounds=2)


def measure(quick: bool, reference: Path | None) -> dict[str, Any]:
    """All image-like tokenizers of a sample, ours and ml-4m's way."""
    amount = QUICK if quick else FULL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="tokenizers-") as folder:
            return _measure(amount, Path(folder), reference) | {"quick": quick}
    finally:
        torch.set_num_threads(threads)


def _measure(amount: Amount, folder: Path, reference: Path | None) -> dict[str, Any]:
    say = _report.console.print
    say("scenes, weights ...")
    dataset = labelled(folder, amount)
    files, teacher = networks(folder, amount)
    export(dataset, folder / "files")
    theirs = Theirs(files, teacher, (*MAPS, DENSE, GLOBAL), reference)
    ours: dict[Precision, list[Spent]] = {"float32": [], "bfloat16": []}
    columns: dict[str, dict[str, list[np.ndarray]]] = {}
    plain = []
    for number in range(amount.rounds):
        say(f"round {number + 1}: theirs ...")
        plain.append(timed(lambda number=number: theirs.run(folder / "files", folder / f"theirs{number}")))
        for precision, seconds in ours.items():
            say(f"round {number + 1}: ours, {precision} ...")
            made = tokenize.grouped(
                tokenize.labelers(files, [*MAPS, DENSE, GLOBAL], [teacher], tokenize.Choice(precision=precision))
            )
            work, tasks = ready(dataset, made)
            seconds.append(timed(lambda work=work, tasks=tasks: [work(task) for task in tasks]))
            columns[precision] = {c: values(dataset, c) for x in made for c in x.emits}
            for column in columns[precision]:
                for shard in dataset.committed(column):
                    dataset.uncommit(column, shard)
    images = amount.scenes
    equal = {c: same(columns["float32"][c], columns["bfloat16"][c]) for c in columns["float32"]}
    took = {"theirs": plain, **ours}
    return {
        "benchmark": "tokenizers",
        "theirs": theirs.kind,
        "random_weights": True,
        "images": images,
        "crops": amount.crops,
        "columns": len(equal),
        "threads": torch.get_num_threads(),
        "images_per_second": {name: images / min(seconds).wall for name, seconds in took.items()},
        "ratios": {
            "equal_precision": ratio(plain, ours["float32"]),
            "bfloat16": ratio(plain, ours["bfloat16"]),
            "quantizer": quantizer(theirs, files, 4 * amount.rounds),
        },
        "seconds": {name: [vars(s) for s in seconds] for name, seconds in took.items()},
        "tokens_equal_in_bfloat16": equal,
        "tokens_equal_to_theirs": agreement(theirs, files, dataset),
        "feeding_images_per_second": feeding(dataset),
    }


@dataclass(frozen=True, order=True)
class Spent:
    """Seconds, of the clock and of the processor."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> Spent:
    """What something takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def ratio(plain: Sequence[Spent], ours: Sequence[Spent]) -> dict[str, float]:
    """How much less ours take, of the fastest each."""
    return {how: min(getattr(s, how) for s in plain) / min(getattr(s, how) for s in ours) for how in ("wall", "cpu")}


def same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The share of equal ids."""
    return float(np.mean(np.concatenate([a.ravel() == b.ravel() for a, b in zip(one, other, strict=True)])))


# -- what both begin with ---------------------------------------------------------------------------------------------


def labelled(folder: Path, amount: Amount) -> Dataset:
    """Rendered scenes with their exact depth, normals and classes, and their edges."""
    dataset = Dataset(folder / "data")
    settings = IngestSettings(shard_size=amount.scenes, num_crops=amount.crops)
    worker, tasks = prepare(dataset, f"scenes:{amount.scenes}?size={amount.size}&seed=7", settings)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    label(dataset, [Canny()])
    return dataset


def label(dataset: Dataset, labelers: Sequence[Any]) -> None:
    """Everything that these labelers make."""
    plan = plan_labels(dataset, [column for x in labelers for column in x.emits], labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)


def ready(dataset: Dataset, labelers: Sequence[Any]) -> tuple[Work, tuple[Task, ...]]:
    """A worker with its networks loaded, and what it has to do."""
    plan = plan_labels(dataset, [column for x in labelers for column in x.emits], labelers)
    return plan.group(dataset.store.url).start("cpu"), plan.tasks


def values(dataset: Dataset, column: str) -> list[Any]:
    """The decoded members of a column."""
    codec = modalities.load(column)
    return [codec.decode(m.data) for shard in dataset.committed(column) for m in dataset.read(column, shard)]


def export(dataset: Dataset, folder: Path) -> None:
    """The files of the tars, one a folder and image, as save_vq_tokens.py reads them."""
    for modality in (*MAPS, "crop_settings"):
        (folder / modality).mkdir(parents=True)
        for shard in dataset.committed(modality):
            for member in dataset.read(modality, shard):
                (folder / modality / f"{member.key}.{member.suffix}").write_bytes(member.data)


def networks(folder: Path, amount: Amount) -> tuple[Path, DinoV2]:
    """Random tokenizers of ViTs of one size, and a random DINOv2 of that size."""
    files = folder / "tokenizers"
    files.mkdir()
    common = VQVAEConfig(
        image_size=SIDE, enc_type=f"{amount.vit}_enc", dec_type="vit_64x1x1_dec", post_mlp=True, latent_dim=32
    )
    for seed, (name, (codes, channels)) in enumerate(MAPS.items()):
        domain = domain_of(name)
        labels = domain.num_labels if isinstance(domain, domains.Semseg) else None
        config = replace(
            common, domain=domain, n_channels=channels, n_labels=labels, codebook_size=codes, patch_size=16, seed=seed
        )
        save(VQVAE(config).eval(), files / f"{name}.safetensors", seed)
    features = domains.Features(channels=amount.width)
    dense = replace(
        common, domain=features, n_channels=amount.width, patch_proj=False, patch_size=14, codebook_size=8192
    )
    save(VQVAE(dense).eval(), files / f"{DENSE}.safetensors", 8)
    wide = 4 * amount.width // 3  # 1024 for ViT-B, as published
    wide -= wide % 16
    mlp = f"BottleneckMLP/B_{max(amount.depth // 2, 1)}-Wi_{wide}"
    whole = replace(
        common, domain=domains.Vector(channels=amount.width), n_channels=amount.width, enc_type=mlp, dec_type=mlp,
        quant_type="memcodes", num_codebooks=16, codebook_size=8192, latent_dim=wide,
    )  # fmt: skip
    VQVAE(whole).save(files / f"{GLOBAL}.safetensors")
    trunk = dinov2_b14._build(width=amount.width, depth=amount.depth, mlp=4 * amount.width, patch=14, side=SIDE)
    state = _checkpoints.randomised(trunk.state_dict(), seed=0)
    torch.save(state, folder / "dinov2.pth")
    return files, DinoV2(checkpoint=str(folder / "dinov2.pth"))


def domain_of(modality: str) -> domains.Domain:
    """As ml-4m has it."""
    return {
        "rgb": domains.Rgb(),
        "depth": domains.Depth(mapping="standardised"),
        "normal": domains.Normal(),
        "semseg": domains.Semseg(),
        "canny_edge": domains.Edges(),
    }[modality]


def save(model: VQVAE, file: Path, seed: int) -> None:
    """A tokenizer whose codes are spread over what its encoder gives, as those of a trained one are."""
    drawn = torch.Generator().manual_seed(seed)
    config = model.config
    with torch.inference_mode():
        if config.n_labels:
            x = torch.randint(config.n_labels, (2, 7, 7), generator=drawn).repeat_interleave(32, 1)
            x = x.repeat_interleave(32, 2)
        else:
            shape = (2, config.n_channels, 16, 16) if not config.patch_proj else (2, config.n_channels, SIDE, SIDE)
            coarse = torch.randn(2, config.n_channels, 14, 14, generator=drawn)
            x = F.interpolate(coarse, shape[-2:], mode="bicubic").contiguous()
        x = x if model.cls_emb is None else model.cls_emb(x).permute(0, 3, 1, 2)
        latents = model.quant_proj(model.encoder(x)).permute(0, 2, 3, 1).flatten(0, 2)
        picked = latents[torch.randint(len(latents), (config.codebook_size,), generator=drawn)]
        codes = picked + latents.std(dim=0) * torch.randn(picked.shape, generator=drawn)
        model.quantize._codebook.embed.copy_(F.normalize(codes, dim=-1))
    model.save(file)


# -- parts ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def quantizer(theirs: Theirs, files: Path, times: int) -> dict[str, float]:
    """How much faster the quantizer of rgb is alone, on the latents of eight crops."""
    own = VQVAE.load(files / "rgb.safetensors")
    latents = torch.randn(8, own.config.latent_dim, 14, 14, generator=torch.Generator().manual_seed(0))
    plain, ours = [], []
    for _ in range(times):
        plain.append(timed(lambda: theirs.models["rgb"].quantize(latents)))
        ours.append(timed(lambda: own.quantize(latents)))
    return ratio(plain, ours)


def agreement(theirs: Theirs, files: Path, dataset: Dataset) -> float:
    """The share of their ids of one crop that are ours, given the same network input."""
    rgb, settings = values(dataset, "rgb")[0], values(dataset, "crop_settings")[0]
    pixels = modalities.load("rgb").crop(rgb, crops_of(settings)[0], rgb.shape[:2], SIDE)
    own = Encoder(str(files / "rgb.safetensors"), "cpu", "float32")
    return float((own([pixels]) == theirs.tokens("rgb", own.domain.to_network([pixels]))).float().mean())


def feeding(dataset: Dataset) -> float:
    """Images a second that are read, decoded and cut for every tokenizer, in one thread and without networks."""
    crop = {m: modalities.load(m) for m in (*MAPS, "crop_settings")}
    began, count = time.perf_counter(), 0
    for shard in dataset.committed("rgb"):
        rows: Mapping[str, list[Any]] = {
            m: [codec.decode(x.data) for x in dataset.read(m, shard)] for m, codec in crop.items()
        }
        for i, rgb in enumerate(rows["rgb"]):
            sample = Sample(str(i), {m: rows[m][i] for m in crop})
            for one in crops_of(sample.values["crop_settings"]):
                for m in MAPS:
                    crop[m].crop(sample.values[m], one, rgb.shape[:2], SIDE)
                _images.squeezed(rgb[one.top : one.top + one.height, one.left : one.left + one.width], SIDE)
            count += 1
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    _report.main(measure)
