"""Tiny real models on disk, pictures, and ways to run a command line in this process."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest

import mmjax
from mmjax import cli
from mmjax.language.tokenizer import train_clip_tokenizer
from mmjax.models import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification
from mmjax.models.clip.config import CLIPTextConfig, CLIPVisionConfig
from mmjax.models.processor import Processor
from mmjax.nn import parameter_specs
from mmjax.vision.processing import ImageProcessor
from tests.commands.pictures import COLOURS, picture
from tests.generation.seeing import make

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def image_processor():
    return ImageProcessor.from_dict(
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
        }
    )


def randomised(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: rng.normal(0.1, 0.3, spec.shape).astype(np.float32), parameter_specs(model)
    )


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    tokenizer = train_clip_tokenizer(["a photo of a red, green or blue cat"], vocab_size=530, max_length=12)
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **SIZES),
        text_config=CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=12,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES,
        ),
        projection_dim=6,
    )
    model = CLIPModel(config)
    folder = tmp_path_factory.mktemp("models") / "clip"
    mmjax.save(folder, model, randomised(model), Processor(image_processor(), tokenizer))
    return str(folder)


@pytest.fixture(scope="session")
def together(clip_folder):
    """The joint forward of image files and three texts, without the command line."""
    model, params, processor = mmjax.load(clip_folder)
    forward = jax.jit(lambda batch: model.apply({"params": params}, **batch))

    def call(images, texts):
        return forward(processor(images=images, text=texts, padding="max_length", truncation=True))

    return call


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))
    folder = tmp_path_factory.mktemp("models") / "vit"
    mmjax.save(folder, model, randomised(model), Processor(image_processor(), None))
    return str(folder)


@pytest.fixture(scope="session")
def bare_folder(clip_folder, tmp_path_factory):
    model, params, _ = mmjax.load(clip_folder)
    folder = tmp_path_factory.mktemp("models") / "bare"
    mmjax.save(folder, model, params)
    return str(folder)


@pytest.fixture(scope="session", params=["llava", "llava_next", "llava_onevision"])
def llava_folder(request, tmp_path_factory):
    """A LLaVA of each kind, with a brain in half precision and ids of its own that end an answer."""
    model, params, processor = make(request.param)
    half = jax.tree.map(lambda leaf: leaf.astype("float16"), params["language_model"])
    folder = tmp_path_factory.mktemp("models") / request.param
    mmjax.save(folder, model, {**params, "language_model": half}, processor)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Class folders of three colours, a test and a train split of them, and a table of captions."""
    root = tmp_path_factory.mktemp("colours")
    rows = []
    for split, count in (("train", 4), ("test", 2)):
        for name, colour in COLOURS.items():
            folder = root / "splits" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(colour, seed=number + 10 * (split == "test")).save(folder / f"{number}.png")
                path = f"splits/{split}/{name}/{number}.png"
                rows += [(path, f"a {name} one, {split} {number}"), (path, f"{name} {split} {number}")]
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return root


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        small = ("zeroshot", "eval", "embed")
        if arguments and arguments[0] in small and not {"--help", "--batch-size"} & set(arguments):
            arguments += ("--batch-size", "2")  # one compiled shape for every test
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def fails(run):
    """Run a command line that has to fail with one line; the line."""

    def call(*arguments, code=2):
        found, out, err = run(*arguments)
        assert found == code, err
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err
        return err[len("error: ") : -1]

    return call


@pytest.fixture
def report(run):
    """Run a command line with --json: the parsed document."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert err == ""
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return call


@pytest.fixture
def images(tmp_path):
    paths = [
        tmp_path / "a picture with quite a long name, so that a narrow terminal would cut it.png",
        tmp_path / "b.jpg",
    ]
    for path, colour in zip(paths, COLOURS.values(), strict=False):
        picture(colour).save(path)
    return [str(path) for path in paths]
