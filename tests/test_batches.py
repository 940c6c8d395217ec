"""Batches of packed shards: a pure function of the seed and the number, in any process; only what is used is read."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataengine import packed
from dataengine.packed import Column, Packed
from model.batches import PackedDataset, TokenBatches, merged_columns, spec_of
from model.masking import MaskingConfig, MixtureComponent

CROPS = 3
DEPTH = Column(name="tok_depth@64", kind="tokens", max_tokens=16, vocab_size=4096, side=64, grid=(4, 4))
RGB = Column(name="rgb@64", kind="pixels", max_tokens=64 * 64, side=64)
CAPTION = Column(name="caption", kind="sequence", max_tokens=20, vocab_size=4096, draw="caption")
T5 = Column(name="t5_caption", kind="embeddings", max_tokens=8, dim=6, draw="caption")
COLUMNS = (DEPTH, RGB, CAPTION, T5)


def shard(path, first, rows, columns=COLUMNS):
    """Rows that tell who they are: every token is the number of its row, times the crops, plus the crop."""
    rng = np.random.default_rng(first)
    values = {
        DEPTH.name: [np.arange(CROPS)[:, None] + np.full((CROPS, 16), n * CROPS) for n in range(first, first + rows)],
        RGB.name: list(rng.integers(0, 256, (rows, CROPS, 64, 64, 3), np.uint8)),
        CAPTION.name: [[[[300 + n % 400]] * (1 + n % 9), [[300 + n % 400] * 5]] for n in range(first, first + rows)],
        T5.name: [[rng.standard_normal((5, 6)), np.zeros((0, 6))] for _ in range(rows)],
    }
    values[DEPTH.name] = [v.astype(np.uint16) for v in values[DEPTH.name]]
    values[T5.name] = [[r.astype(np.float16) for r in v] for v in values[T5.name]]
    if rows > 4:
        values[DEPTH.name][3] = values[CAPTION.name][4] = None
    keys = [f"{n:06}" for n in range(first, first + rows)]
    path.write_bytes(packed.write(columns, CROPS, keys, {c.name: values[c.name] for c in columns}))
    return Packed(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    ends = np.cumsum([0, 30, 41, 5, 24])
    return tuple(
        shard(folder / f"{i}.arrow", first, end - first)
        for i, (first, end) in enumerate(itertools.pairwise(ends.tolist()))
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return tuple(shard(folder / f"{i}.arrow", 1000 * i, 50, (CAPTION,)) for i in range(2))


def masking_of(*names, inputs=None, **changes):
    component = MixtureComponent(
        input_alphas=dict.fromkeys(inputs or names, 0.5), target_alphas=dict.fromkeys(names, 0.5)
    )
    return MaskingConfig(**{"components": (component,), "input_tokens": (8, 16), "target_tokens": (8, 16), **changes})


def batches_of(*datasets, size=16, seed=3, names=None, **changes):
    columns = merged_columns(datasets)
    names = names or sorted(columns)
    specs = tuple(spec_of(columns[name], 16) for name in names)
    config = masking_of(*[n for n in names if n not in ("rgb@64", "t5_caption")], inputs=names, **changes)
    return TokenBatches(datasets=datasets, specs=specs, masking=config, batch_size=size, seed=seed)


def depth_only(*datasets, **changes):
    config = masking_of(DEPTH.name, input_tokens=(1, 1), target_tokens=(1, 1))
    specs = (spec_of(DEPTH, 16),)
    return TokenBatches(datasets=datasets, specs=specs, masking=config, batch_size=changes.pop("size", 10), seed=4)


def seen(batches, numbers):
    """(row, crop) of each sample; -1 where there is no depth."""
    ids = torch.cat([torch.where(b.enc_mod[:, 0] >= 0, b.enc_ids[:, 0], -1) for b in map(batches, numbers)])
    return [(i // CROPS, i % CROPS) for i in ids.tolist()]


def plain(batch):
    """All that a batch holds, as bytes."""
    held = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        for name, tensor in value.items() if isinstance(value, dict) else {field.name: value}.items():
            array = tensor.numpy() if isinstance(tensor, torch.Tensor) else np.array(tensor)
            held[field.name, name] = (str(array.dtype), array.shape, array.tobytes())
    return held


def test_every_epoch_draws_each_sample_once_in_an_order_of_its_own(shards):
    total = sum(map(len, shards))
    rows = [row for row, _ in seen(depth_only(PackedDataset(shards, window=2)), range(total // 10 * 3))]
    epochs = [rows[i * total : (i + 1) * total] for i in range(3)]
    for epoch in epochs:
        counts = Counter(epoch)
        assert counts.pop(-1) == len(shards)  # one label of each is not valid
        assert set(counts.values()) == {1}
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_of_shards_is_read_before_the_next(shards):
    total, ends = sum(map(len, shards)), np.cumsum([len(s) for s in shards])
    rows = [row for row, _ in seen(depth_only(PackedDataset(shards, window=1)), range(total // 10))]
    order = [int(np.searchsorted(ends, row, side="right")) for row in rows if row >= 0]
    assert len([a for a, b in itertools.pairwise(order) if a != b]) == len(shards) - 1
    mixed = [row for row, _ in seen(depth_only(PackedDataset(shards, window=0)), range(total // 10))]
    order = [int(np.searchsorted(ends, row, side="right")) for row in mixed if row >= 0]
    assert len([a for a, b in itertools.pairwise(order) if a != b]) > total // 3


def test_a_repeated_sample_comes_in_a_row_with_other_crops_and_masks(shards):
    drawn = seen(depth_only(PackedDataset(shards, repeats=CROPS)), range(30))
    uses = [drawn[i : i + CROPS] for i in range(0, len(drawn), CROPS)]
    for use in uses:
        assert len({row for row, _ in use}) == 1
        assert use[0][0] < 0 or {crop for _, crop in use} == set(range(CROPS))
    once = [row for row, _ in seen(depth_only(PackedDataset(shards)), range(10))]
    assert [use[0][0] for use in uses] == once
    assert len({use[0][1] for use in uses}) == CROPS
    batch = batches_of(PackedDataset(shards, repeats=16))(0)
    assert len({tuple(line) for line in batch.enc_pos.tolist()}) > 8


def test_all_modalities_of_a_sample_are_of_one_crop(shards):
    """The pixels are those of the crop that the tokens are of."""
    found = 0
    images = [(s, i) for s in shards for i in range(len(s))]
    batch = batches_of(PackedDataset(shards), size=64, names=[DEPTH.name, RGB.name])(0)
    for sample in range(64):
        tokens, pixels = (batch.enc_mod[sample] == m for m in (0, 1))
        if tokens.any() and pixels.any():
            row, crop = divmod(int(batch.enc_ids[sample, tokens][0]), CROPS)
            held, index = images[row]
            image = held.row(index, np.random.default_rng(0), [RGB.name], crop)[RGB.name]
            at = int(batch.enc_pos[sample, pixels][0])
            patch = image[at // 4 * 16 :, at % 4 * 16 :][:16, :16].reshape(-1)
            assert (batch.pixels[RGB.name][batch.enc_ids[sample, pixels][0]].numpy() == patch).all()
            found += 1
    assert found > 20


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1e-4), (0.1, 0.2)])
def test_datasets_are_mixed_by_weight_and_none_is_drawn_twice(shards, texts, weights):
    batches = batches_of(PackedDataset(shards, weights[0]), PackedDataset(texts, weights[1]), size=512)
    rows = [batches._mixture.rows(n * 512, 512) for n in range(40)]
    datasets = np.concatenate([r.datasets for r in rows])
    wanted = len(datasets) * weights[1] / sum(weights)
    assert abs(datasets.sum() - wanted) <= 2
    # In every block; and each stream is gone through in its own order, as if it were alone.
    for block in datasets.reshape(-1, 4096):
        assert abs(block.sum() - 4096 * weights[1] / sum(weights)) <= 2
    alone = batches_of(PackedDataset(shards), names=list(batches._mixture._names))
    mixed = [(s.path, i) for r in rows for s, i, d in zip(r.shards, r.rows, r.datasets, strict=True) if not d]
    wanted = alone._mixture.rows(0, len(mixed))
    assert mixed == [(s.path, i) for s, i in zip(wanted.shards, wanted.rows, strict=True)]


def test_a_text_only_dataset_is_masked_by_its_own_mixture(shards, texts):
    own = masking_of("caption", input_tokens=(1, 1), target_tokens=(12, 12))
    batches = batches_of(PackedDataset(shards), PackedDataset(texts, masking=own), size=256, input_tokens=(16, 16))
    batch, datasets = batches(0), batches._mixture.rows(0, 256).datasets
    caption, lengths = batch.modalities.index("caption"), (batch.enc_mod >= 0).sum(1).numpy()
    assert set(batch.enc_mod[torch.from_numpy(datasets == 1)].unique().tolist()) == {-1, caption}
    assert set(batch.dec_mod[torch.from_numpy(datasets == 1)].unique().tolist()) == {-1, caption}
    assert lengths[datasets == 1].max() == 1
    assert lengths[datasets == 0].max() > 8


def test_only_what_has_a_budget_is_read(shards, monkeypatch):
    read = []
    row = Packed.row
    monkeypatch.setattr(
        Packed, "row", lambda self, i, rng, names, crop: read.append(names) or row(self, i, rng, names, crop)
    )
    config = {"input_tokens": (2, 2), "target_tokens": (2, 2)}
    batch = batches_of(PackedDataset(shards), size=64, **config)(0)
    assert {len(names) for names in read} >= {1, 2, 3}
    rgb = batch.modalities.index("rgb@64")
    assert sum("rgb@64" in names for names in read) == int((batch.enc_mod == rgb).any(1).sum()) < 48


@pytest.mark.parametrize("redistribute", [False, True])
def test_redistributed_budgets_know_how_long_texts_are(shards, redistribute):
    changes = {"input_tokens": (24, 24), "target_tokens": (0, 0), "redistribute": redistribute}
    batch = batches_of(PackedDataset(shards), size=64, names=["caption", DEPTH.name], **changes)(0)
    filled = (batch.enc_mod >= 0).sum(1)
    present = batches_of(PackedDataset(shards), names=["caption", DEPTH.name])._mixture.rows(0, 64).present
    full = filled[torch.from_numpy(present.all(1))]
    # A caption may be kept in part only, but at most four of its ids of 20 tokens are masked on average.
    assert (full.float().mean() > 17) == redistribute


def test_batches_are_the_same_in_any_process_and_after_a_restart(shards, texts):
    def made():
        return batches_of(PackedDataset(shards, 2.0, repeats=2), PackedDataset(texts), size=32)

    batches = made()
    wanted = [plain(batches(n)) for n in range(12)]
    assert [plain(made()(n)) for n in (11, 2, 7)] == [wanted[n] for n in (11, 2, 7)]
    assert len(pickle.dumps(batches)) < 4_000
    assert plain(batches_of(PackedDataset(shards), seed=4)(0)) != plain(batches_of(PackedDataset(shards), seed=5)(0))


class Numbered(torch.utils.data.Dataset):
    """Batches by number, for a DataLoader."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, number):
        return self.batches(number)


