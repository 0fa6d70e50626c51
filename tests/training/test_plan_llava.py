"""Plans of LLaVA's recipes, from folders that hold a config.json and nothing else."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

import mmjax
from mmjax.cli import main
from mmjax.language import DecoderConfig
from mmjax.models import (
    CausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Llava,
    LlavaConfig,
)
from mmjax.nn import parameter_specs
from mmjax.parallel import make_mesh
from mmjax.training import flatten
from mmjax.training.cli import load_experiment
from mmjax.training.plan_chips import CHIPS, find_chip
from mmjax.training.plan_compile import compile_stages
from mmjax.training.plan_shapes import folder_shapes
from mmjax.training.planning import plan_stage
from mmjax.training.source import FromFolder
from tests.tiny import random_params

RECIPES = Path(__file__).parents[2] / "experiments"
WIDTH, INNER, LAYERS, VOCAB, RANK = 16, 24, 2, 320, 2
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
}
# The README's commands, on two devices: there, too, the adapter's step takes its rows in four parts.
MESHES = {"alignment": "fsdp=2", "instruction": "fsdp=2", "lora": "data=2"}
ROWS, LENGTH = 8, 64
BRIDGE = 2 * (WIDTH * WIDTH + WIDTH)
# Of the brain's layers: four square kernels, and three between the widths of a layer and of its middle.
KERNELS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
ADAPTER = LAYERS * RANK * (4 * 2 * WIDTH + 3 * (WIDTH + INNER))


def models() -> dict[str, tuple[Any, str]]:
    """Eyes, a brain and a whole model, and the dtype that each is kept in."""
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=6, **SIZES)
    text = CLIPTextConfig(
        vocab_size=32, max_position_embeddings=8, projection_dim=6, eos_token_id=31, **SIZES
    )
    brain = DecoderConfig(vocab_size=VOCAB, max_position_embeddings=512, **SIZES)
    llava = LlavaConfig(vision_config=vision, text_config=brain, image_token_id=VOCAB - 1)
    return {
        "eyes": (
            CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)),
            "float32",
        ),
        "brain": (CausalLM(brain), "bfloat16"),
        "llava": (Llava(llava), "float16"),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model twice: with its weights in whole/, and only its config.json in bare/."""
    work = tmp_path_factory.mktemp("folders")
    for name, (model, dtype) in models().items():
        mmjax.save(work / "whole" / name, model, random_params(model, dtype=dtype))
        (work / "bare" / name).mkdir(parents=True)
        shutil.copy(work / "whole" / name / "config.json", work / "bare" / name)
    return work


def command(recipe: str, folder: Path) -> tuple[Path, list[str]]:
    """A recipe's file and what is set in it."""
    file = RECIPES / f"llava_1_5_{'alignment' if recipe == 'alignment' else 'instruction'}.py"
    small = [f"train.batch_size={ROWS}", f"data.sequence_length={LENGTH}", f"mesh={MESHES[recipe]}"]
    if recipe == "alignment":
        return file, [f"model.eyes={folder / 'eyes'}", f"model.brain={folder / 'brain'}", *small]
    lora = ["lora=true", f"adapter.rank={RANK}", "train.accumulate=4"] if recipe == "lora" else []
    return file, [f"model.path={folder / 'llava'}", *lora, *small]


def plan(recipe: str, folder: Path) -> dict[str, Any]:
    """The plan of a recipe's only stage, compiled in this process."""
    file, overrides = command(recipe, folder)
    chip = CHIPS["h100"]
    (stage,) = compile_stages(load_experiment(str(file), overrides), chip.devices_per_node)
    return plan_stage(stage, chip)


@pytest.fixture(scope="module")
def plans(folders: Path) -> dict[str, dict[str, Any]]:
    """Of every recipe, from folders without weights."""
    return {recipe: plan(recipe, folders / "bare") for recipe in MESHES}


def expected_bytes(recipe: str) -> tuple[int, int]:
    """What one device holds of all parameters and of those that train, counted over shapes."""
    model, _ = models()["llava"]
    config = model.config
    if recipe == "alignment":  # A token for images is added, and the table is filled up to a multiple of 64.
        text = dataclasses.replace(config.text_config, vocab_size=384)
        config = dataclasses.replace(config, text_config=text)
    total = learned = 0
    for path, spec in flatten(parameter_specs(Llava(config))).items():
        bridge = path.startswith("multi_modal_projector")
        held = spec.size * (4 if bridge or recipe == "instruction" else 2)
        held //= 2 if MESHES[recipe] == "fsdp=2" and "embed" in spec.axes else 1
        total += held
        learned += held * (bridge or (recipe == "instruction" and not path.startswith("vision_tower")))
    adapter = 4 * ADAPTER if recipe == "lora" else 0
    return total + adapter, learned + adapter


