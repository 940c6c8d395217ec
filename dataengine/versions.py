"""Another version of a column beside the first: `depth@v2` is made by the labelers of `depth`, wrapped."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataengine import modalities
from dataengine.labeler import Labeler, Loaded
from dataengine.sample import Sample
from dataengine.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Versioned(Labeler):
    """A labeler that writes `<modality>@<column_version>` for each modality of the one it wraps, and is it otherwise.

    It reads what that one reads, never a version of it, but for the inputs that `reads` replaces: pairs of an input
    and the version to take for it, ("depth", "depth@v2").
    """

    inner: Labeler
    column_version: str
    reads: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for column in self.emits:
            modalities.load(column)
        if isinstance(self.inner, Versioned):
            raise ValueError(f"{self.inner.emits[0]} is a version already")
        for name, column in self.reads:
            if name not in self.inner.inputs:
                raise ValueError(
                    f"{self.emits[0]} does not read {name!r}; {self.inner.name} reads: {', '.join(self.inner.inputs)}"
                )
            if modalities.split(column)[0] != name:
                raise ValueError(f"{self.emits[0]} can read a version of {name} in its place, and not {column!r}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the labeler, as `reads` replaces them."""
        return tuple(dict(self.reads).get(m, m) for m in self.inner.inputs)

    @property
    def emits(self) -> tuple[str, ...]:
        """The version of each modality that the labeler writes."""
        return tuple(f"{m}@{self.column_version}" for m in self.inner.emits)

    def load(self, device: str) -> Loaded:
        """Load the labeler; it sees and says its own names."""
        call, given = self.inner.load(device), {column: m for m, column in self.reads}
        columns = dict(zip(self.inner.emits, self.emits, strict=True))

        def run(samples: Sequence[Sample]) -> list[dict[str, Any]]:
            own = [Sample(s.key, {given.get(m, m): value for m, value in s.values.items()}) for s in samples]
            return [{columns.get(m, m): value for m, value in output.items()} for output in call(own)]

        return run

    def weights(self) -> Weights | None:
        """The labeler's."""
        return self.inner.weights()

    def tiny(self, folder: Path) -> Versioned:
        """The version that the tiny labeler makes."""
        return replace(self, inner=self.inner.tiny(folder))

    def facts(self) -> dict[str, Any]:
        """The labeler's."""
        return self.inner.facts()

    def adapted(self, available: Collection[str]) -> Versioned:
        """The version that the adapted labeler makes; an input that `reads` replaces exists if its version does."""
        there = {*available, *(m for m, column in self.reads if column in available)}
        return replace(self, inner=self.inner.adapted(there))

    def of_column(self, column: str) -> Versioned:
        """The version of the labeler's own."""
        inner = self.inner.of_column(dict(zip(self.emits, self.inner.emits, strict=True))[column])
        return replace(self, inner=inner, reads=tuple(r for r in self.reads if r[0] in inner.inputs))

    def identity(self) -> dict[str, Any]:
        """The labeler's: the name of a column does not decide what is in it."""
        return self.inner.identity()

    @property
    def name(self) -> str:
        """The labeler's."""
        return self.inner.name

    @property
    def random(self) -> bool:
        """Whether the labeler's weights are."""
        return self.inner.random

    @property
    def version(self) -> int:  # type: ignore[override]
        """That of the labeler's code."""
        return self.inner.version

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """The labeler's."""
        return self.inner.batch_size

    @property
    def gpus(self) -> float:  # type: ignore[override]
        """The labeler's."""
        return self.inner.gpus


def offered(
    labelers: Iterable[Labeler], wanted: Iterable[str], reads: Mapping[str, tuple[tuple[str, str], ...]]
) -> list[Labeler]:
    """The labelers, and one for each wanted version that none of them makes: the first for its modality, wrapped.

    `reads` says which versions a wanted version takes as inputs, by column.
    """
    out = list(labelers)
    for column in wanted:
        modality, version = modalities.split(column)
        own = reads.get(column, ())
        there = any(column in labeler.emits for labeler in out)
        if own and (there or not version):
            raise ValueError(
                f"{column} is told to read {own[0][1]} for {own[0][0]}: "
                + ("its recipe says what it reads" if there else f"only a version can do so, as {column}@v2")
            )
        if not version or there:
            continue
        for labeler in out:
            if modality in labeler.emits:
                out.append(Versioned(inner=labeler, column_version=version, reads=own))
                break
    return out
