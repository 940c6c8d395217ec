"""The commands after labelling: tokenise, pack, train, generate, evaluate, and the demo that does it all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dataengine.manifest import Dataset
from dataengine.schedule import single
from pipelines import config, label, running
from pipelines.cli import (
    Bad,
    Json,
    Modalities,
    Permissive,
    Recipe,
    Root,
    RunnerOption,
    Settings,
    Workers,
    app,
    exits,
    say,
    split_settings,
)
from pipelines.running import console
from pipelines.tokens import Precision

Name = Annotated[
    str, typer.Argument(help="A recipe of pipelines/recipes/ (NAME, NAME.large), or a Python file with `def recipe()`.")
]


@app.command()
@exits
def tokenize(
    root: Root,
    modalities: Modalities = None,
    tokenizers: Annotated[str, typer.Option(help="Folder of <modality>.safetensors files.")] = "tokenizers",
    recipe: Recipe = None,
    side: Annotated[int, typer.Option(min=0, help="Side of the crops in pixels; 0 for each tokenizer's own.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of the encoders; auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = "auto",
    compiled: Annotated[bool, typer.Option("--compiled", help="Compile the encoders, on a GPU.")] = False,
    ml4m_names: Annotated[bool, typer.Option("--ml4m-names", help="tok_clip@224, not tok_CLIP-B16@224.")] = False,
    permissive: Permissive = False,
    pack: Annotated[bool, typer.Option("--pack", help="Pack each shard once its tokens are committed.")] = False,
    text_tokenizer: Annotated[str, typer.Option(help="With --pack: the WordPiece JSON file.")] = "",
    pixels: Annotated[int, typer.Option(min=0, help="With --pack: side of the images packed beside the tokens.")] = 0,
    images: Annotated[bool, typer.Option("--images", help="With --pixels: as stored, decoded when read.")] = False,
    runner: RunnerOption = "ray",
    workers: Workers = None,
    device: Annotated[str, typer.Option(help="torch device of the networks: cpu, cuda, or auto.")] = "auto",
    max_bad_fraction: Bad = 0.05,
    as_json: Json = False,
) -> None:
    """Tokenise maps, features, poses and masks: one column for each tokenizer, every crop a row.

    Features (CLIP-B16, DINOv2-B14-global, ...) are computed on the way and never stored.
    """
    from pipelines.pack_behind import tokenize_and_pack
    from pipelines.tokenize import Choice, labelers, plan_of

    dataset = Dataset(root)
    names, settings = split_settings(modalities)
    choice = Choice(side=side, precision=precision, device=device, compiled=compiled, ml4m_names=ml4m_names)
    plan = plan_of(
        dataset, labelers(tokenizers, names, label.candidates(recipe, settings), choice), permissive=permissive
    )
    where: dict[str, Any] = {
        "runner": runner,
        "workers": workers,
        "device": device,
        "max_bad_fraction": max_bad_fraction,
    }
    if pack:
        summary = tokenize_and_pack(dataset, plan, text_tokenizer or f"{tokenizers}/text.json", pixels, images, **where)
    else:
        summary = label.execute(dataset, plan, what="tokenize", **where)
    say(
        {**summary.as_json(), "already_committed": plan.num_done},
        as_json,
        f"committed {plan.num_cells} token cells, {plan.num_done} were committed already",
    )


@app.command()
@exits
def pack(
    root: Root,
    text_tokenizer: Annotated[str, typer.Option(help="The WordPiece JSON file.")] = "tokenizers/text.json",
    pixels: Annotated[int, typer.Option(min=0, help="Side of the images packed beside the tokens; 0 for none.")] = 0,
    images: Annotated[
        bool, typer.Option("--images", help="With --pixels: packed as stored, decoded and cropped when read.")
    ] = False,
    columns: Annotated[str, typer.Option(help="Only these, separated by commas; all that can be if none.")] = "",
    from_ml4m: Annotated[
        str, typer.Option(help="Convert ml-4m's tars into ROOT: tars/[caption,tok_rgb@224]/shard-{000..099}.tar")
    ] = "",
    tokenizers: Annotated[str, typer.Option(help="With --from-ml4m: the folder of what made the tokens.")] = "",
    folder: Annotated[
        list[str] | None, typer.Option(help="With --from-ml4m: FOLDER=MODALITY, as ml-4m's modality_name_map.")
    ] = None,
    aligned_captions: Annotated[
        bool, typer.Option(help="With --from-ml4m: a caption belongs to the crop of its number.")
    ] = False,
    runner: RunnerOption = "local",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Pack tokens, texts and embeddings of each shard into one Arrow file that a trainer memory-maps."""
    from pipelines import convert
    from pipelines import pack as packing

    dataset = Dataset(root)
    worker: convert.Convert | packing.Pack
    if from_ml4m:
        worker, tasks = convert.prepare(
            dataset,
            from_ml4m,
            text_tokenizer=text_tokenizer,
            tokenizers=tokenizers,
            pixels=pixels,
            encoded=images,
            names={name: modality for name, _, modality in (f.partition("=") for f in folder or [])},
            aligned=aligned_captions,
        )
    else:
        chosen = [name for name in columns.split(",") if name]
        worker, tasks = packing.prepare(dataset, text_tokenizer, pixels, chosen, encoded=images)
    summary = running.execute(
        dataset,
        [single(worker, tasks, name="pack")],
        what="pack",
        runner=runner,
        workers=workers,
        device="cpu",
        max_bad_fraction=0.0,
    )
    packed = [c.name for c in worker.columns]
    say({**summary.as_json(), "columns": packed}, as_json, f"packed {len(tasks)} shards: {', '.join(packed)}")


