"""Every sample once and in order, broken ones left out and counted; captions to groups."""

from __future__ import annotations

import numpy as np
import pytest

from mmjax.data import BadSample
from mmjax.errors import DataError
from mmjax.evaluation import embed_examples
from mmjax.evaluation.reading import Reading, pixel_batches
from tests.evaluation.fakes import TwoTowers


class Samples:
    """Numbered samples whose pixels are their number; some are broken."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, dict(broken)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BadSample(self.broken[index], f"sample-{index}")
        return {"image": index, "texts": (f"text {index}",), "label": index % 3, "name": f"name-{index}"}


def process(images):
    (number,) = images
    return {"pixel_values": np.full((1, 2, 3, 1), number, np.float32)}


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("size", [1, 4, 20, 64])
def test_every_sample_once_and_in_order(threads, size):
    reading, done = Reading(), []
    batches = list(pixel_batches(Samples(20), process, size, reading, threads=threads, advance=done.append))
    assert [len(batch) for batch in batches] == [size] * (20 // size) + ([20 % size] if 20 % size else [])
    np.testing.assert_array_equal(np.concatenate(batches)[:, 1, 2, 0], np.arange(20))
    assert reading.names == [f"name-{i}" for i in range(20)] and sum(done) == 20
    np.testing.assert_array_equal(reading.class_labels(), np.arange(20) % 3)
    assert reading.tally.seen == 20 and reading.tally.bad == 0


def test_broken_samples_are_left_out_up_to_a_share():
    samples = Samples(20, {3: "truncated", 11: "no_image"})
    reading = Reading()
    batches = np.concatenate(list(pixel_batches(samples, process, 8, reading, max_broken=0.1)))
    kept = [i for i in range(20) if i not in (3, 11)]
    np.testing.assert_array_equal(batches[:, 0, 0, 0], kept)
    assert reading.names == [f"name-{i}" for i in kept]
    assert reading.tally.counts == {"truncated": 1, "no_image": 1}
    with pytest.raises(DataError, match=r"2 of 12 samples .*sample-11 \(no_image\)"):
        list(pixel_batches(samples, process, 8, Reading(), max_broken=0.09))
    with pytest.raises(DataError, match="sample-3"):
        list(pixel_batches(samples, process, 8, Reading()))


def test_images_that_the_processor_refuses_are_broken_too():
    def picky(images):
        if images == [2]:
            raise DataError("too thin")
        return process(images)

    reading = Reading()
    list(pixel_batches(Samples(5), picky, 2, reading, max_broken=0.2))
    assert reading.tally.counts == {"unreadable": 1} and reading.tally.examples == [("unreadable", "name-2")]


def test_nothing_usable():
    with pytest.raises(DataError, match="no usable sample"):
        list(pixel_batches(Samples(2, {0: "empty", 1: "empty"}), process, 2, Reading(), max_broken=1.0))
    with pytest.raises(DataError, match="no usable sample"):
        list(pixel_batches(Samples(0), process, 2, Reading()))


def test_sizes_that_differ():
    def native(images):
        return {"pixel_values": np.zeros((1, 2 + images[0] % 2, 3, 1), np.float32)}

    with pytest.raises(DataError, match="name-1: pixels .* one size"):
        list(pixel_batches(Samples(4), native, 2, Reading()))


def test_stopping_early_leaves_no_thread_behind():
    import threading

    before = threading.active_count()
    batches = pixel_batches(Samples(1000), process, 2, Reading(), threads=3)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_embedding_a_split():
    import jax

    model = TwoTowers()
    pixels = np.stack([process([i])["pixel_values"][0] for i in range(7)])
    params = model.init(jax.random.key(0), pixels, np.zeros((1, 8), np.int32))["params"]
    samples = Samples(7, {2: "corrupt"})
    embeds, reading = embed_examples(
        model, params, process, samples, batch_size=3, normalize=False, max_broken=0.5
    )
    wanted = model.apply({"params": params}, np.delete(pixels, 2, axis=0), method="encode_image")
    np.testing.assert_allclose(embeds, wanted, atol=1e-6)
    assert len(reading.names) == 6


def test_labels_that_are_missing():
    with pytest.raises(DataError, match="1 of 2 samples have no class"):
        Reading(names=["a", "b"], labels=[0, None]).class_labels()


@pytest.mark.parametrize(
    ("texts", "captions", "images", "groups"),
    [
        ([("a",), ("b",)], ["a", "b"], [0, 1], [0, 1]),
        ([("a", "b"), ("c",)], ["a", "b", "c"], [0, 1], [0, 0, 1]),
        ([("a", "a")], ["a"], [0], [0]),
        ([("a",), ("b",), ("c", "a"), ("c",)], ["a", "b", "c"], [0, 1, 0, 0], [0, 1, 0]),
        ([("a",), ("b",), ("b", "a")], ["a", "b"], [0, 0, 0], [0, 0]),
    ],
)
def test_images_that_share_a_caption_are_one_group(texts, captions, images, groups):
    found = Reading(names=list("abcd")[: len(texts)], texts=texts).caption_groups()
    assert found[0] == captions
    np.testing.assert_array_equal(found[1], images)
    np.testing.assert_array_equal(found[2], groups)


def test_images_without_caption_cannot_be_grouped():
    with pytest.raises(DataError, match="1 of 2 images have no caption"):
        Reading(names=["a", "b"], texts=[("x",), ()]).caption_groups()
