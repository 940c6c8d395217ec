"""The command line as people and scripts use it: outcomes, exit codes, messages, and being killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import tree, write_images
from tests.nasty import write as write_nasty

ROOT = Path(__file__).parents[1]
SLOW = """
from pipelines.label import LabelRun
from tests.fakes import Inverted, Threshold
def recipe():
    return LabelRun(labelers=(Threshold(seconds=0.4), Inverted()))
"""


def command(*arguments: object, cwd: Path = ROOT) -> list[str]:
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "200"}
    return subprocess.run(command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_help_teaches_every_command() -> None:
    shown = run("--help").stdout
    for name in ("ingest", "plan", "label", "tokenize", "pack", "train-tokenizer", "train", "generate", "evaluate"):
        assert f" {name} " in shown
    for name in ("status", "verify", "gc", "retry", "inspect", "doctor", "demo"):
        assert f" {name} " in shown
    assert "Exit codes" in shown
    assert "--max-bad-fraction" in run("label", "--help").stdout


def test_the_whole_way_from_a_folder_to_a_page(tmp_path: Path) -> None:
    images, root = write_images(tmp_path / "images", 6), tmp_path / "root"
    done = run("ingest", f"folder:{images}", root, "--shard-size", 3, "--runner", "local", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_samples"] == 6
    before = tree(root)
    again = json.loads(run("ingest", f"folder:{images}", root, "--shard-size", 3, "--runner", "local", "--json").stdout)
    assert again["num_tasks"] == 0
    assert tree(root) == before
    planned = json.loads(run("plan", root, "canny_edge", "metadata", "--json").stdout)
    assert (planned["cells"], planned["done"]) == (4, 0)
    assert {line["group"] for line in planned["labelers"]} == {group["name"] for group in planned["groups"]}
    assert tree(root) == before
    done = run("label", root, "canny_edge", "metadata", "color_palette", "--runner", "local")
    assert done.returncode == 0, done.stderr
    rows = {r["modality"]: r for r in json.loads(run("status", root, "--json").stdout)}
    assert rows["metadata"] | {"num_bytes": 0} == {
        "modality": "metadata", "shards": 2, "of": 2, "samples": 6, "invalid": 0, "num_bytes": 0, "labeler": "metadata",
        "random": False,
    }  # fmt: skip
    assert run("verify", root).returncode == 0
    page = tmp_path / "page.html"
    assert run("inspect", root, "--out", page).returncode == 0
    assert "picture number 3" in page.read_text()


def test_mistakes_are_refused_with_the_nearest_right_word(tmp_path: Path) -> None:
    root = tmp_path / "root"
    missing = run("label", root, "canny_edge")
    assert missing.returncode == 2
    assert "dataengine ingest" in missing.stderr
    assert run("ingest", f"folder:{write_images(tmp_path / 'i', 2)}", root, "--runner", "local").returncode == 0
    for arguments, said in (
        (("canny_egde",), "did you mean 'canny_edge'?"),
        (("canny_edge", "canny_edge.hihg=3"), "did you mean 'high'?"),
        (("canny_edge", "canny_edge.high=much"), "valid number"),
        (("rgb",), "written at ingest"),
        (("canny_edge", "--recipe", "photo_label"), "did you mean 'photo_labels'?"),
    ):
        done = run("label", root, *arguments, "--runner", "local")
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    wrong = run("ingest", "foldr:x", tmp_path / "other")
    assert (wrong.returncode, "did you mean 'folder'?" in wrong.stderr) == (2, True)
    assert run("label", root, "canny_edge", "--runner", "local").returncode == 0
    conflict = run("label", root, "canny_edge", "canny_edge.high=150", "--runner", "local")
    assert (conflict.returncode, "--replace canny_edge" in conflict.stderr) == (5, True)
    before = tree(root)
    for arguments in (("canny_egde",), ("canny_edge", "canny_edge.hihg=3"), ("metadata",)):
        assert run("label", root, *arguments, "--replace", "canny_edge", "--runner", "local").returncode == 2
    assert tree(root) == before
    replaced = run("label", root, "canny_edge", "canny_edge.high=150", "--replace", "canny_edge", "--runner", "local")
    assert replaced.returncode == 0, replaced.stderr


def test_nasty_images_end_as_documented_and_a_limit_makes_them_a_failure(tmp_path: Path) -> None:
    cases = write_nasty(tmp_path / "nasty")
    refused = sorted(c.reason for c in cases if c.reason)
    assert len(refused) >= 5
    done = run("ingest", f"folder:{tmp_path}/nasty", tmp_path / "root", "--runner", "local", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["num_refused"], summary["num_samples"]) == (len(refused), len(cases) - len(refused))
    lines = [
        json.loads(line)
        for path in sorted((tmp_path / "root/quarantine").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert sorted(line["reason"] for line in lines) == refused
    assert all(line["key"] and line["source"] and line["stage"] and line["detail"] for line in lines)
    assert run("label", tmp_path / "root", "canny_edge", "metadata", "--runner", "local").returncode == 0
    assert run("verify", tmp_path / "root").returncode == 0
    strict = run(
        "ingest", f"folder:{tmp_path}/nasty", tmp_path / "two", "--runner", "local", "--max-bad-fraction", 0.01
    )
    assert (strict.returncode, "quarantine" in strict.stderr) == (3, True)


def test_failed_labels_beyond_the_limit_stop_the_run_and_retry_makes_them_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    run("ingest", f"folder:{write_images(tmp_path / 'i', 4)}", root, "--runner", "local")
    (recipe := tmp_path / "bad.py").write_text(
        "from pipelines.label import LabelRun\nfrom tests.fakes import Threshold\n"
        "def recipe():\n    return LabelRun(labelers=(Threshold(fail_on=('i--image001--png', 'image001', "
        "'image001--png')),))\n"
    )
    done = run("label", root, "canny_edge", "--recipe", recipe, "--runner", "local")
    assert done.returncode == 3, done.stderr
    assert "cannot label this" in done.stderr
    allowed = run("label", root, "canny_edge", "--recipe", recipe, "--runner", "local", "--max-bad-fraction", 0.5)
    assert allowed.returncode == 0, allowed.stderr
    again = run("retry", root, "--reason", "cannot label", "--runner", "local")
    assert again.returncode == 0, again.stderr
    assert [
        r["invalid"] for r in json.loads(run("status", root, "--json").stdout) if r["modality"] == "canny_edge"
    ] == [0]


@pytest.mark.parametrize("runner", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_killed_driver_is_resumed_to_the_same_bytes(tmp_path: Path, runner: str) -> None:
    images = write_images(tmp_path / "images", 32)
    (recipe := tmp_path / "slow.py").write_text(SLOW)
    for name in ("calm", "killed"):
        assert (
            run("ingest", f"folder:{images}", tmp_path / name, "--shard-size", 4, "--runner", "local").returncode == 0
        )
    calm = run("label", tmp_path / "calm", "sam_edge", "--recipe", recipe, "--runner", "local")
    assert calm.returncode == 0, calm.stderr
    killed = tmp_path / "killed"
    arguments = ("label", killed, "sam_edge", "--recipe", recipe, "--runner", runner)
    driver = subprocess.Popen(
        command(*arguments), cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    commits = killed / "commits" / "sam_edge"
    deadline = time.monotonic() + 120
    while len(list(commits.glob("*.json"))) < 2 and time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {p: p.stat().st_mtime_ns for p in commits.glob("*.json")}
    assert 2 <= len(before) < 8
    again = run(*arguments)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert tree(killed) == tree(tmp_path / "calm")


def test_one_new_file_is_one_new_plugin_and_the_contract_tests_find_it(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    keep = shutil.ignore_patterns("__pycache__", ".*", "out", "golden")
    for name in ("dataengine", "labelers", "model", "pipelines", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=keep)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "dataengine/modalities/sobel.py").write_text(
        (ROOT / "dataengine/modalities/canny_edge.py").read_text().replace("CannyEdge", "Sobel")
    )
    (copy / "labelers/sobel.py").write_text(
        '"""Strong gradients."""\nfrom dataclasses import dataclass\nimport cv2\nimport numpy as np\n'
        "from dataengine.labeler import Labeler\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Sobel(Labeler):\n"
        '    """uint8 (h, w) 0/255."""\n    inputs = ("rgb",)\n    emits = ("sobel",)\n    level: int = 100\n'
        "    def load(self, device):\n"
        "        def run(samples):\n"
        "            g = [cv2.Sobel(cv2.cvtColor(s.rgb, cv2.COLOR_RGB2GRAY), cv2.CV_32F, 1, 0) for s in samples]\n"
        '            return [{"sobel": np.where(abs(v) > self.level, 255, 0).astype(np.uint8)} for v in g]\n'
        "        return run\n"
    )
    (copy / "pipelines/recipes/sobels.py").write_text(
        "from labelers.sobel import Sobel\nfrom pipelines.label import LabelRun\n"
        "def recipe():\n    return LabelRun(labelers=(Sobel(level=50),))\n"
    )
    for origin, new, name, renamed in (
        ("dataengine/corpora/folder.py", "album.py", "Folder", "Album"),
        ("model/tokenizers/text.py", "words.py", "TextTokenizer", "Words"),
    ):
        source = (ROOT / origin).read_text()
        (copy / origin).with_name(new).write_text(re.sub(rf"\b{name}\b", renamed, source))
    tests = [f"tests/test_{name}.py" for name in ("labelers", "modalities", "config", "corpora", "tokenizers")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "sobel or album or words", "-p", "no:cacheprovider", *tests],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *tests],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for plugin in ("labelers.py::.*sobel", "modalities.py::.*sobel", "config.py::.*sobels", "album", "words"):
        assert len(re.findall(rf"test_.*{plugin}", listed)) >= 1, plugin
    root = tmp_path / "root"
    assert (
        run("ingest", f"folder:{write_images(tmp_path / 'i', 3)}", root, "--runner", "local", cwd=copy).returncode == 0
    )
    labelled = run("label", root, "sobel", "--recipe", "sobels", "--runner", "local", cwd=copy)
    assert labelled.returncode == 0, labelled.stderr
    assert run("verify", root, cwd=copy).returncode == 0
