"""LoRA tuning of a hub folder on conversations or text.

    mmjax train experiments/lora.py --model.path=/models/some-llama --data.path=/chats/train.jsonl

What you bring: a folder (or hub id) of a causal language model whose tokenizer has a chat template, and JSON
lines: {"messages": [{"role": ..., "content": ...}]}, or {"conversations": [{"from": "human" | "gpt",
"value": ...}]}, or {"text": ...}. Only what the assistant says is learned; special tokens that are typed in
messages stay text. The base is frozen, costs no gradient and no optimizer state, and stays as it is to the
bit. What the run leaves in models/lora is an adapter in PEFT's format, which peft opens on top of the folder.

What can be changed, as any field, on the command line:

- `--model.lora.rank`, `--model.lora.alpha`, `--model.lora.dropout`, `--model.lora.rslora=true`.
- `--model.lora.targets='.*self_attn/(q|v)_proj/kernel'`: which kernels; by default all inside the layers.
- `--model.int8=true`: keep the frozen kernels as int8, half the memory of bfloat16.
- `--model.adapter=DIR`: go on from an adapter of PEFT's.
- `--data.sequence_length`: tokens of a row; conversations are packed into rows, longer ones cut.

With `--data.test_path` the run ends with the loss per learned token on those conversations, with the adapter
and without.

Sources: Hu et al. 2021, "LoRA"; Dettmers et al. 2023, "QLoRA", section 4 (all linear layers; constant rate
2e-4, b2 0.999, gradients clipped at 0.3), here with int8 in place of four bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from mmjax.data import ChatData
from mmjax.nn import Execution
from mmjax.training import (
    FROZEN,
    Constant,
    Experiment,
    LoraConfig,
    LoraFromFolder,
    NextToken,
    Outcome,
    Stage,
    Train,
    export_adapter,
)

TEST_BATCHES = 50


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    return Experiment(
        name="lora",
        model=LoraFromFolder(
            path="",
            dtype="bfloat16",
            execution=Execution(scan_layers=True, remat=True),
            lora=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
        ),
        data=ChatData(path="", sequence_length=1024),
        stages=(
            Stage(
                name="adapter",
                loss=NextToken(),
                rules=(("base/.*", FROZEN), ("lora/.*", Constant(value=2e-4, warmup=0.03))),
            ),
        ),
        train=Train(steps=1000, batch_size=16, accumulate=4, clip_norm=0.3, checkpoint_every=200),
        evaluate=evaluate,
        export=export_adapter,
        smoke=("train.steps=3", "train.batch_size=8", "train.accumulate=1", "data.sequence_length=64"),
    )


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Loss per learned token of the test conversations, where there are some."""
    from mmjax.training import mean_loss

    if outcome.data.test_path is None:
        return {}
    batches = outcome.data.build(processor=outcome.processor, batch_size=8, seed=0, split="test")
    number = min(TEST_BATCHES, math.ceil(batches.steps_per_epoch))
    plain = outcome.params["base"]
    return {
        "test_loss": mean_loss(outcome.model, outcome.params, itertools.islice(batches, number)),
        "test_loss_of_the_base": mean_loss(outcome.model.model, plain, itertools.islice(batches, number)),
    }
