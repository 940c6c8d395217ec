"""How a training is stopped, fed, saved and measured, and that none of it changes what is learned."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from model import snapshots
from model.loop import NonFiniteLoss, Work, fit
from model.settings import LoopConfig, in_tokens
from tests.test_loop import CONFIG, Net, Pair, batch_at, lines, squared

SHORT = replace(CONFIG, steps=6, checkpoint_every=2, keep_checkpoints=3)


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "checkpoint").rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    fit(Net(), batch_at, squared, SHORT, out)
    return out


def test_worker_processes_and_checkpoints_behind_change_no_byte(plain: Path, tmp_path: Path) -> None:
    fit(Net(), batch_at, squared, replace(SHORT, workers=2, async_checkpoints=True), tmp_path)
    assert lines(tmp_path) == lines(plain)
    assert sorted(files(plain)) == sorted(
        f"checkpoint/step-{step}/{name}"
        for step in (2, 4, 6)
        for name in ("average.safetensors", "model.safetensors", "optimizer.safetensors", "state.pt")
    )
    assert files(tmp_path) == files(plain)


def test_a_checkpoint_behind_holds_the_step_it_was_asked_at(tmp_path: Path) -> None:
    """The training goes on while the file is being written, and must not be in it."""
    gone_on, written = threading.Event(), snapshots.write

    def slow(*args: object) -> None:
        assert gone_on.wait(30)
        written(*args)

    def until_four(step: int, metrics: dict[str, float]) -> None:
        if step == 4:
            gone_on.set()

    config = replace(SHORT, checkpoint_every=3, async_checkpoints=True)
    with mock.patch("model.snapshots.write", slow):
        fit(Net(), batch_at, squared, config, tmp_path / "behind", on_log=until_four)
    fit(Net(), batch_at, squared, replace(config, async_checkpoints=False), tmp_path / "plain")
    assert files(tmp_path / "behind") == files(tmp_path / "plain")


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    def full(*args: object) -> None:
        raise OSError("no space left on device")

    with mock.patch("model.snapshots.write", full), pytest.raises(OSError, match="no space left"):
        fit(Net(), batch_at, squared, replace(SHORT, async_checkpoints=True), tmp_path)
    assert snapshots.newest(tmp_path / "checkpoint") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_stops_with_a_checkpoint_and_the_run_goes_on(workers: int, plain: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def told(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(SHORT, workers=workers, async_checkpoints=bool(workers))
    result = fit(Net(), batch_at, squared, config, tmp_path, on_log=told)
    assert (result.steps, result.finished) == (4, False)
    assert result.checkpoint.is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
    assert fit(Net(), batch_at, squared, config, tmp_path).finished
    assert lines(tmp_path) == lines(plain)


def test_figures_may_stay_tensors_with_weights_and_are_read_when_logged(tmp_path: Path) -> None:
    def weighted(model: nn.Module, batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model(batch.x) - batch.y).square().mean()
        count = float(batch.x[0, 0] > 0)
        return error, {
            "root": error.sqrt(),  # with its graph
            "share": torch.tensor([3.0 * count, count]),
            "never": torch.tensor([torch.nan, 0.0]),
        }

    config = replace(SHORT, batches_per_step=4, log_every=3)
    work = lambda batch: Work(8, 5, 10, 1e6)  # noqa: E731
    reads: list[int] = []

    def counted(tensor: Tensor) -> object:
        reads[-1] += 1
        return tolist(tensor)

    tolist = Tensor.tolist
    with mock.patch.object(Tensor, "tolist", counted):
        reads.append(0)
        fit(Net(), batch_at, weighted, config, tmp_path / "measured", work=work)
        reads.append(0)
        fit(Net(), batch_at, lambda model, batch: (weighted(model, batch)[0], {}), config, tmp_path / "bare")
    # The device is waited for once a step, once more where a line is logged, and nowhere else.
    assert reads == [6 + 2, 6]
    assert [line["loss"] for line in lines(tmp_path / "measured")] == [
        line["loss"] for line in lines(tmp_path / "bare")
    ]
    last = json.loads((tmp_path / "measured" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["share"], "never" in last) == (3.0, False)
    assert last["run/samples_per_s"] == pytest.approx(8 / 5 * last["run/tokens_per_s"], rel=1e-3)
    assert last["run/slots_per_s"] == pytest.approx(2 * last["run/tokens_per_s"], rel=1e-3)
    assert 0 <= last["run/data_wait"] <= 1
    assert "run/mfu" not in last
    board = EventAccumulator(str(tmp_path / "measured" / "tensorboard"))
    board.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in lines(tmp_path / "measured")
    ]
    assert [e.step for e in board.Scalars("run/tokens_per_s")] == [3, 6]


def test_a_peak_that_is_given_makes_the_share_of_it(tmp_path: Path) -> None:
    config = replace(SHORT, steps=2, log_every=2, warmup_steps=0, peak_flops=1e9)
    fit(Net(), batch_at, squared, config, tmp_path, work=lambda batch: Work(8, 8, 8, 1e6))
    last = json.loads((tmp_path / "log.jsonl").read_text())
    assert last["run/mfu"] == pytest.approx(last["run/tflops_per_s"] * 1e12 / 1e9, rel=1e-2)


def test_what_is_not_finite_in_a_batch_is_named(tmp_path: Path) -> None:
    def by_modality(model: nn.Module, batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model(batch.x) - batch.y).square().mean()
        return error, {"loss/depth": error, "loss/caption": error.new_ones(2)}

    def poisoned(step: int) -> Pair:
        return replace(batch_at(step), y=batch_at(step).y / (step != 5))

    message = r"step 2: loss inf \(loss/depth of this process's\), gradient norm \S+, expected finite"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(Net(), poisoned, by_modality, replace(SHORT, batches_per_step=2), tmp_path)
    kept = torch.load(tmp_path / "nonfinite-step-2.pt", weights_only=True)
    assert torch.equal(kept["batch"]["x"], batch_at(5).x)


def test_a_loss_that_reads_nothing_compiles_without_a_break() -> None:
    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = model(batch).square().mean()
        return error, {"root": error.detach().sqrt(), "mean": torch.stack([error.detach(), error.new_ones(())])}

    model = nn.Linear(4, 1)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    x = torch.ones(2, 4)
    assert torch.equal(compiled(model, x)[1]["mean"], loss(model, x)[1]["mean"])


def test_a_model_that_compiles_itself_does_so_and_is_left_as_it_was(plain: Path, tmp_path: Path) -> None:
    class Own(Net):
        compiled = 0

        def compile(self, *args: object, **kwargs: object) -> None:
            self.compiled += 1
            self.extra = lambda: None

    model, seen = Own(), []
    fit(
        model, batch_at, squared, replace(SHORT, compile=True), tmp_path,
        on_log=lambda step, metrics: seen.append(model.compiled),
    )  # fmt: skip
    assert seen == [1] * 6
    assert (model.compiled, hasattr(model, "extra"), model.training) == (0, False, False)
    assert lines(tmp_path) == lines(plain)


def test_lengths_in_tokens_are_those_of_4m_7_b() -> None:
    settings = {"total_tokens": 500e9, "warmup_tokens": 10e9, "input_tokens": 128, "target_tokens": 128, "batch": 8192}
    found = in_tokens(**settings, base_lr=1e-4)
    # 500e9 / (256 * 8192) = 238418.58; 10e9 / 2097152 = 4768.37; 1e-4 * 8192 / 256
    assert found == {
        "steps": 238_419,
        "warmup_steps": 4769,
        "cooldown_steps": 0,
        "lr": pytest.approx(3.2e-3),
        "min_lr": 0,
    }
    # ml-4m: 195.3 epochs of ten million samples, rounded up, of 10e6 // 8192 = 1220 steps.
    assert in_tokens(**settings, base_lr=1e-4, epoch_samples=10_000_000)["steps"] == 196 * 1220
    # 4M-21: budgets twice as large at half the batch are as many tokens a step.
    larger = {**settings, "input_tokens": 256, "target_tokens": 256, "batch": 4096}
    wide = in_tokens(**larger, base_lr=1e-4, cooldown_tokens=2097152 * 3)
    assert (wide["steps"], wide["cooldown_steps"], wide["lr"]) == (238_419, 3, pytest.approx(1.6e-3))
    LoopConfig(**wide, batches_per_step=64)
    with pytest.raises(ValueError, match="batch 0, expected more than 0"):
        in_tokens(**{**settings, "batch": 0}, base_lr=1e-4)


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"peak_flops": 0.0}, {"gather_dtype": "float16"}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **wrong)
