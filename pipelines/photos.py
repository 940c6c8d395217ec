"""Real photographs that ship in scikit-image and scikit-learn, with captions of our own: nothing to download."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

CAPTIONS = Path(__file__).with_name("photos.json")
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def write(folder: Path) -> int:
    """Copy the photographs, byte for byte, and their captions into a folder corpus; how many there are."""
    captions: dict[str, str] = json.loads(CAPTIONS.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name in captions:
        package, file = name.split("/")
        target = folder / file
        if not target.exists():
            shutil.copyfile(_package(package) / FOLDERS[package] / file, target)
    by_file = {name.split("/")[1]: caption for name, caption in captions.items()}
    text, listed = json.dumps(by_file, indent=1) + "\n", folder / "captions.json"
    if not listed.exists() or listed.read_text() != text:
        listed.write_text(text)
    return len(by_file)


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"{name} is not installed; it ships some of the photographs")
    return Path(found.origin).parent
