"""ml-4m's tars: what its loader is promised (names, keys, types, shapes), read back and packed, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataengine import export, local, ml4m, modalities, shards
from dataengine.manifest import Conflict, Dataset
from dataengine.packed import Packed
from dataengine.shards import Member
from model.batches import PackedDataset, TokenBatches, merged_columns, spec_of
from model.masking import MaskingConfig, MixtureComponent
from model.tokenizers.text import TextTokenizer
from pipelines import convert, pack
from pipelines.train import packed_shards
from tests import ml4m_inputs
from tests.ml4m_inputs import INPUTS, TOKEN_COLUMNS, publish

NUM_CROPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of all inputs, its tars for ml-4m, and the packed shards of both."""
    folder = tmp_path_factory.mktemp("ml4m")
    dataset = ml4m_inputs.made(folder, num_crops=NUM_CROPS)
    export.export(dataset, str(folder / "tars"), ml4m.layout(dataset), reader=ml4m.Reader())
    TextTokenizer.tiny().save(folder / "text.json")
    worker, tasks = pack.prepare(dataset, str(folder / "text.json"), 0)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return folder


def pattern(base: Path, *folders: str) -> str:
    names = folders or (*INPUTS, "crop_settings")
    return f"{base}/tars/[{','.join(names)}]/shard-{{00000..00001}}.tar"


def run(*arguments: str) -> None:
    from typer.testing import CliRunner

    from pipelines import cli, columns, commands  # noqa: F401  commands register themselves

    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output


def convert_first(out: Dataset, source: str, **settings: Any) -> None:
    worker, tasks = convert.prepare(out, source, **settings)
    worker.start("cpu")(tasks[0])


def converted(base: Path, out: Path, source: str = "", **settings: Any) -> tuple[Packed, ...]:
    settings = {"text_tokenizer": str(base / "text.json"), **settings}
    worker, tasks = convert.prepare(Dataset(out), source or pattern(base), **settings)
    local.run(worker, tasks, workers=1, device="cpu", on_report=lambda report: None)
    return packed_shards(str(out))


# -- writing -----------------------------------------------------------------------------------------------------------


def test_the_tars_are_what_the_contract_says(base: Path) -> None:
    dataset = Dataset(base / "root")
    assert sorted(p.name for p in (base / "tars").iterdir() if p.is_dir()) == sorted((*INPUTS, "crop_settings"))
    members: dict[str, dict[str, bytes]] = {}
    for number in (0, 1):
        keys = list(dataset.keys(number))
        for folder in (*INPUTS, "crop_settings"):
            with tarfile.open(base / "tars" / folder / f"shard-{number:05d}.tar") as tar:
                names = tar.getnames()
                assert [n.split(".", 1)[0] for n in names] == keys  # the same order in every tar
                assert all("/" not in n and n.count(".") == 1 for n in names)
                members.setdefault(folder, {}).update({n: tar.extractfile(n).read() for n in names})  # type: ignore[union-attr]
    suffixes = {m: {n.rpartition(".")[2] for n in found} for m, found in members.items()}
    arrays = {*TOKEN_COLUMNS, "crop_settings", "sam_instance"}
    others = {"rgb": {"png"}, "t5_caption": {"npz"}}
    assert suffixes == {m: others.get(m, {"npy"} if m in arrays else {"json"}) for m in suffixes}
    for name in TOKEN_COLUMNS:
        for data in members[name].values():
            ids = np.load(io.BytesIO(data))
            assert (ids.dtype, ids.shape) == (np.int16, (NUM_CROPS, ml4m.TOKENS[name][1]))
    for data in members["crop_settings"].values():
        rows = np.load(io.BytesIO(data))
        assert (rows.dtype, rows.shape) == (np.int64, (NUM_CROPS, 5))
    for data in members["caption"].values():
        captions = json.loads(data)
        assert len(captions) == NUM_CROPS
        assert all(isinstance(c, str) for c in captions)
    for data in members["t5_caption"].values():
        with np.load(io.BytesIO(data)) as arrays_of:
            assert arrays_of["emb"].shape[0] in (1, NUM_CROPS)
            assert arrays_of["mask_valid"].shape == arrays_of["emb"].shape[:2]
    for data in members["human_poses"].values():
        persons = json.loads(data)
        assert np.array(persons["pose_tokenized"]).shape == (2, 8)
        assert np.array(persons["pred_smpl_params"]["global_orient"]).shape == (2, 1, 3, 3)
    for data in members["sam_instance"].values():
        value = np.load(io.BytesIO(data), allow_pickle=True)
        assert (value.dtype, value.shape) == (object, (NUM_CROPS,))
        for crop in value:
            contours = [c[0] for c in crop["points"]]
            assert all(c.dtype == np.int32 and c.shape[1:] == (1, 2) for c in contours)
            assert crop["token_ids"].shape == (len(contours), 16)
            assert np.issubdtype(crop["token_ids"].dtype, np.integer)
            assert crop["bbox"].shape == (len(contours), 4)


