"""Blockwise ranks against a dense float64 count, and no array of the whole matrix in the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.errors import DataError
from mmjax.evaluation import retrieval_metrics
from mmjax.evaluation.retrieval import _ranks
from tests.evaluation.fakes import unit


def dense_ranks(images, texts, image_ids, text_ids):
    scores = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
    same = np.asarray(image_ids)[:, None] == np.asarray(text_ids)[None, :]
    ranks = []
    for matrix, own in ((scores, same), (scores.T, same.T)):
        best = np.where(own, matrix, -np.inf).max(axis=1, keepdims=True)
        ranks.append((~own & (matrix >= best)).sum(axis=1))
    return ranks


def assert_ranks(found, images, texts, image_ids, text_ids):
    image_ranks, text_ranks = dense_ranks(images, texts, image_ids, text_ids)
    np.testing.assert_array_equal(found.image_ranks, image_ranks)
    np.testing.assert_array_equal(found.text_ranks, text_ranks)
    for k, value in found.image_to_text.items():
        assert value == np.mean(image_ranks < k)
    for k, value in found.text_to_image.items():
        assert value == np.mean(text_ranks < k)


@pytest.mark.parametrize("block_size", [1, 5, 8, 64])
def test_several_captions_per_image_in_any_order(block_size):
    rng = np.random.default_rng(0)
    image_ids = rng.permutation(23) * 7 - 50
    text_ids = rng.permutation(np.repeat(image_ids, rng.integers(1, 5, 23)))
    images = unit(rng.normal(size=(23, 6)))
    texts = unit(images[[list(image_ids).index(i) for i in text_ids]] + rng.normal(size=(len(text_ids), 6)))
    with jax.enable_x64(True):
        found = retrieval_metrics(images, texts, image_ids, text_ids, block_size=block_size)
    assert_ranks(found, images, texts, image_ids, text_ids)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ties_on_exact_numbers(data):
    # Small integers multiply without rounding, so float32 must agree with float64, ties and all.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = data.draw(st.integers(1, 6))
    image_ids = np.concatenate([np.arange(groups), rng.integers(0, groups, 12 - groups)])
    text_ids = np.concatenate([rng.integers(0, groups, 17 - groups), np.arange(groups)])
    images, texts = rng.integers(-1, 2, (12, 3)), rng.integers(-1, 2, (17, 3))
    found = retrieval_metrics(images, texts, image_ids, text_ids, block_size=5)
    assert_ranks(found, images, texts, image_ids, text_ids)


def test_one_embedding_for_everything_finds_nothing():
    found = retrieval_metrics(np.ones((20, 4)), np.ones((20, 4)), ks=(1, 10))
    assert found.image_to_text == {1: 0.0, 10: 0.0} == found.text_to_image
    np.testing.assert_array_equal(found.image_ranks, np.full(20, 19))


def test_equal_embeddings_are_found_at_once():
    found = retrieval_metrics(np.eye(20), np.eye(20))
    assert found.to_dict() == {
        direction: {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0, "mean_rank": 1.0}
        for direction in ("image_to_text", "text_to_image")
    }


def test_padding_never_counts():
    # All real scores are negative; padding rows are zeros and would win.
    images, texts = np.ones((3, 2)), -np.ones((5, 2)) * np.arange(1, 6)[:, None]
    ids = [0, 1, 2, 2, 2]
    assert_ranks(
        retrieval_metrics(images, texts, [0, 1, 2], ids, block_size=2), images, texts, [0, 1, 2], ids
    )


def test_the_whole_matrix_is_never_held():
    count, width, block = 4096, 8, 64
    blocks = jax.ShapeDtypeStruct((count // block, block, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((count // block, block), jnp.int32)
    compiled = _ranks.lower(blocks, ids, blocks, ids).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # Blocks of scores and two numbers per row, against 64 MiB for the matrix and 1 MiB for one row of blocks.
    assert temporary <= 4 * (8 * block * block + 8 * count), temporary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_embeds": np.zeros((0, 2))}, "image embeddings must be"),
        ({"text_embeds": np.zeros(3)}, "text embeddings must be"),
        ({"text_embeds": np.ones((3, 5))}, "width 3, text embeddings 5"),
        ({"image_embeds": np.full((3, 3), np.nan)}, r"3 image embeddings are not finite \(first: number 0\)"),
        ({"image_ids": [0, 1]}, "image ids must be 3 integers"),
        ({"text_ids": [0.0, 1.0, 2.0]}, "text ids must be 3 integers"),
        ({"image_ids": [0, 1, 9]}, r"1 images have no text of their group \(first: number 2, group 9\)"),
        ({"text_ids": [0, 1, 9], "image_ids": [0, 1, 1]}, "1 texts have no image"),
        ({"block_size": 0}, "at least 1"),
        ({"ks": ()}, "at least 1"),
        ({"ks": (0,)}, "at least 1"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"image_embeds": np.eye(3), "text_embeds": np.eye(3)} | changes
    with pytest.raises(DataError, match=message):
        retrieval_metrics(**arguments)
