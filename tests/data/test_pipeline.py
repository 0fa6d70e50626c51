import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from mmjax.data import DigitsData, ImageFolderData, MixtureData, SyntheticData
from mmjax.data.faults import FAULTS, BadSample
from mmjax.data.order import Order
from mmjax.errors import ConfigError, DataError
from tests.data.fakes import assert_batches_equal, fake_processor, take
from tests.data.makers import png

SMALL = SyntheticData(num_samples=10, image_size=8, num_threads=0)


def build(config, batch_size=4, seed=0, **options):
    return config.build(processor=fake_processor(), batch_size=batch_size, seed=seed, **options)


def ids(batches):
    return np.concatenate([batch["ids"] for batch in batches]).tolist()


def test_batch_contents():
    batch = next(iter(build(SMALL)))
    shapes = {name: (array.shape, str(array.dtype)) for name, array in batch.items()}
    assert shapes == {
        "pixel_values": ((4, 8, 8, 3), "float32"),
        "input_ids": ((4, 16), "int32"),
        "attention_mask": ((4, 16), "int32"),
        "labels": ((4,), "int32"),
        "faults": ((len(FAULTS),), "int32"),
        "ids": ((4,), "int64"),
    }
    examples = SMALL.examples("train")
    for row, number in enumerate(batch["ids"]):
        example = examples[int(number)]
        expected = fake_processor().image_processor([example["image"]])["pixel_values"][0]
        np.testing.assert_array_equal(batch["pixel_values"][row], expected)
        assert batch["labels"][row] == example["label"]
        length = min(len(example["text"]), 16)
        assert "".join(map(chr, batch["input_ids"][row][:length])) == example["text"][:16]
    assert not batch["faults"].any()


def test_every_epoch_has_every_sample_once_and_in_another_order():
    order = ids(take(iter(build(SMALL)), 15))
    epochs = [order[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_batch_larger_than_the_source_spans_epochs():
    order = ids(take(iter(build(SMALL, batch_size=25)), 2))
    assert all(sorted(order[start : start + 10]) == list(range(10)) for start in range(0, 50, 10))


def test_seed_decides_the_order():
    assert ids(take(iter(build(SMALL)), 3)) == ids(take(iter(build(SMALL)), 3))
    assert ids(take(iter(build(SMALL)), 3)) != ids(take(iter(build(SMALL, seed=1)), 3))


def augmented(threads):
    return dataclasses.replace(SMALL, crop_scale=(0.3, 1.0), flip=True, num_threads=threads)


def test_resuming_anywhere_continues_bitwise():
    dataset = build(augmented(0), batch_size=3)
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(iterator.get_state())))
        batches.append(next(iterator))
    for place, state in enumerate(states):
        resumed = iter(dataset)
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_batches_equal(take(resumed, 9 - place), batches[place:])


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_do_not_change_batches_or_states(threads):
    plain, threaded = iter(build(augmented(0))), iter(build(augmented(threads)))
    with threaded:
        assert_batches_equal(take(plain, 8), take(threaded, 8))
        assert plain.get_state() == threaded.get_state()
        state = plain.get_state()
        expected = take(plain, 3)
        threaded.set_state(state)
        assert_batches_equal(take(threaded, 3), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_closed_iterator_goes_on_where_it_was(threads):
    iterator, expected = iter(build(augmented(threads))), take(iter(build(augmented(0))), 4)
    found = take(iterator, 2)
    iterator.close()
    iterator.close()
    found += take(iterator, 2)
    iterator.close()
    assert_batches_equal(found, expected)


def test_a_program_may_end_without_closing():
    code = (
        "from tests.data.test_pipeline import augmented, build\n"
        "iterator = iter(build(augmented(0)))\n"
        "others = [iter(build(augmented(threads))) for threads in (1, 2)]\n"
        "for each in (iterator, *others):\n"
        "    next(each)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("threads", [1, 2])
def test_an_iterator_left_alone_is_collected(threads):
    iterator = iter(build(augmented(threads)))
    next(iterator)
    reader, gone = iterator._reader, weakref.ref(iterator)
    del iterator
    gc.collect()
    assert gone() is None and reader.rows is None


def test_processes_make_the_rows_of_one_process():
    whole = take(iter(build(SMALL, batch_size=6)), 5)
    parts = [take(iter(build(SMALL, batch_size=6, process_index=k, process_count=3)), 5) for k in range(3)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        for name in batch:
            if name != "faults":
                np.testing.assert_array_equal(batch[name], np.concatenate([piece[name] for piece in pieces]))


def test_a_state_holds_for_any_number_of_processes():
    one = iter(build(SMALL, batch_size=4))
    take(one, 2)
    half = iter(build(SMALL, batch_size=4, process_index=1, process_count=2))
    half.set_state(one.get_state())
    np.testing.assert_array_equal(next(half)["ids"], next(one)["ids"][2:])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 5},
        {"split": "test"},
        {"config": dataclasses.replace(SMALL, num_samples=11)},
        {"config": dataclasses.replace(SMALL, words=3)},
        {"config": dataclasses.replace(SMALL, flip=True)},
        {"config": dataclasses.replace(SMALL, max_length=9)},
    ],
)
def test_a_state_of_other_data_is_refused(change):
    state = iter(build(SMALL)).get_state()
    with pytest.raises(DataError, match="belongs to other data: .* was .*, is "):
        iter(build(**{"config": SMALL, **change})).set_state(state)


