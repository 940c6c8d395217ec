"""The whole set on real photographs, through the engine on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dataengine import local, plugins, validate
from dataengine.ingest import IngestSettings, prepare
from dataengine.manifest import Dataset
from pipelines import label, look, page, photos
from pipelines.recipes import every_labeler

COUNT = 32


def photographs(folder: Path) -> None:
    """The bundled photographs, captions and all, made small, and windows of some of them to make up the number."""
    photos.write(folder)
    files = sorted(p for p in folder.iterdir() if p.suffix != ".json")
    for i, file in enumerate(files):
        with Image.open(file) as image:
            small = image.convert("RGB")
        small.thumbnail((160, 160))
        if file.suffix in (".jpg", ".jpeg", ".png"):
            small.save(file)
        if i < COUNT - len(files):
            small.crop((7, 5, small.width - 20, small.height - 9)).save(folder / f"window{i:02d}.png")


@pytest.mark.ray
def test_every_labeler_commits_all_cells_of_32_photographs_on_ray(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    dataset = Dataset(tmp_path / "root")
    worker, tasks = prepare(dataset, f"folder:{tmp_path / 'photos'}", IngestSettings(shard_size=16))
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    run = every_labeler.labels(tmp_path / "weights")
    plan = label.plan(dataset, [], run)
    summary = label.execute(dataset, plan, runner="ray", workers=2, device="cpu", max_bad_fraction=0.0, what="label")
    assert sum(summary.invalid.values()) == 0, summary.reasons
    columns = [m for labeler in run.labelers for m in labeler.emits]
    assert len(columns) >= len(plugins.names("labelers"))
    for column in columns:
        assert dataset.committed(column) == [0, 1], column
        records = [dataset.commit(column, shard) for shard in (0, 1)]
        assert [r.num_samples for r in records if r is not None] == [16, 16], column
    assert validate.verify(dataset) == []
    shown = page.render(look.page(dataset, 4))
    assert all(column in shown for column in columns)
    assert "RANDOM" in shown.upper()
