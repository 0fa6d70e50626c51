"""result.json: readable, and the same data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmjax.training.folders import RunFolders


def test_rows_of_numbers_are_lines_and_strings_stay(tmp_path: Path) -> None:
    folders = RunFolders(tmp_path, "run")
    folders.output.mkdir(parents=True)
    result = {
        "table": [[1, 2], [3.5, -4e-5]],
        "text": ["[1,  2]", "a\n[1]"],
        "none": [],
        "x": np.float32(0.5),
    }
    folders.write_result(result)
    text = (folders.output / "result.json").read_text()
    assert "    [ 1, 2 ],\n" in text
    assert json.loads(text) == {**result, "x": 0.5}
    with pytest.raises(TypeError, match="cannot hold a set"):
        folders.write_result({"bad": {1}})
    assert json.loads((folders.output / "result.json").read_text())["none"] == []


def test_an_export_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folders = RunFolders(tmp_path, "run")

    def fill(name: str) -> None:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / name).write_text(name)

        folders.export(write)

    fill("one")
    fill("two")
    assert [path.name for path in folders.model.iterdir()] == ["two"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["run"]
