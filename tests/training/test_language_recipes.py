"""The recipes for language models, at toy size, on texts made here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import mmjax
from mmjax.training import flatten, load_adapter, read_metrics
from mmjax.training.cli import load_experiment, main

FOLDER = Path(__file__).parents[2] / "experiments"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("language")
    words = ["red", "green", "blue", "cat", "dog", "house"]
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (work / split).mkdir()
        for number in range(12):
            chosen = [words[rng.integers(6)] for _ in range(40)]
            text = " ".join(f"{word} follows {word}." for word in chosen)
            (work / split / f"{number}.txt").write_text(text)
    flags = [
        "--train.steps=12",
        "--data.sequence_length=32",
        "--model.config.num_hidden_layers=1",
        "--model.config.vocab_size=300",
        "--model.processor.vocab_size=300",
        "--train.log_every=4",
    ]
    data = [f"--data.path={work / 'train'}", f"--data.test_path={work / 'test'}"]
    file = str(FOLDER / "language_model.py")
    assert main([file, "--smoke", "--workdir", str(work), *data, *flags]) == 0
    return work


def test_a_model_from_scratch_learns_and_leaves_a_folder(trained: Path) -> None:
    output = trained / "output/language-model-smoke"
    losses = read_metrics(output / "metrics.csv")["loss"]
    assert losses[-1] < losses[0] - 0.3
    metrics = json.loads((output / "result.json").read_text())["metrics"]
    assert np.isclose(metrics["test_perplexity"], np.exp(metrics["test_loss"]))
    assert metrics["test_loss"] < losses[0] and (output / "preview.png").stat().st_size > 1000
    model, params, processor = mmjax.load(trained / "models/language-model-smoke")
    out = model.apply({"params": params}, **processor(text="red follows"))
    assert out.logits.shape[-1] == 300


def test_texts_have_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FOLDER / "language_model.py"), "--workdir", str(tmp_path)]) == 2
    assert "TextData.path is empty: name files or folders" in capsys.readouterr().err


def test_an_adapter_is_tuned_on_conversations(trained: Path, tmp_path: Path) -> None:
    folder = trained / "models/language-model-smoke"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "dog dog dog"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 30)
    flags = [
        f"--model.path={folder}",
        f"--data.path={tmp_path / 'chats.jsonl'}",
        f"--data.test_path={tmp_path / 'chats.jsonl'}",
        "--model.dtype=float32",
        "--model.lora.rank=4",
        "--model.int8=true",
        "--stages.0.rules.1.schedule.value=0.02",
        "--train.steps=8",
    ]
    assert main([str(FOLDER / "lora.py"), "--smoke", "--workdir", str(tmp_path), *flags]) == 0
    metrics = json.loads((tmp_path / "output/lora-smoke/result.json").read_text())["metrics"]
    assert metrics["test_loss"] < metrics["test_loss_of_the_base"] - 0.2
    model, _, _ = mmjax.load(folder)
    adapter, config = load_adapter(tmp_path / "models/lora-smoke", model)
    assert config.rank == 4 and len(flatten(adapter)) == 2 * 7
    assert (tmp_path / "models/lora-smoke/chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("name", ["language_model", "lora"])
def test_recipes_are_hashable_data(name: str) -> None:
    experiment = load_experiment(str(FOLDER / f"{name}.py"))
    assert hash(experiment) == hash(dataclasses.replace(experiment))
