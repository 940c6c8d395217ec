"""What `dataengine verify` does and says: problems as they are found, and how fast the disk was read."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dataengine import modalities, plugins, validate
from dataengine import replay as replays
from dataengine.labeler import Labeler
from dataengine.manifest import Commit, Dataset
from dataengine.validate import Problem
from dataengine.versions import Versioned
from pipelines import config, label, planning, tokenize
from pipelines.running import console
from pipelines.tokens import Exact


@dataclass
class Verified:
    """What was read, and what is wrong with it. `notes` are no problems: files that an interrupted run has left."""

    sample: float
    num_cells: int = 0
    num_bytes: int = 0
    num_decoded: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replayed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Megabytes (10^6) a second."""
        return self.num_bytes / 1e6 / max(self.seconds, 1e-9)

    def add(self, problem: Problem) -> None:
        """Count a problem, and say it at once."""
        self.problems.append(problem)
        console.print(f"{problem.file}{f' {problem.key}' if problem.key else ''}: {problem.problem}", highlight=False)

    def line(self) -> str:
        """The outcome in a line for people."""
        read = f"{self.num_cells} cells read, {self.num_bytes / 1e6:.1f} MB at {self.rate:.0f} MB/s"
        part = "" if self.sample == 1 else f" ({self.num_decoded} values decoded, a sample of {self.sample:g})"
        same = sum(cell["outcome"] == "same" for cell in self.replayed)
        again = f", {same} of {len(self.replayed)} made again with the same bytes" if self.replayed else ""
        left = f", {len(self.notes)} files that no record names (dataengine gc)" if self.notes else ""
        return f"{read}{part}{again}, {len(self.problems)} problems{left}"

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        values = {**vars(self), "problems": [vars(p) for p in self.problems]}
        return {**values, "seconds": round(self.seconds, 3), "mb_per_second": round(self.rate, 1)}


def verify(dataset: Dataset, *, workers: int, sample: float) -> Verified:
    """Read the whole dataset again under a progress bar."""
    found = Verified(sample)
    total = sum(map(len, validate.cells(dataset).values()))
    files: set[str] = set()
    began = time.perf_counter()
    with Progress(
        TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[rate]}"), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("verify", total=total, rate="")
        for checked in validate.checks(dataset, workers=workers, sample=sample):
            found.num_cells += checked.num_cells
            found.num_bytes += checked.num_bytes
            found.num_decoded += checked.num_decoded
            files.update(checked.files)
            for problem in checked.problems:
                found.add(problem)
            found.seconds = time.perf_counter() - began
            bar.update(task, advance=checked.num_cells, rate=f"{found.rate:.0f} MB/s")
    for problem in validate.others(dataset):
        found.add(problem)
    found.notes = validate.orphans(dataset, files)
    return found


def fraction(text: str) -> float:
    """`1%` or `0.01` as a fraction above 0 and up to 1."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ValueError(f"--replay {text}: expected a part of the cells such as 1% or 0.01")
    return value


def replay(
    dataset: Dataset,
    found: Verified,
    part: float,
    device: str,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    tokenizers: str | None = None,
) -> None:
    """Label a part of the committed cells again and compare, under a progress bar; nothing is written to the root.

    Labelers of a recipe and tokenizers of a folder are tried before those of the registry.
    """
    records = replays.drawn(dataset, part)
    given = list(label.run_of(recipe).labelers)
    if tokenizers is not None:
        known = plugins.names("labelers")
        own = [setting for setting in settings if setting.partition(".")[0] in known]
        for precision in get_args(Exact):  # the record says which
            choice = tokenize.Choice(precision=precision)
            given += tokenize.labelers(tokenizers, [], label.candidates(recipe, own), choice)
    made = Maker(dataset, given, settings)
    with Progress(
        TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TextColumn("cells"), console=console
    ) as bar:  # fmt: skip
        task = bar.add_task("replay", total=len(records))
        for cell in replays.replay(dataset, records, made, label.pick_device(device)):
            found.replayed.append(vars(cell))
            problem = cell.problem()
            if problem is not None:
                found.add(problem)
            bar.advance(task)


class Maker:
    """Finds what made a cell: a labeler of a recipe, or one of the registry with the settings the record names."""

    def __init__(self, dataset: Dataset, given: Sequence[Labeler], settings: Sequence[str] = ()) -> None:
        self.dataset, self.given, self.settings = dataset, given, settings
        known = plugins.names("labelers")
        for setting in settings:
            name = setting.partition(".")[0]
            if "=" not in setting or (name not in known and not any(x.name == name for x in given)):
                raise ValueError(f"{setting!r}: expected LABELER.field=value, such as sam.checkpoint=PATH")

    def __call__(self, record: Commit) -> tuple[Labeler, int]:
        """The labeler of a record, and the size of its batches; ValueError when what is here is not what made it."""
        labeler = self._wrapped(record, self._labeler(record.provenance))
        sizes = planning.chosen_batches(self.dataset, [labeler], {}, {}, record=False)
        return labeler, next(iter(sizes.values()))

    def _labeler(self, made: dict[str, Any]) -> Labeler:
        name, weights = made.get("labeler"), made.get("weights") or {}
        wanted = {
            "labeler": name,
            "version": made.get("version"),
            "settings": made.get("settings"),
            "weights": weights.get("sha256"),
        }
        own = [setting.partition(".")[2] for setting in self.settings if setting.partition(".")[0] == name]
        candidates = [x for x in self.given if x.name == name]
        if isinstance(name, str) and name in plugins.names("labelers"):
            kind = plugins.load("labelers", name, Labeler)
            try:
                candidates.append(TypeAdapter(kind).validate_python(made.get("settings") or {}))
            except ValidationError as error:
                raise ValueError(f"{name} here has no such settings: {error.errors()[0]['msg']}") from error
        why = f"there is no labeler {name!r} here; --recipe or --tokenizers may have it"
        for candidate in candidates:
            labeler = config.override(candidate, own)
            try:
                there = json.loads(json.dumps(labeler.identity()))
            except FileNotFoundError as error:
                why = f"weights absent: {error}; {name}.checkpoint=PATH says where they are"
                continue
            if there == wanted:
                return labeler
            if (there["weights"], there["version"]) == (wanted["weights"], wanted["version"]):
                why = f"settings differ: {there['settings']} here, {wanted['settings']} made it"
            elif there["weights"] != wanted["weights"]:
                why = f"weights differ: {_short(there['weights'])} here, {_short(wanted['weights'])} made it"
            else:
                why = f"code differs: version {there['version']} of {name} here, {wanted['version']} made it"
        raise ValueError(why)

    def _wrapped(self, record: Commit, labeler: Labeler) -> Labeler:
        """The labeler as it wrote the column, which may be a version of what it emits."""
        if record.modality in labeler.emits:
            return labeler
        modality, version = modalities.split(record.modality)
        if not version or modality not in labeler.emits:
            raise ValueError(f"{labeler.name} makes {', '.join(labeler.emits)}, and not {record.modality}")
        read = zip(labeler.inputs, record.provenance.get("inputs", labeler.inputs), strict=False)
        return Versioned(inner=labeler, column_version=version, reads=tuple((m, c) for m, c in read if m != c))


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:16]