def test_values_at_the_edge_are_what_its_reader_takes() -> None:
    reader = ml4m.Reader()

    def written(column: str, value: Any) -> Member:
        codec = modalities.load(column)
        return reader.form(column, 3)(Member("k", codec.suffix, codec.encode(value)))

    assert json.loads(written("caption", []).data) == ["", "", ""]
    assert json.loads(written("caption", ["a", "b"]).data) == ["a", "b", "a"]
    assert len(json.loads(written("caption", list("abcde")).data)) == 3
    emb = {"emb": np.ones((2, 1, 4), np.float16) * [[[1]], [[2]]], "mask_valid": np.ones((2, 1), bool)}
    emb["emb"] = emb["emb"].astype(np.float16)
    value = ml4m.decode("t5_caption", written("t5_caption", emb))
    assert value["emb"][:, 0, 0].tolist() == [1, 2, 1]
    one = {"emb": emb["emb"][:1], "mask_valid": emb["mask_valid"][:1]}
    assert ml4m.decode("t5_caption", written("t5_caption", one))["emb"].shape[0] == 1
    unknown = {"polygon": [], "bbox": [0, 0, 5, 5], "tokens": [0] * 16}
    seen = {"polygon": [[3, 3]], "bbox": [3, 3, 3, 3], "tokens": [1] * 16}
    member = written("sam_instance_tokens", {"side": 224, "crops": [[], [unknown], [unknown, seen]]})
    assert ml4m.decode("sam_instance", member) == {"side": 224, "crops": [[], [], [seen]]}
    with pytest.raises(ValueError, match="crops of 64 pixels, ml-4m's are of 224"):
        written("sam_instance_tokens", {"side": 64, "crops": []})
    assert reader.folder("human_poses_tokens") == "human_poses"
    assert reader.folder("tok_rgb@224") == "tok_rgb@224"


