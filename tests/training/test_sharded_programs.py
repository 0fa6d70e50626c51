"""What the devices of a sharded training step send each other: parameters and gradients, not activations."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import pytest

from mmjax.data import SceneDialogueData, ScenesData
from mmjax.language import DecoderConfig
from mmjax.models import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, Llava, LlavaConfig
from mmjax.nn import Execution
from mmjax.parallel import make_mesh
from mmjax.training import FROZEN, Contrastive, Cosine, Experiment, FromConfig, NextToken, Stage, Train
from mmjax.training.plan_shapes import batch_shapes, open_shapes
from mmjax.training.stage_run import StageRun

ROWS, LENGTH, VOCABULARY = 8, 64, 64
VISION = CLIPVisionConfig(
    image_size=24, patch_size=4, hidden_size=32, intermediate_size=48, num_attention_heads=4,
    num_hidden_layers=2, projection_dim=16,
)  # fmt: skip
TEXT = CLIPTextConfig(
    vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, max_position_embeddings=24, hidden_size=32,
    intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, projection_dim=16,
)  # fmt: skip
BRAIN = DecoderConfig(
    vocab_size=VOCABULARY, hidden_size=40, intermediate_size=56, num_attention_heads=4, num_hidden_layers=2,
    max_position_embeddings=LENGTH,
)  # fmt: skip
DIALOGUES = SceneDialogueData(about="caption", num_train=8, sequence_length=LENGTH, image_size=48)
CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "clip": (
        CLIPModel,
        CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16),
        Contrastive(),
        ScenesData(num_train=8),
    ),
    "llava": (
        Llava,
        LlavaConfig(vision_config=VISION, text_config=BRAIN, image_token_id=VOCABULARY - 1),
        NextToken(),
        DIALOGUES,
    ),
}


def program(case: str, mesh: Any, scan: bool) -> tuple[str, int]:
    """The compiled step of a case, and how many entries its largest parameter has."""
    model, config, loss, data = CASES[case]
    execution = Execution(scan_layers=scan, remat=scan)
    rules = (("vision_tower/.*", FROZEN), (".*", Cosine(peak=1e-3)))
    experiment = Experiment(
        name="sharded",
        model=FromConfig(config=config, model=model, execution=execution),
        data=data,
        stages=(Stage(name="only", loss=loss, rules=rules if case == "llava" else rules[1:]),),
        train=Train(steps=1, batch_size=ROWS),
    )
    opened = open_shapes(experiment, mesh)
    run = StageRun(experiment, 0, opened, mesh)
    batch = batch_shapes(opened.model, loss, data, opened.shapes, ROWS)
    compiled = run.step.lower(run.shapes, batch, jax.eval_shape(run.rates, 0)).compile()
    return compiled.as_text(), max(math.prod(leaf.shape) for leaf in opened.shapes.values())


def gathered(text: str) -> list[tuple[int, str]]:
    """Entries of every array that is gathered or added up between devices, and where."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter)(-start)?\(", line)
        if match is not None:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(math.prod(map(int, shape.split(",") if shape else ())), line) for shape in shapes]
    return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_no_activations_are_gathered(case: str, scan: bool) -> None:
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    text, largest = program(case, mesh, scan)
    found = gathered(text)
    assert found, "a step over several devices gathers parameters at least"
    # Stacked for a scan, the kernels of a layer are one array.
    most = largest * (2 if scan else 1)
    assert max(size for size, _ in found) <= most, max(found)[1]
