"""Nothing that others wrote is run: arrays, checkpoints, tables, datasets, and every call of ours that could."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine import codecs, corpora
from tests import hostile
from tests.test_security import read

ROOT = Path(__file__).parents[1]


def test_no_array_checkpoint_table_or_dataset_runs_code(tmp_path: Path) -> None:
    import datasets
    import torch

    from labelers import _checkpoints
    from model import snapshots

    proof = tmp_path / "proof"
    pickled = hostile.payload(proof)
    with pytest.raises(ValueError, match="Object arrays"):
        codecs.decode_npy(hostile.npy("{'descr':'|O','fortran_order':False,'shape':(1,)}", pickled))
    torch.save({"weight": hostile.Payload(str(proof))}, tmp_path / "evil.pt")
    (tmp_path / "raw.pth").write_bytes(pickled)
    (tmp_path / "step-1").mkdir()
    torch.save(hostile.Payload(str(proof)), tmp_path / "step-1" / "state.pt")
    for name in ("evil.pt", "raw.pth"):
        with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
            _checkpoints.read(tmp_path / name)
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        snapshots.read(tmp_path, 1, "cpu")
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickled.decode("latin-1"),
    }
    field = pa.field("jpg", pa.binary(), metadata=metadata)
    pq.write_table(pa.table([pa.array([b"x"])], schema=pa.schema([field])), tmp_path / "t.parquet")
    assert [raw.image for raw in read(corpora.load(f"parquet:{tmp_path}"))] == [b"x"]
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text(f"import os; os.mkdir({str(proof)!r})\n")
    with pytest.raises((ValueError, datasets.exceptions.DatasetNotFoundError)):
        corpora.load(f"hf:{script}").splits(10)
    assert not proof.exists()
    assert b"mkdir" in pickled  # a pickle that is loaded does make the folder
    import pickle

    pickle.loads(pickled)
    assert proof.is_dir()


def test_a_safetensors_header_that_lies_is_refused(tmp_path: Path) -> None:
    from labelers import _checkpoints

    shape = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}).encode()
    for header in ((1 << 62).to_bytes(8, "little"), len(shape).to_bytes(8, "little") + shape):
        (tmp_path / "w.safetensors").write_bytes(header + bytes(100))
        with pytest.raises(Exception, match=r"(?i)header|deserializ"):
            _checkpoints.read(tmp_path / "w.safetensors")


# Every call that could run or unpickle what it is given, and why it may stand where it does.
ALLOWED = {
    ("dataengine/corpora/hf.py", "datasets.load_dataset"): "runs no scripts: datasets 4 and later have none",
    ("dataengine/plugins.py", "importlib.import_module"): "a name that was found in our own folder",
    ("dataengine/_tar_index.py", "np.load"): "allow_pickle=False",
    ("dataengine/shards.py", "tarfile.open"): "writes",
    ("dataengine/corpora/webdataset.py", "tarfile.open"): "writes the example",
    ("dataengine/actors.py", "subprocess.run"): "a fixed command",
    ("dataengine/supervise.py", "pickle.loads"): "what it has just pickled itself",
    ("dataengine/supervise.py", "subprocess.Popen"): "this interpreter and this package",
    ("labelers/_checkpoints.py", "torch.load"): "weights_only",
    ("labelers/hmr2.py", "tarfile.open"): "the bytes of one member of a checkpoint, under a name of ours",
    ("labelers/_checkpoints.py", "pickle.Unpickler"): "builds arrays alone, all else is refused",
    ("labelers/_networks.py", "importlib.import_module"): "a package that a labeler names",
    ("model/snapshots.py", "torch.load"): "weights_only",
    ("model/trainer_files.py", "torch.load"): "weights_only, argparse.Namespace and numbers of numpy",
    ("pipelines/config.py", "importlib.import_module"): "a recipe of our own folder",
    ("pipelines/config.py", "made.loader.exec_module"): "the user's own recipe, named on the command line",
    ("pipelines/config.py", "yaml.safe_load"): "safe",
    ("model/checkpoint.py", "yaml.safe_load"): "safe",
}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NAMES = {"eval", "exec", "compile", "__import__"}
ENDINGS = ("load_dataset", "import_module", "exec_module", "read_pickle", "Unpickler", "extractall", "unpack_archive",
           "os.system", "os.popen", "jit.load", "hub.load", "format.read_array")  # fmt: skip
WHOLE = {"np.load", "numpy.load", "torch.load", "yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load"}
SWITCHES = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "shell": False}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def _suspect(name: str) -> bool:
    first = name.partition(".")[0]
    loads = first in UNPICKLERS and not name.endswith((".dumps", ".dump", "Error"))
    opens = name == "tarfile.open" or first in ("subprocess", "runpy")
    return loads or opens or name in NAMES | WHOLE or name.endswith(ENDINGS)


def _calls(text: str) -> list[tuple[str, list[tuple[str, object]]]]:
    """(name, keywords with a constant value) of every call of a module."""
    return [
        (_dotted(n.func), [(k.arg or "", k.value.value) for k in n.keywords if isinstance(k.value, ast.Constant)])
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Call)
    ]


def test_no_call_that_could_run_data_is_made_anywhere_else() -> None:
    found, switched = set(), []
    for package in ("dataengine", "labelers", "model", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for name, keywords in _calls(path.read_text()):
                place = str(path.relative_to(ROOT))
                if _suspect(name):
                    found.add((place, name))
                    if name == "torch.load" and ("weights_only", True) not in keywords:
                        switched.append((place, name))
                switched += [(place, name) for k, v in keywords if k in SWITCHES and v is not SWITCHES[k]]
    assert found - set(ALLOWED) == set()
    assert switched == []
    for bad in ("pickle.load(f)", "eval(x)", "np.load(f)", "torch.load(f)", "yaml.load(t)", "tar.extractall()"):
        assert _suspect(_calls(bad)[0][0])  # the scan would find it
