"""The one training loop, for tokenizers and for FourM: exact to resume, and it stops at the first non-finite loss.

It runs alone, or in each of the processes that torchrun starts: docs/training.md.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model import journal, parallel, settings, snapshots
from model.journal import Journal, Metrics
from model.parallel import Processes
from model.settings import LoopConfig
from model.training import Outcome, State

__all__ = ["Batch", "FitResult", "LoopConfig", "Metrics", "NonFiniteLoss", "fit"]


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
    loss: Callable[[nn.Module, B], tuple[Tensor, Metrics]],
    config: LoopConfig,
    out: Path,
    *,
    on_log: Callable[[int, Metrics], None] | None = None,
    evaluate: Evaluate | None = None,
    pictures: Pictures | None = None,
) -> FitResult:
    """Train `model` in place on `batch_at(0), batch_at(1), ...`; called again, go on from the last checkpoint.

    Step s takes the batches s * n .. s * n + n - 1, n being `config.batches_per_step`. `batch_at` must depend on its
    argument alone: then a resumed run takes the very same steps as an undisturbed one. It runs in one background
    thread, a batch ahead. A finished run is not trained again: its weights are loaded.

    Among several processes each calls `fit` with the same arguments and a folder that all of them see, takes its share
    of every step's batches, and ends with the same weights; the first one logs, with means over all batches.
    `evaluate` and `pictures` get the model (averaged, where that is asked for) and the number of steps done, every so
    many steps and at the end; what they give is logged under the names they choose. They are called in the first
    process only, but with "fsdp" in all, since its forward pass needs them all.
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
    with _surroundings(config, processes):
        trained = parallel.Trained(
            model,
            loss,
            processes,
            mode,
            blocks=config.blocks,
            recompute=config.recompute,
            compiled=config.compile,
            unused_parameters=config.unused_parameters,
        )
        state = State(trained, processes, config)
        state.resume(out / "checkpoint")
        metrics = journal.truncated(out / "log.jsonl", state.done) if processes.first else {}
        if state.done < config.steps:
            with contextlib.ExitStack() as stack:
                written = None
                if processes.first:
                    written = stack.enter_context(Journal(out, config, state.done, on_log))
                metrics = _Run(state, out, metrics, written, evaluate, pictures, started).train(batch_at)
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

    def train(self, batch_at: Callable[[int], B]) -> Metrics:
        """Take the steps that are left, or as many as time allows; the newest log line."""
        state, config = self.state, self.state.config
        state.model.train()
        n, processes = config.batches_per_step, state.processes
        mine = (s * n + i for s in range(state.done, config.steps) for i in range(processes.rank, n, processes.world))
        with contextlib.closing(_prefetched(batch_at, mine)) as batches:
            while state.done < config.steps:
                held = list(islice(batches, n // processes.world))
                late = config.max_seconds is not None and time.monotonic() - self.started > config.max_seconds
                lr = state.rate
                outcome = state.step([batch.to(processes.device, non_blocking=True) for batch in held], late)
                if outcome.broken:
                    raise NonFiniteLoss(_keep_batch(self.out, state, held, outcome))
                self._report(lr, outcome)
                if outcome.stop or self._due(config.checkpoint_every):
                    state.save(self.out / "checkpoint")
                if outcome.stop:
                    break
        return self.metrics

    def _due(self, every: int) -> bool:
        return self.state.done % every == 0 or self.state.done == self.state.config.steps

    def _report(self, lr: float, outcome: Outcome) -> None:
        config, processes, done = self.state.config, self.state.processes, self.state.done
        called = processes.first or self.state.trained.sharded
        evaluating = self.evaluate is not None and self._due(config.evaluate_every)
        if evaluating or self._due(config.log_every):
            parts = _means([part for held in processes.gathered(outcome.metrics) for part in held])
            scale = {"loss_scale": self.state.scaler.get_scale()} if self.state.scaler.is_enabled() else {}
            self.metrics = dict(loss=outcome.loss, lr=lr, grad_norm=outcome.grad_norm, **scale, **parts)
            if evaluating and called and self.evaluate is not None:
                with self.state.for_others() as model:
                    self.metrics |= self.evaluate(model, done)
            if self.journal is not None:
                self.journal.log(done, self.metrics)
        if self.pictures is not None and called and self._due(config.pictures_every):
            with self.state.for_others() as model:
                shown = self.pictures(model, done)
            if self.journal is not None:
                self.journal.show(done, shown)
        if self.journal is not None:
            self.journal.advance(done, outcome.loss)


def _means(parts: Sequence[Metrics]) -> Metrics:
    """The mean of each figure over the batches that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    held = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: sum(values) / len(values) for name, values in held.items()}


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


def _prefetched(batch_at: Callable[[int], B], numbers: Iterable[int]) -> Generator[B, None, None]:
    """The batches of those numbers in order, each made while the one before it is in use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        upcoming = None
        for number in numbers:
            ready, upcoming = upcoming, pool.submit(batch_at, number)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()


def _keep_batch(out: Path, state: State, batches: Sequence[Any], outcome: Outcome) -> str:
    """Write the first batch of this process whose loss is not finite, or its first one; the message that names it."""
    step, processes = state.done, state.processes
    suffix = f"-process-{processes.rank}" if processes.world > 1 else ""
    path = out / f"nonfinite-step-{step}{suffix}.pt"
    batch = batches[outcome.finite.index(False) if False in outcome.finite else 0]
    kept = {"step": step, "loss": outcome.loss, "grad_norm": outcome.grad_norm, "batch": _plain(batch)}
    torch.save(kept, path)
    return (
        f"step {step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}, expected finite; "
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
