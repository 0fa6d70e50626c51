"""The recipes for image-text data, at toy size, on shards made here."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import mmjax
from mmjax.language.tokenizer import train_clip_tokenizer
from mmjax.training.cli import load_experiment, main
from mmjax.training.outcome import read_metrics

FOLDER = Path(__file__).parents[2] / "experiments"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "grey": (120, 120, 120)}
SIZES = {"large": 14, "small": 6}
CAPTIONS = [f"a {size} {colour} square" for size in SIZES for colour in COLOURS]
PAIRS = 48


def picture(caption: str, rng: np.random.Generator) -> bytes:
    _, size, colour, _ = caption.split()
    pixels = rng.integers(200, 256, (16, 20, 3), np.uint8)
    edge = SIZES[size]
    top, left = rng.integers(0, 16 - edge + 1), rng.integers(0, 20 - edge + 1)
    pixels[top : top + edge, left : left + edge] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_shard(path: Path, captions: list[str], rng: np.random.Generator) -> None:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            for ending, data in (("jpg", picture(caption, rng)), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{path.stem}{number:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name shards to train on and others to test on."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for shard in range(3):
        chosen = rng.choice(CAPTIONS, PAIRS // 3).tolist()
        write_shard(folder / f"{shard:05d}.tar", chosen, rng)
    write_shard(folder / "test.tar", CAPTIONS, rng)
    return [f"--data.shards={folder}/{{00000..00002}}.tar", f"--data.test_shards={folder}/test.tar"]


def toy_flags(workdir: Path, tokenizer: Path, vocabulary: int) -> list[str]:
    towers = [
        f"--model.config.{tower}_config.{field}={value}"
        for tower in ("vision", "text")
        for field, value in (
            ("hidden_size", 32),
            ("intermediate_size", 64),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 2),
        )
    ]
    return [
        f"--workdir={workdir}",
        *towers,
        "--model.config.vision_config.image_size=16",
        "--model.config.vision_config.patch_size=8",
        "--model.config.text_config.max_position_embeddings=12",
        f"--model.config.text_config.vocab_size={vocabulary}",
        "--model.processor.image_size=16",
        f"--model.processor.folder={tokenizer}",
        "--data.max_length=12",
        "--train.accumulate=2",
        "--mesh=data=4,fsdp=2",
    ]


def check(workdir: Path, name: str, steps: int) -> None:
    """The loss fell, the test pairs were looked for, checkpoints are there, and the folder opens."""
    history = read_metrics(workdir / "output" / name / "metrics.csv")
    assert history["step"].tolist() == list(range(1, steps + 1))
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-3:].mean() < history["loss"][:3].mean()
    metrics = json.loads((workdir / "output" / name / "result.json").read_text())["metrics"]
    assert (metrics["test_images"], metrics["test_captions"]) == (len(CAPTIONS), len(CAPTIONS))
    assert 0 <= metrics["image_to_text"]["R@1"] <= metrics["image_to_text"]["R@5"] <= 1
    assert any((workdir / "checkpoints" / name).iterdir())
    model, params, processor = mmjax.load(workdir / "models" / name)
    batch = processor(
        images=[Image.new("RGB", (8, 8))], text=CAPTIONS[:2], padding="max_length", max_length=12
    )
    assert model.apply({"params": params}, **batch).logits_per_image.shape == (1, 2)


def test_clip_trains_on_shards(shards: list[str], tmp_path: Path) -> None:
    vocabulary = 530
    train_clip_tokenizer(CAPTIONS, vocab_size=vocabulary, max_length=12).save(tmp_path / "tokenizer")
    flags = [
        *toy_flags(tmp_path, tmp_path / "tokenizer", vocabulary),
        f"--model.config.text_config.eos_token_id={vocabulary - 1}",
        "--model.config.projection_dim=16",
        "--stages.contrastive.rules.0.schedule.warmup=2",
        "--stages.contrastive.rules.0.schedule.peak=3e-3",
        "--train.steps=8",
    ]
    assert main([str(FOLDER / "clip_vit_b32.py"), "--smoke", *shards, *flags]) == 0
    check(tmp_path, "clip-vit-b32-smoke", 8)


def test_siglip_trains_on_shards(shards: list[str], tmp_path: Path) -> None:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids"],
        **dict.fromkeys(("eos_token", "pad_token"), "</s>"),
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = [
        *toy_flags(tmp_path, folder, len(vocabulary)),
        "--model.config.text_config.projection_size=32",
        "--stages.contrastive.rules.0.schedule.warmup=2",
        "--train.steps=8",
    ]
    assert main([str(FOLDER / "siglip_vit_b16.py"), "--smoke", *shards, *flags]) == 0
    check(tmp_path, "siglip-vit-b16-smoke", 8)


@pytest.mark.parametrize(
    ("file", "published"),
    [
        (
            "clip_vit_b32.py",
            {
                "batch_size": 32768,
                "steps": 390625,
                "b2": 0.98,
                "eps": 1e-6,
                "weight_decay": 0.2,
                "clip_norm": 0,
            },
        ),
        (
            "siglip_vit_b16.py",
            {"batch_size": 32768, "steps": 274658, "b2": 0.95, "weight_decay": 1e-4, "clip_norm": 1.0},
        ),
    ],
)
def test_a_recipe_has_the_published_settings(file: str, published: dict[str, float]) -> None:
    experiment = load_experiment(str(FOLDER / file))
    assert {name: getattr(experiment.train, name) for name in published} == published
    assert experiment.train.checkpoint_every > 0


def test_a_missing_tokenizer_is_one_line(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(FOLDER / "clip_vit_b32.py"), "--smoke", f"--workdir={tmp_path}", *shards]) == 2
    assert "no tokenizer in this folder" in capsys.readouterr().err
