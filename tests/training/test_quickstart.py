"""The quickstart in its small version: what it says of its model, what it leaves, and how it goes on."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mmjax
from mmjax.data import make_scene, scene_questions
from mmjax.data.scenes_questions import KINDS

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "quickstart.py"
STAGES = {
    "quickstart-smoke-eyes": ["contrastive"],
    "quickstart-smoke-brain": ["text"],
    "quickstart-smoke": ["alignment", "description", "things", "instruction"],
}


def quickstart(workdir: Path, *flags: str) -> str:
    """What the command prints, in a process of its own with one device."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "mmjax.cli", "train", str(FILE), "--smoke", "--workdir", str(workdir)]
    ended = subprocess.run([*command, *flags], env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    workdir = tmp_path_factory.mktemp("quickstart")
    return workdir, quickstart(workdir)


def test_it_leaves_results_curves_a_picture_and_a_model(finished: tuple[Path, str]) -> None:
    workdir, said = finished
    result = json.loads((workdir / "output/quickstart-smoke/result.json").read_text())["metrics"]
    for name in ("accuracy_by_kind", "blind_by_kind"):
        assert set(result[name]) == {"all", *KINDS}
    for name in ("accuracy", "blind", "chance", "probes", "said_yes_to_absent", "accuracy_on_unseen_pairs"):
        assert 0 <= result[name] <= 1
    assert result["dialogue"].count("\n") > 5 and all(line in said for line in result["dialogue"].split("\n"))
    for name, stages in STAGES.items():
        with (workdir / f"output/{name}/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(dict.fromkeys(row["stage"] for row in rows)) == stages
        assert all(float(row["loss"]) > 0 for row in rows)
    with Image.open(workdir / "output/quickstart-smoke/preview.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20
    model, _, processor = mmjax.load(workdir / "models/quickstart-smoke")
    assert type(model).__name__ == "Llava" and processor.tokenizer.chat_template


def test_it_goes_on_from_a_stage_in_the_middle(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = finished
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    kept = sorted((tmp_path / "checkpoints/quickstart-smoke").iterdir(), key=lambda path: int(path.name))
    assert [int(path.name) for path in kept] == [4, 6, 10]  # the ends of its last three stages
    for path in (*kept[1:], tmp_path / "models/quickstart-smoke"):
        shutil.rmtree(path)
    (tmp_path / "output/quickstart-smoke/result.json").unlink()
    said = quickstart(tmp_path, "--resume")
    assert f"resumed from {kept[0]}" in said and "alignment  2/2" not in said and "contrastive" not in said
    weights = Path("models/quickstart-smoke/model.safetensors")
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()


def test_the_dialogue_has_all_that_was_asked_about_the_first_picture() -> None:
    """Also where its scene was made anew for other questions; wrong answers are marked."""
    made = runpy.run_path(str(FILE))
    pairs = [
        (scene, question)
        for ask in (made["open_questions"], scene_questions)
        for scene in (make_scene(number, "test") for number in range(2))
        for question in ask(scene)
    ]
    mine = [question for scene, question in pairs if scene.number == 0]
    assert len(mine) > 5 and mine[0].text == "what is in the picture?"
    answers = [question.answer for _, question in pairs]
    lines = made["dialogue"](pairs, answers).split("\n")
    assert lines == [f"{question.text}  {question.answer}" for question in mine]
    wrong = made["dialogue"](pairs, ["seven"] * len(pairs)).split("\n")
    assert len(wrong) == len(mine) and wrong[0].endswith(f"(right: {mine[0].answer})")
