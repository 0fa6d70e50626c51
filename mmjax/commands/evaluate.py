"""Measure a model on data: zero-shot accuracy, a linear probe on its features, or retrieval."""

from __future__ import annotations

import argparse
from typing import Any

from mmjax.commands.data import counts, embed_data, embed_lines, open_data
from mmjax.commands.models import open_model, require_dual
from mmjax.commands.output import count_text, percent, print_json, print_table
from mmjax.commands.parser import (
    UsageError,
    add_batch_size,
    add_data,
    add_json,
    add_model,
    not_negative,
    positive_int,
)

_TEMPLATE_SETS = ("name", "photo", "general", "scene", "texture")
_CLASSES_SHOWN = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax eval`."""
    add_model(parser)
    parser.add_argument(
        "--task",
        required=True,
        choices=("zeroshot", "probe", "retrieval"),
        help="zeroshot: classes named in words; probe: logistic regression on frozen features; "
        "retrieval: R@1/5/10 between images and captions",
    )
    add_batch_size(parser)
    add_json(parser)
    add_data(parser, required=True)
    zeroshot = parser.add_argument_group("zeroshot")
    zeroshot.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt with {} for the class; several are averaged",
    )
    zeroshot.add_argument(
        "--templates", choices=_TEMPLATE_SETS, help="a set of prompts instead (default: photo)"
    )
    probe = parser.add_argument_group("probe")
    probe.add_argument(
        "--train-data",
        metavar="SOURCE",
        help="what the probe is fitted on (default: the train split of --data, if it has one)",
    )
    probe.add_argument(
        "--l2", type=not_negative, default=1e-3, help="penalty beside the mean loss (default: 0.001)"
    )
    probe.add_argument(
        "--max-steps", type=positive_int, default=1000, metavar="N", help="L-BFGS steps (1000)"
    )
    retrieval = parser.add_argument_group("retrieval")
    retrieval.add_argument(
        "--block-size",
        type=positive_int,
        default=1024,
        metavar="N",
        help="similarities at a time: N x N (1024)",
    )


def run(options: argparse.Namespace) -> int:
    """Run `mmjax eval`."""
    report, rows = {"zeroshot": _zeroshot, "probe": _probe, "retrieval": _retrieval}[options.task](options)
    if options.json:
        print_json({"task": options.task, "model": options.model, "data": options.data, **report})
    else:
        print_table(("measure", "value"), rows, numeric=("value",))
    return 0


Outcome = tuple[dict[str, Any], list[tuple[str, str]]]


def _sample_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("samples", count_text(report["samples"]))]
    return rows + [(f"left out: {cause}", count_text(n)) for cause, n in report["left_out"].items()]


def _zeroshot(options: argparse.Namespace) -> Outcome:
    from mmjax.evaluation.zero_shot import (
        TEMPLATES,
        fill_templates,
        zero_shot_accuracy,
        zero_shot_classifier,
        zero_shot_classify,
    )

    if options.template and options.templates:
        raise UsageError("give --template or --templates, not both (see mmjax eval --help)")
    data = open_data(options, options.data, options.split)
    usual = TEMPLATES["photo"] if data.templates is None else data.templates
    templates = options.template or (TEMPLATES[options.templates] if options.templates else usual)
    fill_templates(["class"], templates)
    opened = open_model(options.model, options.dtype, images=True, texts=True)
    model, params, processor = opened
    require_dual(options.model, model, params)
    embeds, reading = embed_data(options, opened, data.examples)
    names, labels = _classes(data, reading)
    classifier = zero_shot_classifier(
        model, params, processor, names, templates, batch_size=options.batch_size
    )
    logits = zero_shot_classify(params, embeds, classifier).logits
    result = zero_shot_accuracy(logits, labels, (1, 5))
    report = {
        **counts(reading),
        "classes": list(names),
        "templates": list(templates),
        "accuracy": {f"top{k}": value for k, value in result.accuracy.items()},
        "per_class": dict(zip(names, result.per_class.tolist(), strict=True)),
        "confusion": result.confusion.tolist(),
    }
    rows = [*_sample_rows(report), ("classes", count_text(len(names))), ("templates", str(len(templates)))]
    rows += [(f"top-{k} accuracy", percent(value)) for k, value in result.accuracy.items()]
    if len(names) <= _CLASSES_SHOWN:
        shown = ("-" if value != value else percent(value) for value in result.per_class.tolist())
        rows += [(f"class {name}", text) for name, text in zip(names, shown, strict=True)]
    return report, rows


def _classes(data: Any, reading: Any) -> tuple[tuple[str, ...], Any]:
    """Class names and labels; for captioned data every distinct caption is a class."""
    if data.class_names is not None:
        return data.class_names, reading.class_labels()
    from mmjax.errors import DataError

    several = [name for name, texts in zip(reading.names, reading.texts, strict=True) if len(texts) != 1]
    if several:
        raise DataError(
            f"{len(several)} samples have no caption, or several (first: {several[0]}): for zero-shot "
            "classification the caption of a sample is its class"
        )
    names = tuple(sorted({texts[0] for texts in reading.texts}))
    number = {name: index for index, name in enumerate(names)}
    return names, [number[texts[0]] for texts in reading.texts]


def _probe(options: argparse.Namespace) -> Outcome:
    from mmjax.errors import DataError
    from mmjax.evaluation.linear_probe import fit_linear_probe
    from mmjax.evaluation.metrics import top_k_accuracy

    test = open_data(options, options.data, options.split)
    train = _train_data(options)
    opened = open_model(options.model, options.dtype, images=True)
    # The scale of raw features carries information that a probe can use, so they are not normalised.
    train_features, train_reading = embed_data(options, opened, train.examples, normalize=False)
    features, reading = embed_data(options, opened, test.examples, normalize=False)
    train_names, train_labels = _classes(train, train_reading)
    names, labels = _classes(test, reading)
    unknown = sorted(set(names) - set(train_names))
    if unknown:
        raise DataError(
            f"{options.data}: class {unknown[0]!r} is not among the classes that the probe is fitted on"
        )
    labels = [train_names.index(names[label]) for label in labels]
    probe = fit_linear_probe(
        train_features, train_labels, num_classes=len(train_names), l2=options.l2, max_steps=options.max_steps
    )
    top = top_k_accuracy(probe.logits(features), labels, (1, 5))
    report = {
        **counts(reading),
        "train_samples": len(train_reading.names),
        "classes": list(train_names),
        "features": int(features.shape[1]),
        "l2": options.l2,
        "steps": probe.steps,
        "converged": probe.converged,
        "objective": probe.objective,
        "train_accuracy": probe.accuracy(train_features, train_labels),
        "accuracy": {f"top{k}": value for k, value in top.items()},
    }
    steps = f"{probe.steps}" if probe.converged else f"{probe.steps}, not converged"
    rows = [
        *_sample_rows(report),
        ("train samples", count_text(report["train_samples"])),
        ("features", count_text(report["features"])),
        ("L-BFGS steps", steps),
        ("train accuracy", percent(report["train_accuracy"])),
        *((f"top-{k} accuracy", percent(value)) for k, value in top.items()),
    ]
    return report, rows


def _train_data(options: argparse.Namespace) -> Any:
    from pathlib import Path

    from mmjax.evaluation.sources import kind_of, split_folders

    if options.train_data is not None:
        own_splits = kind_of(options.train_data) == "digits" or (
            kind_of(options.train_data) == "folder" and split_folders(Path(options.train_data).expanduser())
        )
        return open_data(options, options.train_data, "train" if own_splits else None)
    kind = kind_of(options.data) if options.dataset_type == "auto" else options.dataset_type
    has_train = kind == "digits" or (
        kind == "folder" and "train" in split_folders(Path(options.data).expanduser())
    )
    if not has_train or options.split == "train":
        raise UsageError(
            "a probe needs other data to be fitted on: give --train-data (see mmjax eval --help)"
        )
    return open_data(options, options.data, "train")


def _retrieval(options: argparse.Namespace) -> Outcome:
    from mmjax.errors import DataError
    from mmjax.evaluation.retrieval import retrieval_metrics

    data = open_data(options, options.data, options.split)
    if not data.examples.has_text:
        raise DataError(f"{options.data}: has no captions, which retrieval compares images with")
    opened = open_model(options.model, options.dtype, images=True, texts=True)
    require_dual(options.model, *opened[:2])
    embeds, reading = embed_data(options, opened, data.examples)
    captions, image_groups, caption_groups = reading.caption_groups()
    found = retrieval_metrics(
        embeds,
        embed_lines(options, opened, captions),
        image_groups,
        caption_groups,
        block_size=options.block_size,
    )
    measures = found.to_dict()
    report = {
        **counts(reading),
        "captions": len(captions),
        "groups": len(set(image_groups.tolist())),
        **measures,
    }
    rows = [
        *_sample_rows(report),
        ("captions", count_text(len(captions))),
        ("groups", count_text(report["groups"])),
    ]
    for direction, values in measures.items():
        for name, value in values.items():
            rows.append((f"{direction} {name}", percent(value) if name.startswith("R@") else f"{value:.1f}"))
    return report, rows
