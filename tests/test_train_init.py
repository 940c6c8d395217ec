"""Beginning with a trained FourM: what is copied, what is new, what is refused; and one modality more."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dataengine import modalities
from model import checkpoint, initialise
from model.batches import TokenBatches, spec_of
from model.fourm import FourM, FourMConfig
from model.masking import MaskedBatch
from model.spec import ModalitySpec
from pipelines import train
from pipelines.pack import Vocabulary, text_column
from tests import packed_sources as sources
from tests.packed_sources import CAPTION, COLUMNS, DEPTH, GLOBAL, SEMSEG

CONFIG = FourMConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2)
SPECS = {column.name: spec_of(column, 16) for column in COLUMNS}


def specs(*columns) -> tuple[ModalitySpec, ...]:
    return tuple(SPECS[column.name] for column in columns)


def model(inputs, outputs, seed=0, config=CONFIG) -> FourM:
    return FourM(config, inputs, outputs, seed=seed)


def test_shared_parameters_are_copied_new_ones_drawn_and_others_left_out() -> None:
    source = model(specs(DEPTH, GLOBAL, CAPTION), specs(DEPTH, GLOBAL), seed=1)
    inputs, outputs = specs(SEMSEG, GLOBAL, DEPTH), specs(DEPTH, GLOBAL, SEMSEG)
    made, changes = initialise.initialised(source, CONFIG, inputs, outputs, seed=7)
    fresh, before = model(inputs, outputs, seed=7).state_dict(), source.state_dict()
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name] if name in before else fresh[name]), name
    assert {name for name in made.state_dict() if name not in before} == {
        f"{side}_embeddings.tok_semseg@64.{part}"
        for side, part in [
            *(("encoder", p) for p in ("mod_emb", "pos_emb", "token_emb.weight")),
            *(("decoder", p) for p in ("mod_emb", "pos_emb", "token_emb.weight", "to_logits.weight")),
        ]
    }
    # Learned positions are kept (ml-4m's finetune drops them); the copies are no views of the source.
    learned = "encoder_embeddings.tok_dinov2_global.pos_emb"
    assert torch.equal(made.state_dict()[learned], before[learned])
    assert not torch.equal(fresh[learned], before[learned])
    assert {p.data_ptr() for p in made.parameters()}.isdisjoint(p.data_ptr() for p in source.parameters())
    assert changes.new == ("input tok_semseg@64", "output tok_semseg@64")
    assert changes.dropped == ("input caption",)
    assert "left out: input caption" in changes.line()
    again, _ = initialise.initialised(source, CONFIG, inputs, outputs, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True))


def test_an_input_that_becomes_an_output_keeps_the_embedding_of_its_name() -> None:
    source = model(specs(DEPTH, CAPTION), specs(DEPTH), seed=1)
    made, changes = initialise.initialised(source, CONFIG, specs(DEPTH, CAPTION), specs(DEPTH, CAPTION), seed=7)
    decoder = made.decoder_embeddings["caption"]
    assert torch.equal(decoder.mod_emb, source.encoder_embeddings["caption"].mod_emb)
    assert decoder.to_logits.weight is decoder.token_emb.weight
    assert changes.new == ("output caption",)


def test_a_checkpoint_of_ml4m_gives_its_weights_and_where_its_positions_wrap(tmp_path: Path) -> None:
    poses, clip = (checkpoint.ml4m_spec(name) for name in ("human_poses", "tok_clip@224"))
    source = model((poses, clip), (poses, clip), seed=1)
    checkpoint.save_safetensors(source, tmp_path / "model.safetensors")
    read = initialise.read(str(tmp_path / "model.safetensors"))
    own = replace(poses, max_positions=0, chunked=False)
    adopted = initialise.adopted(own, read)
    assert (own.max_positions, adopted.max_positions) == (0, 263)
    made, changes = initialise.initialised(read, CONFIG, (adopted,), (adopted,), seed=0)
    assert torch.equal(
        made.state_dict()["decoder_embeddings.human_poses.token_emb.weight"],
        source.state_dict()["decoder_embeddings.human_poses.token_emb.weight"],
    )
    assert changes.dropped == ("input tok_clip@224", "output tok_clip@224")


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        ({}, {"vocab_size": 40}, "tok_depth@64: ids of 40 in the data, a vocabulary of 32 .* too small for them"),
        ({}, {"vocab_size": 20}, "tok_depth@64: ids of 20 in the data, a vocabulary of 32 in the checkpoint$"),
        ({}, {"learned_positions": True}, "tok_depth@64: 16 learned positions in the data, 16 fixed positions in the"),
        ({}, {"kind": "sequence"}, "tok_depth@64: sequence in the data, tokens in the checkpoint"),
        ({}, {"name": "tok_depths@64"}, "none of the run's modalities, but tok_depth@64"),
        ({"dim": 64}, {}, "model.dim 64, the checkpoint has 32"),
        ({"qk_norm": True, "encoder_depth": 2}, {}, r"model.encoder_depth 2, .* 1; model.qk_norm True, .* has False"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(config: dict, changed: dict, message: str) -> None:
    source = model(specs(DEPTH), specs(DEPTH))
    spec = replace(SPECS[DEPTH.name], **changed)
    with pytest.raises(ValueError, match=message):
        initialise.initialised(source, replace(CONFIG, **config), (spec,), (spec,), seed=0)


def test_other_logits_than_tables_are_not_tied() -> None:
    source = model(specs(DEPTH), specs(DEPTH), config=replace(CONFIG, tie_embeddings=False))
    with pytest.raises(ValueError, match="tie_embeddings true, the checkpoint has other logits than tables"):
        initialise.initialised(source, CONFIG, specs(DEPTH), specs(DEPTH), seed=0)
    tied = model(specs(DEPTH), specs(DEPTH), seed=3)
    made, _ = initialise.initialised(tied, replace(CONFIG, tie_embeddings=False), specs(DEPTH), specs(DEPTH), seed=0)
    both = made.decoder_embeddings[DEPTH.name]
    assert torch.equal(both.to_logits.weight, both.token_emb.weight)
    assert both.to_logits.weight is not both.token_emb.weight


def test_a_source_is_a_folder_a_file_or_a_repository() -> None:
    with pytest.raises(ValueError, match="runs/none/model: no such folder or file, and no name of a Hugging Face"):
        initialise.folder_of("runs/none/model")


MOOD = '''
"""How a picture feels, as one word."""

from typing import Any

from dataengine import codecs
from dataengine.modalities import Picture, TextLike


class Mood(TextLike):
    kind, suffix, max_tokens = "text", "json", 6

    def encode(self, value): return codecs.encode_json(value)
    def decode(self, data): return codecs.decode_json(data)
    def check(self, value, size): return None
    def placeholder(self, size): return ""
    def example(self, rng, size): return "calm"
    def crop(self, value, crop, size, side): return value
    def variants(self, value, crops, size): return [[value]]
    def parse(self, text): return text, []
    def picture(self, value, rgb): return Picture(text=value)
'''


@pytest.fixture
def mood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The packed column of a modality that is one new file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mood.py").write_text(MOOD)
    monkeypatch.setattr(modalities, "__path__", [*modalities.__path__, str(tmp_path / "files")])
    yield text_column(modalities.load("mood"), Vocabulary(240, "d" * 64))
    modalities.load.cache_clear()
    sys.modules.pop("dataengine.modalities.mood", None)


def mean_loss(network: FourM, batches: TokenBatches, name: str) -> float:
    with torch.no_grad():
        outputs = [network(batches(10_000 + n), "token") for n in range(4)]
    counted = [(float(o.losses[name]), int(o.counts[name])) for o in outputs]
    return sum(loss * count for loss, count in counted) / sum(count for _, count in counted)


def test_one_modality_more_changes_no_old_output_and_is_learned(tmp_path: Path, mood) -> None:
    sources.write(tmp_path / "old")
    old = sources.run(tmp_path / "old", tmp_path / "first", steps=40)
    assert train.train(old).finished
    assert json.loads((tmp_path / "first/model/tokenizers.json").read_text())["caption"] == {"tokenizer": "d" * 64}

    sources.write(tmp_path / "new", (*COLUMNS, mood))
    names = (*old.inputs, "mood")
    more = sources.run(tmp_path / "new", tmp_path / "second", names, steps=100, init_from=str(tmp_path / "first/model"))
    made = train.prepared(more)
    assert made.changes is not None
    assert made.changes.new == ("input mood", "output mood")
    before, after = checkpoint.from_pretrained(tmp_path / "first/model"), made.model.eval()
    batch: MaskedBatch = train.prepared(old).batches(3)
    with torch.no_grad():
        one, two = before(batch), after(batch)
        assert torch.equal(before.decode(batch, before.encode(batch)), after.decode(batch, after.encode(batch)))
    assert {name: float(v) for name, v in two.losses.items() if name != "mood"} == {
        name: float(v) for name, v in one.losses.items()
    }
    assert sum(one.counts.values()) > 0

    start = mean_loss(after, made.batches, "mood")
    result = train.train(more)
    assert result.finished
    learned = checkpoint.from_pretrained(tmp_path / "second/model")
    assert mean_loss(learned, made.batches, "mood") < 0.5 * start
    assert start > 0.8 * np.log(240)
    about = json.loads((tmp_path / "second/initialised.json").read_text())
    assert about["new"] == ["input mood", "output mood"]
