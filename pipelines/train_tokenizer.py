"""Train the tokenizer of a modality on the committed labels of some datasets, on the one training loop."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from dataengine import weights
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from model import tokenizers
from model.loop import FitResult, LoopConfig, fit
from model.tokenizers._vq import VQ, VQConfig
from model.tokenizers.vqvae import dead_code_threshold
from pipelines import config, tokenizer_loss
from pipelines.label_batches import LabelBatches, Source, source_of
from pipelines.pack import is_random
from pipelines.tokenizer_health import Health
from pipelines.tokenizer_loss import AdversarialLoss, PerceptualLoss


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """One tokenizer: the modality of `roots`, cut to `model.image_size`; written to `<out>/<modality>.safetensors`.

    `min_crop_scale` draws new crops of at least that share of the image, mirrored by a coin, instead of one of the
    stored ones. With `smallest_side` every step has a side of range(smallest_side, image_size + 1, side_step), and its
    crops are resized to that. `teacher` makes the features of each crop from its pixels.

    `init_from` starts from the weights of a tokenizer of the same architecture, `init_encoder_from` takes its encoder
    half alone (for `model.freeze_enc`); position tables are never taken, for they follow from the size.
    `dead_code_share` sets `model.threshold_ema_dead_code` by ml-4m's rule: a code is dead that gets less than
    1/share of an even split of a batch, over all processes.

    Every `loop.evaluate_every` steps the samples of `heldout` are tokenised: usage of the codebook, and figures of the
    reconstruction; every `loop.pictures_every` the first few are shown beside their originals.
    """

    roots: tuple[str, ...]
    modality: str
    model: VQConfig
    loop: LoopConfig
    batch_size: int
    out: str
    min_crop_scale: float | None = None
    smallest_side: int | None = None
    side_step: int = 32
    teacher: Labeler | None = None
    teacher_device: str = "auto"
    init_from: str = ""
    init_encoder_from: str = ""
    dead_code_share: float | None = None
    perceptual: PerceptualLoss | None = None
    adversarial: AdversarialLoss | None = None
    heldout: tuple[str, ...] = ()
    heldout_samples: int = 256


def train(run: TrainTokenizer) -> FitResult:
    """Train, or resume, or find it done; ValueError when the labels come from random weights.

    In each of the processes that torchrun starts; the first one writes the tokenizer.
    """
    if run.model.domain is None:
        raise ValueError("model.domain is not set, expected how maps become network input")
    model = made(run)
    batches = _batches(run, run.roots, run.loop.batches_per_step)
    health = None
    if run.heldout:
        heldout = _batches(run, run.heldout, 1).examples(run.heldout_samples)
        health = Health(run.modality, heldout)
    module, loss = tokenizer_loss.trained(model, run.perceptual, run.adversarial, run.loop.seed)
    loop = run.loop
    if run.adversarial is not None:
        loop = replace(loop, lr_scales=(*loop.lr_scales, ("critic.", run.adversarial.lr_scale)))
    work = Path(run.out) / run.modality
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        config.keep(run, work, free=("heldout", "heldout_samples", "teacher_device"))
    result = fit(
        module,
        batches,
        loss,
        loop,
        work,
        evaluate=None if health is None else health.figures,
        pictures=None if health is None else health.pictures,
    )
    if result.finished and first:
        model.cpu().save(tokenizer_file(run))
    return result


def tokenizer_file(run: TrainTokenizer) -> Path:
    """Where the finished tokenizer lies."""
    return Path(run.out) / f"{run.modality}.safetensors"


def sides(run: TrainTokenizer) -> tuple[int, ...]:
    """The sides that maps are trained at, in pixels; ValueError when one is no multiple of what the model needs."""
    largest = run.model.image_size
    if run.smallest_side is None:
        return (largest,)
    found = tuple(range(run.smallest_side, largest + 1, run.side_step))
    if not found or found[-1] != largest or any(side % run.model.patch_size for side in found):
        raise ValueError(
            f"sides {run.smallest_side}..{largest} in steps of {run.side_step}, "
            f"expected multiples of the patch size {run.model.patch_size} that end at {largest}"
        )
    return found


def made(run: TrainTokenizer) -> VQ:
    """The tokenizer as it is before the first step, by its class and with the weights it starts from."""
    settings = run.model
    if run.dead_code_share is not None:
        # What a quantizer counts in one forward pass: the maps of one batch in every process.
        together = run.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        mean = (min(sides(run)) + max(sides(run))) // 2 // settings.patch_size
        threshold = dead_code_threshold(together * mean**2, settings.codebook_size, run.dead_code_share)
        settings = replace(settings, threshold_ema_dead_code=threshold)
    model = class_of(settings)(settings)
    if run.init_from and run.init_encoder_from:
        raise ValueError("init_from and init_encoder_from are both set, expected one of them")
    if run.init_from or run.init_encoder_from:
        _start(model, run.init_from or run.init_encoder_from, encoder_only=not run.init_from)
    elif settings.freeze_enc:
        raise ValueError("model.freeze_enc without init_encoder_from: a random encoder would stay random")
    return model


def class_of(settings: VQConfig) -> type[VQ]:
    """The tokenizer class that these settings are of."""
    # Settings lie beside their class, in the file of the plugin.
    kind = tokenizers.load(type(settings).__module__.rpartition(".")[2])
    if issubclass(kind, VQ) and kind.Config is type(settings):
        return kind
    raise ValueError(f"settings of {type(settings).__name__}, expected those of a tokenizer such as VQVAEConfig")


def _start(model: VQ, source: str, *, encoder_only: bool) -> None:
    """Take over weights; ValueError names those that do not fit, position tables aside, and refuses random ones."""
    if weights.stated(Path(source)).get("random"):
        raise ValueError(
            f"{source} is random, expected a trained tokenizer: what starts from it would not be called so"
        )
    found = tokenizers.read(source, domain=model.config.domain, encoder_only=encoder_only).state_dict()
    own = model.state_dict()
    decoder = [name for name in own if name.startswith(("decoder.", "post_quant_proj."))] if encoder_only else []
    wanted = {name for name in own if not name.endswith("pos_emb")} - set(decoder)
    given = {name for name in found if not name.endswith("pos_emb")}
    wrong = sorted(wanted ^ given) + sorted(n for n in wanted & given if own[n].shape != found[n].shape)
    if wrong:
        raise ValueError(f"{source} does not fit the model, which differs in {', '.join(wrong[:5])} ({len(wrong)})")
    model.load_state_dict({name: found[name] for name in wanted}, strict=False)


def _batches(run: TrainTokenizer, roots: tuple[str, ...], batches_per_step: int) -> LabelBatches:
    datasets = tuple(Dataset(root) for root in roots)
    source = _source(run, datasets)
    for dataset in datasets:
        if is_random(dataset, source.columns[0]):
            name = source.columns[0]
            raise ValueError(f"{name} of {dataset.store.name} comes from random weights: nothing is trained on it")
    assert run.model.domain is not None
    return LabelBatches(
        datasets=datasets,
        source=source,
        domain=run.model.domain,
        sides=sides(run),
        batch_size=run.batch_size,
        seed=run.loop.seed,
        min_scale=run.min_crop_scale,
        batches_per_step=batches_per_step,
    )


def _source(run: TrainTokenizer, datasets: tuple[Dataset, ...]) -> Source:
    device = run.teacher_device
    if run.teacher is not None and device == "auto":
        from pipelines.label import pick_device

        device = run.loop.device or pick_device("auto")
        if device == "cuda":
            # Batches are made in a thread, where torch's current device is not this process's.
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return source_of(run.modality, datasets, run.teacher, device)
