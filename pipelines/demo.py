"""The whole path in one run: photographs and scenes to labels, tokens, a nano any-to-any model, and a page to look at.

Every stage is the one its command runs; each finds its own work done the second time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dataengine.ingest import IngestSettings, prepare
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.schedule import single
from pipelines import config, label, pack, photos, running
from pipelines.recipes import _scenes
from pipelines.running import Runner, console

SCENE_LABELS = ("canny_edge", "color_palette", "metadata")
TOKENIZERS = ("depth", "normal", "semseg", "rgb", "canny_edge")
PHOTO_MAPS = ("rgb", "canny_edge")
TEXT_VOCABULARY = 6000
HELDOUT_SEED = 1_000_000  # a scene is its seed: far from the training scenes, which count from 0

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything: the demo's own amounts unless a test wants a glance; None leaves a recipe's steps."""

    scenes: int = 4000
    heldout: int = 200
    tokenizer_steps: int | None = None
    model_steps: int | None = None


def run(out: Path, runner: Runner = "ray", workers: int = 2, scale: Scale | None = None) -> None:
    """Do what is not done yet under `out`, and print where to look."""
    scale = scale or Scale()
    clock = _Clock(out / "seconds.json")
    photo, scenes, heldout = (Dataset(out / name) for name in ("photos", "scenes", "scenes_heldout"))
    with clock("photographs: ingest and label"):
        count = photos.write(out / "corpus" / "photos")
        _ingest(photo, f"folder:{out}/corpus/photos", 8, runner, workers)
        _label_photos(photo, out, runner, workers)
    with clock("scenes: render and label"):
        _ingest(scenes, f"scenes:{scale.scenes}?size={_scenes.SIDE}&seed=0", 250, runner, workers)
        _ingest(heldout, f"scenes:{scale.heldout}?size={_scenes.SIDE}&seed={HELDOUT_SEED}", 100, runner, workers)
        for dataset in (scenes, heldout):
            _label(dataset, SCENE_LABELS, label.default_labelers(), runner, workers)
    with clock("tokenizers: train"):
        _train_text((photo, scenes), out / "tokenizers" / "text.json")
        _train_tokenizers(out, workers, scale.tokenizer_steps)
    with clock("tokens: write and pack"):
        for dataset, modalities in ((photo, PHOTO_MAPS), (scenes, TOKENIZERS), (heldout, TOKENIZERS)):
            _tokenize(dataset, modalities, out / "tokenizers", runner, workers)
            _pack(dataset, out / "tokenizers" / "text.json", workers)
    with clock("model: train"):
        _train_model(out, scale.model_steps)
    with clock("model: evaluate, generate, draw"):
        metrics = _look(out, photo, scenes, heldout, scale.heldout)
    clock.save()
    _summary(out, count, scale.scenes, metrics, clock)


class _Clock:
    """Seconds of work a stage took, over all runs: a stage that was interrupted counts all its parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.stages: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self.now = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        console.rule(stage, align="left")
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.now += spent
            # A stage that found its work done takes no part in what the work took.
            if spent > 5 or stage not in self.stages:
                self.stages[stage] = self.stages.get(stage, 0.0) + spent
            self.save()

    def save(self) -> None:
        """Keep the seconds for the next run."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({k: round(v, 1) for k, v in self.stages.items()}, indent=1) + "\n")


def _ingest(dataset: Dataset, corpus: str, shard_size: int, runner: Runner, workers: int) -> None:
    worker, tasks = prepare(dataset, corpus, IngestSettings(shard_size=shard_size))
    stages = [single(worker, tasks, name="ingest")]
    running.execute(dataset, stages, what="ingest", runner=runner, workers=workers, device="cpu", max_bad_fraction=0.0)


def _label_photos(dataset: Dataset, out: Path, runner: Runner, workers: int) -> None:
    from pipelines.recipes import photo_labels

    recipe = photo_labels.labels(out / "random_weights")
    wanted = [m for labeler in recipe.labelers for m in labeler.emits]
    made = label.plan(dataset, wanted, recipe)
    for labeler in made.labelers:
        if made.tasks and labeler.random:
            console.print(f"{labeler.name}: RANDOM WEIGHTS, its labels mean nothing", style="bold yellow")
    _execute(dataset, made, "label", runner, workers)


def _label(
    dataset: Dataset,
    wanted: Sequence[str],
    labelers: Sequence[Labeler],
    runner: Runner,
    workers: int,
    what: str = "label",
) -> None:
    available = {*dataset.plan.ingested, *wanted}
    _execute(dataset, plan_labels(dataset, wanted, [x.adapted(available) for x in labelers]), what, runner, workers)


