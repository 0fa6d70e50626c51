"""Data options turned into samples, and samples into embeddings."""

from __future__ import annotations

import argparse
from typing import Any

from mmjax.commands.output import progress


def open_data(options: argparse.Namespace, source: str, split: str | None) -> Any:
    """The `Dataset` that the data options describe."""
    from mmjax.evaluation.sources import open_dataset

    return open_dataset(
        source,
        kind=options.dataset_type,
        split=split,
        img_key=options.csv_img_key,
        caption_key=options.csv_caption_key,
        separator=options.csv_separator,
        image_root=options.image_root,
    )


def embed_data(
    options: argparse.Namespace, opened: tuple[Any, Any, Any], examples: Any, *, normalize: bool = True
) -> tuple[Any, Any]:
    """Embeddings [N, E] and the `Reading` of samples, with progress."""
    from mmjax.evaluation.reading import embed_examples

    model, params, processor = opened
    with progress("images", len(examples)) as advance:
        embeds, reading = embed_examples(
            model,
            params,
            processor.image_processor,
            examples,
            batch_size=options.batch_size,
            normalize=normalize,
            max_broken=getattr(options, "max_broken", 0.0),
            advance=advance,
        )
    _check_finite(options, embeds, "image")
    return embeds, reading


def _check_finite(options: argparse.Namespace, embeds: Any, kind: str) -> None:
    import numpy as np

    from mmjax.errors import DataError

    broken = int((~np.isfinite(embeds).all(axis=1)).sum())
    if broken:
        hint = "; float16 may be too small a range, try --dtype float32" if options.dtype == "float16" else ""
        raise DataError(f"{options.model}: {broken} of {len(embeds)} {kind} embeddings are not finite{hint}")


def embed_lines(
    options: argparse.Namespace, opened: tuple[Any, Any, Any], texts: list[str], *, normalize: bool = True
) -> Any:
    """Embeddings [N, E] of texts, with progress."""
    from mmjax.evaluation.embed import embed_texts
    from mmjax.evaluation.zero_shot import text_batches, text_length

    model, params, processor = opened
    size = min(options.batch_size, len(texts))
    with progress("texts", len(texts)) as advance:

        def batches():
            for batch in text_batches(processor, texts, size, text_length(model)):
                yield batch
                advance(len(batch["input_ids"]))

        embeds = embed_texts(model, params, batches(), normalize=normalize)
    _check_finite(options, embeds, "text")
    return embeds


def counts(reading: Any) -> dict[str, Any]:
    """How many samples were measured, and how many were left out for what, for a report."""
    return {"samples": len(reading.names), "left_out": dict(reading.tally.counts)}