@pytest.mark.parametrize(
    "damage", [{"next_batch": -1}, {"next_batch": None}, {"format": 99}, {"faults": {}}, {"data": 3}]
)
def test_a_damaged_state_is_refused(damage):
    iterator = iter(build(SMALL))
    with pytest.raises(DataError, match="state of the data iterator cannot be read"):
        iterator.set_state({**iterator.get_state(), **damage})


def test_caption_choice_is_seeded_and_changes_with_the_epoch():
    config = DigitsData(templates=tuple("abcdefgh"[i] + " {}" for i in range(8)), num_threads=0)
    first = take(iter(build(config, batch_size=1442)), 2)
    rows = [dict(zip(b["ids"].tolist(), b["input_ids"][:, 0].tolist(), strict=True)) for b in first]
    assert set(rows[0].values()) == set(map(ord, "abcdefgh"))
    assert 0.7 < np.mean([rows[0][number] != rows[1][number] for number in rows[0]]) < 0.95
    assert_batches_equal(first, take(iter(build(config, batch_size=1442)), 2))


class Broken:
    """A source of which some samples are broken."""

    has_text, has_labels, window, identity = True, False, 1, "broken"

    def __init__(self, count, bad):
        self.count, self.bad = count, set(bad)
        self.shard_sizes = (count,)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("truncated", f"sample {index}")
        return {"image": png(index), "texts": ("x",), "label": None, "name": str(index)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenData(SyntheticData):
    """Synthetic in name only: its samples are those of `Broken`."""

    bad: tuple[int, ...] = ()

    def source(self, split="train", progress=None):
        return Broken(self.num_samples, self.bad)


def test_broken_samples_are_counted_and_replaced_by_good_ones():
    config = BrokenData(num_samples=20, bad=(3, 4, 17), num_threads=0)
    dataset = build(config, batch_size=5)
    iterator = iter(dataset)
    batches = take(iterator, 8)
    counts = np.sum([batch["faults"] for batch in batches], axis=0)
    assert counts.tolist() == [6 if cause == "truncated" else 0 for cause in FAULTS]
    assert not {3, 4, 17} & set(ids(batches))
    assert iterator.tally.counts == {"truncated": 6} and iterator.tally.seen == 40
    order = Order((20,), 1, 0)
    planned = [order.sample(place // 20, place % 20) for place in range(40)]
    for place, (wanted, got) in enumerate(zip(planned, ids(batches), strict=True)):
        assert wanted == got or wanted in config.bad, place
    assert_batches_equal(batches, take(iter(build(config, batch_size=5)), 8))
    for threads in (1, 8):
        threaded = iter(build(dataclasses.replace(config, num_threads=threads), batch_size=5))
        with threaded:
            assert_batches_equal(batches, take(threaded, 8))


def test_resuming_keeps_the_counts_of_faults():
    dataset = build(
        BrokenData(num_samples=20, bad=(3, 4), num_threads=0, max_fault_share=0.04), batch_size=10
    )
    iterator = iter(dataset)
    take(iterator, 2)
    resumed = iter(dataset)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert resumed.tally == iterator.tally
    with pytest.raises(DataError, match=r"2 of 20 samples \(10.0%\) broken: truncated 2; for example sample"):
        resumed.check_faults()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_nothing_but_broken_samples_is_an_error(threads):
    config = BrokenData(num_samples=4, bad=(0, 1, 2, 3), num_threads=threads)
    with (
        pytest.raises(DataError, match="no usable sample could be found: .* truncated 101"),
        iter(build(config)) as it,
    ):
        next(it)


def test_without_tokenizer_there_is_no_text_and_captions_are_not_needed():
    config = BrokenData(num_samples=4, num_threads=0)
    batch = next(iter(config.build(processor=fake_processor(text=False), batch_size=4, seed=0)))
    assert set(batch) == {"pixel_values", "faults", "ids"}


def test_mixture_keeps_weights_in_every_stretch():
    sources = (SMALL, dataclasses.replace(SMALL, num_samples=7, content_seed=1))
    config = MixtureData(sources=sources, weights=(3.0, 1.0), num_threads=0)
    iterator = iter(build(config, batch_size=8))
    batches = take(iterator, 10)
    for batch in batches:
        assert (batch["ids"] < 10).sum() == 6
    order = np.array(ids(batches))
    assert sorted(order[order < 10][:10].tolist()) == list(range(10))
    assert sorted(order[order >= 10][:7].tolist()) == list(range(10, 17))
    resumed = iter(build(config, batch_size=8))
    resumed.set_state(iterator.get_state())
    assert_batches_equal(take(resumed, 2), take(iterator, 2))


def test_mixture_without_weights_goes_by_size():
    sources = (SMALL, dataclasses.replace(SMALL, num_samples=30, content_seed=1))
    batches = take(iter(build(MixtureData(sources=sources, num_threads=0), batch_size=40)), 2)
    for batch in batches:
        assert sorted(batch["ids"].tolist()) == list(range(40))
        assert "labels" in batch


def test_mixture_drops_labels_that_mean_different_things():
    config = MixtureData(sources=(SMALL, dataclasses.replace(SMALL, num_classes=3)), num_threads=0)
    assert "labels" not in next(iter(build(config)))
    with pytest.raises(ConfigError, match="different classes"):
        config.class_names()


def test_mixture_of_captioned_and_uncaptioned_sources_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(0))
    with pytest.raises(ConfigError, match="source 1 of MixtureData has no captions"):
        build(MixtureData(sources=(SMALL, ImageFolderData(path=str(tmp_path)))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build(SMALL, batch_size=0), "batch_size=0"),
        (lambda: build(SMALL, batch_size=5, process_count=2), "multiple of process_count=2"),
        (lambda: build(SMALL, process_index=1), "process_index=1"),
        (lambda: build(SMALL, split="val"), "split='val'"),
        (lambda: SMALL.examples("val"), "split='val'"),
        (lambda: SMALL.build(processor=None, batch_size=4, seed=0), "image_processor"),
        (lambda: SyntheticData(num_samples=0), "num_samples"),
        (lambda: SyntheticData(max_length=0), "max_length=0"),
        (lambda: SyntheticData(crop_scale=(0.9, 1.1)), "crop_scale"),
        (lambda: SyntheticData(crop_scale=(0.0, 1.0)), "crop_scale"),
        (lambda: SyntheticData(crop_ratio=(2.0, 1.0)), "crop_ratio"),
        (lambda: SyntheticData(max_fault_share=1.5), "max_fault_share"),
        (lambda: SyntheticData(num_threads=-1), "num_threads"),
        (lambda: DigitsData(templates=("no place",)), "templates"),
        (lambda: MixtureData(sources=()), "at least one source"),
        (lambda: MixtureData(sources=(MixtureData(sources=(SMALL,)),)), "no mixtures"),
        (lambda: MixtureData(sources=(SMALL,), weights=(1.0, 2.0)), "1 positive numbers"),
        (lambda: MixtureData(sources=(SMALL, SMALL), weights=(1.0, 0.0)), "positive"),
        (lambda: MixtureData(sources=(SMALL, SMALL)).source(), "several sources"),
    ],
)
def test_wrong_settings_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_tokenizer_without_length_needs_max_length():
    processor = fake_processor()
    processor.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ConfigError, match="max_length"):
        SMALL.build(processor=processor, batch_size=4, seed=0)
    config = dataclasses.replace(SMALL, max_length=5)
    assert next(iter(config.build(processor=processor, batch_size=4, seed=0)))["input_ids"].shape == (4, 5)


def test_with_a_real_processor():
    from mmjax.language.tokenizer import train_clip_tokenizer
    from mmjax.models.processor import Processor
    from mmjax.vision.processing import ImageProcessor

    config = DigitsData(max_length=12, num_threads=4)
    texts = [text for example in config.examples("train")[:60] for text in example["texts"]]
    processor = Processor(ImageProcessor(size=16, crop_size=16), train_clip_tokenizer(texts, vocab_size=540))
    with iter(config.build(processor=processor, batch_size=6, seed=0)) as iterator:
        batch = next(iterator)
    examples = config.examples("train")
    for row, number in enumerate(batch["ids"].tolist()):
        pixels = processor(images=[examples[number]["image"]])["pixel_values"][0]
        np.testing.assert_array_equal(batch["pixel_values"][row], pixels)
        ids = [
            processor(text=[text], padding="max_length", truncation=True, max_length=12)["input_ids"][
                0
            ].tolist()
            for text in examples[number]["texts"]
        ]
        assert batch["input_ids"][row].tolist() in ids
    assert batch["attention_mask"].shape == (6, 12)
