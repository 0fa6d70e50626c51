"""A small language model from scratch on your own text files.

    mmjax train experiments/language_model.py --data.path=/texts
    mmjax train experiments/language_model.py --data.path=/texts --data.test_path=/held_out --mesh=data=8

What you bring: UTF-8 text, as files, folders (their .txt and .md files) or wildcards, several joined by `::`.
A byte-level BPE vocabulary of 4,096 tokens is learned from it, then a LLaMA-like decoder of 8 layers reads
rows of 512 tokens: documents one after another, each seeing only itself. What the run leaves in
models/language-model opens in transformers.

What can be changed, as any field, on the command line:

- `--data.split_on=$'\\n\\n'`: what ends a document inside a file; without it, a file is a document.
- `--data.sequence_length`, `--model.config.max_position_embeddings`: how far the model sees.
- `--model.config.hidden_size`, `...num_hidden_layers`, ...: the model's size.
- `--model.processor.folder=DIR`: an existing tokenizer, in place of learning one; then set
  `--model.config.vocab_size` to its size and `--model.config.eos_token_id` to its end token.
- `--model.processor.vocab_size` together with `--model.config.vocab_size`: a larger vocabulary to learn.
- `--model.execution.dtype=float32`: parameters, optimizer and loss are float32 either way.

With `--data.test_path` the run ends with the loss and the perplexity (per token) on those files.

Sources: Touvron et al. 2023, "LLaMA", section 2 (the decoder; AdamW with b2 0.95 and decay 0.1, gradients
clipped at 1, cosine to a tenth after a warm-up).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.data import TextData
from mmjax.language import DecoderConfig
from mmjax.models import CausalLM
from mmjax.nn import Execution
from mmjax.training import Cosine, Experiment, FromConfig, NextToken, Outcome, Stage, Train

VOCABULARY = 4096
TEST_BATCHES = 50


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Experiment(
        name="language-model",
        model=FromConfig(
            config=config,
            model=CausalLM,
            processor=MakeTokenizer(),
            execution=Execution(dtype="bfloat16", scan_layers=True),
        ),
        data=TextData(path="", sequence_length=512),
        stages=(
            Stage(
                name="next-token", loss=NextToken(), rules=((".*", Cosine(peak=1e-3, warmup=0.05, end=1e-4)),)
            ),
        ),
        train=Train(steps=5000, batch_size=32, weight_decay=0.1, b2=0.95, checkpoint_every=500),
        evaluate=evaluate,
        preview=draw_loss,
        smoke=(
            "train.steps=20",
            "train.batch_size=8",
            "data.sequence_length=64",
            "model.config.hidden_size=48",
            "model.config.intermediate_size=96",
            "model.config.num_hidden_layers=2",
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeTokenizer:
    """The tokenizer of a folder, or one learned from the training texts.

    Args:
        folder: a hub folder with a tokenizer; None: learn one.
        vocab_size: of the learned one.
    """

    folder: str | None = None
    vocab_size: int = VOCABULARY

    def __call__(self, data: TextData) -> Any:
        """The processor that the run uses and its folder gets."""
        from mmjax.language import Tokenizer, train_bpe_tokenizer
        from mmjax.models import Processor

        if self.folder is not None:
            return Processor(tokenizer=Tokenizer.from_folder(self.folder))
        return Processor(tokenizer=train_bpe_tokenizer(data.texts(), self.vocab_size))


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Loss and perplexity per token of the test files, where there are some."""
    from mmjax.training import mean_loss

    if outcome.data.test_path is None:
        return {}
    batches = outcome.data.build(processor=outcome.processor, batch_size=8, seed=0, split="test")
    number = min(TEST_BATCHES, math.ceil(batches.steps_per_epoch))
    loss = mean_loss(outcome.model, outcome.params, itertools.islice(batches, number))
    return {"test_loss": loss, "test_perplexity": math.exp(loss), "test_rows": 8 * number}


def draw_loss(outcome: Outcome, path: Path) -> None:
    """The training loss over steps as a picture."""
    import numpy as np
    from matplotlib.figure import Figure

    history = outcome.history()
    steps, loss = history["step"], history["loss"]
    width = max(1, len(loss) // 40)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.plot(steps, loss, color="#b9cde0", linewidth=0.8, label="each step")
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    axis.plot(steps[width - 1 :], smooth, color="#1f4e79", linewidth=2, label=f"mean of {width} steps")
    axis.set(title=f"{outcome.name}: next-token loss", xlabel="step", ylabel="nats per token")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False)
    figure.savefig(path)