def test_what_ml4m_cannot_train_on_is_left_out_and_named(tmp_path: Path) -> None:
    dataset = ml4m_inputs.made(tmp_path, num_crops=2)
    key = dataset.keys(0)[0]
    poses = modalities.load("human_poses")
    rng = np.random.default_rng(0)
    for number in (0, 1):
        size = (30, 30)
        publish(dataset, "human_poses", number, [[] for _ in dataset.keys(number)], {})
        edges = [np.zeros(size, np.uint8) for _ in dataset.keys(number)]
        publish(dataset, "canny_edge", number, edges, {})
        publish(dataset, "caption@v2", number, [["x"] for _ in dataset.keys(number)], {})
        dataset.uncommit("det", number)
        det = modalities.load("det")
        boxes = [det.example(rng, size) for _ in dataset.keys(number)]
        publish(dataset, "det", number, boxes, {}, invalid=key if number == 0 else "")
    assert poses.decode(b"[]") == []
    plan = ml4m.layout(dataset)
    assert set(plan.columns) == {*INPUTS, "crop_settings"} - {"human_poses", "sam_instance"} | {
        "human_poses_tokens", "sam_instance_tokens"
    }  # fmt: skip
    assert plan.skipped == {
        "human_poses": "has no tokens, which ml-4m reads with it: they are in human_poses_tokens",
        "canny_edge": "is not among what ml-4m trains 4M on",
        "caption@v2": "is a version, which has no name in ml-4m: `dataengine rename` makes it the modality itself",
    }
    assert (plan.num_samples, plan.num_dropped) == (5, 1)
    out = str(tmp_path / "tars")
    run("export", str(dataset.store.url), out, "--ml4m", "--json")
    keys, columns = ml4m.read(ml4m.expand(f"{out}/[det,tok_rgb@224,sam_instance]/shard-00000.tar")[0])
    assert key not in keys
    assert all([m.key for m in column] == keys for column in columns.values())
    with pytest.raises(ValueError, match="canny_edge is not among what ml-4m trains 4M on"):
        ml4m.layout(dataset, ["canny_edge"])
    with pytest.raises(ValueError, match="tok_clip@224, tok_CLIP-B16@224 are all tok_clip@224 in ml-4m"):
        ml4m.layout(dataset, ["tok_clip@224", "tok_CLIP-B16@224"])
    with pytest.raises(Conflict, match=r"an export with another .*reader"):
        export.export(dataset, out, plan)
    manifest = json.loads((tmp_path / "tars" / "export.json").read_text())
    assert manifest["reader"] == "ml-4m"


# -- reading -----------------------------------------------------------------------------------------------------------


def test_converted_tars_are_what_packing_the_dataset_gives(base: Path, tmp_path: Path) -> None:
    shards_of = converted(base, tmp_path / "out", aligned=True)
    own = packed_shards(str(base / "root"))
    assert [s.keys for s in shards_of] == [s.keys for s in own]
    names = [n for n in own[0].columns if n not in ("caption", "t5_caption")]
    assert set(shards_of[0].columns) == set(own[0].columns) == set(INPUTS) - {"rgb"}
    for mine, theirs in zip(own, shards_of, strict=True):
        for index in range(len(mine)):
            for crop in range(NUM_CROPS):
                one = mine.row(index, np.random.default_rng(crop), names, crop)
                two = theirs.row(index, np.random.default_rng(crop), names, crop)
                for name in names:
                    assert np.array_equal(one[name], two[name]), name
            emb = theirs.row(index, np.random.default_rng(0), ["t5_caption"], 1)["t5_caption"]
            assert np.array_equal(emb, mine.row(index, np.random.default_rng(0), ["t5_caption"], 0)["t5_caption"])


def test_a_converted_folder_is_trained_on_and_converted_once(base: Path, tmp_path: Path) -> None:
    source = pattern(base, "tok_depth@224", "caption", "t5_caption")
    datasets = (PackedDataset(converted(base, tmp_path / "out", source)),)
    columns = merged_columns(datasets)
    specs = tuple(spec_of(c, 16) for c in columns.values())
    alphas = {s.name: 1.0 for s in specs}
    masking = MaskingConfig(
        components=(MixtureComponent(input_alphas=alphas, target_alphas=alphas),),
        input_tokens=(32, 32),
        target_tokens=(32, 32),
    )
    batch = TokenBatches(datasets=datasets, specs=specs, masking=masking, batch_size=8, seed=0)(0)
    assert batch.embeddings["t5_caption"].shape[1] == 16
    assert set(batch.enc_mod.unique().tolist()) == {-1, 0, 1, 2}
    text = str(base / "text.json")
    assert convert.prepare(Dataset(tmp_path / "out"), source, text_tokenizer=text)[1] == []
    assert len(convert.prepare(Dataset(tmp_path / "out"), source, text_tokenizer=text, aligned=True)[1]) == 2
    with pytest.raises(Conflict, match="is a dataset of its own: convert into another folder"):
        convert.prepare(Dataset(base / "root"), source, text_tokenizer=text)
    run("pack", str(tmp_path / "cli"), "--from-ml4m", source, "--text-tokenizer", text, "--json")
    assert len(packed_shards(str(tmp_path / "cli"))) == 2


