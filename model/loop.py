"""The one training loop, for tokenizers and for FourM: exact to resume, and it stops at the first non-finite loss."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from model import optim, snapshots


class Batch(Protocol):
    """What a step trains on: a tensor, or a dataclass of tensors that can move."""

    @property
    def to(self) -> Callable[..., Any]:
        """A method that takes a device and `non_blocking`, and returns the batch there."""


B = TypeVar("B", bound=Batch)
Metrics = dict[str, float]

# Settings that may differ between a run and its resumption, because no loss depends on them.
_FREE = frozenset({"checkpoint_every", "threads", "max_seconds", "progress"})


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or NaN; the message names the file that holds the batch."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train: steps are optimizer steps, `lr` is the peak after the warm-up.

    `ema_decay` also averages the weights; the average is what a finished run leaves in the model. `max_seconds` stops
    early with a checkpoint, to be resumed. `threads` is torch's number of CPU threads, None for its own choice.
    """

    steps: int
    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float | None = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    log_every: int = 10
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    ema_decay: float | None = None
    seed: int = 0
    threads: int | None = None
    max_seconds: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}, expected at least 1")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr {self.min_lr} and lr {self.lr}, expected 0 <= min_lr <= lr")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r}, expected float32 or bfloat16")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay}, expected more than 0 and less than 1, or None")


@dataclass(frozen=True)
class FitResult:
    """Where a run stands: optimizer steps done, whether that is all of them, the newest log line, its last checkpoint.

    `seconds` is the time of this call alone, 0 steps included.
    """

    steps: int
    finished: bool
    metrics: Metrics
    seconds: float
    checkpoint: Path


def fit(
    model: nn.Module,
    batch_at: Callable[[int], B],
    loss: Callable[[nn.Module, B], tuple[Tensor, Metrics]],
    config: LoopConfig,
    out: Path,
    *,
    on_log: Callable[[int, Metrics], None] | None = None,
) -> FitResult:
    """Train `model` in place on `batch_at(0) .. batch_at(steps - 1)`; called again, go on from the last checkpoint.

    `batch_at` must depend on the step alone: then a resumed run takes the very same steps as an undisturbed one. It
    runs in one background thread, a step ahead. A finished run is not trained again: its weights are loaded.
    """
    out = Path(out)
    started = time.monotonic()
    _same_settings(config, out)
    with _surroundings(config, model):
        state = _TrainState(model, config)
        done = state.resume(out / "checkpoint")
        metrics = _truncate_log(out / "log.jsonl", done)
        if done < config.steps:
            with _Journal(out, config, done, on_log) as journal:
                done, metrics = _train(state, batch_at, loss, config, out, done, metrics, journal, started)
    finished = done >= config.steps
    if finished:
        state.use_average()
    model.eval()
    checkpoint = snapshots.path(out / "checkpoint", done)
    return FitResult(done, finished, metrics, time.monotonic() - started, checkpoint)


def _train(
    state: _TrainState,
    batch_at: Callable[[int], B],
    loss: Callable[[nn.Module, B], tuple[Tensor, Metrics]],
    config: LoopConfig,
    out: Path,
    done: int,
    metrics: Metrics,
    journal: _Journal,
    started: float,
) -> tuple[int, Metrics]:
    state.model.train()
    with contextlib.closing(_prefetched(batch_at, done, config.steps)) as batches:
        for step, batch in batches:
            moved = batch.to(state.device, non_blocking=True)
            lr = float(state.scheduler.get_last_lr()[0])
            value, grad_norm, parts = state.step(moved, loss)
            if not (math.isfinite(value) and math.isfinite(grad_norm)):
                raise NonFiniteLoss(_keep_batch(out, step, batch, value, grad_norm))
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                metrics = dict(loss=value, lr=lr, grad_norm=grad_norm, **parts)
                journal.log(done, metrics)
            journal.advance(done, value)
            late = config.max_seconds is not None and time.monotonic() - started > config.max_seconds
            if late or done % config.checkpoint_every == 0 or done == config.steps:
                state.save(out / "checkpoint", done)
            if late:
                break
    return done, metrics


