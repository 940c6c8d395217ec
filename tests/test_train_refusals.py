"""What a trainer refuses, each by a message that says what to do, and before anything is trained or written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dataengine import packed
from model import checkpoint
from model.fourm import FourM
from model.masking import MaskingConfig, MixtureComponent
from pipelines import train
from pipelines.train import Source, TrainFourM
from tests import packed_sources as sources
from tests.packed_sources import CAPTION, COLUMNS, DEPTH, GLOBAL, SEMSEG

NAMES = tuple(column.name for column in COLUMNS)


def refused(run: TrainFourM, *messages: str) -> None:
    with pytest.raises(ValueError, match=re.compile(".*".join(messages), re.DOTALL)):
        train.train(run)
    assert not Path(run.out).exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "data"
    sources.write(folder)
    return folder


def trained(run: TrainFourM, folder: Path, makers: dict[str, dict[str, str]] | None = None, **changes: object) -> str:
    """A checkpoint as a run would leave it, without its training."""
    made = train.prepared(replace(run, **changes))
    checkpoint.save_pretrained(made.model, folder)
    (folder / train.TOKENIZERS).write_text(json.dumps(made.tokenizers | (makers or {})))
    return str(folder)


def test_two_datasets_of_two_tokenizers(data: Path, tmp_path: Path) -> None:
    sources.write(tmp_path / "other", (replace(DEPTH, tokenizer="e" * 64), *COLUMNS[1:]))
    run = sources.run(data, tmp_path / "out")
    both = (*run.data, Source(root=str(tmp_path / "other")))
    refused(
        replace(run, data=both), "tok_depth@64 of .*other.* was made by another tokenizer or layout",
        "tokenizer eeeeeeeeeeee, not aaaaaaaaaaaa", "tokenise and pack both with the same one",
    )  # fmt: skip
    # What the run does not use, or nobody knows, is no reason.
    train.prepared(replace(run, data=both, inputs=NAMES[1:], outputs=NAMES[1:], masking=_masking(NAMES[1:])))
    sources.write(tmp_path / "unknown", (replace(DEPTH, tokenizer=""), *COLUMNS[1:]))
    train.prepared(replace(run, data=(*run.data, Source(root=str(tmp_path / "unknown")))))


def test_a_checkpoint_of_other_tokenizers(data: Path, tmp_path: Path) -> None:
    run = sources.run(data, tmp_path / "out")
    makers = {DEPTH.name: {"tokenizer": "e" * 64}, CAPTION.name: {"tokenizer": "f" * 64}}
    folder = trained(run, tmp_path / "model", makers)
    refused(
        replace(run, init_from=folder), "2 reasons not to train:",
        "caption: made by tokenizer dddddddddddd, the checkpoint was trained on those of ffffffffffff",
        "tok_depth@64: made by tokenizer aaaaaaaaaaaa, the checkpoint was trained on those of eeeeeeeeeeee",
    )  # fmt: skip
    (tmp_path / "model" / train.TOKENIZERS).unlink()  # ml-4m's checkpoints do not say
    assert train.prepared(replace(run, init_from=folder)).changes is not None


def test_a_vocabulary_too_small_for_ids_for_the_checkpoint_and_for_texts(data: Path, tmp_path: Path) -> None:
    # A column that understates its vocabulary, as a program might that does not check what it writes.
    rows = sources.values(COLUMNS)
    sources.write(tmp_path / "small", (replace(DEPTH, vocab_size=9), *COLUMNS[1:]), rows)
    refused(
        sources.run(tmp_path / "small", tmp_path / "out"),
        "tok_depth@64 of .*: id 1[0-9], expected less than its vocabulary of 9",
    )

    run = sources.run(data, tmp_path / "out")
    small = trained(sources.run(tmp_path / "few", tmp_path / "out"), *_few(tmp_path))
    refused(
        replace(run, init_from=small),
        "tok_depth@64: ids of 32 in the data, a vocabulary of 20 in the checkpoint, too small for them",
    )

    sources.write(tmp_path / "text", (*COLUMNS[:3], replace(CAPTION, vocab_size=200)))
    refused(
        sources.run(tmp_path / "text", tmp_path / "out"),
        "caption: a vocabulary of 200, expected at least the 204 reserved ids",
        "caption of .*: id 2[0-9]+, expected less",
    )  # fmt: skip


def _few(tmp_path: Path) -> tuple[Path]:
    sources.write(tmp_path / "few", (replace(DEPTH, vocab_size=20), *COLUMNS[1:]))
    return (tmp_path / "few-model",)


def test_a_modality_that_no_dataset_holds(data: Path, tmp_path: Path) -> None:
    run = sources.run(data, tmp_path / "out", (*NAMES, "tok_normal@64", "rgb@64"))
    refused(
        run,
        "no dataset holds tok_normal@64, rgb@64; there are: tok_depth@64, tok_semseg@64, tok_dinov2_global, caption",
    )


def test_datasets_that_are_empty_or_none(data: Path, tmp_path: Path) -> None:
    sources.write(tmp_path / "empty", COLUMNS, {name: [] for name in NAMES})
    run = sources.run(data, tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    both = (*run.data, Source(root=str(tmp_path / "empty")), Source(root=str(tmp_path / "nothing")))
    refused(
        replace(run, data=both), "2 reasons", "empty is empty: its 1 packed shards hold no sample",
        "nothing holds n.* packed tokens",
    )  # fmt: skip
    refused(replace(run, data=()), "data is empty, expected at least one dataset")


def _masking(
    inputs: tuple[str, ...], targets: tuple[str, ...] | None = None, **first: dict[str, float]
) -> MaskingConfig:
    whole = MixtureComponent(
        input_alphas=dict.fromkeys(inputs, 1.0),
        target_alphas=dict.fromkeys(inputs if targets is None else targets, 1.0),
    )
    components = (replace(whole, **first), whole) if first else (whole,)
    return MaskingConfig(components=components, input_tokens=(12, 12), target_tokens=(12, 12))


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (
            _masking(NAMES, input_alphas=dict.fromkeys(NAMES, 0.0)),
            "component 0: its input alphas name nothing, which no dataset holds as input",
        ),
        (_masking(NAMES, target_alphas={}), "component 0: its target alphas name nothing, which no dataset holds"),
        (
            _masking(NAMES, target_alphas={"tok_normal@64": 1.0}),
            "component 0: its target alphas name tok_normal@64, which no dataset",
        ),
        (_masking(NAMES, ()), "the target alphas of no component name a modality of the dataset of .*data"),
        (_masking(NAMES, NAMES[1:]), "tok_depth@64 is never drawn as target: no component names it"),
        (_masking(NAMES[1:], NAMES), "tok_depth@64 is never drawn as input: no component names it"),
    ],
)
def test_concentrations_that_select_nothing(data: Path, tmp_path: Path, masking: MaskingConfig, message: str) -> None:
    refused(sources.run(data, tmp_path / "out", masking=masking), message)


def test_concentrations_of_what_the_model_does_not_have(data: Path, tmp_path: Path) -> None:
    run = sources.run(data, tmp_path / "out")
    refused(
        replace(run, outputs=NAMES[1:]), "component 0 draws tok_depth@64 as target, which is no target of the model"
    )
    refused(replace(run, inputs=NAMES[:-1]), "component 0 draws caption as input, which is no input of the model")
    # ml-4m's tables have a 0 where a modality is no target: taken, and never drawn.
    never = replace(run.masking.components[0], target_alphas={**run.masking.components[0].target_alphas, DEPTH.name: 0})
    made = train.prepared(replace(run, outputs=NAMES[1:], masking=replace(run.masking, components=(never,))))
    assert DEPTH.name not in made.batches.masking.components[0].target_alphas


def test_shards_of_another_version(data: Path, tmp_path: Path) -> None:
    batch = packed.build(COLUMNS, 1, ["a"], sources.values(COLUMNS, rows=1))
    about = json.loads(batch.schema.metadata[b"dataengine.tokens"])
    about["format"] = 1
    older = batch.replace_schema_metadata({b"dataengine.tokens": json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, older.schema) as writer:
        writer.write_batch(older)
    sources.write(tmp_path / "older", shard=0)
    sources.publish(tmp_path / "older", sink.getvalue().to_pybytes(), ["a"], shard=1)
    run = sources.run(tmp_path / "older", tmp_path / "out")
    refused(
        run, "older: ", "shard-00001.arrow: token format 1, expected 2",
        "`dataengine pack` makes it anew",
    )  # fmt: skip


def test_everything_that_is_wrong_is_said_at_once(data: Path, tmp_path: Path) -> None:
    run = sources.run(data, tmp_path / "out", NAMES[:2])
    folder = trained(run, tmp_path / "model", {DEPTH.name: {"tokenizer": "e" * 64}})
    wrong = replace(
        run, init_from=folder, model=replace(run.model, dim=64),
        masking=_masking(NAMES[:2], input_alphas={}),
    )  # fmt: skip
    refused(
        wrong,
        "3 reasons",
        "component 0: its input alphas name nothing",
        "model.dim 64, the checkpoint has 32",
        "made by tokenizer",
    )


def test_nothing_is_refused_of_a_run_that_is_right(data: Path, tmp_path: Path) -> None:
    made = train.prepared(sources.run(data, tmp_path / "out"))
    assert isinstance(made.model, FourM)
    assert made.tokenizers[SEMSEG.name] == {"tokenizer": "b" * 64}
    assert made.batches(0).dec_mod.ge(0).any()
    assert np.isfinite(float(made.model(made.batches(0)).loss.detach()))
    assert GLOBAL.name in made.batches(0).modalities
