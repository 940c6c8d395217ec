"""The doctor's findings are about this machine."""

from __future__ import annotations

import importlib.metadata

import pytest

from dataengine import plugins
from pipelines import doctor


def test_it_reports_every_labeler_and_downloads_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        report = doctor.examine()
    assert set(report["labelers"]) == set(plugins.names("labelers"))
    assert report["labelers"]["canny_edge"] == "ready (an algorithm): canny_edge"
    assert "downloads are off" in report["labelers"]["sam"] or "not found" in report["labelers"]["sam"]
    assert report["packages"]["torch"] == importlib.metadata.version("torch")


def test_a_rival_distribution_is_named_with_how_to_remove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"model": ["m21-dataengine", "theirs"], "labelers": ["m21-dataengine"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    assert doctor.rivals() == "model also comes with theirs: pip uninstall theirs"
