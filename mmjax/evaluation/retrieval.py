"""Image-text retrieval, blockwise: exact ranks without ever holding the similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike, NDArray

from mmjax.errors import DataError

# Ids are numbered from 0, so these match nothing, and not each other.
_PAD_IMAGE, _PAD_TEXT = -1, -2


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """Recall and ranks of both directions.

    Attributes:
        image_to_text: k -> share of images with one of their captions among the k best texts.
        text_to_image: k -> share of texts with their image among the k best images.
        image_ranks: [N_i] int64, 0 is best: how many texts of other groups score at least as high as the
            best own one.
        text_ranks: [N_t] int64, the same for texts.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    image_ranks: NDArray[np.int64]
    text_ranks: NDArray[np.int64]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The numbers for a report: R@k, and the median and mean rank counted from 1."""
        report = {}
        for name, recall, ranks in (
            ("image_to_text", self.image_to_text, self.image_ranks),
            ("text_to_image", self.text_to_image, self.text_ranks),
        ):
            report[name] = {f"R@{k}": value for k, value in recall.items()}
            report[name] |= {"median_rank": float(np.median(ranks)) + 1, "mean_rank": float(ranks.mean()) + 1}
        return report


def _scores(images: jax.Array, texts: jax.Array) -> jax.Array:
    # HIGHEST: accelerators would otherwise multiply in bfloat16 and change the order of close candidates.
    return jnp.einsum("qe,ce->qc", images, texts, precision=lax.Precision.HIGHEST)


@jax.jit
def _ranks(
    images: jax.Array, image_ids: jax.Array, texts: jax.Array, text_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ranks of all images and all texts, from blocks.

    Two sweeps over all pairs of blocks: the best positive of each row and column, then how many others
    reach it. Each [R, S] block of scores serves both directions and is then dropped.

    Args:
        images: [I, R, E] blocks of image embeddings.
        image_ids: [I, R] int32 groups, negative for padding.
        texts: [J, S, E] blocks of text embeddings.
        text_ids: [J, S] int32.

    Returns:
        [I, R] and [J, S] int32.
    """
    lowest = jnp.array(-jnp.inf, images.dtype)

    def best_positive(text_best: jax.Array, block: tuple[jax.Array, jax.Array]):
        image, image_id = block

        def against(image_best: jax.Array, other: tuple[jax.Array, jax.Array, jax.Array]):
            text, text_id, best = other
            scores = jnp.where(image_id[:, None] == text_id[None, :], _scores(image, text), lowest)
            return jnp.maximum(image_best, scores.max(axis=1)), jnp.maximum(best, scores.max(axis=0))

        start = jnp.full(image.shape[:1], lowest)
        image_best, text_best = lax.scan(against, start, (texts, text_ids, text_best))
        return text_best, image_best

    text_best, image_best = lax.scan(best_positive, jnp.full(text_ids.shape, lowest), (images, image_ids))

    def count(text_count: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]):
        image, image_id, own_best = block

        def against(image_count: jax.Array, other: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
            text, text_id, best, counted = other
            scores = _scores(image, text)
            real = (image_id[:, None] >= 0) & (text_id[None, :] >= 0)
            rival = real & (image_id[:, None] != text_id[None, :])
            above_image = (rival & (scores >= own_best[:, None])).sum(axis=1, dtype=jnp.int32)
            above_text = (rival & (scores >= best[None, :])).sum(axis=0, dtype=jnp.int32)
            return image_count + above_image, counted + above_text

        start = jnp.zeros(image.shape[:1], jnp.int32)
        image_count, text_count = lax.scan(against, start, (texts, text_ids, text_best, text_count))
        return text_count, image_count

    text_count, image_count = lax.scan(
        count, jnp.zeros(text_ids.shape, jnp.int32), (images, image_ids, image_best)
    )
    return image_count, text_count


def _blocks(embeds: NDArray, ids: NDArray, size: int, pad: int) -> tuple[NDArray, NDArray]:
    """Cut [N, E] and [N] into equal blocks [K, size, E] and [K, size], padding the last."""
    count = -(-len(embeds) // size)
    extra = count * size - len(embeds)
    embeds = np.concatenate([embeds, np.zeros((extra, embeds.shape[1]), embeds.dtype)])
    ids = np.concatenate([ids, np.full(extra, pad, np.int32)])
    return embeds.reshape(count, size, -1), ids.reshape(count, size)


def _embeddings(embeds: ArrayLike, what: str) -> NDArray:
    array = np.asarray(embeds)
    if array.dtype != np.float64:
        array = array.astype(np.float32)
    if array.ndim != 2 or not array.size:
        raise DataError(f"{what} embeddings must be [count, width] and not empty, got shape {array.shape}")
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        raise DataError(
            f"{int(broken.sum())} {what} embeddings are not finite (first: number {broken.argmax()})"
        )
    return array


def _group_ids(
    image_ids: ArrayLike | None, text_ids: ArrayLike | None, counts: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Number the groups from 0; every image needs a text of its group and every text an image."""
    given = [
        np.arange(count) if ids is None else np.asarray(ids)
        for ids, count in zip((image_ids, text_ids), counts, strict=True)
    ]
    for ids, count, what in zip(given, counts, ("image", "text"), strict=True):
        if ids.shape != (count,) or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(
                f"{what} ids must be {count} integers, got shape {ids.shape} and dtype {ids.dtype}"
            )
    names, numbers = np.unique(np.concatenate(given), return_inverse=True)
    images, texts = np.split(numbers.astype(np.int32), [counts[0]])
    for own, other, what, lack in ((images, texts, "images", "text"), (texts, images, "texts", "image")):
        alone = ~np.isin(own, other)
        if alone.any():
            raise DataError(
                f"{int(alone.sum())} {what} have no {lack} of their group (first: number {alone.argmax()}, "
                f"group {names[own[alone.argmax()]]})"
            )
    return images, texts


def retrieval_metrics(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    image_ids: ArrayLike | None = None,
    text_ids: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int = 1024,
) -> RetrievalMetrics:
    """Recall at k from images to texts and back, with any number of captions per image.

    A pair belongs together when its ids are equal. A query is found at k when fewer than k candidates of
    other groups score at least as high as its best own one; so ties count against the model, and a model
    that gives everything one embedding finds nothing.

    Memory on the device beside the embeddings and a handful of numbers per row: a few blocks of
    min(block_size, N_i) x min(block_size, N_t) scores, whatever N_i and N_t are.

    Args:
        image_embeds: [N_i, E]; float64 is kept when jax has it enabled, everything else becomes float32.
        text_embeds: [N_t, E]; both usually of length 1 per row.
        image_ids: [N_i] integers, the group of each image; None means 0, 1, 2, ...
        text_ids: [N_t] integers.
        ks: each at least 1.
        block_size: rows of a block, on both sides.

    Returns:
        RetrievalMetrics.

    Raises:
        DataError: shapes do not fit, an embedding is not finite, or a query has nothing to find.

    Example:
        >>> images = np.eye(2)
        >>> texts = np.array([[1.0, 0.0], [0.9, 0.1], [0.6, 0.4]])    # the last is of the second image
        >>> found = retrieval_metrics(images, texts, [0, 1], [0, 0, 1], ks=(1, 2))
        >>> found.image_to_text, found.text_ranks.tolist()
        ({1: 1.0, 2: 1.0}, [0, 0, 1])
    """
    if block_size < 1 or not ks or any(k < 1 for k in ks):
        raise DataError(f"block_size and every k must be at least 1, got {block_size} and {list(ks)}")
    images, texts = _embeddings(image_embeds, "image"), _embeddings(text_embeds, "text")
    if images.shape[1] != texts.shape[1]:
        raise DataError(f"image embeddings have width {images.shape[1]}, text embeddings {texts.shape[1]}")
    own_images, own_texts = _group_ids(image_ids, text_ids, (len(images), len(texts)))
    wide = np.result_type(images, texts)
    image_ranks, text_ranks = _ranks(
        *_blocks(images.astype(wide), own_images, min(block_size, len(images)), _PAD_IMAGE),
        *_blocks(texts.astype(wide), own_texts, min(block_size, len(texts)), _PAD_TEXT),
    )
    ranks = [
        np.asarray(found).reshape(-1)[: len(embeds)].astype(np.int64)
        for found, embeds in ((image_ranks, images), (text_ranks, texts))
    ]
    recall = [{int(k): float(np.mean(rank < k)) for k in ks} for rank in ranks]
    return RetrievalMetrics(
        image_to_text=recall[0], text_to_image=recall[1], image_ranks=ranks[0], text_ranks=ranks[1]
    )
