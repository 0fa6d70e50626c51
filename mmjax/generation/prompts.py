"""Prompts on the host: rows aligned at their ends, lengths rounded up, limits checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError, DataError
from mmjax.generation import images
from mmjax.nn.rope import longest_unchanged

# Arrays with one entry per token, which move with their tokens. Others go to the model as they are.
PER_TOKEN = (
    *("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "mm_token_type_ids"),
    *images.PER_TOKEN,
)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of a batch, padded on the left up to the longest one and then on the right up to a bucket.

    So a row of its own, and the longest row of a batch, starts at the first slot of the cache; and the slots
    of the padding on the right are written over by the new tokens.

    Attributes:
        inputs: arguments of the model: input_ids or inputs_embeds, attention_mask, others.
        length: tokens of the longest row.
        rows: B.
    """

    inputs: dict[str, np.ndarray]
    length: int
    rows: int


def bucket(length: int, most: int | None = None) -> int:
    """The length that a program is compiled for: the next power of two, 16 at least.

    Args:
        length: in tokens.
        most: a bound that the result keeps if `length` does.

    >>> [bucket(n) for n in (3, 17, 100, 600)], bucket(40, 48)
    ([16, 32, 128, 1024], 48)
    """
    size = max(16, 1 << (length - 1).bit_length())
    return size if most is None else max(length, min(size, most))


def prepare(batch: Mapping[str, Any], most: int | None = None, model: Any = None) -> Prompts:
    """Align a batch's rows at their last tokens.

    Args:
        batch: input_ids int [B, T] or inputs_embeds [B, T, D]; attention_mask [B, T] where rows are padded,
            on either side; more arguments of the model.
        most: the longest input that the model takes; None: any.
        model: lays out images and says how many features they have; None: they stay as they are.

    Raises:
        DataError: nothing to begin with, an empty row, or arrays that do not fit each other.

    >>> batch = {"input_ids": [[5, 6, 0], [7, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]]}
    >>> prompts = prepare(batch, most=3)
    >>> prompts.length, prompts.inputs["input_ids"].tolist(), prompts.inputs["attention_mask"].tolist()
    (2, [[5, 6, 0], [0, 7, 0]], [[1, 1, 0], [0, 1, 0]])
    """
    inputs = {name: value for name, value in batch.items() if value is not None}
    if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
        raise DataError("batch: give input_ids or inputs_embeds, one of the two")
    for name in ("position_ids", "segment_ids", "cache"):
        if name in inputs:
            raise DataError(f"{name}: positions are counted here; leave it out of the batch")
    name = "input_ids" if "input_ids" in inputs else "inputs_embeds"
    first = np.asarray(inputs[name])
    inputs = inputs if model is None else images.lay_out(model, inputs)
    if first.ndim != (2 if name == "input_ids" else 3) or 0 in first.shape:
        raise DataError(f"{name}: expected rows of at least one token, got shape {first.shape}")
    if name == "input_ids" and not np.issubdtype(first.dtype, np.integer):
        raise DataError(f"input_ids: expected whole numbers, got {first.dtype}")
    mask = np.asarray(inputs.get("attention_mask", np.ones(first.shape[:2], np.int32))) != 0
    if mask.shape != first.shape[:2]:
        raise DataError(f"attention_mask: shape {mask.shape}, but {name} has {first.shape[:2]}")
    empty = np.flatnonzero(~mask.any(axis=1))
    if empty.size:
        raise DataError(f"attention_mask: row {empty[0]} has no token; a prompt needs at least one")
    inputs["attention_mask"] = mask.astype(np.int32)
    begin, end = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    length = int((end - begin).max())
    size = bucket(length, most)
    for key in PER_TOKEN:
        if key in inputs:
            value = np.asarray(inputs[key])
            if value.shape[:2] != mask.shape:
                raise DataError(f"{key}: shape {value.shape}, but {name} has {mask.shape}")
            inputs[key] = _aligned(value, begin, end, length, size, -1 if key == "image_index" else 0)
    ids = inputs.get("input_ids")
    if ids is not None:
        inputs["input_ids"] = ids.astype(np.int32)
    if model is not None and "image_index" in inputs:
        config = model.config
        inputs = images.rounded(inputs, config.tile_rows, getattr(config, "tiles_per_image", 1))
    return Prompts(inputs, length, len(mask))


