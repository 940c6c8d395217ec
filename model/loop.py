"""The one training loop, for tokenizers and for FourM: exact to resume, and it stops at the first non-finite loss.

It runs alone, or in each of the processes that torchrun starts: docs/training.md.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model import figures, journal, parallel, settings, snapshots
from model.feeding import Feed
from model.journal import Journal, Metrics
from model.measuring import Meter, Work
from model.parallel import Loss, Processes
from model.saving import Saver
from model.settings import LoopConfig, named_dtype
from model.training import Outcome, State

__all__ = ["Batch", "FitResult", "LoopConfig", "Loss", "Metrics", "NonFiniteLoss", "Work", "fit"]


class Batch(Protocol):
    """What a step trains on: a tensor, or a dataclass of tensors that can move."""

    @property
    def to(self) -> Callable[..., Any]:
        """A method that takes a device and `non_blocking`, and returns the batch there."""


B = TypeVar("B", bound=Batch)
Evaluate = Callable[[nn.Module, int], Metrics]
Pictures = Callable[[nn.Module, int], Mapping[str, Tensor]]


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became infinite or NaN; the message names the file that holds the batch."""


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
    loss: Loss,
    config: LoopConfig,
    out: Path,
    *,
    on_log: Callable[[int, Metrics], None] | None = None,
    evaluate: Evaluate | None = None,
    pictures: Pictures | None = None,
    work: Callable[[B], Work] | None = None,
) -> FitResult:
    """Train `model` in place on `batch_at(0), batch_at(1), ...`; called again, go on from the last checkpoint.

    Step s takes the batches s * n .. s * n + n - 1, n being `config.batches_per_step`. `batch_at` must depend on its
    argument alone: then a resumed run takes the very same steps as an undisturbed one. It runs ahead of the training,
    in one background thread or in `config.workers` processes. A finished run is not trained again: its weights are
    loaded. SIGTERM ends the run after the step that is under way, with a checkpoint, as `config.max_seconds` does.

    `loss` gives a scalar and figures by name: numbers, scalar tensors, or tensors (total, weight) for weighted means.
    Give tensors, which are only read when they are logged, so that no step waits for the device because of them.
    `work` says what a batch is (samples, tokens, operations), for the figures of speed; it runs where `batch_at` does.

    Among several processes each calls `fit` with the same arguments and a folder that all of them see, takes its share
    of every step's batches, and ends with the same weights; the first one logs, with means over all batches.
    `evaluate` and `pictures` get the model (averaged, where that is asked for) and the number of steps done, every so
    many steps and at the end; what they give is logged under the names they choose. They are called in the first
    process only, but in all with "fsdp", since its forward pass needs them all, or if they say `in_all_processes`
    (`model.evaluation.Heldout`).
    """
    out = Path(out)
    started = time.monotonic()
    processes = parallel.join(model, config.device)
    mode = parallel.mode_of(config.parallel, processes.world)
    if config.batches_per_step % processes.world:
        raise ValueError(
            f"batches_per_step {config.batches_per_step} over {processes.world} processes, expected a multiple of them"
        )
    checked = settings.check(config, out)
    processes.wait()
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "loop.json").write_text(json.dumps(checked, indent=1) + "\n")
    with _surroundings(config, processes), _told_to_stop() as told:
        trained = parallel.Trained(
            model,
            loss,
            processes,
            mode,
            blocks=config.blocks,
            recompute=config.recompute,
            compiled=config.compile,
            unused_parameters=config.unused_parameters,
            sharding=parallel.Sharding(
                config.reshard, named_dtype(config.gather_dtype), named_dtype(config.reduce_dtype)
            ),
        )
        state = State(trained, processes, config)
        state.resume(out / "checkpoint")
        metrics = journal.truncated(out / "log.jsonl", state.done) if processes.first else {}
        if state.done < config.steps:
            with contextlib.ExitStack() as stack:
                written = None
                if processes.first:
                    written = stack.enter_context(Journal(out, config, state.done, on_log))
                saver = Saver(
                    out / "checkpoint",
                    config.keep_checkpoints,
                    processes,
                    sharded=trained.sharded,
                    behind=config.async_checkpoints,
                )
                stack.enter_context(contextlib.closing(saver))
                meter = Meter(processes.device, config.torch_dtype, config.peak_flops)
                run = _Run(state, out, metrics, written, evaluate, pictures, started, saver, meter, told)
                metrics = run.train(batch_at, work)
        state.finish()
    checkpoint = snapshots.path(out / "checkpoint", state.done)
    finished = state.done >= config.steps
    return FitResult(state.done, finished, processes.of_first(metrics), time.monotonic() - started, checkpoint)


