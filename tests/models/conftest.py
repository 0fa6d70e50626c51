"""Whole tiny folders, and a hub that must not be asked."""

from __future__ import annotations

import huggingface_hub
import pytest

from tests.models.folders import make


@pytest.fixture
def no_network(monkeypatch):
    """Fail the test that fetches anything."""

    def refuse(*arguments, **options):
        pytest.fail(f"the hub was asked for {arguments} {options}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "folder")


@pytest.fixture
def clip(tmp_path):
    return make(tmp_path / "clip", "clip")


@pytest.fixture
def siglip(tmp_path):
    return make(tmp_path / "siglip", "siglip")