def _aligned(value: np.ndarray, begin: Any, end: Any, length: int, size: int, fill: int = 0) -> np.ndarray:
    result = np.full((value.shape[0], size, *value.shape[2:]), fill, value.dtype)
    for row, (start, stop) in enumerate(zip(begin, end, strict=True)):
        result[row, length - (stop - start) : length] = value[row, start:stop]
    return result


def text_config(model: Any) -> Any:
    """The config of the decoder: a part of that of a model which sees."""
    return getattr(model.config, "text_config", model.config)


def longest_text(model: Any) -> int | None:
    """How many tokens the model's positions reach, None if its config does not say.

    Positions that the config scales reach `factor` times as far.
    """
    config = text_config(model)
    longest = getattr(config, "max_position_embeddings", None)
    factor = getattr(getattr(config, "rope_scaling", None), "factor", None) or 1.0
    return None if longest is None else int(longest * max(1.0, float(factor)))


def length_matters(model: Any, length: int) -> bool:
    """Whether tokens of a text so long are rotated otherwise than in a shorter one.

    Then keys that were written while the text was shorter are not those of the whole text.
    """
    longest = longest_unchanged(getattr(text_config(model), "rope_scaling", None))
    return longest is not None and length > longest


def longest_input(model: Any) -> int | None:
    """How many tokens may be given at once, padding included; None: any number."""
    config = text_config(model)
    return config.max_position_embeddings if getattr(config, "positions", None) == "learned" else None


def check_model(model: Any) -> None:
    """Refuse what cannot generate.

    Raises:
        ConfigError: the model has no cache.
    """
    if not callable(getattr(model, "init_cache", None)):
        raise ConfigError(
            f"model: a {type(model).__name__} does not generate text (it has no init_cache); "
            "give a language model such as CausalLM"
        )


def check_length(model: Any, length: int, new: int) -> None:
    """Refuse texts that would be longer than the model's positions reach.

    Raises:
        ConfigError: too long, or `new` is not a whole number of at least 1.
    """
    if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 1:
        raise ConfigError(f"max_new_tokens: {new!r} is not a whole number of at least 1")
    longest = longest_text(model)
    if longest is not None and length + new > longest:
        raise ConfigError(
            f"max_new_tokens: {length} tokens and {new} new ones are more than the model's {longest} "
            "(max_position_embeddings); give fewer"
        )


def check_ids(
    model: Any, ids: np.ndarray | None, name: str = "input_ids", index: np.ndarray | None = None
) -> None:
    """Refuse ids that are not the model's; indexing would give some other row in silence.

    Args:
        index: image_index; an image's id is not looked up, so it may be any.

    Raises:
        DataError: an id outside of the vocabulary.
    """
    config = text_config(model)
    size = getattr(config, "vocab_size", None)
    if ids is None or size is None:
        return
    outside = (ids < 0) | (ids >= size)
    wrong = ids[outside if index is None else outside & (index[..., 0] < 0)]
    if wrong.size:
        raise DataError(f"{name}: id {wrong.flat[0]} is outside the model's vocabulary of {size}")


def ending_ids(model: Any, stop_ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a text.

    Args:
        model: its config may name some, which None stands for.
        stop_ids: one or several of the caller's; () for none.

    Raises:
        ConfigError: something that is no id.
    """
    if stop_ids is None:
        config = text_config(model)
        own = getattr(model.config, "eos_token_id", None)
        stop_ids = getattr(config, "eos_token_id", None) if own is None else own
    stop_ids = () if stop_ids is None else stop_ids
    many = [stop_ids] if isinstance(stop_ids, (int, np.integer)) else list(stop_ids)
    for number in many:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise ConfigError(f"stop_ids: {number!r} is not a token id")
    return tuple(int(number) for number in many)


def padding_id(model: Any, stop_ids: Sequence[int]) -> int:
    """What follows a finished text: the config's padding id, else the first that ends texts, else 0."""
    config = text_config(model)
    own = getattr(model.config, "pad_token_id", None)
    own = getattr(config, "pad_token_id", None) if own is None else own
    # Some configs write -1 for "none".
    return own if own is not None and own >= 0 else (stop_ids[0] if stop_ids else 0)


def cache_dtype(model: Any, params: Any) -> Any:
    """The dtype of keys and values: that of the products, which make them."""
    if model.execution.dtype is not None:
        return np.dtype(model.execution.dtype)
    floating = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return max(floating, key=lambda leaf: leaf.size).dtype


__all__ = ["Prompts", "bucket", "prepare"]
