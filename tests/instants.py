"""Changes to a dataset, killed at every instant; and the quickest way to label one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataengine import evolve, local
from dataengine.labeler import Labeler
from dataengine.manifest import Dataset
from dataengine.plan import plan_labels
from dataengine.storage import Store
from tests.fakes import tree


class Killed(BaseException):
    """The end of a process that nothing can catch."""


@contextmanager
def killed_before(step: int) -> Iterator[list[str]]:
    """From its `step`th change to a store on, every change fails, as in a process that is no more."""
    done: list[str] = []

    def counted(do: Callable[..., object], name: str) -> Callable[..., object]:
        def change(*args: object, **kwargs: object) -> object:
            if len(done) >= step:
                raise Killed
            done.append(f"{name} {args[-1] if name == 'remove' else args[1]}")
            return do(*args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evolve, "_THREADS", 1)
        patch.setattr(Store, "publish", counted(Store.publish, "publish"))
        patch.setattr(Store, "remove", counted(Store.remove, "remove"))
        patch.setattr(Store, "remove_many", lambda store, paths: [store.remove(path) for path in paths])
        patch.setattr(evolve.os, "link", counted(os.link, "link"))
        yield done


def at_every_instant(make: Callable[[str], Path], change: Callable[[Path], object], stride: int = 1) -> int:
    """Kill a change before each (`stride`th) of its steps and run it again: the tree is that of an undisturbed one."""
    calm = make("calm")
    with killed_before(10**6) as steps:
        change(calm)
    for step in range(0, len(steps), stride):
        root = make(f"killed{step}")
        with killed_before(step), pytest.raises(Killed):
            change(root)
        change(root)
        assert tree(root) == tree(calm), f"killed before {steps[step]}"
    return len(steps)


def label(dataset: Dataset, wanted: Sequence[str], *labelers: Labeler) -> int:
    plan = plan_labels(dataset, wanted, labelers)
    local.run(plan.group(dataset.store.url), plan.tasks, workers=1, device="cpu", on_report=lambda report: None)
    return plan.num_cells