def rewritten(base: Path, tmp_path: Path, folder: str, change: Callable[[list[Member]], list[Member]]) -> str:
    """The path of the first shard of depth and `folder` tars, the latter changed."""
    for name in ("tok_depth@224", folder):
        data = (base / "tars" / name / "shard-00000.tar").read_bytes()
        members = list(shards.read_tar(data))
        (tmp_path / name).mkdir()
        new = change(members) if name == folder else members
        (tmp_path / name / "shard-00000.tar").write_bytes(shards.build_tar(new))
    return f"{tmp_path}/[tok_depth@224,{folder}]/shard-00000.tar"


def test_the_tokenizers_of_a_folder_say_what_the_ids_are(base: Path, tmp_path: Path) -> None:
    from model.tokenizers.vqvae import VQVAE

    vqvae = VQVAE.tiny()
    names = ("depth", "CLIP-B16")
    for name in names:
        vqvae.save(tmp_path / f"{name}.safetensors")
    source = pattern(base, "tok_depth@224", "tok_clip@224")
    with pytest.raises(ValueError, match=r"tok_depth@224: grid \(.*\), expected 196 tokens"):
        converted(base, tmp_path / "no", source, tokenizers=str(tmp_path))
    small = np.zeros((NUM_CROPS, math.prod(vqvae.grid)), np.uint16)
    for name in ("tok_depth@224", "tok_clip@224"):
        codec = modalities.load(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "s.tar").write_bytes(shards.build_tar([Member("k", "npy", codec.encode(small))]))
    source = f"{tmp_path}/[tok_depth@224,tok_clip@224]/s.tar"
    (shard,) = converted(base, tmp_path / "out", source, tokenizers=str(tmp_path))
    digest = shards.sha256((tmp_path / "depth.safetensors").read_bytes())
    for column in shard.columns.values():
        assert (column.tokenizer, column.vocab_size, column.grid) == (digest, vqvae.vocab_size, vqvae.grid)


def test_misaligned_tars_are_refused_by_shard_position_and_key(base: Path, tmp_path: Path) -> None:
    keys = Dataset(base / "root").keys(0)
    for i, (change, said) in enumerate(
        (
            (lambda m: [m[0], m[2], m[1]], f"shard-00000.tar is not aligned: at position 1 it has .{keys[2]}"),
            (lambda m: m[:2], "at position 2 it has the end of 2 keys"),
            (lambda m: [*m, Member("z", "npy", m[0].data)], "at position 3 it has 'z', and .* has the end of 3 keys"),
            (lambda m: [m[0], m[1], m[0]], "members of .* stand apart, or are there twice"),
            (lambda m: [m[0], *m], "is there twice"),
        )
    ):  # fmt: skip
        (tmp_path / str(i)).mkdir()
        source = rewritten(base, tmp_path / str(i), "tok_rgb@224", change)
        with pytest.raises(ValueError, match=said):
            ml4m.read(ml4m.expand(source)[0])
    with pytest.raises(FileNotFoundError):
        ml4m.read(ml4m.expand(f"{tmp_path}/0/[tok_depth@224,tok_clip@224]/shard-00000.tar")[0])
    cut = tmp_path / "0" / "tok_rgb@224" / "shard-00000.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"tok_rgb@224/shard-00000.tar: ends within"):
        ml4m.read(ml4m.expand(f"{tmp_path}/0/[tok_depth@224,tok_rgb@224]/shard-00000.tar")[0])


