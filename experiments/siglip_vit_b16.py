"""SigLIP ViT-B/16 from scratch on image-text pairs in WebDataset shards, with the published settings.

    mmjax train experiments/siglip_vit_b16.py \\
        --data.shards='/data/train/{00000..41407}.tar' --data.test_shards='/data/test/{00000..00009}.tar' \\
        --model.processor.folder=/models/siglip-base-patch16-224
    mmjax plan experiments/siglip_vit_b16.py --mesh data=256 --chip v5e

What you bring: shards as img2dataset writes them (KEY.jpg with KEY.txt or KEY.json), of any number and size,
and a folder with SigLIP's tokenizer: tokenizer.json, or spiece.model, as every SigLIP folder of the Hugging
Face hub has it. Any other tokenizer of at most 32,000 tokens does too; a larger one needs
`--model.config.text_config.vocab_size`. Nothing of that folder but the tokenizer is read.

What can be changed, as any field, on the command line:

- `--train.batch_size`, `--train.accumulate`: the loss is that of the whole batch whatever the number of
  micro-batches; raise `accumulate` until `mmjax plan` says that it fits.
- `--train.steps`: 274,658 steps of 32,768 are the 9 billion pairs of the paper's study of batch sizes.
- `--model.execution.dtype=float32`, `--model.execution.remat=true`: how the towers are computed; parameters,
  optimizer and loss are float32 either way.
- `--mesh=data=64,fsdp=4`: how the devices share batch and parameters (default: all of them split the batch).
- `--data.index_cache=DIR` keeps the shards' indices between runs.

With test shards the run ends with retrieval in both directions on them; without, it leaves the weights alone.

Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training" (batch 32,768, rate 1e-3, decay 1e-4,
b2 0.95, scale 10 and bias -10 at the start, images squashed to 224 x 224, 64 tokens per text). Gradients are
clipped at 1 and the rate rises over the first 3% of the steps, as in the authors' own configurations
(big_vision); its optimizer, an Adafactor close to Adam, is AdamW here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.data import WebDatasetData
from mmjax.models import SiglipConfig, SiglipModel
from mmjax.models.siglip import SiglipTextConfig, SiglipVisionConfig
from mmjax.nn import Execution
from mmjax.training import Cosine, Experiment, FromConfig, Outcome, Sigmoid, Stage, Train

TEXT_LENGTH = 64


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    tower: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    vision = SiglipVisionConfig(image_size=224, patch_size=16, **tower)
    text = SiglipTextConfig(vocab_size=32_000, max_position_embeddings=TEXT_LENGTH, **tower)
    return Experiment(
        name="siglip-vit-b16",
        model=FromConfig(
            config=SiglipConfig(vision_config=vision, text_config=text, logit_bias_init_value=-10.0),
            model=SiglipModel,
            execution=Execution(dtype="bfloat16"),
            processor=ProcessorFromFolder(),
        ),
        data=WebDatasetData(shards="data/train", max_length=TEXT_LENGTH, crop_scale=None, num_threads=16),
        stages=(Stage(name="contrastive", loss=Sigmoid(), rules=((".*", Cosine(peak=1e-3, warmup=0.03)),)),),
        train=Train(
            steps=274_658,
            batch_size=32_768,
            weight_decay=1e-4,
            b1=0.9,
            b2=0.95,
            clip_norm=1.0,
            log_every=100,
            checkpoint_every=5000,
        ),
        evaluate=evaluate,
        smoke=("train.steps=4", "train.batch_size=16", "train.checkpoint_every=2", "data.num_threads=2"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorFromFolder:
    """Makes the processor: a tokenizer that is opened, and images as SigLIP takes them.

    Args:
        folder: a hub folder with a tokenizer.
        image_size: of the config.
    """

    folder: str = "models/siglip-base-patch16-224"
    image_size: int = 224

    def __call__(self, data: Any) -> Any:
        """The processor: both edges to the image size (bicubic), values between -1 and 1."""
        from mmjax.language.tokenizer import Tokenizer
        from mmjax.models.processor import Processor
        from mmjax.vision.processing import ImageProcessor

        return Processor(
            image_processor=ImageProcessor(
                size={"height": self.image_size, "width": self.image_size},
                do_center_crop=False,
                image_mean=0.5,
                image_std=0.5,
            ),
            tokenizer=Tokenizer.from_folder(self.folder, tokenizer_class="SiglipTokenizer"),
            processor_class="SiglipProcessor",
        )


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Retrieval among the pairs of the test shards, if there are any: R@1, R@5, R@10, both directions."""
    from mmjax.evaluation import evaluate_retrieval

    data = outcome.data
    if data.test_shards is None:
        return {}
    return evaluate_retrieval(
        outcome.model,
        outcome.params,
        outcome.processor,
        data.examples("test"),
        max_length=data.max_length,
        max_broken=data.max_fault_share,
    )
