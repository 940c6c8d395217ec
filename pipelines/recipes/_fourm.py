"""What the recipes of 4M-7 and 4M-21 share: ml-4m's mixtures and hyper-parameters (its `cfgs/default/4m`).

Datasets are expected under `data/`, what is held out of them in `data/NAME_val` (`heldout=[]` for none), checkpoints
that a run starts from under `runs/`. A step takes one batch from each of ml-4m's GPUs, which any number of processes
that divides theirs can share out. docs/recipes.md compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from model.budgets import Keep
from model.fourm import FourMConfig
from model.loop import LoopConfig
from model.masking import MaskingConfig, MixtureComponent
from model.settings import in_tokens
from pipelines.train import Source, TrainFourM

EPOCH = 10_000_000
"""Samples that ml-4m counts as one epoch, after which it evaluates and saves."""

WORKERS = 4
"""Processes that make batches for each GPU."""

RGB = "rgb@224"
MAPS = tuple(f"tok_{m}@224" for m in ("rgb", "depth", "semseg", "normal", "clip"))
OUTPUTS_7 = (*MAPS, "caption", "det")
OUTPUTS_21 = (
    *("caption", "det", "metadata", *MAPS, "human_poses", "tok_dinov2@224", "tok_dinov2_global"),
    *("tok_imagebind@224", "tok_imagebind_global", "tok_sam_edge@224", "tok_canny_edge@224"),
    *("color_palette", "sam_instance"),
)
INPUTS_7 = (RGB, *OUTPUTS_7)
INPUTS_21 = (RGB, "t5_caption", *OUTPUTS_21)
MAPS_448 = tuple(name.replace("@224", "@448") for name in MAPS)
INPUTS_SR = (*INPUTS_7, "rgb@448", *MAPS_448)

Alphas = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """A row of docs/recipes.md: billions of tokens, and `batch_size` samples on each of `gpus` GPUs."""

    size: str
    gpus: int
    batch_size: int
    input_tokens: tuple[int, int]
    target_tokens: tuple[int, int]
    blr: float = 1e-4
    total: int = 500
    warmup: int = 10
    clip_grad: float | None = None
    sharded: bool = False
    recompute: bool = False

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.gpus * self.batch_size


def run(
    hyper: Hyper,
    components: tuple[MixtureComponent, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    out: str,
    *,
    data: tuple[Source, ...] = (Source(root="data/cc12m", repeats=4),),
    init_from: str = "",
) -> TrainFourM:
    """A recipe with the peak rate blr * samples of a step / 256, and what all of ml-4m's have in common."""
    return TrainFourM(
        data=data,
        heldout=tuple(replace(source, root=f"{source.root}_val", weight=1.0, repeats=1) for source in data),
        inputs=inputs,
        outputs=outputs,
        model=FourMConfig.preset(hyper.size),
        masking=masking(hyper, components),
        loop=LoopConfig(
            **in_tokens(
                total_tokens=hyper.total * 1e9,
                warmup_tokens=hyper.warmup * 1e9,
                input_tokens=hyper.input_tokens[1],
                target_tokens=hyper.target_tokens[1],
                batch=hyper.samples,
                base_lr=hyper.blr,
                epoch_samples=EPOCH,
            ),
            schedule="ml4m-cosine",
            weight_decay=0.05,
            betas=(0.9, 0.95),
            clip_grad=hyper.clip_grad,
            batches_per_step=hyper.gpus,
            dtype="bfloat16",
            parallel="fsdp" if hyper.sharded else "auto",
            # ml-4m's SHARD_GRAD_OP, which adds gradients up in bfloat16.
            reshard=not hyper.sharded,
            reduce_dtype="bfloat16" if hyper.sharded else "float32",
            recompute=hyper.recompute,
            workers=WORKERS,
            async_checkpoints=True,
            log_every=100,
            evaluate_every=EPOCH // hyper.samples,
            checkpoint_every=EPOCH // hyper.samples,
        ),
        batch_size=hyper.batch_size,
        out=out,
        init_from=init_from,
    )


def masking(hyper: Hyper, components: tuple[MixtureComponent, ...]) -> MaskingConfig:
    """Budgets as ml-4m draws them, its traps included: what is clamped is lost, and T5 takes part in targets."""
    return MaskingConfig(components=components, input_tokens=hyper.input_tokens, target_tokens=hyper.target_tokens)


