"""Batches ahead of the training: the same whoever makes them, and nobody is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.feeding import Feed, WorkerDied
from model.measuring import Work

NUMBERS = [3, 0, 7, 5, 6, 1]


def numbered(number: int) -> Tensor:
    time.sleep(0.02 * (number % 3))  # so that they are not done in their order
    return torch.full((2,), number)


def none_left() -> bool:
    return not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_with_their_work_and_leave_random_numbers_alone(workers: int) -> None:
    state = torch.get_rng_state()
    work = lambda batch: Work(int(batch[0]), 2, 3, 4.0)  # noqa: E731
    with Feed(numbered, NUMBERS, workers=workers, work=work) as feed:
        fed = list(feed.with_work())
    assert [batch.tolist() for batch, _ in fed] == [[n, n] for n in NUMBERS]
    assert [done for _, done in fed] == [Work(n, 2, 3, 4.0) for n in NUMBERS]
    assert torch.equal(torch.get_rng_state(), state)
    assert none_left()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_batch(workers: int) -> None:
    def failing(number: int) -> Tensor:
        if number == 7:
            raise KeyError("the machine went away")
        return numbered(number)

    with pytest.raises(KeyError, match="went away") as caught, Feed(failing, NUMBERS, workers=workers) as feed:
        list(feed)
    if workers:
        assert none_left()
    else:
        assert caught.value.__notes__ == ["while batch 7 was made"]


def test_a_dead_worker_is_named_with_its_batch_wherever_the_training_is() -> None:
    def killed(number: int) -> Tensor:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(number)

    def train() -> None:
        with Feed(killed, NUMBERS, workers=2) as feed:
            for _ in feed:
                time.sleep(0.3)  # a step, in which torch raises what it hears

    with pytest.raises(WorkerDied, match=r"worker process \d+ died at batch 7, expected it to live"):
        train()
    assert none_left()


def test_workers_outlive_a_signal_to_all_and_end_with_the_feed(tmp_path: Path) -> None:
    def signalled(number: int) -> Tensor:
        if number == 6:
            time.sleep(0.5)  # until the feed is being closed
        os.kill(os.getpid(), signal.SIGTERM)
        return numbered(number)

    with Feed(signalled, NUMBERS, workers=1) as feed:
        batches = iter(feed)
        assert [int(next(batches)[0]) for _ in range(4)] == NUMBERS[:4]
    assert none_left()