class _TrainState:
    """Everything that a step changes: the weights, their average, the optimizer, the schedule and the random states."""

    def __init__(self, model: nn.Module, config: LoopConfig) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        self.optimizer = optim.adamw(model, config.lr, config.weight_decay, config.betas)
        self.scheduler = optim.warmup_cosine(self.optimizer, config.steps, config.warmup_steps, config.min_lr)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            # Buffers too: a codebook is a buffer, and must stay with the weights around it.
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    def step(
        self, batch: Any, loss: Callable[[nn.Module, Any], tuple[Tensor, Metrics]]
    ) -> tuple[float, float, Metrics]:
        """One optimizer step; the loss, the gradient's norm before clipping, and the loss function's own metrics.

        A step whose loss or gradient is not finite leaves the weights as they were.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            value, parts = loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        limit = math.inf if self.config.clip_grad is None else self.config.clip_grad
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # One wait for the device per step: the price of keeping the batch that broke the run.
        measured, grad_norm = torch.stack([value.detach().float(), norm.float()]).tolist()
        if math.isfinite(measured) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        return measured, grad_norm, parts

    def use_average(self) -> None:
        """Put the averaged weights into the model, where there are any."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())

    def save(self, folder: Path, step: int) -> None:
        """One checkpoint; older ones beyond the number to keep are deleted after it."""
        weights = {"model": self.model.state_dict()}
        if self.average is not None:
            weights["average"] = self.average.module.state_dict()
        rest = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "averaged": None if self.average is None else self.average.n_averaged,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "generators": {name: own.get_state() for name, own in _generators(self.model).items()},
        }
        snapshots.write(folder, step, weights, rest)
        snapshots.prune(folder, self.config.keep_checkpoints)

    def resume(self, folder: Path) -> int:
        """Load the newest checkpoint, if there is one; the number of steps it holds."""
        step = snapshots.newest(folder)
        if step is None:
            return 0
        weights, rest = snapshots.read(folder, step, str(self.device))
        self.model.load_state_dict(weights["model"])
        if self.average is not None:
            self.average.module.load_state_dict(weights["average"])
            self.average.n_averaged.copy_(rest["averaged"])
        self.optimizer.load_state_dict(rest["optimizer"])
        self.scheduler.load_state_dict(rest["scheduler"])
        torch.set_rng_state(rest["random"].cpu())
        if rest["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(rest["random_cuda"].cpu(), self.device)
        for name, own in _generators(self.model).items():
            own.set_state(rest["generators"][name].cpu())
        return step


def _generators(model: nn.Module) -> dict[str, torch.Generator]:
    """The random generators that modules hold as `generator`, by the module's name."""
    found = {name: getattr(module, "generator", None) for name, module in model.named_modules()}
    return {name: own for name, own in found.items() if isinstance(own, torch.Generator)}


@contextlib.contextmanager
def _surroundings(config: LoopConfig, model: nn.Module) -> Iterator[None]:
    """Torch's threads and random state as configured, and as they were before afterwards."""
    threads = torch.get_num_threads()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _prefetched(batch_at: Callable[[int], B], first: int, end: int) -> Generator[tuple[int, B], None, None]:
    """The batches of steps first..end-1 in order, each made while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        upcoming = pool.submit(batch_at, first)
        for step in range(first, end):
            batch = upcoming.result()
            if step + 1 < end:
                upcoming = pool.submit(batch_at, step + 1)
            yield step, batch


def _same_settings(config: LoopConfig, out: Path) -> None:
    """Keep the settings beside the run, and refuse to go on with others that would change its losses."""
    path = out / "loop.json"
    settings = json.loads(json.dumps(asdict(config)))
    if snapshots.newest(out / "checkpoint") is not None and path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if k not in _FREE and before.get(k) != v
        ]
        if changed:
            raise ValueError(f"{out} holds a run with other settings: {'; '.join(changed)}; expected the same")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def _truncate_log(path: Path, done: int) -> Metrics:
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
    return {name: value for name, value in last.items() if name not in ("step", "seconds")}


class _Journal:
    """Log lines, TensorBoard and the progress bar of one call of `fit`."""

    def __init__(self, out: Path, config: LoopConfig, done: int, on_log: Callable[[int, Metrics], None] | None) -> None:
        self._on_log = on_log
        self._started = time.monotonic()
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

    def log(self, step: int, metrics: Metrics) -> None:
        """One line per call, on disk when it returns."""
        seconds = round(time.monotonic() - self._started, 3)
        self._file.write(json.dumps({"step": step, **metrics, "seconds": seconds}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._on_log is not None:
            self._on_log(step, metrics)

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        self._bar.update(self._task, completed=step, description=f"loss {loss:.4f}")


def _keep_batch(out: Path, step: int, batch: Any, loss: float, grad_norm: float) -> str:
    path = out / f"nonfinite-step-{step}.pt"
    torch.save({"step": step, "loss": loss, "grad_norm": grad_norm, "batch": _plain(batch)}, path)
    return f"step {step}: loss {loss}, gradient norm {grad_norm}, expected finite; the batch is kept in {path}"


def _plain(value: Any) -> Any:
    """Tensors in dicts and lists, which torch.load(weights_only=True) reads; of anything else, its text."""
    if value is None or isinstance(value, (Tensor, str, int, float)):
        return value
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return repr(value)