def component(
    names: tuple[str, ...],
    inputs: float,
    targets: float,
    *,
    weight: float = 1.0,
    given: Alphas | None = None,
    wanted: Alphas | None = None,
    keep: Mapping[str, Keep] | None = None,
) -> MixtureComponent:
    """One column of ml-4m's tables: a concentration for all, others for those that are `given` and `wanted`.

    Pixels are never targets. Concentration 0 is ml-4m's "as good as never", and takes part as 1e-9 there and here.
    """
    never = {name: 0.0 for name in names if name.startswith("rgb@")}
    return MixtureComponent(
        weight=weight,
        input_alphas=dict.fromkeys(names, inputs) | dict(given or {}),
        target_alphas=dict.fromkeys(names, targets) | never | dict(wanted or {}),
        keep=keep or {},
    )


def mod7() -> tuple[MixtureComponent, ...]:
    """`mix_mod7_all2all_rgb2all_a0.5`: half from the image alone, half any to any."""
    return (component(INPUTS_7, 0.0, 0.5, given={RGB: 1000.0}), component(INPUTS_7, 0.5, 0.5))


def mod7_dense() -> tuple[MixtureComponent, ...]:
    """`mix_mod7_all2all_rgb2dense_a0.5`: the same, but from the image alone no text."""
    no_text = {"caption": 0.0, "det": 0.0}
    return (component(INPUTS_7, 0.0, 0.5, given={RGB: 1000.0}, wanted=no_text), component(INPUTS_7, 0.5, 0.5))


def mod7_biased() -> tuple[MixtureComponent, ...]:
    """`mix_mod7_all2allmix_rgb2all_capbias`: any to any at four concentrations, from the image, from captions."""
    return (
        *_all_to_all(INPUTS_7),
        component(INPUTS_7, 0.0, 0.5, given={RGB: 1000.0}),
        component(INPUTS_7, 0.05, 0.5, given={"caption": 5.0}, keep={"caption": "all"}),
    )


def mod21() -> tuple[MixtureComponent, ...]:
    """`mix_mod21_all2allmix_rgb2all_capT5bias`: the same over 21 modalities, half of the captions as T5 embeddings."""
    some: dict[str, Keep] = {"color_palette": "binary"}
    return (
        *_all_to_all(INPUTS_21, some),
        component(INPUTS_21, 0.0, 0.5, given={RGB: 1000.0}, keep=some),
        component(
            INPUTS_21, 0.05, 0.5, weight=0.5, given={"caption": 5.0, "t5_caption": 0.0}, wanted={"caption": 0.0},
            keep={**some, "caption": "all"},
        ),
        component(
            INPUTS_21, 0.05, 0.5, weight=0.5, given={"t5_caption": 5.0, "caption": 0.0}, wanted={"t5_caption": 0.0},
            keep={**some, "t5_caption": "all"},
        ),
    )  # fmt: skip


def _all_to_all(names: tuple[str, ...], keep: Mapping[str, Keep] | None = None) -> tuple[MixtureComponent, ...]:
    return tuple(component(names, alpha, alpha, keep=keep) for alpha in (0.01, 0.1, 1.0, 10.0))


def caption_biased() -> tuple[MixtureComponent, ...]:
    """`mix_caption_bias_a0.2_a1.0`: a third mostly from captions."""
    return (
        component(INPUTS_7, 0.05, 1.0, given={"caption": 5.0}, keep={"caption": "all"}),
        component(INPUTS_7, 0.2, 1.0),
        component(INPUTS_7, 1.0, 1.0),
    )


def superres() -> tuple[MixtureComponent, ...]:
    """`mix_mod7_superres_caption_rgb_bias`: tokens of 448 pixels, mostly from tokens of 224, or from captions."""
    sharp, bias = dict.fromkeys(MAPS_448, 1.0), {"tok_rgb@224": 5.0, "tok_rgb@448": 5.0}
    return (
        component(INPUTS_SR, 0.05, 0.0, given=bias, wanted=dict.fromkeys(MAPS_448, 0.05) | {"tok_rgb@448": 5.0}),
        component(INPUTS_SR, 0.05, 0.0, given={"caption": 5.0}, wanted=sharp, keep={"caption": "all"}),
        component(INPUTS_SR, 0.2, 0.0, wanted=sharp),
        component(INPUTS_SR, 1.0, 0.0, wanted=sharp),
    )


def text_only() -> tuple[MixtureComponent, ...]:
    """C4: captions alone, which are input and target."""
    return (component(("caption",), 1.0, 1.0),)
