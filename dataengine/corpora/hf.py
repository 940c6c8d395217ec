"""hf:NAME - a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataengine import plugins
from dataengine.corpora import Corpus, RawSample, Split, _items, _location, _reach
from dataengine.keys import make_key


class HuggingFace(Corpus):
    """Rows of one split (`?split=train`, any expression that `datasets` knows); images are never decoded here.

    Options: `split`, `config` (the dataset's configuration), `image` and `caption` name the columns, else the first
    image column and the usual caption names are taken; `fetch=yes` allows links (`any`: to private addresses too),
    `files=FOLDER` paths into that folder. No code of a dataset is run.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        defaults = {"split": "train", "config": "", "image": "", "caption": "", "fetch": "no", "files": ""}
        self._name, self._options = _location.parse(location, defaults)
        self._fetch = _reach.reach_of(self._options["fetch"], f"hf:{location}")

    def __getstate__(self) -> dict[str, Any]:
        # The memory-mapped rows stay in this process: another one opens them itself.
        return {"location": self.location, "_name": self._name, "_options": self._options, "_fetch": self._fetch}

    @cached_property
    def _rows(self) -> Any:
        import datasets

        split = self._options["split"]
        if os.path.exists(os.path.join(self._name, "dataset_dict.json")):
            saved = datasets.load_from_disk(self._name)
            if split not in saved:
                raise ValueError(f"hf:{self.location}: no split {split!r}; known: {', '.join(saved)}")
            rows = saved[split]
        elif os.path.exists(os.path.join(self._name, "state.json")):
            rows = datasets.load_from_disk(self._name)
        else:
            try:
                rows = datasets.load_dataset(self._name, self._options["config"] or None, split=split)
            except RuntimeError as error:  # a dataset that is a script
                raise ValueError(f"hf:{self.location}: {error}") from error
        undecoded = {n: f for n, f in rows.features.items() if isinstance(f, datasets.Image)}
        for name in undecoded:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        image = self._options["image"] or next(iter(undecoded), "image")
        caption = self._options["caption"] or next((n for n in _items.CAPTION_NAMES if n in rows.features), None)
        columns = [image] if caption is None else [image, caption]
        for column in columns:
            if column not in rows.features:
                hint = plugins.nearest(column, list(rows.features))
                raise ValueError(f"hf:{self.location}: no column {column!r}{hint}; known: {', '.join(rows.features)}")
        return rows.select_columns(columns)

    def splits(self, shard_size: int) -> list[Split]:
        """Even ranges of rows."""
        source = f"{os.path.basename(self._name.rstrip('/'))}/{self._options['split']}"
        return _location.pieces(source, [(0, len(self._rows))], shard_size)

    def read(self, split: Split) -> Iterator[RawSample]:
        """The rows of a range; ValueError when the dataset has fewer than when it was split."""
        if len(self._rows) < split.stop:
            raise ValueError(f"hf:{self.location} has changed: row {split.stop - 1} of {len(self._rows)} was expected")
        reach = _reach.Reach(self._name, self._folders(), self._fetch)
        image, *caption = self._rows.column_names
        for number in range(split.start, split.stop):
            key = make_key(*split.source.split("/"), f"{number:09d}")

            def load(number: int = number) -> tuple[bytes, tuple[str, ...]]:
                row = self._rows[number]
                texts = _items.captions(row[caption[0]]) if caption else ()
                return _items.image_bytes(row[image], reach), texts

            yield _items.attempt(key, f"{split.source}#{number}", load)

    def _folders(self) -> tuple[str, ...]:
        """Where paths of rows may lead: into the dataset itself, the downloads of `datasets`, what the user named."""
        import datasets
        from huggingface_hub import constants

        # Not all of Hugging Face's cache folder: the user's token lies in it.
        caches = (str(datasets.config.HF_DATASETS_CACHE), str(constants.HF_HUB_CACHE))
        local = (self._name,) if os.path.isdir(self._name) else ()
        return (*local, *caches, *filter(None, [self._options["files"]]))

    @classmethod
    def example(cls, folder: str) -> HuggingFace:
        """Five rows, saved to disk."""
        import datasets
        from PIL import Image

        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)) for _ in range(5)]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": images, "text": [f"row {i}" for i in range(5)]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(Path(folder, "rows"))
        return cls(str(Path(folder, "rows")))
