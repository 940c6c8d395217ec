"""What a training run leaves to read: JSON lines, TensorBoard, a progress bar, and Weights & Biases when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from model import measuring
from model.settings import LoopConfig

Metrics = dict[str, float]
OnLog = Callable[[int, Metrics], None]


def truncated(path: Path, done: int) -> Metrics:
    """Drop the lines after step `done` and one cut short by a crash; the metrics of the line that is then last."""
    kept: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            break
        if step > done:
            break
        kept.append(line)
    if not kept:
        path.unlink(missing_ok=True)
        return {}
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)
    last = json.loads(kept[-1])
    aside = ("step", "seconds")
    return {n: v for n, v in last.items() if n not in aside and not n.startswith(measuring.PREFIX)}


class Journal:
    """Log lines, pictures and the progress bar of one call of `fit`; only the first process has one."""

    def __init__(self, out: Path, config: LoopConfig, done: int, on_log: OnLog | None) -> None:
        self._on_log = on_log
        self._started = time.monotonic()
        self._wandb = None if config.wandb is None else _wandb(config.wandb, out, config)
        self._file = (out / "log.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1 if done else None)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, disable=not config.progress, transient=True, console=Console(stderr=True))
        self._task = self._bar.add_task("training", total=config.steps, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(error is not None))

    def log(self, step: int, metrics: Metrics, measured: Metrics) -> None:
        """One line per call, on disk when it returns; `measured` is what differs from run to run."""
        seconds = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps({"step": step, **metrics, "seconds": seconds, **measured}) + "\n")
        metrics = metrics | measured
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._on_log is not None:
            self._on_log(step, metrics)

    def show(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Pictures (C, H, W) of 1 or 3 channels, uint8 or float in 0..1, by name."""
        for name, picture in pictures.items():
            if picture.ndim != 3 or picture.shape[0] not in (1, 3):
                raise ValueError(f"picture {name}: shape {tuple(picture.shape)}, expected (1 or 3, height, width)")
            self._board.add_image(name, picture.detach().cpu(), step)
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(picture.detach().cpu().float())}, step=step)

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}")


def _wandb(project: str, out: Path, config: LoopConfig) -> Any:
    """The run of this folder: begun at the first call, gone on with at later ones."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"loop.wandb is {project!r}, but wandb is not installed: pip install wandb") from error
    known = out / "wandb-id"
    run = wandb.init(
        project=project,
        name=out.name,
        dir=str(out),
        config=asdict(config),
        id=known.read_text() if known.exists() else None,
        resume="allow",
    )
    known.write_text(run.id)
    return run
