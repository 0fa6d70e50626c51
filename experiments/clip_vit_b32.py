"""CLIP ViT-B/32 from scratch on image-text pairs in WebDataset shards, with the published settings.

    mmjax train experiments/clip_vit_b32.py \\
        --data.shards='/data/train/{00000..41407}.tar' --data.test_shards='/data/test/{00000..00009}.tar' \\
        --model.processor.folder=/models/clip-vit-base-patch32
    mmjax plan experiments/clip_vit_b32.py --mesh data=256 --chip h100

What you bring: shards as img2dataset writes them (KEY.jpg with KEY.txt or KEY.json), of any number and size,
and a folder with CLIP's tokenizer: vocab.json and merges.txt, or tokenizer.json, as every CLIP folder of the
Hugging Face hub has them. The tokenizer's ids have to be those of the config (49,408 of them, the last one
ends a text); the run refuses others. Nothing of that folder but the tokenizer is read.

What can be changed, as any field, on the command line:

- `--train.batch_size`, `--train.accumulate`: the loss is that of the whole batch whatever the number of
  micro-batches, so a batch of 32,768 also runs on a few devices: raise `accumulate` until `mmjax plan` says
  that it fits.
- `--train.steps`: 390,625 steps of 32,768 are the 12.8 billion pairs that CLIP saw.
- `--model.execution.dtype=float32`, `--model.execution.remat=true`: how the towers are computed; parameters,
  optimizer and loss are float32 either way.
- `--mesh=data=64,fsdp=4`: how the devices share batch and parameters (default: all of them split the batch).
- `--data.index_cache=DIR` keeps the shards' indices between runs.

With test shards the run ends with retrieval in both directions on them; without, it leaves the weights alone.

Sources: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", tables
18 to 20 (batch 32,768, AdamW with b2 0.98, epsilon 1e-6 and decay 0.2 except on gains and biases, rate 5e-4
after 2,000 steps of warm-up, cosine to zero, temperature at most 100). Random crops keep 90% to 100% of an
image, as open_clip's defaults do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.data import WebDatasetData
from mmjax.models import CLIPConfig, CLIPModel
from mmjax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mmjax.nn import Execution
from mmjax.training import Contrastive, Cosine, Experiment, FromConfig, Outcome, Stage, Train

TEXT_LENGTH = 77


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    vision = CLIPVisionConfig(
        image_size=224,
        patch_size=32,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        eos_token_id=49407,
        max_position_embeddings=TEXT_LENGTH,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
    )
    return Experiment(
        name="clip-vit-b32",
        model=FromConfig(
            config=CLIPConfig(vision_config=vision, text_config=text, projection_dim=512),
            model=CLIPModel,
            execution=Execution(dtype="bfloat16"),
            processor=ProcessorFromFolder(),
        ),
        data=WebDatasetData(
            shards="data/train", max_length=TEXT_LENGTH, crop_scale=(0.9, 1.0), num_threads=16
        ),
        stages=(
            Stage(
                name="contrastive",
                loss=Contrastive(max_scale=100.0),
                rules=((".*", Cosine(peak=5e-4, warmup=2000)),),
            ),
        ),
        train=Train(
            steps=390_625,
            batch_size=32_768,
            weight_decay=0.2,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            clip_norm=0.0,
            log_every=100,
            checkpoint_every=5000,
        ),
        evaluate=evaluate,
        smoke=("train.steps=4", "train.batch_size=16", "train.checkpoint_every=2", "data.num_threads=2"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorFromFolder:
    """Makes the processor: a tokenizer that is opened, and images as CLIP takes them.

    Args:
        folder: a hub folder with CLIP's tokenizer.
        image_size: of the config.
    """

    folder: str = "models/clip-vit-base-patch32"
    image_size: int = 224

    def __call__(self, data: Any) -> Any:
        """The processor: shorter edge to the image size (bicubic), centre crop, CLIP's mean and deviation."""
        from mmjax.language.tokenizer import Tokenizer
        from mmjax.models.processor import Processor
        from mmjax.vision.processing import ImageProcessor

        size = self.image_size
        return Processor(
            image_processor=ImageProcessor(size=size, crop_size=size),
            tokenizer=Tokenizer.from_folder(self.folder, tokenizer_class="CLIPTokenizer"),
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
