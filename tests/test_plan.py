"""Planning: the identities that it computes, what it asks of labelers and of the store, and that it scales."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import engine_scale
from benchmarks._recorded import labelers, names
from benchmarks.engine_scale import Synthetic
from dataengine import provenance
from dataengine.manifest import INGESTED, Conflict, Dataset
from dataengine.plan import LabelPlan, order, plan_labels
from dataengine.storage import Store
from pipelines import look
from tests.fakes import Inverted, Threshold


@pytest.fixture
def synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Synthetic:
    """The records of a dataset of 12 shards and 21 columns, everything labelled."""
    monkeypatch.setattr(engine_scale, "NUM_KEYS", 5)
    made = Synthetic(tmp_path / "root", 12)
    made.ingest()
    made.label()
    return made


def plainly(dataset: Dataset, wanted: list[str]) -> tuple[dict[int, dict[str, str]], int]:
    """The cells to do with their identities, and how many are done: record by record."""
    ordered = order(wanted, labelers(), [m for m in dataset.modalities() if len(dataset.committed(m)) == 12])
    made = {m for labeler in ordered for m in labeler.emits}
    cells = {*wanted, *(m for labeler in ordered for m in labeler.inputs if m in made)}
    todo: dict[int, dict[str, str]] = {}
    done = 0
    for shard in dataset.committed("rgb"):
        specs: dict[str, str] = {}
        for labeler in ordered:
            inputs = {}
            for m in {"rgb", *labeler.inputs}:
                record = dataset.commit(m, shard)
                inputs[m] = specs.get(m, record.spec if record else "")
            for m in labeler.emits:
                text = {"identity": {**labeler.identity(), "emits": m}, "inputs": inputs}
                specs[m] = hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
        for m in sorted(cells):
            if dataset.commit(m, shard) is None:
                todo.setdefault(shard, {})[m] = specs[m]
            else:
                done += 1
    return todo, done


def tasks(plan: LabelPlan) -> dict[int, dict[str, str]]:
    return {t.shard: t.specs for t in plan.tasks}


def test_a_plan_is_what_reading_every_record_gives(synthetic: Synthetic) -> None:
    dataset, rng = Dataset(synthetic.root), random.Random(0)
    full = plan_labels(dataset, names(), labelers())
    assert (full.tasks, full.num_done) == ((), 12 * 18)
    for m in rng.sample(names(), 9):
        for shard in rng.sample(range(12), 4):
            (synthetic.root / f"commits/{m}/shard-{shard:05d}.json").unlink()
    for wanted in (names(), ["tok_depth@224"], ["metadata", "sam_edge"], ["DINOv2-B14"]):
        plan = plan_labels(dataset, wanted, labelers())
        assert (tasks(plan), plan.num_done) == plainly(dataset, wanted)
        assert list(plan.num_rows.items()) == [(shard, 5) for shard in range(12)]


def test_an_identity_is_the_hash_of_one_json_text() -> None:
    identity, inputs = {"labeler": "sÿm", "settings": {"b": 1, "a": [None, 0.5]}}, {"rgb": "12", "depth": "3"}
    text = (
        '{"identity": {"labeler": "s\\u00ffm", "settings": {"a": [null, 0.5], "b": 1}}, '
        '"inputs": {"depth": "3", "rgb": "12"}}'
    )
    assert provenance.spec(identity, inputs) == hashlib.sha256(text.encode()).hexdigest()
    of = provenance.specs(identity)
    assert [of(inputs), of({}), of(inputs)] == [provenance.spec(identity, i) for i in (inputs, {}, inputs)]


@dataclass(frozen=True, kw_only=True)
class Heavy(Threshold):
    """A labeler whose weights take long to hash."""

    asked: ClassVar[list[str]] = []

    def identity(self) -> dict[str, Any]:
        self.asked.append(self.name)
        return super().identity()


def test_a_labeler_is_asked_for_its_identity_once_a_plan(synthetic: Synthetic) -> None:
    for path in (synthetic.root / "commits").glob("*_edge/*"):
        path.unlink()
    plan = plan_labels(Dataset(synthetic.root), ["canny_edge", "sam_edge"], [Heavy(), Inverted()])
    assert plan.num_cells == 24
    assert len(Heavy.asked) == 1


def test_what_a_plan_and_status_read_does_not_grow_with_the_dataset(
    synthetic: Synthetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataengine.index._TICK_SECONDS", -1)  # the records were written just now
    dataset = Dataset(synthetic.root)
    plan_labels(dataset, names(), labelers())
    asked: list[str] = []
    for name in ("read", "entries", "files", "folders", "exists"):
        do = getattr(Store, name)

        def counted(store: Store, path: str, _do: Any = do, _name: str = name) -> Any:
            asked.append(f"{_name} {path}")
            return _do(store, path)

        monkeypatch.setattr(Store, name, counted)
    plan_labels(dataset, names(), labelers())
    listings = [f"entries commits/{m}" for m in (*INGESTED, *names())]
    once = sorted(["folders commits", "read plan.json", "read runs/index.arrow", *listings])
    assert sorted(asked) == once
    asked.clear()
    assert [s.shards for s in look.status(dataset)] == [12] * 21
    assert sorted(asked) == once


def test_a_missing_input_and_another_identity_are_conflicts(synthetic: Synthetic) -> None:
    dataset = Dataset(synthetic.root)
    (synthetic.root / "commits/sam_instance/shard-00003.json").unlink()
    with pytest.raises(ValueError, match=r"nothing makes 'sam_instance' \(an input of 'sam_edge'\)"):
        plan_labels(dataset, ["sam_edge"], [x for x in labelers() if "sam_edge" in x.emits])
    with pytest.raises(Conflict, match="canny_edge/shard-00000 was made with other settings"):
        plan_labels(dataset, ["canny_edge"], [Threshold()])
    replaced = plan_labels(dataset, ["canny_edge"], [Threshold()], replace=["canny_edge"])
    assert (replaced.num_cells, replaced.num_done) == (12, 0)
    some = plan_labels(dataset, ["depth"], labelers(), replace=[("depth", 2), ("depth", 7)])
    assert [t.shard for t in some.tasks] == [2, 7]