def test_the_path_grammar() -> None:
    def of(text: str) -> list[tuple[tuple[str, str], ...]]:
        return [tars.urls for tars in ml4m.expand(text)]

    assert of("r/[a,b@1]/s-{008..010}.tar")[2] == (("a", "r/a/s-010.tar"), ("b@1", "r/b@1/s-010.tar"))
    assert of("r/[a]/x.tar") == [(("a", "r/a/x.tar"),)]
    assert of("r/x-{0..1}.tar::q/[a]/y.tar") == [
        (("", "r/x-0.tar"),), (("", "r/x-1.tar"),), (("a", "q/a/y.tar"),)
    ]  # fmt: skip
    for bad in ("r/[a/x.tar", "r/[a,]/x.tar", "r/[a,a]/x.tar", "r/[a]/[b]/x.tar", "x.tar::x.tar"):
        with pytest.raises(ValueError, match=r"expected|twice"):
            ml4m.expand(bad)


def test_members_of_every_kind_and_name_are_read(base: Path, tmp_path: Path) -> None:
    ids = modalities.load("tok_depth@224").encode(np.ones((3, 196), np.uint16))
    captions = gzip.compress(json.dumps([{"caption": "a dog"}, "a cat"]).encode())
    members = [
        member
        for key in ("x/a", "x/b")
        for member in (
            Member(key, "tok_depth@224.npy", ids),
            Member(key, "caption.json.gz", captions),
            Member(key, "class_idx.cls", b"3"),
        )
    ]  # fmt: skip
    (tmp_path / "all.tar").write_bytes(shards.build_tar(members))
    keys, columns = ml4m.read(ml4m.expand(f"{tmp_path}/all.tar")[0])
    assert keys == ["x/a", "x/b"]
    assert {m: c[0].suffix for m, c in columns.items()} == {"tok_depth@224": "npy", "caption": "json"}
    assert ml4m.decode("caption", columns["caption"][0]) == ["a dog", "a cat"]
    (shard,) = converted(base, tmp_path / "out", f"{tmp_path}/all.tar")
    assert shard.columns["tok_depth@224"].vocab_size == 8192
    (tmp_path / "words").mkdir()
    texts = [Member(k, "TXT.gz", gzip.compress("süß".encode())) for k in keys]
    (tmp_path / "words" / "all.tar").write_bytes(shards.build_tar(texts))
    _, columns = ml4m.read(ml4m.expand(f"{tmp_path}/[words]/all.tar")[0], {"words": "caption"})
    assert ml4m.decode("caption", columns["caption"][0]) == ["süß"]
    bomb = Member("k", "json.gz", gzip.compress(bytes(65 << 20)))
    (tmp_path / "words" / "bomb.tar").write_bytes(shards.build_tar([bomb]))
    with pytest.raises(ValueError, match="swells to more than"):
        ml4m.read(ml4m.expand(f"{tmp_path}/[words]/bomb.tar")[0])
    (tmp_path / "bare.tar").write_bytes(shards.build_tar([Member("k", "json", b"[]")]))
    with pytest.raises(ValueError, match=r"a member KEY.json in a tar of several modalities"):
        ml4m.read(ml4m.expand(f"{tmp_path}/bare.tar")[0])
    (tmp_path / "gap.tar").write_bytes(shards.build_tar(members[:-2]))
    with pytest.raises(ValueError, match=r"1 members of caption for 2 keys; the first without one is 'x/b'"):
        ml4m.read(ml4m.expand(f"{tmp_path}/gap.tar")[0])