@dataclass
class _Run:
    """One call of `fit`, from the first step it takes to the last."""

    state: State
    out: Path
    metrics: Metrics
    journal: Journal | None
    evaluate: Evaluate | None
    pictures: Pictures | None
    started: float
    saver: Saver
    meter: Meter
    told: threading.Event

    def train(self, batch_at: Callable[[int], B], work: Callable[[B], Work] | None) -> Metrics:
        """Take the steps that are left, or as many as time allows; the newest log line."""
        state, config = self.state, self.state.config
        state.model.train()
        n, processes = config.batches_per_step, state.processes
        mine = (s * n + i for s in range(state.done, config.steps) for i in range(processes.rank, n, processes.world))
        pin = processes.device.type == "cuda"
        with Feed(batch_at, mine, workers=config.workers, pin=pin, work=work) as feed:
            made = feed.with_work()
            while state.done < config.steps:
                with self.meter.step():
                    with self.meter.waiting():
                        held = list(islice(made, n // processes.world))
                    lr = state.rate
                    batches = [fed.batch.to(processes.device, non_blocking=True) for fed in held]
                    outcome = state.step(batches, self._late())
                self.meter.add([fed.work for fed in held])
                if outcome.broken:
                    raise NonFiniteLoss(_keep_batch(self.out, state, [fed.batch for fed in held], outcome))
                self._report(lr, outcome)
                if outcome.stop or self._due(config.checkpoint_every):
                    state.save(self.saver)
                if outcome.stop:
                    break
        return self.metrics

    def _late(self) -> bool:
        limit = self.state.config.max_seconds
        return self.told.is_set() or (limit is not None and time.monotonic() - self.started > limit)

    def _due(self, every: int) -> bool:
        return self.state.done % every == 0 or self.state.done == self.state.config.steps

    def _called(self, watching: Evaluate | Pictures) -> bool:
        processes = self.state.processes
        return processes.first or self.state.trained.sharded or getattr(watching, "in_all_processes", False)

    def _report(self, lr: float, outcome: Outcome) -> None:
        config, processes, done = self.state.config, self.state.processes, self.state.done
        evaluating = self.evaluate is not None and self._due(config.evaluate_every)
        if evaluating or self._due(config.log_every):
            gathered = processes.gathered((figures.read(outcome.figures), self.meter.take()))
            parts = figures.means([part for read, _ in gathered for part in read])
            measured = self.meter.figures([taken for _, taken in gathered])
            scale = {"loss_scale": self.state.scaler.get_scale()} if self.state.scaler.is_enabled() else {}
            self.metrics = dict(loss=outcome.loss, lr=lr, grad_norm=outcome.grad_norm, **scale, **parts)
            if evaluating and self.evaluate is not None and self._called(self.evaluate):
                with self.state.for_others() as model:
                    self.metrics |= self.evaluate(model, done)
            if self.journal is not None:
                self.journal.log(done, self.metrics, measured)
        if self.pictures is not None and self._called(self.pictures) and self._due(config.pictures_every):
            with self.state.for_others() as model:
                shown = self.pictures(model, done)
            if self.journal is not None:
                self.journal.show(done, shown)
        if self.journal is not None:
            self.journal.advance(done, outcome.loss)


@contextlib.contextmanager
def _surroundings(config: LoopConfig, processes: Processes) -> Iterator[None]:
    """Torch's threads and random state as configured, and as they were before afterwards."""
    threads, device = torch.get_num_threads(), processes.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Other noise on other samples.
        torch.manual_seed(config.seed + processes.rank)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM, with which schedulers say that they take a machine back; only a main thread can listen."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _keep_batch(out: Path, state: State, batches: Sequence[Any], outcome: Outcome) -> str:
    """Write the first batch of this process whose loss is not finite, or its first one; the message that names it."""
    step, processes = state.done, state.processes
    suffix = f"-process-{processes.rank}" if processes.world > 1 else ""
    path = out / f"nonfinite-step-{step}{suffix}.pt"
    broken = outcome.finite.index(False) if False in outcome.finite else 0
    batch, read = batches[broken], figures.read(outcome.figures)[broken]
    names = figures.not_finite(read)
    named = f" ({', '.join(names)} of this process's)" if names else ""
    kept = {"step": step, "loss": outcome.loss, "grad_norm": outcome.grad_norm, "batch": _plain(batch)}
    torch.save(kept, path)
    return (
        f"step {step}: loss {outcome.loss}{named}, gradient norm {outcome.grad_norm}, expected finite; "
        f"the batch is kept in {path}"
    )


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
