"""Classify images by labels given in words, without training."""

from __future__ import annotations

import argparse
from typing import Any

from mmjax.commands.data import embed_data
from mmjax.commands.models import open_model, require_dual
from mmjax.commands.output import percent, print_json, print_table
from mmjax.commands.parser import add_batch_size, add_json, add_model, positive_int

_TEMPLATE = "a photo of {}"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax zeroshot`."""
    add_model(parser)
    parser.add_argument(
        "--image", required=True, nargs="+", action="extend", metavar="FILE", help="images to classify"
    )
    parser.add_argument(
        "--labels",
        required=True,
        nargs="+",
        action="extend",
        metavar="LABEL",
        help="what they may show, in words",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help=f"prompt with {{}} for the label; several are averaged (default: '{_TEMPLATE}')",
    )
    parser.add_argument(
        "--top",
        type=positive_int,
        default=5,
        metavar="K",
        help="labels shown per image in the table (default: 5)",
    )
    add_batch_size(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run `mmjax zeroshot`."""
    templates = options.template or [_TEMPLATE]
    scores = _classify(options, templates)
    if options.json:
        print_json(_report(options, templates, scores))
    else:
        _print(options, scores)
    return 0


def _classify(options: argparse.Namespace, templates: list[str]) -> Any:
    from mmjax.evaluation.sources import image_files
    from mmjax.evaluation.zero_shot import fill_templates, zero_shot_classifier, zero_shot_classify

    examples = image_files(options.image)
    fill_templates(options.labels, templates)
    model, params, processor = open_model(options.model, options.dtype, images=True, texts=True)
    require_dual(options.model, model, params)
    embeds, _ = embed_data(options, (model, params, processor), examples)
    classifier = zero_shot_classifier(
        model, params, processor, options.labels, templates, batch_size=options.batch_size
    )
    return zero_shot_classify(params, embeds, classifier)


def _report(options: argparse.Namespace, templates: list[str], scores: Any) -> dict[str, Any]:
    return {
        "model": options.model,
        "labels": options.labels,
        "templates": templates,
        "probabilities": "one per label" if scores.pairwise else "softmax over labels",
        "images": [
            {
                "image": image,
                "best": options.labels[int(row.argmax())],
                "probabilities": dict(zip(options.labels, row.tolist(), strict=True)),
                "logits": dict(zip(options.labels, logits.tolist(), strict=True)),
            }
            for image, row, logits in zip(options.image, scores.probabilities, scores.logits, strict=True)
        ],
    }


def _print(options: argparse.Namespace, scores: Any) -> None:
    rows = [
        (image, options.labels[index], percent(float(row[index])))
        for image, row, logits in zip(options.image, scores.probabilities, scores.logits, strict=True)
        for index in (-logits).argsort(kind="stable")[: options.top]
    ]
    print_table(("image", "label", "probability"), rows, numeric=("probability",))