def test_what_cannot_be_converted_is_named_with_its_shard(base: Path, tmp_path: Path) -> None:
    text = str(base / "text.json")

    def refused(source: str, said: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=said):
            convert_first(Dataset(tmp_path / "out"), source, text_tokenizer=text, **settings)

    def with_changed(number: int, folder: str, change: Callable[[list[Member]], list[Member]]) -> str:
        (tmp_path / str(number)).mkdir()
        return rewritten(base, tmp_path / str(number), folder, change)

    def last(data: bytes) -> Callable[[list[Member]], list[Member]]:
        return lambda members: [*members[:-1], Member(members[-1].key, members[-1].suffix, data)]

    codec = modalities.load("tok_rgb@224")
    for number, folder, data, said in (
        (0, "tok_rgb@224", codec.encode(np.full((3, 196), 16384, np.uint16)), "tok_rgb@224: id 16384, expected less"),
        (1, "tok_rgb@224", codec.encode(np.zeros((2, 196), np.uint16)), r"expected \(3, 196\), got \(2, 196\)"),
        (2, "tok_rgb@224", b"no array", "tok_rgb@224 of .*no readable .npy"),
        (3, "metadata", b'{"n_dogs": 1}', "metadata of .*unknown key 'n_dogs'"),
    ):
        source = with_changed(number, folder, last(data))
        refused(source, rf"(?s)shard-00000.tar: .*{said}" if number else said)
    refused(pattern(base, "det", "tok_rgb@224"), "det need rgb and crop_settings in the path")
    refused(pattern(base, "tok_rgb@224"), "pixels need the folders rgb and crop_settings", pixels=16)
    small = np.zeros((3, 4), np.uint16)
    source = with_changed(9, "tok_sam_edge@224", lambda m: [Member(x.key, x.suffix, codec.encode(small)) for x in m])
    refused(source, "tok_sam_edge@224 with 4 tokens is not among the published ones: name the folder")
    refused(source, "no tokenizer .*depth.safetensors", tokenizers=str(tmp_path))
    poses = [{"bbox_xyxy": [[0, 0, 1, 1]], "pred_cam": [[1, 0, 0]], "pred_smpl_params": {}}]
    source = with_changed(
        10, "human_poses", lambda m: [Member(x.key, x.suffix, json.dumps(poses[0]).encode()) for x in m]
    )
    refused(source, "human_poses of .*no pose_tokenized: these poses have not been tokenised")
    unknown = rewritten(base, tmp_path, "t5_caption", lambda m: m).replace("t5_caption]", "t5_caption,odd]")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "shard-00000.tar").write_bytes((tmp_path / "t5_caption" / "shard-00000.tar").read_bytes())
    refused(unknown, "odd to be packed, expected tok_")


def test_aligned_captions_belong_to_their_crops(base: Path, tmp_path: Path) -> None:
    def captions(*each: list[str]) -> str:
        keys = Dataset(base / "root").keys(0)
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "caption"
        folder.mkdir(parents=True)
        members = [Member(k, "json", json.dumps(c).encode()) for k, c in zip(keys, each, strict=False)]
        (folder / "shard-00000.tar").write_bytes(shards.build_tar(members))
        depth = folder.parent / "tok_depth@224"
        depth.mkdir()
        old = (base / "tars" / "tok_depth@224" / "shard-00000.tar").read_bytes()
        (depth / "shard-00000.tar").write_bytes(shards.build_tar(list(shards.read_tar(old))[: len(members)]))
        return f"{folder.parent}/[tok_depth@224,caption]/shard-00000.tar"

    three = [f"v0={i}" for i in range(4)]
    (shard,) = converted(base, tmp_path / "out", captions(three, ["v0=9"]), aligned=True)
    rng = np.random.default_rng(0)
    assert [shard.row(0, rng, ["caption"], crop)["caption"] for crop in range(3)] == [[204], [205], [206]]
    assert [shard.row(1, rng, ["caption"], crop)["caption"] for crop in range(3)] == [[213]] * 3
    with pytest.raises(Exception, match=r"caption of .*: 2 for 3 crops, but one or as many"):
        converted(base, tmp_path / "two", captions(three[:2]), aligned=True)
    (shard,) = converted(base, tmp_path / "any", captions(three))
    assert {shard.row(0, rng, ["caption"], 0)["caption"][0] for _ in range(40)} == {204, 205, 206, 207}