@app.command(name="pack-text")
@exits
def pack_text(
    root: Root,
    source: Annotated[list[str], typer.Argument(help="Parquet or JSON lines (.gz, .zst): files, folders, globs.")],
    text_tokenizer: Annotated[str, typer.Option(help="The WordPiece JSON file.")] = "tokenizers/text.json",
    column: Annotated[str, typer.Option(help="Of the text: a column, or a name in the objects.")] = "text",
    rows: Annotated[int, typer.Option(min=1, help="Rows a shard.")] = 10_000,
    runner: RunnerOption = "local",
    workers: Workers = None,
    max_bad_fraction: Bad = 0.05,
    as_json: Json = False,
) -> None:
    """Pack texts that come without images (C4 and the like), as the captions of samples that have nothing else."""
    from pipelines import pack_text as packing

    dataset = Dataset(root)
    worker, tasks, counts = packing.prepare(dataset, source, text_tokenizer=text_tokenizer, field=column, rows=rows)
    summary = running.execute(
        dataset,
        [single(worker, tasks, counts, name="pack")],
        what="pack-text",
        runner=runner,
        workers=workers,
        device="cpu",
        max_bad_fraction=max_bad_fraction,
    )
    left = sum(summary.invalid.values())
    why = ", ".join(f"{n} {reason.partition(': ')[2]}" for reason, n in summary.reasons.most_common())
    say(
        {**summary.as_json(), "shards": len(worker.parts)},
        as_json,
        f"packed {summary.num_samples - left} texts, left out {left}{f' ({why})' if why else ''}: {len(tasks)} of "
        f"{len(worker.parts)} shards to do",
    )


@app.command(name="train-tokenizer")
@exits
def train_tokenizer(recipe: Name, settings: Settings = None, as_json: Json = False) -> None:
    """Train the tokenizer of a recipe; run it again to resume."""
    from pipelines.train_tokenizer import TrainTokenizer, tokenizer_file, train

    run = config.override(config.load(recipe, TrainTokenizer), settings or [])
    result = train(run)
    say(
        {"file": str(tokenizer_file(run)), "steps": result.steps, **result.metrics},
        as_json,
        f"{tokenizer_file(run)}: {result.steps} steps, {result.metrics}",
    )


@app.command(name="train-text-tokenizer")
@exits
def train_text_tokenizer(
    roots: Annotated[list[str], typer.Argument(metavar="ROOT...", help="Dataset roots, to learn from all of them.")],
    out: Annotated[Path, typer.Option(help="The WordPiece JSON file to write.")],
    vocab_size: Annotated[int, typer.Option(help="Ids at most: 4284 are fixed, the others learned pieces.")] = 30_000,
    columns: Annotated[str, typer.Option(help="Only these, separated by commas; all that are text if none.")] = "",
    as_json: Json = False,
) -> None:
    """Learn word pieces from captions and all other labels that are read as text."""
    from pipelines import train_text

    chosen = [name for name in columns.split(",") if name]
    made = train_text.train([Dataset(root) for root in roots], out, vocab_size, chosen)
    for column in made.left_out:
        console.print(f"{column} is left out: it comes from random weights", markup=False)
    say(vars(made), as_json, made.line())


