"""Opening a model for a command, with what the command needs from it."""

from __future__ import annotations

from typing import Any

from mmjax.errors import CheckpointError, DataError


def open_model(
    folder: str, dtype: str | None, *, images: bool = False, texts: bool = False
) -> tuple[Any, Any, Any]:
    """Load a model and check that it, and its processor, take what will be given.

    Args:
        folder: a model folder or a hub id.
        dtype: of the parameters; None keeps the folder's.
        images: whether images will be given.
        texts: whether texts will be given.

    Returns:
        (model, params, processor).

    Raises:
        CheckpointError: the folder cannot be opened or lacks its processor files.
        DataError: the model has no such tower.
    """
    import mmjax
    from mmjax.evaluation.embed import takes

    model, params, processor = mmjax.load(folder, dtype=dtype)
    for wanted, name, part, files, what in (
        (images, "pixel_values", "image_processor", "preprocessor_config.json", "images"),
        (texts, "input_ids", "tokenizer", "tokenizer.json or tokenizer.model", "texts"),
    ):
        if wanted and not takes(model, name):
            raise DataError(f"{folder}: a {type(model).__name__} takes no {what}")
        if wanted and getattr(processor, part, None) is None:
            raise CheckpointError(
                f"{folder}: no {files}, so {what} cannot be prepared; add the file to the folder"
            )
    return model, params, processor


def require_dual(folder: str, model: Any, params: Any) -> None:
    """Refuse a model that does not compare images with texts.

    Raises:
        DataError: it has no shared space.
    """
    if not (hasattr(model, "encode_image") and hasattr(model, "encode_text") and "logit_scale" in params):
        raise DataError(
            f"{folder}: a {type(model).__name__} does not compare images with texts; "
            "use a CLIP or SigLIP model"
        )