def unchanged(batch):
    return batch


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader_change_nothing(shards, texts, start, workers):
    batches = batches_of(PackedDataset(shards, 2.0, repeats=2), PackedDataset(texts), size=8)
    wanted = [plain(batches(n)) for n in range(6)]
    loader = DataLoader(
        Numbered(batches), batch_size=None, sampler=range(6), num_workers=workers, multiprocessing_context=start,
        collate_fn=unchanged,
    )  # fmt: skip
    assert [plain(batch) for batch in loader] == wanted


def test_any_number_of_ranks_sees_the_same_samples_in_a_step(shards):
    """Batches of a step are dealt out to ranks: together they are those of one process, in its order."""
    batches = depth_only(PackedDataset(shards), size=4)
    alone = seen(batches, range(24))
    for ranks in (1, 2, 4):
        mine = [[seen(batches, [step * 4 + k]) for step in range(6) for k in range(r, 4, ranks)] for r in range(ranks)]
        each = 4 // ranks
        together = [mine[k % ranks][step * each + k // ranks] for step in range(6) for k in range(4)]
        assert list(itertools.chain.from_iterable(together)) == alone


def test_what_cannot_be_mixed_is_refused_at_once(shards, texts, tmp_path):
    empty = shard(tmp_path / "empty.arrow", 0, 0)
    with pytest.raises(ValueError, match=r"the dataset of .*empty.arrow is empty, expected samples"):
        batches_of(PackedDataset(shards), PackedDataset((empty,)))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight {weight} of the dataset of .*, expected a number above 0"):
            PackedDataset(shards, weight)
    with pytest.raises(ValueError, match="no datasets, expected at least one"):
        batches_of(names=[])
    with pytest.raises(ValueError, match=r"target alphas of no component name a modality of .*which holds caption"):
        batches_of(PackedDataset(texts), PackedDataset(shards), components=masking_of(DEPTH.name).components)
    with pytest.raises(ValueError, match="component 0: its input alphas name depth, which no dataset holds as input"):
        batches_of(PackedDataset(texts), components=masking_of("caption", inputs=["depth"]).components)
    with pytest.raises(ValueError, match="component 0: its target alphas name rgb@64, which no dataset holds"):
        batches_of(PackedDataset(shards), components=masking_of("rgb@64").components)
    with pytest.raises(ValueError, match="some with redistribute and some without"):
        batches_of(PackedDataset(shards), PackedDataset(texts, masking=masking_of("caption", redistribute=True)))
    with pytest.raises(ValueError, match="repeats 0, window 16"):
        PackedDataset(shards, repeats=0)
