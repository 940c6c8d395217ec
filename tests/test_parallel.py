"""Training in two gloo processes against one, for DDP and FSDP2. As a script, this file is one of those processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import parallel, snapshots
from model.evaluation import Heldout
from model.loop import LoopConfig, NonFiniteLoss, fit

ROOT = Path(__file__).parents[1]
CONFIG = LoopConfig(
    steps=8,
    lr=1e-2,
    warmup_steps=2,
    batches_per_step=4,
    log_every=1,
    checkpoint_every=4,
    keep_checkpoints=9,
    threads=1,
    progress=False,
    ema_decay=0.9,
)
HALF = replace(CONFIG, dtype="float16", recompute=True)
TWO = {"ddp": replace(CONFIG, parallel="ddp"), "fsdp": replace(CONFIG, parallel="fsdp")}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 13), nn.Linear(13, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.outer(torch.tanh(self.inner(self.norm(x)))))


class Net(nn.Module):
    """Odd sizes, so that shards are uneven; a frozen layer; a codebook's kind of buffer; two heads as of modalities."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            # Other weights in each process: the first one's are to count.
            torch.manual_seed(int(os.environ.get("RANK", "0")))
            self.enter = nn.Linear(4, 7)
            self.blocks = nn.Sequential(Block(7, dropout), Block(7, dropout))
            self.heads = nn.ModuleList([nn.Linear(7, 1), nn.Linear(7, 1)])
        self.enter.bias.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, x: Tensor, heads: tuple[int, ...] = (0, 1)) -> Tensor:
        x = self.blocks(self.enter(x))
        if self.training:
            with torch.no_grad():  # what a codebook does: a moving average of what all processes saw
                sums = torch.cat([x.float().sum(0), torch.tensor([float(len(x))])])
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(sums)
                self.mean.lerp_(sums[:-1] / sums[-1], 0.1)
        return torch.stack([self.heads[head](x) for head in heads]).sum(0)


def batch_at(number: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(number))


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    error = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return error, {"root": torch.stack([error.sqrt() * len(x), error.new_full((), len(x))])}


def two_at(number: int) -> Tensor:
    return torch.cat([batch_at(2 * number), batch_at(2 * number + 1)])


def numbered_at(number: int) -> Tensor:
    return batch_at(number).index_fill(0, torch.tensor(0), number % 2)