@app.command()
@exits
def train(
    recipe: Name,
    settings: Settings = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="On the Ray cluster of RAY_ADDRESS or of this machine; dead workers restart.")
    ] = False,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: processes; by default as many as there are GPUs, or one.")
    ] = None,
    use_gpu: Annotated[
        bool | None,
        typer.Option("--use-gpu/--use-cpu", help="With --ray: a GPU for each; by default if there are any."),
    ] = None,
    max_failures: Annotated[int, typer.Option(min=0, help="With --ray: how often workers are started again.")] = 3,
    as_json: Json = False,
) -> None:
    """Train the FourM of a recipe on packed shards; run it again to resume."""
    from pipelines import train as training

    run = config.override(config.load(recipe, training.TrainFourM), settings or [])
    if ray:
        from pipelines import cluster_train

        result = cluster_train.train(run, num_workers=num_workers, use_gpu=use_gpu, max_failures=max_failures)
    else:
        if num_workers is not None or use_gpu is not None:
            raise ValueError("--num-workers and --use-gpu are for --ray; torchrun has --nproc-per-node")
        result = training.train(run)
    say({"out": run.out, "steps": result.steps, **result.metrics}, as_json, f"{run.out}: {result.steps} steps")


@app.command()
@exits
def generate(recipe: Name, settings: Settings = None) -> None:
    """Generate modalities from others as a recipe says, and write a page of input, prediction and truth."""
    from pipelines import generate as generation

    run = config.override(config.load(recipe, generation.Generate), settings or [])
    console.print(f"wrote {generation.write_page(run)}")


class _ModelUnlessNamed(TyperGroup):
    """`evaluate RECIPE` is `evaluate model RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `model` before what is no subcommand."""
        named = not args or args[0].startswith("-") or args[0] in self.commands
        return super().parse_args(ctx, args if named else ["model", *args])


judging = typer.Typer(
    cls=_ModelUnlessNamed,
    help="Score a trained model (evaluate RECIPE) or a tokenizer (evaluate tokenizer FILE ROOT).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(judging, name="evaluate")


@judging.command(name="model")
@exits
def evaluate(recipe: Name, settings: Settings = None, as_json: Json = False) -> None:
    """Score a model's predictions from RGB alone against the truth and the best constant predictor."""
    from pipelines import evaluate as evaluation

    run = config.override(config.load(recipe, evaluation.Evaluate), settings or [])
    scores, _ = evaluation.evaluate(run)
    for s in scores:
        line = f"{s.modality}: {s.metric} {s.model:.4f}, constant {s.constant:.4f}, ratio {s.ratio:.3f}"
        say(vars(s) | {"ratio": s.ratio}, as_json, line)


@judging.command(name="tokenizer")
@exits
def evaluate_tokenizer(
    file: Annotated[str, typer.Argument(help="A tokenizer's file, folder or repository, ours or ml-4m's.")],
    root: Root,
    samples: Annotated[int, typer.Option(min=1, help="At most so many values, from the first shard on.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Also write a page of originals beside reconstructions.")] = None,
    modality: Annotated[str, typer.Option(help="What it is of, where neither its file nor its name says so.")] = "",
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of the crops; the tokenizer's own if none.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a diffusion decoder.")] = 25,
    recipe: Annotated[str, typer.Option(help="The recipe it was trained by: its modality, and its teacher.")] = "",
    device: Annotated[str, typer.Option(help="torch device: cpu, cuda, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Score what a tokenizer gives back of a dataset's labels, and how it uses its codebook."""
    from pipelines import evaluate_tokenizer as judge
    from pipelines import tokenizer_page
    from pipelines.train_tokenizer import TrainTokenizer

    makers = None
    if recipe:
        run = config.load(recipe, TrainTokenizer)
        modality, makers = modality or run.modality, None if run.teacher is None else [run.teacher]
    judged, domain, pairs = judge.evaluate(
        file, root, samples=samples, modality=modality, steps=steps, side=side, device=device, makers=makers
    )
    if out is not None:
        tokenizer_page.write(out, judged, domain, pairs)
    lines = [
        f"{judged.kind} of {judged.modality}, {judged.samples} values, {judged.tokens} tokens of {judged.bits:.0f} bits"
    ]
    lines += [f"{s.metric}: {s.value:.4f}, best constant {s.constant:.4f}" for s in judged.scores]
    lines.append(
        f"codes used: {judged.codes_used} of {judged.codes} ({judged.usage:.0%}), perplexity {judged.perplexity:.1f}"
    )
    lines += [f"note: {note}" for note in judged.notes]
    say(judged.as_json(), as_json, "\n".join(lines))
    if out is not None and not as_json:
        console.print(f"wrote {out}", markup=False, highlight=False)


@app.command()
@exits
def demo(out: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("out/demo")) -> None:
    """The whole path on photographs and rendered scenes: labels, tokens, a nano model, its predictions, one page."""
    from pipelines import demo as whole

    whole.run(out)
