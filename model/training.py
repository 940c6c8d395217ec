"""All that a training step changes, and how it is saved: weights, their average, the optimizer and randomness."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from model import optim, snapshots
from model.figures import Figures, detached
from model.parallel import Processes, Trained, full
from model.saving import Saver
from model.settings import LoopConfig


class Outcome(NamedTuple):
    """What a step measured: the mean loss of all its batches, the gradient's norm before clipping, and own figures.

    `figures` and `finite` (whether the loss is) have an entry for each batch of this process alone; figures may still
    be on the device.
    """

    loss: float
    grad_norm: float
    figures: list[Figures]
    finite: list[bool]
    stop: bool
    broken: bool


class State:
    """The training of one model in this process; every method but `rate` is called by all processes of the run."""

    def __init__(self, trained: Trained, processes: Processes, config: LoopConfig) -> None:
        self.trained = trained
        self.model = trained.model
        self.processes = processes
        self.config = config
        self.optimizer = optim.adamw(self.model, config.lr, config.weight_decay, config.betas, config.lr_scales)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.dtype == "float16")
        self.average = None if config.ema_decay is None else optim.Average(self.model, config.ema_decay)
        self.done = 0

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        c = self.config
        return optim.rate(
            c.schedule,
            self.done,
            steps=c.steps,
            lr=c.lr,
            min_lr=c.min_lr,
            warmup_steps=c.warmup_steps,
            cooldown_steps=c.cooldown_steps,
        )

    def step(self, batches: Sequence[Any], stop: bool) -> Outcome:
        """One optimizer step on the mean loss over this process's batches and those of the others.

        A step whose loss or gradient is not finite leaves the weights as they were; it is `broken`, unless float16
        gradients overflowed, which the scaler answers with a smaller factor. `stop` comes back true for all processes
        when it is true for one.
        """
        device = self.processes.device
        optim.set_rate(self.optimizer, self.rate)
        self.optimizer.zero_grad(set_to_none=True)
        values, figures = [], list[Figures]()
        for i, batch in enumerate(batches):
            with self.trained.step(last=i + 1 == len(batches)):
                with torch.autocast(device.type, self.config.torch_dtype, enabled=self.config.dtype != "float32"):
                    value, parts = self.trained(batch)
                self.scaler.scale(value / len(batches)).backward()
            values.append(value.detach().float())
            figures.append(detached(parts))
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.config.clip_grad is None else self.config.clip_grad
        norm = full(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        means = self.processes.total(torch.stack([torch.stack(values).mean(), values[0].new_tensor(float(stop))]))
        # One wait for the device per step: the price of keeping the batch that broke the run.
        loss, stops, grad_norm = torch.cat([means, norm.float().to(device)[None]]).tolist()
        loss /= self.processes.world
        scale = self.scaler.get_scale()
        if math.isfinite(loss):
            if math.isfinite(grad_norm) or scale > 1:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.done += 1
            if self.average is not None and math.isfinite(grad_norm):
                self.average.update()
        # At a factor of 1 it is not the factor that makes a gradient infinite.
        broken = not math.isfinite(loss) or not (math.isfinite(grad_norm) or scale > 1)
        finite = [] if not broken else [bool(v.isfinite()) for v in values]
        return Outcome(loss, grad_norm, figures, finite, stops > 0, broken)

    @contextlib.contextmanager
    def for_others(self) -> Iterator[nn.Module]:
        """The model as a finished run would leave it, in eval mode, for code that must not disturb the training."""
        modes = {module: module.training for module in self.model.modules()}
        random = self._random()
        with contextlib.ExitStack() as stack:
            if self.average is not None and self.average.updates:
                stack.enter_context(self.average.in_model())
            stack.enter_context(self.trained.readable())
            stack.enter_context(torch.no_grad())
            try:
                yield self.model.eval()
            finally:
                for module, training in modes.items():
                    module.training = training
                self._set_random(random)

    def finish(self) -> None:
        """Put the averaged weights, where there are any, or the last ones into the caller's model."""
        if self.average is not None:
            self.model.load_state_dict(self.average.tensors)
        self.model.eval()
        self.trained.give_back()

    def save(self, saver: Saver) -> None:
        """One checkpoint."""
        rest = {
            "averaged": None if self.average is None else self.average.updates,
            "scaler": self.scaler.state_dict(),
            "processes": self.processes.gathered(self._random()),
        }
        saver.save(self.done, self._tensors(), rest)

    def resume(self, folder: Path) -> None:
        """Load the newest checkpoint, if there is one, as written by any number of processes."""
        step = self.processes.of_first(snapshots.newest(folder))
        if step is None:
            return
        rest = snapshots.rest(folder, step)
        self.done = step
        if self.average is not None:
            self.average.updates = int(rest["averaged"])
        tensors = self._tensors()
        if step >= self.config.steps:
            del tensors["optimizer"]
        for name, values in tensors.items():
            snapshots.fill(folder, step, name, values)
        if step < self.config.steps:
            self.scaler.load_state_dict(rest["scaler"])
            held = rest["processes"]
            if self.processes.rank < len(held):
                self._set_random(held[self.processes.rank])
            else:
                # One more process than before; generators that modules own are alike everywhere.
                torch.manual_seed(torch.initial_seed() + step)
                self._set_random({"generators": held[0]["generators"]})

    def _tensors(self) -> snapshots.Weights:
        """The tensors of a checkpoint; filling them sets the training, since all are the ones in use."""
        sets: snapshots.Weights = {"model": dict(self.model.state_dict()), "optimizer": {}}
        if self.average is not None:
            sets["average"] = self.average.tensors
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
            state = self.optimizer.state[parameter]
            if not state:  # no step has been taken: what AdamW would make at the first
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            sets["optimizer"] |= {f"{names[id(parameter)]}.{key}": value.detach() for key, value in state.items()}
        return sets

    def _random(self) -> dict[str, Any]:
        device = self.processes.device
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "generators": {name: own.get_state() for name, own in _generators(self.model).items()},
        }

    def _set_random(self, held: dict[str, Any]) -> None:
        if "torch" in held:
            torch.set_rng_state(held["torch"])
        if held.get("cuda") is not None and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(held["cuda"], self.processes.device)
        for name, own in _generators(self.model).items():
            own.set_state(held["generators"][name])


def _generators(model: nn.Module) -> dict[str, torch.Generator]:
    """The random generators that modules hold as `generator`, by the module's name."""
    found = {name: getattr(module, "generator", None) for name, module in model.named_modules()}
    return {name: own for name, own in found.items() if isinstance(own, torch.Generator)}
