"""The digits experiment from the command line to its picture and its hub folder, in its small version."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax.nn import Execution
from mmjax.training import FROZEN, Constant, Contrastive, FromFolder, Stage, flatten, train
from mmjax.training.cli import load_experiment, main

FILE = Path(__file__).parents[2] / "experiments" / "digits.py"


pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("digits")
    small = [f"--model.config.{tower}_config.num_hidden_layers=1" for tower in ("vision", "text")]
    argv = [str(FILE), "--smoke", "--workdir", str(workdir), "--train.steps=3", *small]
    assert main(argv) == 0
    return workdir


def test_it_leaves_a_result_a_picture_and_a_hub_folder(finished: Path) -> None:
    result = json.loads((finished / "output/digits-smoke/result.json").read_text())
    assert 0 <= result["metrics"]["zero_shot_accuracy"] <= 1
    assert np.sum(result["metrics"]["confusion"]) == result["metrics"]["test_images"] > 300
    with Image.open(finished / "output/digits-smoke/preview.png") as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 20
    model, params, processor = mmjax.load(finished / "models/digits-smoke")
    images = [Image.new("RGB", (8, 8), shade) for shade in ("black", "white")]
    batch = processor(images=images, text=["a handwritten seven", "the digit two"], padding=True)
    assert model.apply({"params": params}, **batch).logits_per_image.shape == (2, 2)


def test_a_tokenizer_that_does_not_fit_the_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, words in [
        (
            "--model.config.text_config.eos_token_id=3",
            "text_config.eos_token_id=3, but the tokenizer's texts end",
        ),
        ("--model.config.text_config.vocab_size=20", "text_config.vocab_size=20, but the tokenizer has"),
    ]:
        assert main([str(FILE), "--workdir", str(tmp_path), flag]) == 2
        assert words in capsys.readouterr().err


def test_training_goes_on_from_a_hub_folder_with_a_locked_image_tower(finished: Path, tmp_path: Path) -> None:
    folder = finished / "models/digits-smoke"
    base = load_experiment(str(FILE), ["train.steps=2", "train.batch_size=16", "mesh=data=4,tensor=2"])
    stage = Stage(
        name="text",
        loss=Contrastive(),
        rules=(("vision_model/.*", FROZEN), ("visual_projection/.*", FROZEN), (".*", Constant(value=1e-3))),
    )
    experiment = dataclasses.replace(
        base,
        name="locked",
        model=FromFolder(path=str(folder), execution=Execution(scan_layers=True)),
        stages=(stage,),
        evaluate=None,
        preview=None,
    )
    outcome = train(experiment, workdir=tmp_path)
    assert outcome.model.execution.scan_layers
    before, after = (flatten(mmjax.load(path)[1]) for path in (folder, tmp_path / "models/locked"))
    assert list(before) == list(after)
    for path, value in before.items():
        same = np.asarray(value).tobytes() == np.asarray(after[path]).tobytes()
        assert same == path.startswith(("vision_model/", "visual_projection/")), path


def test_the_experiment_is_hashable_data() -> None:
    experiment = load_experiment(str(FILE))
    assert hash(experiment) == hash(dataclasses.replace(experiment))
