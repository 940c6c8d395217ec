"""200 steps of the loop on the batches that ml-4m's trainer took: the same losses throughout.

tests/golden/fourm_training.npz has both (made by tests/golden/make_fourm_presets.py): the reference ran its own model,
optimizer groups, AdamW, schedule, clipping and step.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import _parity_training as training
from model.masking import MaskedBatch
from tests.golden import make_fourm_presets as golden


def batches(stored):
    """The batches as they were: patches of one colour are kept as one number."""
    rgb, first, found = [spec.name for spec in training.SPECS].index("rgb@64"), 0, []
    for number in range(len(stored["losses"])):
        fields = {name: torch.from_numpy(stored[name][number].astype(np.int64)) for name in golden.FIELDS}
        count = int((fields["enc_mod"] == rgb).sum())
        patches = torch.from_numpy(stored["first_pixels"][first : first + count])[:, None].expand(-1, 768)
        first += count
        names = tuple(spec.name for spec in training.SPECS)
        found.append(MaskedBatch(modalities=names, pixels={"rgb@64": patches.contiguous()}, embeddings={}, **fields))
    return found


def test_the_loop_trains_as_ml4ms_trainer_does(tmp_path):
    with np.load(golden.TRAINING, allow_pickle=False) as file:
        stored = dict(file)
    wanted = stored["losses"]
    assert len(wanted) == 200
    assert wanted[-20:].mean() < 0.8 * wanted[:20].mean()
    torch.set_num_threads(1)
    found = np.array(training.losses_of_ours(batches(stored), tmp_path))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    np.testing.assert_allclose(found[:10], wanted[:10], rtol=1e-4)