def _execute(dataset: Dataset, plan: Any, what: str, runner: Runner, workers: int) -> None:
    label.execute(dataset, plan, what=what, runner=runner, workers=workers, device="cpu", max_bad_fraction=0.05)


def _train_text(datasets: Sequence[Dataset], path: Path) -> None:
    if not path.exists():
        from pipelines import train_text

        console.print(train_text.train(datasets, path, TEXT_VOCABULARY).line())


def _rooted(recipe: C, out: Path) -> C:
    """A recipe of the demo with its paths under another folder."""
    return config.with_paths(recipe, _scenes.OUT, str(out))


def _train_tokenizers(out: Path, workers: int, steps: int | None) -> None:
    """Side by side, one core each: so small a network gains little from a second core."""
    todo = [m for m in TOKENIZERS if not (out / "tokenizers" / f"{m}.safetensors").exists()]
    if not todo:
        return
    columns = (
        TextColumn("train     "),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokenizers"),
        TimeElapsedColumn(),
    )
    with (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("tokenizers", total=len(todo))
        for finished in as_completed([processes.submit(_train_tokenizer, m, out, steps) for m in todo]):
            bar.console.print(finished.result())
            bar.advance(task)


def _train_tokenizer(modality: str, out: Path, steps: int | None) -> str:
    from pipelines import train_tokenizer

    recipe = _rooted(config.load(f"scenes_{modality}", train_tokenizer.TrainTokenizer), out)
    result = train_tokenizer.train(
        replace(recipe, loop=replace(recipe.loop, threads=1, progress=False, steps=steps or recipe.loop.steps))
    )
    return f"{modality} tokenizer: {result.steps} steps, loss {result.metrics['loss']:.4f}, {result.seconds:.0f} s"


def _tokenize(dataset: Dataset, modalities: Sequence[str], folder: Path, runner: Runner, workers: int) -> None:
    from pipelines.tokenize import labelers

    made = labelers(folder, modalities)
    wanted = [m for tokenizer in made for m in tokenizer.emits]
    _label(dataset, wanted, made, runner, workers, what="tokenize")


def _pack(dataset: Dataset, text_tokenizer: Path, workers: int) -> None:
    worker, tasks = pack.prepare(dataset, str(text_tokenizer), _scenes.SIDE)
    stages = [single(worker, tasks, name="pack")]
    running.execute(dataset, stages, what="pack", runner="local", workers=workers, device="cpu", max_bad_fraction=0.0)


def _train_model(out: Path, steps: int | None) -> None:
    if (out / "fourm" / "model" / "model.safetensors").exists():
        return
    from pipelines import train

    recipe = _rooted(config.load("nano", train.TrainFourM), out)
    result = train.train(replace(recipe, loop=replace(recipe.loop, steps=steps or recipe.loop.steps)))
    console.print(f"nano model: {result.steps} steps, loss {result.metrics['loss']:.3f}, {result.seconds:.0f} s")


def _look(out: Path, photo: Dataset, scenes: Dataset, heldout: Dataset, samples: int) -> dict[str, Any]:
    """Scores and the page; both are kept while the model, the tokens and the labels they show stay the same."""
    path = out / "metrics.json"
    shown = hashlib.sha256((out / "fourm" / "model" / "model.safetensors").read_bytes())
    for dataset in (photo, scenes, heldout):
        for m in dataset.modalities():
            records = [dataset.commit(m, s) for s in dataset.committed(m)]
            shown.update("".join(r.sha256 for r in records if r is not None).encode())
    if path.exists() and (out / "index.html").exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["identity"] == shown.hexdigest():
            return known
    from pipelines import demo_page, evaluate

    recipe = _rooted(config.load("nano_evaluate", evaluate.Evaluate), out)
    scores, maps = evaluate.evaluate(replace(recipe, samples=samples))
    metrics = {
        "identity": shown.hexdigest(),
        "samples": scores[0].num_samples,
        "scores": {s.modality: {**vars(s), "ratio": s.ratio} for s in scores},
    }
    demo_page.write(out, photo, scenes, heldout, scores, maps)
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def _summary(out: Path, num_photos: int, num_scenes: int, metrics: dict[str, Any], clock: _Clock) -> None:
    console.rule("done", align="left")
    console.print(f"{num_photos} photographs, {num_scenes} training scenes, {metrics['samples']} scenes never seen")
    for name, s in metrics["scores"].items():
        console.print(
            f"{name:>8}: {s['metric']} {s['model']:.3f} from RGB alone, best constant {s['constant']:.3f}, "
            f"ratio {s['ratio']:.2f} (tokenizer alone {s['tokenizer']:.3f})"
        )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in clock.stages.items())
    console.print(f"work: {spent}; this run {clock.now:.0f} s")
    console.print(f"look at {out / 'index.html'}")
