"""LLaVA-1.5, first stage: a bridge between frozen eyes and a frozen brain, from images with captions.

    mmjax train experiments/llava_1_5_alignment.py --model.brain=/models/vicuna-7b-v1.5 \\
        --data.path=/llava/blip_laion_cc_sbu_558k.json --data.images=/llava/images --mesh=fsdp=8

What you bring: a folder of a causal language model with its tokenizer (Vicuna-7B in the published recipe,
whose pytorch_model.bin and tokenizer.model open as they are); LLaVA's JSON (558,128 pairs), or chat messages;
and the folder of its images. Rows that cannot be used are left out and counted by cause. What the run leaves
in models/llava-1-5-alignment is the whole model, as a LLaVA folder for the second stage
(`llava_1_5_instruction.py`), and parts.safetensors, the bridge alone, which `mmjax.training.load_parts` and
`--model.bridge` put onto the same eyes and brain.

What can be changed, as any field, on the command line:

- `--model.eyes`, `--model.projector=linear` (1.0), `--model.bridge=FILE`: go on from a bridge.
- `--model.dtype=float32`: of the frozen parameters; bridge, optimizer and loss are float32 always.
- `--data.arrange=pack`: several pairs in a row of `--data.sequence_length` tokens, in place of rows of about
  equal length.
- `--data.features=DIR`: what the frozen eyes see, computed once by `mmjax.training.keep_features`.
- `--train.accumulate=4`: the batch in four parts.

With `--data.test_path` the run ends with the loss per learned token on those rows.

Sources: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", table 9 (one epoch, batch 256,
rate 1e-3 with cosine decay and 3% warm-up, AdamW without decay), and LLaVA's scripts/v1_5/pretrain.sh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from mmjax.data import InstructionData
from mmjax.nn import Execution
from mmjax.training import (
    FROZEN,
    Cosine,
    Experiment,
    ExportParts,
    LlavaFromParts,
    NextToken,
    Outcome,
    Stage,
    Train,
)

PAIRS, BATCH = 558_128, 256
TEST_BATCHES = 50


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    return Experiment(
        name="llava-1-5-alignment",
        model=LlavaFromParts(  # type: ignore[arg-type]
            eyes="openai/clip-vit-large-patch14-336",
            brain="",
            dtype="bfloat16",
            execution=Execution(dtype="bfloat16", scan_layers=True, remat=True),
        ),
        data=InstructionData(
            path="", template="plain", pad_images=False, arrange="group", sequence_length=2048
        ),
        stages=(
            Stage(
                name="alignment",
                loss=NextToken(),
                rules=(("multi_modal_projector/.*", Cosine(peak=1e-3, warmup=0.03)), (".*", FROZEN)),
            ),
        ),
        train=Train(steps=math.ceil(PAIRS / BATCH), batch_size=BATCH, checkpoint_every=500),
        evaluate=evaluate,
        export=ExportParts(),
        smoke=("train.steps=3", "train.batch_size=8", "data.sequence_length=1024"),
    )


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Loss per learned token of the test rows, where there are some."""
    from mmjax.training import mean_loss

    if outcome.data.test_path is None:
        return {}
    batches = outcome.data.build(processor=outcome.processor, batch_size=8, seed=0, split="test")
    number = min(TEST_BATCHES, math.ceil(batches.steps_per_epoch))
    return {"test_loss": mean_loss(outcome.model, outcome.params, itertools.islice(batches, number))}
