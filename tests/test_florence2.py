"""Florence-2's captions: parity with transformers' processor and generation, and a column beside what was ingested."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from dataengine import local, modalities
from dataengine.labeler import Staged
from dataengine.sample import Sample
from labelers import _images, florence2
from labelers.florence2 import Florence2
from pipelines import label
from tests.fakes import ingested

SIZES = {"astronaut": (512, 512), "coffee": (400, 600), "chelsea": (300, 451), "rocket": (427, 640)}


@pytest.fixture
def labeler(tmp_path: Path) -> Florence2:
    return Florence2().tiny(tmp_path)


def photographs() -> list[Sample]:
    photos = {name: np.ascontiguousarray(getattr(skimage.data, name)()) for name in SIZES}
    assert {name: photo.shape[:2] for name, photo in photos.items()} == SIZES
    return [Sample(name, {"rgb": photo}) for name, photo in photos.items()]


def processor(folder: Path) -> Any:
    """The reference's, from the files of a checkpoint."""
    from tokenizers import Tokenizer
    from transformers import CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

    facts = json.loads((folder / "preprocessor_config.json").read_text())
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessor.from_dict(facts)
    images.image_seq_length = facts["image_seq_length"]
    return Florence2Processor(images, own, post_processor_config={"pure_text": {}})


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("task", ["CAPTION", "DETAILED_CAPTION", "MORE_DETAILED_CAPTION"])
def test_equal_to_transformers_one_image_at_a_time(task: Any, beams: int, labeler: Florence2) -> None:
    import torch
    from transformers import Florence2ForConditionalGeneration

    folder = Path(labeler.checkpoint).parent
    ours = dataclasses.replace(labeler, task=task, beams=beams).load("cpu")(photographs())
    network = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    prepare = processor(folder)
    published = {"no_repeat_ngram_size": 3, "early_stopping": beams > 1, "forced_bos_token_id": 0}
    for sample, found in zip(photographs(), ours, strict=True):
        inputs = prepare(text=f"<{task}>", images=Image.fromarray(sample.rgb), return_tensors="pt")
        with torch.no_grad():
            ids = network.generate(**inputs, num_beams=beams, max_new_tokens=12, do_sample=False, **published)
        text = prepare.batch_decode(ids, skip_special_tokens=False)[0]
        said = prepare.post_process_generation(text, task=f"<{task}>", image_size=(1, 1))[f"<{task}>"]
        assert found == {"caption": [said]}
    assert len({str(found) for found in ours}) > 1  # words that never change would agree with anything


def test_the_network_sees_and_reads_what_the_processor_makes(labeler: Florence2) -> None:
    folder = Path(labeler.checkpoint).parent
    prepare = processor(folder)
    stage = labeler.load("cpu")
    assert isinstance(stage, Staged)
    prompt = florence2.prompt_ids(
        florence2.writer(labeler.checkpoint), florence2._tokenizer(labeler.checkpoint), labeler.task, 64
    )
    for sample in photographs():
        inputs = prepare(text=f"<{labeler.task}>", images=Image.fromarray(sample.rgb), return_tensors="pt")
        pixels = _images.normalised([stage.prepare(sample)], _images.IMAGENET, "cpu")
        assert float((pixels - inputs["pixel_values"]).abs().max()) <= 1e-5 * float(pixels.abs().max())
        assert inputs["input_ids"].tolist() == [prompt]


def test_what_is_heard_of_an_image_does_not_depend_on_its_neighbours(labeler: Florence2) -> None:
    import torch

    network = florence2.writer(labeler.checkpoint)
    stage = labeler.load("cpu")
    assert isinstance(stage, Staged)
    pixels = _images.normalised([stage.prepare(sample) for sample in photographs()], _images.IMAGENET, "cpu")
    prompt = torch.tensor([florence2.prompt_ids(network, florence2._tokenizer(labeler.checkpoint), "CAPTION", 64)])
    start = torch.tensor([[2, 0]])
    with torch.no_grad():
        together = network(
            input_ids=prompt.expand(4, -1), pixel_values=pixels, decoder_input_ids=start.expand(4, -1)
        ).logits
        for row in range(4):
            alone = network(input_ids=prompt, pixel_values=pixels[row : row + 1], decoder_input_ids=start).logits[0]
            assert float((together[row] - alone).abs().max() / alone.abs().max()) <= 1e-5


def test_the_published_architecture_has_the_published_size() -> None:
    import torch
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration

    vision = {
        "embed_dim": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64], "num_groups": [8, 16, 32, 64],
        "depths": [1, 1, 9, 1], "projection_dim": 1024,
    }  # fmt: skip
    shape = Florence2Config(text_config=BartConfig(vocab_size=51289, max_position_embeddings=4096).to_dict(),
                            vision_config=vision)  # fmt: skip
    with torch.device("meta"):
        network = Florence2ForConditionalGeneration(shape)
    assert sum(p.numel() for p in network.parameters()) == 776_465_408  # "0.77 B"
    assert (768 // florence2.STRIDE) ** 2 + 1 == 577


def test_a_column_beside_the_captions_that_were_ingested(labeler: Florence2, tmp_path: Path) -> None:
    dataset = ingested(tmp_path, count=5, shard_size=3)
    before = {shard: [member.data for member in dataset.read("caption", shard)] for shard in (0, 1)}
    settings = ["caption@florence2=florence2", f"florence2.checkpoint={labeler.checkpoint}", "florence2.max_tokens=12"]
    made = label.plan(dataset, [], None, settings)
    assert made.wanted == ("caption@florence2",)
    assert [(x.name, x.inputs, x.emits) for x in made.labelers] == [("florence2", ("rgb",), ("caption@florence2",))]
    local.run(made.group(dataset.store.url), made.tasks, workers=1, device="cpu", on_report=lambda report: None)
    codec = modalities.load("caption@florence2")
    written = [codec.decode(m.data) for shard in (0, 1) for m in dataset.read("caption@florence2", shard)]
    assert len(written) == 5
    assert all(len(captions) == 1 and captions[0] for captions in written)
    assert {shard: [member.data for member in dataset.read("caption", shard)] for shard in (0, 1)} == before
    record = dataset.commit("caption@florence2", 0)
    assert record is not None
    assert record.provenance["random"]
    assert label.plan(dataset, ["caption@florence2"], None, settings).num_cells == 0
    with pytest.raises(ValueError, match="caption: written at ingest, not by a labeler"):
        label.plan(dataset, [], None, ["caption=florence2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "OD"}, "expected task CAPTION, DETAILED_CAPTION, MORE_DETAILED_CAPTION, got 'OD'"),
        ({"beams": 0}, "at least 1, got 0"),
    ],
)
def test_settings_are_held_to_what_they_may_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Florence2(**change)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("preprocessor_config.json", '{"size": {"shortest_edge": 224}}', "expected size, resample, image_mean"),
        ("preprocessor_config.json", None, "holds no preprocessor_config.json"),
        ("tokenizer.json", "{}", "tokenizer.json of .*: expected a tokenizer"),
        ("config.json", '{"model_type": "florence_vision"}', "expected model_type 'florence2'"),
    ],
)
def test_a_checkpoint_that_lacks_something_says_so(
    name: str, text: str | None, message: str, labeler: Florence2
) -> None:
    file = Path(labeler.checkpoint).parent / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        labeler.load("cpu")