def one_head(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """One process uses the one head, one the other, as of modalities; each leaves the other without gradient."""
    head = int(x[0, 0])
    error = (model(x, (head,)) - x.sum(1, keepdim=True)).square().mean()
    return error, {f"head{head}": float(error.detach())}


def faint(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Small enough that no gradient overflows in float16, where processes differ in when one does."""
    return loss(model, x)[0] / 256, {}


def slowly(number: int) -> Tensor:
    time.sleep(0.01)
    return batch_at(number)


def broken(number: int) -> Tensor:
    return batch_at(number) / (number != 23)  # of step 5, and of the last process


HELD = Heldout(name="held", batch_at=batch_at, num_batches=5, loss=loss)  # one process has one batch less
BEHIND = {"async_checkpoints": True, "workers": 1, "evaluate_every": 3}
ROUGH = replace(CONFIG, dtype="bfloat16", parallel="fsdp", gather_dtype="bfloat16", reduce_dtype="bfloat16")


def told(step: int, metrics: dict[str, float]) -> None:
    """Only the first process logs, and only it is told to stop."""
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def noisy(parallel_mode: Any) -> tuple[LoopConfig, Net]:
    return replace(CONFIG, steps=16, checkpoint_every=3, parallel=parallel_mode), Net(dropout=0.2)


def scenarios(out: Path) -> None:
    rank = int(os.environ["RANK"])
    for mode, config in TWO.items():
        calls: list[str] = []

        def evaluate(model: nn.Module, step: int, calls: list[str] = calls) -> dict[str, float]:
            torch.rand(3)  # must not disturb the training
            calls.append(f"evaluate {step} {model.training}")
            return {"eval/out": float(model(batch_at(0)).sum())}

        def pictures(model: nn.Module, step: int, calls: list[str] = calls) -> dict[str, Tensor]:
            calls.append(f"pictures {step} {model.training}")
            return {"weights": model.enter(batch_at(0))[None].sigmoid()}

        often = replace(config, evaluate_every=3)
        result = fit(Net(), batch_at, loss, often, out / mode, evaluate=evaluate, pictures=pictures)
        (out / f"{mode}-{rank}.json").write_text(json.dumps([calls, result.metrics, result.steps]))
        net = Net()
        fit(net, batch_at, loss, replace(config, batches_per_step=2), out / f"{mode}-whole")
        snapshots.write_file(out / f"{mode}-{rank}.safetensors", snapshots.safetensors_bytes(net.state_dict()))
        fit(Net(), numbered_at, one_head, replace(config, unused_parameters=True), out / f"{mode}-heads")
        fit(Net(), batch_at, faint, replace(HALF, parallel=config.parallel), out / f"{mode}-half")
        fit(Net(), batch_at, loss, replace(config, **BEHIND), out / f"{mode}-behind", evaluate=HELD)
        stopped = replace(config, reshard=False, async_checkpoints=True)
        result = fit(Net(), batch_at, loss, stopped, out / f"{mode}-told", on_log=told)
        assert (result.steps, result.finished, result.checkpoint.is_dir()) == (4, False, True)
        assert fit(Net(), batch_at, loss, stopped, out / f"{mode}-told").finished
        with pytest.raises(NonFiniteLoss, match=r"step 5: loss (inf|nan)"):
            fit(Net(), broken, loss, config, out / f"{mode}-broken")
        config, net = noisy(mode)
        fit(net, batch_at, loss, config, out / f"{mode}-noisy")
    fit(Net(), batch_at, loss, ROUGH, out / "fsdp-rough")
    with pytest.raises(ValueError, match="batches_per_step 3 over 2 processes"):
        fit(Net(), batch_at, loss, replace(CONFIG, batches_per_step=3), out / "odd")
    with pytest.raises(ValueError, match="parallel 'none' in one of 2 processes"):
        fit(Net(), batch_at, loss, replace(CONFIG, parallel="none"), out / "none")


def killed(out: Path) -> None:
    for mode in TWO:
        config, net = noisy(mode)
        fit(net, slowly, loss, config, out / f"{mode}-killed")


def resumed(out: Path) -> None:
    for mode, config in TWO.items():
        noisy_config, net = noisy(mode)
        fit(net, batch_at, loss, noisy_config, out / f"{mode}-killed")
        fit(Net(), batch_at, loss, config, out / f"one-then-{mode}")


def begin(scenario: Callable[[Path], None], out: Path) -> list[ForkProcess]:
    """Two processes with torchrun's environment, forked so that torch is imported once for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        scenario(out)

    processes = [get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[ForkProcess]) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def all_runs_of_two(out: Path) -> None:
    finish(begin(scenarios, out))
    for mode in TWO:
        processes = begin(killed, out)
        moment = random.randint(4, 13)
        log = out / f"{mode}-killed" / "log.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= moment):
            time.sleep(0.005)
            assert all(process.is_alive() for process in processes), "they ended before they could be killed"
        for process in processes:
            process.kill()
            process.join()
        assert max(snapshots.steps(log.parent / "checkpoint")) < 16
    finish(begin(resumed, out))


def lines(run: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("run/")}
        for line in read
    ]


def assert_same_curve(run: Path, other: Path, but: AbstractSet[str] = frozenset(), tolerance: float = 1e-6) -> None:
    ours, theirs = lines(run), lines(other)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        names = (a.keys() & b.keys()) - but
        assert names >= {"step", "loss", "lr"}
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, abs=tolerance, rel=tolerance)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process and of two."""
    folder = tmp_path_factory.mktemp("runs")
    fit(Net(), batch_at, loss, replace(CONFIG, evaluate_every=3), folder / "one", evaluate=HELD)
    for mode in TWO:
        shutil.copytree(folder / "one", folder / f"one-then-{mode}")
        shutil.rmtree(folder / f"one-then-{mode}" / "checkpoint" / "step-8")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as two:
        fit(Net(), two_at, loss, replace(CONFIG, batches_per_step=1), folder / "one-whole")
        fit(Net(), numbered_at, one_head, CONFIG, folder / "one-heads")
        fit(Net(), batch_at, faint, HALF, folder / "one-half")
        output = two.communicate(timeout=900)[0]
    assert two.returncode == 0, output
    return folder


@pytest.mark.parametrize("mode", TWO)
def test_half_a_batch_in_each_of_two_processes_is_a_whole_one_in_one(mode: str, out: Path) -> None:
    assert_same_curve(out / f"{mode}-whole", out / "one-whole", {"root"})
    ours = [snapshots.load_file(out / f"{mode}-{rank}.safetensors") for rank in range(2)]
    expected = snapshots.load_file(out / "one-whole" / "checkpoint" / "step-8" / "average.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(ours[0][name], value, atol=1e-6, rtol=1e-6, msg=name)
        assert torch.equal(ours[0][name], ours[1][name]), name


@pytest.mark.parametrize("mode", TWO)
def test_two_processes_accumulate_as_one(mode: str, out: Path) -> None:
    assert_same_curve(out / "one", out / mode)
    assert_same_curve(out / "one-heads", out / f"{mode}-heads")


@pytest.mark.parametrize("mode", TWO)
def test_only_the_first_process_evaluates_and_all_end_with_its_figures(mode: str, out: Path) -> None:
    (calls, metrics, steps), (others, other_metrics, _) = (
        json.loads((out / f"{mode}-{rank}.json").read_text()) for rank in range(2)
    )
    assert calls == ["evaluate 3 False", "evaluate 6 False", "evaluate 8 False", "pictures 8 False"]
    # Sharded weights are put together by all processes.
    assert others == (calls if mode == "fsdp" else [])
    logged = lines(out / mode)
    assert [line["step"] for line in logged if "eval/out" in line] == [3, 6, 8]
    assert (steps, metrics) == (8, other_metrics)
    assert logged[-1] == {"step": 8, **metrics}


@pytest.mark.parametrize("mode", TWO)
def test_half_precision_with_recomputed_blocks_trains_as_in_one_process(mode: str, out: Path) -> None:
    assert_same_curve(out / "one-half", out / f"{mode}-half", {"grad_norm"}, tolerance=1e-3)
    assert {line["loss_scale"] for line in lines(out / f"{mode}-half")} == {2.0**16}


@pytest.mark.parametrize("mode", TWO)
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_kept(mode: str, out: Path) -> None:
    kept = [torch.load(out / f"{mode}-broken" / f"nonfinite-step-5-process-{r}.pt", weights_only=True) for r in (0, 1)]
    assert torch.equal(kept[1]["batch"], broken(23))
    assert torch.isfinite(kept[0]["batch"]).all()
    assert len(lines(out / f"{mode}-broken")) == 5


@pytest.mark.parametrize("mode", TWO)
def test_a_killed_run_goes_on_to_the_same_losses(mode: str, out: Path) -> None:
    # With dropout, so the random states of both processes matter.
    assert_same_curve(out / f"{mode}-killed", out / f"{mode}-noisy")


@pytest.mark.parametrize("mode", TWO)
def test_a_checkpoint_is_read_by_another_number_of_processes(mode: str, out: Path) -> None:
    assert_same_curve(out / f"one-then-{mode}", out / "one")
    moved = out / f"{mode}-then-one"
    shutil.copytree(out / mode, moved)
    shutil.rmtree(moved / "checkpoint" / "step-8")
    fit(Net(), batch_at, loss, CONFIG, moved)
    assert_same_curve(out / "one", moved)


def files(checkpoints: Path) -> dict[str, Any]:
    """What lies in each file; of a file of tensors its header apart, where torch writes metadata in any order."""
    found: dict[str, Any] = {}
    for path in checkpoints.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            name = str(path.relative_to(checkpoints))
            found[name] = (json.loads(data[8:end]), data[end:]) if path.suffix == ".safetensors" else data
    return found


@pytest.mark.parametrize("mode", TWO)
def test_checkpoints_behind_are_the_same_and_evaluations_are_shared_out(mode: str, out: Path) -> None:
    found = files(out / f"{mode}-behind" / "checkpoint")
    assert found == files(out / mode / "checkpoint")
    assert len(found) == (14 if mode == "fsdp" else 8)
    assert_same_curve(out / "one", out / f"{mode}-behind")
    held = [line["eval/held/root"] for line in lines(out / f"{mode}-behind") if "eval/held/root" in line]
    assert len(held) == 3


@pytest.mark.parametrize("mode", TWO)
def test_a_signal_to_one_process_stops_all_after_the_step(mode: str, out: Path) -> None:
    assert_same_curve(out / f"{mode}-told", out / "one")


def test_weights_gathered_in_bfloat16_are_rounded_and_train_alike(out: Path) -> None:
    assert_same_curve(out / "fsdp-rough", out / "one", tolerance=0.05)
    assert lines(out / "fsdp-rough")[-1]["loss"] != lines(out / "one")[-1]["loss"]


def test_a_lost_tensor_of_a_sharded_checkpoint_is_named(out: Path) -> None:
    tensors = dict(Net().state_dict()) | {"more": torch.zeros(3), "mean": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"does not fit the model, which differs in more, mean \(2 tensors\)"):
        snapshots.fill(out / "fsdp" / "checkpoint", 8, "model", tensors)


def test_a_lone_process_shares_nothing() -> None:
    assert parallel.mode_of("fsdp", 1) == "none"
    assert parallel.join(Net(), "cpu") == parallel.Processes(0, 1, torch.device("cpu"))


if __name__ == "__main__":
    all_runs_of_two(Path(sys.argv[1]))
