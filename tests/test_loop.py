from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from model import optim, parallel, snapshots
from model.loop import LoopConfig, NonFiniteLoss, fit

CONFIG = LoopConfig(
    steps=20, lr=1e-2, warmup_steps=3, log_every=1, checkpoint_every=10, threads=1, progress=False, ema_decay=0.9
)


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Pair:
        return Pair(self.x.to(device), self.y.to(device))


class Net(nn.Module):
    """Uses both kinds of randomness that a resumed run must continue: torch's own and a generator of the module."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            x = x + 0.01 * torch.randn(x.shape, generator=self.generator)
        return self.net(x)


def batch_at(step: int) -> Pair:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return Pair(x, x.sum(dim=1, keepdim=True))


def squared(model: nn.Module, batch: Pair) -> tuple[Tensor, dict[str, float]]:
    error = (model(batch.x) - batch.y).square().mean()
    return error, {"root": float(error.detach()) ** 0.5}


def failing_at(stop: int) -> Callable[[int], Pair]:
    def batch(step: int) -> Pair:
        if step == stop:
            raise KeyError("the machine went away")
        return batch_at(step)

    return batch


def lines(out: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("run/")}
        for line in read
    ]


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path: Path) -> None:
    straight, parts = Net(), Net()
    fit(straight, batch_at, squared, CONFIG, tmp_path / "straight")
    with pytest.raises(KeyError, match="went away"):
        fit(parts, failing_at(14), squared, CONFIG, tmp_path / "parts")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 15))
    resumed = Net()
    result = fit(resumed, batch_at, squared, CONFIG, tmp_path / "parts")
    assert lines(tmp_path / "parts") == lines(tmp_path / "straight")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 21))
    assert result.finished
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_it_learns(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=300, lr=3e-2, log_every=50, checkpoint_every=300, ema_decay=None)
    fit(Net(), batch_at, squared, config, tmp_path)
    assert lines(tmp_path)[-1]["loss"] < 0.5 * lines(tmp_path)[0]["loss"]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = Net()
    before = fit(first, batch_at, squared, CONFIG, tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    again = Net()
    result = fit(again, failing_at(0), squared, CONFIG, tmp_path)
    assert (result.steps, result.finished, result.metrics) == (20, True, before.metrics)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())


def test_the_average_is_left_in_the_model_and_the_last_weights_in_the_checkpoint(tmp_path: Path) -> None:
    model = Net()
    result = fit(model, batch_at, squared, CONFIG, tmp_path)
    weights, rest = snapshots.read(tmp_path / "checkpoint", 20, "cpu")
    assert result.checkpoint == tmp_path / "checkpoint" / "step-20"
    assert int(rest["averaged"]) == 20
    assert torch.equal(model.state_dict()["net.0.weight"], weights["average"]["net.0.weight"])
    assert not torch.equal(model.state_dict()["net.0.weight"], weights["model"]["net.0.weight"])


def test_only_the_newest_checkpoints_are_kept_and_no_partial_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint" / ".partial-5").mkdir(parents=True)
    fit(Net(), batch_at, squared, replace(CONFIG, checkpoint_every=4), tmp_path)
    assert sorted(entry.name for entry in (tmp_path / "checkpoint").iterdir()) == ["step-16", "step-20"]


def test_a_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = fit(Net(), batch_at, squared, replace(CONFIG, max_seconds=0.0), tmp_path)
    assert (result.steps, result.finished) == (1, False)
    assert fit(Net(), batch_at, squared, CONFIG, tmp_path).finished
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 21))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_batch(tmp_path: Path) -> None:
    def poisoned(step: int) -> Pair:
        batch = batch_at(step)
        return Pair(batch.x, batch.y / 0 if step == 7 else batch.y)

    with pytest.raises(NonFiniteLoss, match=r"step 7: loss inf.*expected finite; the batch is kept in"):
        fit(Net(), poisoned, squared, CONFIG, tmp_path)
    kept = torch.load(tmp_path / "nonfinite-step-7.pt", weights_only=True)
    assert kept["step"] == 7
    assert torch.equal(kept["batch"]["x"], batch_at(7).x)


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    fit(Net(), batch_at, squared, CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"other settings: lr 0.01 -> 0.02; expected the same"):
        fit(Net(), batch_at, squared, replace(CONFIG, lr=2e-2), tmp_path)


def test_the_callers_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    fit(Net(), batch_at, squared, CONFIG, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_bfloat16_and_callback(tmp_path: Path) -> None:
    seen: list[int] = []
    config = replace(CONFIG, dtype="bfloat16", log_every=5)
    model = Net()
    fit(model, batch_at, squared, config, tmp_path, on_log=lambda step, metrics: seen.append(step))
    assert seen == [5, 10, 15, 20]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any((tmp_path / "tensorboard").iterdir())


def test_weights_decay_and_norms_and_biases_do_not() -> None:
    model = Net()
    model.net[0].weight.requires_grad_(False)
    decayed, free = optim.parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.net[1].weight), id(model.net[4].weight)}
    names = ["mod_emb", "encoder.0.norm1.weight", "encoder_norm.weight", "x.bias", "x.gamma", "a.lookup_table_weight"]
    assert [optim.decays(name) for name in names] == [True, False, False, False, False, False]


def test_the_rate_rises_then_falls_to_its_minimum() -> None:
    rates = [optim.rate("cosine", step, steps=11, lr=1.0, min_lr=0.1, warmup_steps=3) for step in range(12)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[7] == pytest.approx(0.55)
    assert rates[11] == pytest.approx(0.1)


def test_the_inverse_root_is_that_of_ml4m_and_cools_down_to_the_minimum() -> None:
    rates = [
        optim.rate("inverse_sqrt-10", step, steps=40, lr=1.0, min_lr=0.1, warmup_steps=4, cooldown_steps=6)
        for step in range(40)
    ]
    expected = [1 / math.sqrt((i + 10) / 10) for i in range(30)]
    assert rates[4:34] == pytest.approx(expected)
    assert rates[34:] == pytest.approx(np.linspace(expected[-1], 0.1, 6).tolist())
    flat = [optim.rate("constant", step, steps=9, lr=1.0, cooldown_steps=3) for step in range(9)]
    assert flat == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 20}, "20 warm-up and 0 cool-down steps of 20, expected fewer"),
        ({"cooldown_steps": 2}, "cooldown_steps 2, expected 0: a cosine"),
        ({"lr_scales": (("encoder.", 0.1),)}, "lr_scales encoder.: expected the start of a trainable"),
        ({"recompute": True}, "blocks Block, DecoderBlock: the model has none"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_training(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Net(), batch_at, squared, replace(CONFIG, **settings), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batches_per_step": 0},
        {"dtype": "float8"},
        {"ema_decay": 1.0},
        {"min_lr": 1.0},
        {"parallel": "horovod"},
        {"schedule": "inverse_sqrt"},
        {"lr_scales": (("net.", 0.0),)},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **wrong)


def double_at(number: int) -> Pair:
    parts = [batch_at(2 * number), batch_at(2 * number + 1)]
    return Pair(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))


def still() -> Net:
    """Without randomness, so that batches can be put together."""
    return Net().eval()


def quiet(model: nn.Module, batch: Pair) -> tuple[Tensor, dict[str, float]]:
    return squared(model.eval(), batch)


def test_two_batches_a_step_are_one_batch_of_both(tmp_path: Path) -> None:
    fit(still(), double_at, quiet, CONFIG, tmp_path / "whole")
    fit(still(), batch_at, quiet, replace(CONFIG, batches_per_step=2), tmp_path / "halves")
    for ours, whole in zip(lines(tmp_path / "halves"), lines(tmp_path / "whole"), strict=True):
        for name in ("step", "loss", "lr", "grad_norm"):
            assert ours[name] == pytest.approx(whole[name], abs=1e-6)


def test_evaluations_and_pictures_are_logged_and_do_not_disturb(tmp_path: Path) -> None:
    seen: list[tuple[int, bool, float]] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        torch.rand(5)
        torch.rand(5, generator=model.generator)
        seen.append((step, model.training, float(model.net[0].weight.sum().detach())))
        return {"eval/bias": float(model.net[4].bias.detach())}

    def pictures(model: nn.Module, step: int) -> dict[str, Tensor]:
        return {"weight": torch.full((3, 8, 9), step, dtype=torch.uint8)}

    plain, watched = Net(), Net()
    fit(plain, batch_at, squared, CONFIG, tmp_path / "plain")
    config = replace(CONFIG, evaluate_every=7, pictures_every=10, log_every=2)
    fit(watched, batch_at, squared, config, tmp_path / "watched", evaluate=evaluate, pictures=pictures)
    assert [(step, training) for step, training, _ in seen] == [(7, False), (14, False), (20, False)]
    assert seen[-1][2] == float(watched.net[0].weight.detach().sum())  # the average, which a finished run leaves
    logged = lines(tmp_path / "watched")
    assert [line["step"] for line in logged if "eval/bias" in line] == [7, 14, 20]
    losses = {line["step"]: line["loss"] for line in lines(tmp_path / "plain")}
    assert {line["step"]: line["loss"] for line in logged}.items() <= losses.items()
    events = EventAccumulator(str(tmp_path / "watched" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.height, e.width) for e in events.Images("weight")] == [(10, 8, 9), (20, 8, 9)]
    assert [e.step for e in events.Scalars("eval/bias")] == [7, 14, 20]


def test_a_picture_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"picture x: shape \(8, 8\), expected \(1 or 3, height, width\)"):
        fit(Net(), batch_at, squared, CONFIG, tmp_path, pictures=lambda model, step: {"x": torch.zeros(8, 8)})


def test_groups_have_their_own_rate_and_frozen_parts_no_state(tmp_path: Path) -> None:
    model, start = Net(), Net()
    model.net[1].weight.requires_grad_(False)
    config = replace(CONFIG, steps=1, warmup_steps=0, ema_decay=None, lr_scales=(("net.", 1e-3), ("net.4.", 0.1)))
    fit(model, batch_at, squared, config, tmp_path)
    moved = {
        name: float((value - before).detach().abs().max())
        for (name, value), before in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    # Adam's first step is as long as the rate.
    assert moved["net.0.bias"] == pytest.approx(1e-5, rel=0.01)
    assert moved["net.4.bias"] == pytest.approx(1e-3, rel=0.01)
    assert moved["net.1.weight"] == 0
    state, _ = snapshots.read(tmp_path / "checkpoint", 1, "cpu")
    assert "net.1.weight.exp_avg" not in state["optimizer"]
    assert state["optimizer"]["net.1.bias.exp_avg"].shape == (16,)


def test_float16_leaves_out_steps_whose_gradients_overflow_and_goes_on_resumed(tmp_path: Path) -> None:
    def steep(model: nn.Module, batch: Pair) -> tuple[Tensor, dict[str, float]]:
        return squared(model, batch)[0] * 30, {}

    config = replace(CONFIG, dtype="float16", clip_grad=None)
    fit(Net(), batch_at, steep, config, tmp_path / "straight")
    scales = [line["loss_scale"] for line in lines(tmp_path / "straight")]
    assert scales[0] == 2.0**15
    assert 1 < scales[-1] < scales[0]
    with pytest.raises(KeyError, match="went away"):
        fit(Net(), failing_at(14), steep, config, tmp_path / "parts")
    fit(Net(), batch_at, steep, config, tmp_path / "parts")
    # An overflowed gradient is infinite, or not a number, which equals nothing.
    assert str(lines(tmp_path / "parts")) == str(lines(tmp_path / "straight"))


def test_recomputed_blocks_change_nothing_and_are_left_as_they_were(tmp_path: Path) -> None:
    plain, recomputed = Net(), Net()
    fit(plain, batch_at, squared, CONFIG, tmp_path / "plain")
    config = replace(CONFIG, recompute=True, blocks=("Dropout", "Linear"))
    with mock.patch("model.parallel.checkpoint", wraps=parallel.checkpoint) as used:
        fit(recomputed, batch_at, squared, config, tmp_path / "recomputed")
    assert used.call_count == 20 * 3
    assert lines(tmp_path / "recomputed") == lines(tmp_path / "plain")
    assert all("forward" not in vars(module) for module in recomputed.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_step_gives_the_same_losses(tmp_path: Path) -> None:
    fit(still(), batch_at, quiet, CONFIG, tmp_path / "plain")
    eager = partialmethod(nn.Module.compile, backend="eager")  # torch's own compiler takes half a minute
    with mock.patch.object(nn.Module, "compile", eager):
        fit(still(), batch_at, quiet, replace(CONFIG, compile=True), tmp_path / "compiled")
    for ours, plain in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)


def test_tied_tensors_are_averaged_once(tmp_path: Path) -> None:
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.b = nn.Linear(2, 2)
    model.b.weight = model.a.weight
    average = optim.Average(model, 0.5)
    average.update()
    first = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.add_(1.0)
    last = model.a.weight.detach().clone()
    average.update()
    with average.in_model():
        torch.testing.assert_close(model.b.weight, (first + last) / 2)
    assert torch.equal(model.a.weight, last)
    torch.testing.assert_close(average.tensors["b.weight"], (first + last) / 2)


def test_wandb_gets_what_the_log_gets_and_one_run_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match="wandb is not installed: pip install wandb"):
            fit(Net(), batch_at, squared, replace(CONFIG, wandb="trial"), tmp_path)
    fake = mock.MagicMock()
    fake.init.return_value.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KeyError, match="went away"):
        fit(Net(), failing_at(14), squared, replace(CONFIG, wandb="trial"), tmp_path)
    fit(Net(), batch_at, squared, replace(CONFIG, wandb="trial"), tmp_path)
    assert [call.kwargs["id"] for call in fake.init.call_args_list] == [None, "abc"]
    assert {call.kwargs["project"] for call in fake.init.call_args_list} == {"trial"}
    assert fake.init.call_args.kwargs["config"] == asdict(replace(CONFIG, wandb="trial"))
    assert (tmp_path / "wandb-id").read_text() == "abc"
    last = fake.init.return_value.log.call_args
    written = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last.kwargs["step"] == written.pop("step") == 20
    assert written.pop("seconds") >= 0
    assert last.args[0] == written
    assert {"loss", "lr", "grad_norm", "root", "run/data_wait", "run/memory_gb"} <= written.keys()
    assert fake.init.return_value.finish.call_args_list == [mock.call(exit_code=1), mock.call(exit_code=0)]


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path: Path) -> None:
    fit(Net(), batch_at, squared, replace(CONFIG, max_seconds=0.0), tmp_path)
    settings = json.loads((tmp_path / "loop.json").read_text())
    del settings["batches_per_step"]
    (tmp_path / "loop.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="other settings: batches_per_step 1 -> 2"):
        fit(Net(), batch_at, squared, replace(CONFIG, batches_per_step=2), tmp_path)
    assert fit(Net(), batch_at, squared, CONFIG, tmp_path).finished
