"""A FourM run that is killed goes on from the command line, alone or in two processes of torchrun: the same losses."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from model import snapshots
from pipelines import train
from pipelines.train import TrainFourM
from tests import packed_sources as sources

ROOT = Path(__file__).parents[1]
STEPS = 60
RECIPE = """
from pathlib import Path
from tests.test_train_resume import run
def recipe():
    return run(Path({data!r}), Path({out!r}))
"""
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def run(data: Path, out: Path) -> TrainFourM:
    made = sources.run(data, out, steps=STEPS)
    loop = replace(made.loop, lr=1e-3, batches_per_step=2, log_every=1, checkpoint_every=4)
    return replace(made, batch_size=8, loop=loop)


def command(out: Path, *how: str, settings: Sequence[str] = ()) -> subprocess.Popen[str]:
    recipe = out.with_suffix(".py")
    recipe.write_text(RECIPE.format(data=str(out.parent / "data"), out=str(out)))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [sys.executable, "-m", *how, "pipelines", "train", str(recipe), *settings]
    return subprocess.Popen(
        arguments, cwd=out.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(out: Path) -> list[tuple[int, float]]:
    file = out / "log.jsonl"
    read = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [(line["step"], line["loss"]) for line in read]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, and one that was killed at a random step."""
    folder = tmp_path_factory.mktemp("resume")
    sources.write(folder / "data")
    killed, moment = folder / "killed", random.randint(5, STEPS - 20)
    with command(killed) as process:
        # Its peer runs meanwhile: it is as slow.
        train.train(run(folder / "data", folder / "undisturbed"))
        while len(losses(killed)) < moment and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode < 0, "it ended before it could be killed"
    assert 0 < (snapshots.newest(killed / "checkpoint") or 0) < STEPS
    return folder


@pytest.mark.parametrize(
    ("way", "mode", "tolerance"), [("alone", "auto", 1e-6), ("torchrun", "ddp", 1e-5), ("torchrun", "fsdp", 1e-5)]
)
def test_a_killed_run_goes_on_to_the_losses_of_an_undisturbed_one(
    way: str, mode: str, tolerance: float, folder: Path
) -> None:
    out = folder / f"{way}-{mode}"
    shutil.copytree(folder / "killed", out)
    if way == "alone":
        train.train(run(folder / "data", out))
    else:
        with command(out, *TORCHRUN, settings=[f"loop.parallel={mode}", "loop.async_checkpoints=true"]) as process:
            said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    found, wanted = losses(out), losses(folder / "undisturbed")
    assert [step for step, _ in found] == [step for step, _ in wanted] == [*range(1, STEPS + 1)]
    worst = max(abs(a / b - 1) for (_, a), (_, b) in zip(found, wanted, strict=True))
    assert worst <= tolerance
    assert (out / "model/model.safetensors").exists()
