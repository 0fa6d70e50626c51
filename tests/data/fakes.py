"""A small processor, so that data tests need no model folder."""

from types import SimpleNamespace

import numpy as np
from PIL import Image


class FakeImageProcessor:
    """Resizes to size x size and scales to 0..1."""

    def __init__(self, size=8):
        self.size = size

    def __call__(self, images):
        arrays = [
            np.asarray(i.resize((self.size, self.size), Image.Resampling.BICUBIC), np.float32) for i in images
        ]
        return {"pixel_values": np.stack(arrays) / 255}


class FakeTokenizer:
    """One token per character."""

    model_max_length = 16

    def __call__(self, texts, padding, truncation, max_length):
        assert padding == "max_length" and truncation is True
        ids = np.zeros((len(texts), max_length), np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            codes = [ord(c) % 1000 for c in text[:max_length]]
            ids[row, : len(codes)] = codes
            mask[row, : len(codes)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def fake_processor(size=8, text=True):
    return SimpleNamespace(
        image_processor=FakeImageProcessor(size), tokenizer=FakeTokenizer() if text else None
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_batches_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