@pytest.mark.parametrize("recipe", MESHES)
def test_a_config_alone_is_enough_for_the_figures(plans: dict[str, Any], recipe: str) -> None:
    found = plans[recipe]
    total, learned = expected_bytes(recipe)
    size = found["bytes"]
    assert (size["parameters"], size["gradients"]) == (total, learned)
    # Adam's two moments, and its counts of steps.
    assert 2 * learned < size["optimizer"] <= 2 * learned + 16
    assert size["batch"] > 0 and size["activations"] > 0 and size["total"] < CHIPS["h100"].memory
    counts = found["parameters"]
    assert counts["total"] == counts["trained"] + counts["frozen"]
    assert found["batch_size"] == ROWS and found["devices"] == 2
    # Every token goes forward through the brain's kernels, once more in place of kept activations, and back.
    assert sum(found["flops"].values()) > 3 * 2 * ROWS * LENGTH * KERNELS


def test_trained_parameters_are_counted(plans: dict[str, Any]) -> None:
    counts = {recipe: found["parameters"] for recipe, found in plans.items()}
    specs = flatten(parameter_specs(models()["llava"][0]))
    total = sum(spec.size for spec in specs.values())
    eyes = sum(spec.size for path, spec in specs.items() if path.startswith("vision_tower"))
    assert counts["alignment"]["trained"] == BRIDGE
    assert counts["alignment"]["total"] == total + 2 * (384 - VOCAB) * WIDTH
    assert counts["instruction"] == {"total": total, "trained": total - eyes, "frozen": eyes}
    assert counts["lora"] == {
        "total": total + ADAPTER,
        "trained": BRIDGE + ADAPTER,
        "frozen": total - BRIDGE,
    }


def test_an_adapter_needs_less_than_the_whole_brain(plans: dict[str, Any]) -> None:
    """Even though each device holds all of its base, and only half of the parameters that train in full."""
    full, lora = plans["instruction"], plans["lora"]
    for part in ("optimizer", "gradients", "total"):
        assert lora["bytes"][part] < full["bytes"][part], part
    sent = [sum(kind["bytes"] for kind in found["network"].values()) for found in (full, lora)]
    assert 0 < sent[1] < sent[0]


@pytest.mark.parametrize("recipe", MESHES)
def test_the_slowest_part_of_a_chip_bounds_the_step(plans: dict[str, Any], recipe: str) -> None:
    found = plans[recipe]
    assert found["bound"] == max(found["seconds"], key=found["seconds"].get)
    for slow, bound in (
        ("bfloat16=1,float32=1", "compute"),
        ("bandwidth=1", "memory"),
        ("link=1", "network"),
    ):
        again = plan_stage(found, find_chip(f"h100,{slow}"))
        assert again["bound"] == bound and again["step_seconds"] == again["seconds"][bound]
        assert again["samples_per_second"] == ROWS / again["step_seconds"]
    assert found["fits"] and not plan_stage(found, find_chip("h100,memory=1000"))["fits"]


@pytest.mark.parametrize("recipe", MESHES)
def test_weights_make_no_difference(folders: Path, plans: dict[str, Any], recipe: str) -> None:
    assert plan(recipe, folders / "whole") == plans[recipe]


def test_a_config_tells_the_dtype_that_parameters_are_kept_in(folders: Path) -> None:
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    for name, (_, dtype) in models().items():
        bare, whole = (
            folder_shapes(FromFolder(path=str(folders / kind / name)), mesh) for kind in ("bare", "whole")
        )
        assert bare.shapes == whole.shapes and bare.model.config == whole.model.config
        assert {str(x.dtype) for x in bare.shapes.values()} == {dtype}


def test_the_command_plans_a_recipe(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, overrides = command("alignment", folders / "bare")
    assert main(["plan", str(file), *(f"--{each}" for each in overrides)]) == 0
    out = capsys.readouterr().out
    for words in (f"({BRIDGE} trained, ", "2 x NVIDIA H100 SXM (fsdp=2)", "bounds the step", ": fits"):
        assert words in out
    # The loss is part of the model's own work here, so it has no line of its own.
    assert "of which the loss" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("instruction", ["model.path=HERE/empty"], "HERE/empty/config.json: no such file"),
        ("alignment", ["model.eyes=HERE/eyes", "model.brain=HERE/empty"], "HERE/empty/config.json: no such"),
        ("alignment", ["model.eyes=HERE/eyes"], "'': no such folder; give a folder with config.json"),
        ("instruction", ["model.path=HERE/none"], "HERE/none: no such folder; give a folder"),
    ],
)
def test_a_folder_without_a_config_is_one_line(
    folders: Path, recipe: str, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = folders / "bare"
    (here / "empty").mkdir(exist_ok=True)
    arguments = [f"--{each.replace('HERE', str(here))}" for each in overrides]
    assert main(["plan", str(command(recipe, here)[0]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words.replace('HERE', str(here))}") and error.count("\n") == 1
