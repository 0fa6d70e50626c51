"""A small CLIP learns real handwritten digits from captions in words.

    mmjax train experiments/digits.py

Nothing is downloaded: scikit-learn carries the 1,797 scans. The model sees pairs of an image and a
caption ("a handwritten seven") and never a label. Afterwards the test images, which it has not seen,
are told apart by asking which of ten captions fits best. Any field can be changed on the command line:
`--train.steps=300`, `--model.config.vision_config.hidden_size=64`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data import DIGIT_TEMPLATES, DigitsData
from mmjax.models import CLIPConfig, CLIPModel
from mmjax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mmjax.training import Contrastive, Cosine, Experiment, FromConfig, Outcome, Stage, Train

VOCABULARY = 576
IMAGE_SIZE = 16
WORDS = 16


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    tower: dict[str, Any] = {"hidden_act": "gelu", "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=4,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        **tower,
    )
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        eos_token_id=VOCABULARY - 1,
        max_position_embeddings=WORDS,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        **tower,
    )
    return Experiment(
        name="digits",
        model=FromConfig(
            config=CLIPConfig(vision_config=vision, text_config=text, projection_dim=64),
            model=CLIPModel,
            processor=make_processor,
        ),
        data=DigitsData(crop_scale=(0.7, 1.0), crop_ratio=(0.8, 1.25)),
        stages=(
            Stage(name="contrastive", loss=Contrastive(), rules=((".*", Cosine(peak=1e-3, warmup=0.1)),)),
        ),
        train=Train(steps=500, batch_size=128, weight_decay=0.1, b2=0.98, log_every=20, checkpoint_every=250),
        evaluate=evaluate,
        preview=draw_preview,
        smoke=("train.steps=20", "train.batch_size=32"),
    )


def make_processor(data: DigitsData) -> Any:
    """A tokenizer learned from the captions, and images resized to the model's size."""
    from mmjax.language.tokenizer import train_clip_tokenizer
    from mmjax.models.processor import Processor
    from mmjax.vision.processing import ImageProcessor

    captions = [template.format(name) for template in data.templates for name in data.class_names()]
    return Processor(
        image_processor=ImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_center_crop=False,
            image_mean=0.5,
            image_std=0.5,
        ),
        tokenizer=train_clip_tokenizer(captions, vocab_size=VOCABULARY, max_length=WORDS),
    )


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Zero-shot accuracy on the test split: no label was ever shown in training."""
    from mmjax.evaluation import confusion_matrix

    predicted, _, truth = classify(outcome)
    names = outcome.data.class_names()
    return {
        "zero_shot_accuracy": float(np.mean(predicted == truth)),
        "test_images": len(truth),
        "chance": 1 / len(names),
        "confusion": confusion_matrix(predicted, truth, len(names)).tolist(),
    }


def classify(outcome: Outcome) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted class [N], its probability [N] and the true class [N] of the test images."""
    from mmjax.data import batches
    from mmjax.evaluation import embed_images, zero_shot_classifier, zero_shot_classify

    examples = outcome.data.examples("test")
    pixels = [batch["pixel_values"] for batch in batches(examples, outcome.processor, 128)]
    images = embed_images(outcome.model, outcome.params, pixels)[: len(examples)]
    names = outcome.data.class_names()
    classifier = zero_shot_classifier(
        outcome.model, outcome.params, outcome.processor, names, DIGIT_TEMPLATES
    )
    scores = zero_shot_classify(outcome.params, images, classifier)
    truth = np.array([example["label"] for example in examples])
    return scores.probabilities.argmax(axis=1), scores.probabilities.max(axis=1), truth


def draw_preview(outcome: Outcome, path: Path) -> None:
    """Test images with what was said about them, the loss, and the confusion matrix, as one picture."""
    from matplotlib.figure import Figure

    predicted, confidence, truth = classify(outcome)
    figure = Figure(figsize=(12, 7.6), dpi=120, layout="constrained", facecolor="white")
    figure.suptitle(
        f"Zero-shot on {len(truth)} unseen handwritten digits: "
        f"{np.mean(predicted == truth):.1%} right (chance {1 / len(outcome.data.class_names()):.0%})",
        fontsize=15,
        fontweight="bold",
    )
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    left, right = halves
    _draw_images(left, outcome, predicted, confidence, truth)
    upper, lower = right.subplots(2, 1, height_ratios=(1, 1.5))
    _draw_loss(upper, outcome)
    _draw_confusion(lower, np.asarray(outcome.metrics["confusion"]), outcome.data.class_names())
    figure.savefig(path)
    _save_samples(outcome, path.parent)


def _save_samples(outcome: Outcome, folder: Path) -> None:
    """The first unseen scan of some digits, to try `mmjax zeroshot` on."""
    names, wanted = outcome.data.class_names(), {"two", "seven"}
    for example in outcome.data.examples("test"):
        name = names[example["label"]]
        if name in wanted:
            example["image"].save(folder / f"{name}.png")
            wanted.remove(name)


def _draw_images(
    figure: Any, outcome: Outcome, predicted: np.ndarray, confidence: np.ndarray, truth: np.ndarray
) -> None:
    """Four rows of six test images: every mistake first (at most six), then right ones of every digit."""
    rows, columns = 4, 6
    examples, names = outcome.data.examples("test"), outcome.data.class_names()
    wrong = np.flatnonzero(predicted != truth)[:columns]
    right = np.flatnonzero(predicted == truth)
    # Round the digits in turn, so that each is seen.
    turn = np.argsort(
        np.array([np.sum(truth[right[:place]] == truth[n]) for place, n in enumerate(right)]), kind="stable"
    )
    chosen = [*wrong, *right[turn]][: rows * columns]
    figure.suptitle(
        "the digit in the closest of ten captions, and the truth where it is another", fontsize=11
    )
    axes = figure.subplots(rows, columns)
    for axis, index in zip(axes.flat, chosen, strict=True):
        good = predicted[index] == truth[index]
        axis.imshow(np.asarray(examples[int(index)]["image"].convert("L")), cmap="gray_r")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color("#2a7f4f" if good else "#c0392b")
            spine.set_linewidth(2)
        said = f"{names[predicted[index]]} {confidence[index]:.0%}"
        axis.set_title(said, fontsize=11, color="#2a7f4f" if good else "#c0392b")
        axis.set_xlabel("" if good else f"it is {names[truth[index]]}", fontsize=11)


def _draw_loss(axis: Any, outcome: Outcome) -> None:
    history = outcome.history()
    steps, loss = history["step"], history["loss"]
    width = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    axis.plot(steps, loss, color="#b9cde0", linewidth=0.8, label="each step")
    axis.plot(steps[width - 1 :], smooth, color="#1f4e79", linewidth=2, label=f"mean of {width} steps")
    axis.set_title("contrastive loss", fontsize=11)
    axis.set_xlabel("step")
    axis.grid(color="#e5e5e5")
    axis.legend(frameon=False)


def _draw_confusion(axis: Any, confusion: np.ndarray, names: tuple[str, ...]) -> None:
    """Rows are the truth, columns what was said."""
    axis.imshow(np.sqrt(confusion), cmap="Blues")
    axis.set_title("confusion (rows: truth, columns: prediction)", fontsize=11)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(confusion > 0):
        dark = confusion[row, column] > confusion.max() / 2
        text = str(confusion[row, column])
        axis.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
