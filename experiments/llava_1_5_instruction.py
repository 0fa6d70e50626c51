"""LLaVA-1.5, second stage: visual instruction tuning of bridge and brain, in full or by LoRA.

    mmjax train experiments/llava_1_5_instruction.py --model.path=models/llava-1-5-alignment \\
        --data.path=/llava/llava_v1_5_mix665k.json --data.images=/llava --mesh=fsdp=8
    mmjax train experiments/llava_1_5_instruction.py --lora=true ...

What you bring: a LLaVA folder, such as what the first stage left (`llava_1_5_alignment.py`) or one of the
hub's; LLaVA's JSON (665,298 conversations) or chat messages; and the folder of its images. Only what the
assistant says is learned, in every turn. The eyes are frozen and stay as they are to the bit.

In full, the run leaves a LLaVA folder in models/llava-1-5-instruction. With `--lora=true` the brain is frozen
too, and what the run leaves is an adapter in PEFT's format with the bridge beside it, which peft and
`mmjax.training.load_tuned` put onto the folder that it came from.

What can be changed, as any field, on the command line:

- `--rate`, `--lora_rate`, `--bridge_rate`: of the brain, of the adapter, of the bridge.
- `--adapter.rank`, `--adapter.alpha`, `--adapter.dropout`, `--adapter.targets`: with `--lora=true`.
- `--model.dtype`: of the folder's parameters; by default float32, with `--lora=true` bfloat16.
- `--data.template=chatml`: one of vicuna, llama-2, mistral, chatml and plain; `none` is the folder's own.
- `--data.arrange=pack`: several conversations in a row, each seeing only itself.
- `--train.accumulate=4`: the batch in four parts.

With `--data.test_path` the run ends with the loss per learned token on those rows.

Sources: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", table 9 (one epoch, batch 128,
rate 2e-5 with cosine decay and 3% warm-up, AdamW without decay), and LLaVA's scripts/v1_5/finetune.sh and
finetune_lora.sh (rank 128, alpha 256, dropout 0.05, rate 2e-4; the bridge in full at 2e-5).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mmjax.data import InstructionData
from mmjax.nn import Execution
from mmjax.training import (
    FROZEN,
    Cosine,
    Experiment,
    ExportAdapter,
    FromFolder,
    LoraConfig,
    LoraFromFolder,
    NextToken,
    Outcome,
    Rule,
    Stage,
    Train,
)
from mmjax.training.plan_shapes import folder_shapes
from mmjax.training.source import OpenedModel

CONVERSATIONS, BATCH = 665_298, 128
BRIDGE = "multi_modal_projector/.*|image_newline"
LAYERS = r"language_model/.*layers_\d+/.*/kernel"
TEST_BATCHES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedFolder(FromFolder):
    """A folder that is trained whole: in float32, if nothing else is asked for."""

    def open(self, data: Any, key: jax.Array, mesh: Mesh) -> OpenedModel:
        """Load the folder straight into the mesh."""
        return self._plain().open(data, key, mesh)

    def open_shapes(self, mesh: Mesh) -> OpenedModel:
        """The same as shapes, for a plan."""
        return folder_shapes(self._plain(), mesh)

    def _plain(self) -> FromFolder:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return FromFolder(**fields | {"dtype": self.dtype or "float32"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction(Experiment):
    """An experiment in one of two forms.

    Args:
        lora: train an adapter and the bridge, in place of all of the brain and the bridge.
        adapter: the adapter's config.
        rate, lora_rate, bridge_rate: highest learning rates.
    """

    lora: bool = False
    adapter: LoraConfig = LoraConfig(targets=LAYERS, rank=128, alpha=256.0, dropout=0.05)
    rate: float = 2e-5
    lora_rate: float = 2e-4
    bridge_rate: float = 2e-5

    def __post_init__(self) -> None:
        model: Any = self.model
        if self.lora:
            own = {field.name: getattr(model, field.name) for field in dataclasses.fields(FromFolder)}
            own["dtype"] = own["dtype"] or "bfloat16"
            object.__setattr__(self, "model", LoraFromFolder(**own, lora=self.adapter, whole=BRIDGE))
            object.__setattr__(self, "export", ExportAdapter(whole=BRIDGE))
        (stage,) = self.stages
        object.__setattr__(self, "stages", (dataclasses.replace(stage, rules=self._rules()),))
        super().__post_init__()

    def _rules(self) -> tuple[Rule, ...]:
        before = "base/" if self.lora else ""
        bridge = Rule(f"{before}({BRIDGE})", Cosine(peak=self.bridge_rate, warmup=0.03))
        if self.lora:
            return bridge, Rule("base/.*", FROZEN), Rule("lora/.*", Cosine(peak=self.lora_rate, warmup=0.03))
        brain = Rule("language_model/.*", Cosine(peak=self.rate, warmup=0.03))
        return Rule("vision_tower/.*", FROZEN), bridge, brain


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    return Instruction(
        name="llava-1-5-instruction",
        model=TrainedFolder(path="", execution=Execution(dtype="bfloat16", scan_layers=True, remat=True)),
        data=InstructionData(path="", template="vicuna", arrange="group", sequence_length=2048),
        stages=(Stage(name="instruction", loss=NextToken(), rules=((".*", FROZEN),)),),
        train=Train(steps=math.ceil(CONVERSATIONS / BATCH), batch_size=BATCH, checkpoint_every=500),
        evaluate=evaluate,
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
