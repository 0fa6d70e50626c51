import json
import os
import tarfile

import numpy as np
import pytest

from mmjax.data import WebDatasetData
from mmjax.data.faults import BadSample
from mmjax.data.tar_index import index_tar
from mmjax.errors import ConfigError, DataError
from tests.data.fakes import assert_batches_equal, fake_processor, take
from tests.data.makers import BROKEN_IMAGES, odd_images, picture, png, write_shards, write_tar


def build(config, batch_size=4, **options):
    return config.build(processor=fake_processor(), batch_size=batch_size, seed=3, **options)


def outcome(source, number):
    """The captions of a sample, or the cause of its fault."""
    try:
        return source[number]["texts"]
    except BadSample as error:
        return error.cause


def outcomes(path, **options):
    source = WebDatasetData(shards=str(path), **options).source()
    names = [index.key(row) for index in source.indices for row in range(len(index))]
    return {name: outcome(source, number) for number, name in enumerate(names)}


def test_samples_are_read_as_written(tmp_path):
    source = WebDatasetData(shards=write_shards(tmp_path)).source()
    assert len(source) == 15 and source.shard_sizes == (5, 5, 5)
    for number in range(15):
        record = source[number]
        assert record["image"] == png(number)
        assert record["texts"] == (f"picture {number}",)
        assert record["label"] is None
        assert record["name"] == f"{number // 5:05d}.tar/{number:09d}"


def test_batches_hold_the_right_pixels(tmp_path):
    batch = next(iter(build(WebDatasetData(shards=write_shards(tmp_path), crop_scale=None))))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "faults", "ids"}
    for row, number in enumerate(batch["ids"]):
        expected = fake_processor().image_processor([picture(int(number))])["pixel_values"][0]
        np.testing.assert_array_equal(batch["pixel_values"][row], expected)


@pytest.mark.parametrize("threads", [0, 8])
def test_resuming_mid_shard_continues_bitwise(tmp_path, threads):
    config = WebDatasetData(shards=write_shards(tmp_path), shuffle_window=2, num_threads=threads)
    dataset = build(config, batch_size=4)
    with iter(dataset) as iterator:
        states, batches = [], []
        for _ in range(9):
            states.append(json.loads(json.dumps(iterator.get_state())))
            batches.append(next(iterator))
    order = np.concatenate([batch["ids"] for batch in batches]).tolist()
    assert sorted(order[:15]) == sorted(order[15:30]) == list(range(15)) and order[:15] != order[15:30]
    for place in range(0, 9, 1 if threads == 0 else 4):
        with iter(dataset) as resumed:
            resumed.set_state(states[place])
            assert_batches_equal(take(resumed, 9 - place), batches[place:])


def test_window_shuffle_reads_few_shards_at_a_time(tmp_path):
    config = WebDatasetData(shards=write_shards(tmp_path, 4, 5), shuffle_window=2, num_threads=0)
    ids = np.concatenate([b["ids"] for b in take(iter(build(config, batch_size=10)), 2)])
    assert len(set((ids[:10] // 5).tolist())) == 2


def test_every_fault_in_a_tar_is_counted_by_its_cause(tmp_path):
    members = [(f"{cause}.png", data) for cause, data in BROKEN_IMAGES.items()]
    members += [(f"{cause}.txt", b"text") for cause in BROKEN_IMAGES]
    members += [
        ("alone.png", png(1)),
        ("words.txt", b"no picture"),
        ("blank.png", png(2)),
        ("blank.txt", b" \n"),
    ]
    members += [("latin.png", png(3)), ("latin.txt", "caf\u00e9".encode("latin-1"))]
    members += [
        ("cut.png", png(3)),
        ("cut.json", b'{"caption": '),
        ("list.png", png(3)),
        ("list.json", b"[1]"),
    ]
    members += [
        ("deep.png", png(3)),
        ("deep.json", b"[" * 100_000),
        ("none.png", png(3)),
        ("none.json", b"{}"),
    ]
    members += [("half.png", png(3)), ("half.json", b'{"caption": "\\ud800"}')]
    members += [
        ("twice.png", png(4)),
        ("twice.txt", b"first"),
        ("twice.png", png(5)),
        ("twice.txt", b"second"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    config = WebDatasetData(shards=str(path), num_threads=0, crop_scale=None)
    sampler = build(config).samplers[0]
    source, found = sampler.source, {}
    for number in range(len(source)):
        try:
            sampler._read(number, 0, None)
            found.setdefault(source.indices[0].key(number), []).append("good")
        except BadSample as error:
            found.setdefault(source.indices[0].key(number), []).append(error.cause)
    assert found == {
        **{cause: [cause] for cause in BROKEN_IMAGES},
        "alone": ["no_caption"],
        "words": ["no_image"],
        "blank": ["no_caption"],
        "latin": ["bad_record"],
        "cut": ["bad_record"],
        "list": ["bad_record"],
        "deep": ["bad_record"],
        "none": ["no_caption"],
        "half": ["bad_record"],
        "twice": ["good", "duplicate_key"],
    }
    assert source[[i for i in range(len(source)) if source.indices[0].key(i) == "twice"][0]]["image"] == png(
        4
    )
    iterator = iter(build(config, batch_size=len(source)))
    next(iterator)
    counts = iterator.tally.counts
    assert sum(counts.values()) == len(source) - 1 and counts["bad_record"] == 5 and counts["no_caption"] == 3
    with pytest.raises(DataError, match=f"{len(source) - 1} of {len(source)} samples"):
        iterator.check_faults()


def test_odd_but_good_images_are_no_faults(tmp_path):
    members = [(name, data) for name, data, _ in odd_images()]
    members += [(name.rsplit(".", 1)[0] + ".txt", b"x") for name, _, _ in odd_images()]
    config = WebDatasetData(shards=str(write_tar(tmp_path / "a.tar", members)))
    sizes = {example["name"].split("/")[1]: example["image"].size for example in config.examples("train")}
    assert sizes == {name.rsplit(".", 1)[0]: size for name, _, size in odd_images()}
    assert all(example["image"].mode == "RGB" for example in config.examples("train"))


def test_captions_come_from_txt_before_json(tmp_path):
    both = [("a.jpg", b"x"), ("a.txt", b"from txt\n"), ("a.json", b'{"caption": "from json"}')]
    swapped = [("b.jpg", b"x"), ("b.json", b'{"caption": "from json"}'), ("b.txt", b"from txt")]
    empty = [("c.jpg", b"x"), ("c.txt", b""), ("c.json", b'{"caption": ["one", "two"]}')]
    void = [("d.jpg", b"x"), ("d.json", b""), ("d.txt", b"")]
    path = write_tar(tmp_path / "a.tar", both + swapped + empty + void)
    assert outcomes(path) == {"a": ("from txt",), "b": ("from txt",), "c": ("one", "two"), "d": "bad_record"}
    other = write_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.json", b'{"alt": "other", "caption": "no"}')])
    assert outcomes(other, json_caption="alt") == {"a": ("other",)}


def test_images_are_chosen_by_extension(tmp_path):
    members = [
        ("a.webp", b"4"),
        ("a.png", b"3"),
        ("a.JPEG", b"2"),
        ("a.jpg", b"1"),
        ("a.txt", b"x"),
        ("a.npy", b"0"),
    ]
    source = WebDatasetData(shards=str(write_tar(tmp_path / "a.tar", members))).source()
    assert len(source) == 1 and source[0]["image"] == b"1"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path, format):
    folder = "d" * 90 + "/" + "e" * (9 if format == tarfile.USTAR_FORMAT else 200)
    names = [f"{folder}/k.more.png", f"{folder}/k.png", "\u00fc.png", ".hidden.png"]
    members = [(name, name.encode()) for name in names] + [(f"{folder}/k.txt", b"long"), ("\u00fc.txt", b"u")]
    path = write_tar(tmp_path / "a.tar", members, format)
    assert outcomes(path) == {f"{folder}/k": ("long",), "\u00fc": ("u",)}


def test_names_are_never_used_as_paths(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    hard = tarfile.TarInfo("hard.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../secret.txt"
    hard.size = 600
    device, pipe, folder = (tarfile.TarInfo(name) for name in ("dev.png", "pipe.png", "dir.png"))
    device.type, pipe.type, folder.type = tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE
    names = ["../../up", "/etc/passwd", "c:\\windows", "nul\0name"]
    members = [pair for n in names[:3] for pair in [(f"{n}.png", png(1)), (f"{n}.txt", b"x")]]
    path = write_tar(
        tmp_path / "a.tar", [link, hard, device, pipe, folder, *members, ("z.png", png(2)), ("z.txt", b"z")]
    )
    before = sorted(tmp_path.rglob("*"))
    assert outcomes(path) == {"../../up": ("x",), "/etc/passwd": ("x",), "c:\\windows": ("x",), "z": ("z",)}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_cut_anywhere_gives_what_came_before(tmp_path):
    whole = write_tar(
        tmp_path / "whole.tar",
        [(f"{i}.{e}", png(i) if e == "png" else b"x") for i in range(3) for e in ("png", "txt")],
    )
    content = whole.read_bytes()
    last_text = content.rindex(b"2.txt")
    cut = tmp_path / "cut.tar"
    for size in [*range(0, last_text + 1100, 37), *range(0, last_text + 1100, 512)]:
        cut.write_bytes(content[:size])
        found = outcomes(cut)
        complete = sum(value == ("x",) for value in found.values())
        lost = [value for value in found.values() if value != ("x",)]
        assert complete == sum(size >= content.index(f"{i}.txt".encode()) + 513 for i in range(3))
        assert 1 <= len(lost) <= 2 and set(lost) <= {"truncated", ()}, size


def corrupted(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def checked(header):
    """A header block with its checksum put right."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7],
)
def test_a_member_that_claims_more_than_the_file_is_truncated(tmp_path, size):
    path = write_tar(
        tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1)), ("b.txt", b"x")]
    )
    at = path.read_bytes().index(b"b.png")
    header = bytearray(path.read_bytes()[at : at + 512])
    header[124:136] = size
    corrupted(path, at, checked(header))
    assert outcomes(path) == {"a": ("x",), "b": "truncated"}


@pytest.mark.parametrize("size", [b"\xff" * 12, b"12x45678901\0", b"-0000000001\0"])
def test_an_impossible_size_ends_the_tar_as_corrupt(tmp_path, size):
    path = write_tar(
        tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1)), ("b.txt", b"x")]
    )
    at = path.read_bytes().index(b"b.png")
    header = bytearray(path.read_bytes()[at : at + 512])
    header[124:136] = size
    corrupted(path, at, checked(header))
    assert outcomes(path) == {"a": ("x",), f"(byte {at})": "corrupt"}


def test_a_damaged_header_ends_the_tar_as_corrupt(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1))])
    at = path.read_bytes().index(b"b.png")
    corrupted(path, at, b"B")
    assert outcomes(path) == {"a": ("x",), f"(byte {at})": "corrupt"}


def test_a_huge_extension_header_is_not_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x")])
    header = bytearray(path.read_bytes()[:512])
    header[124:136], header[156:157] = b"00010000000\0", b"x"
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    path.write_bytes(content + checked(header) + bytes(3 << 20))
    assert outcomes(path) == {"a": ("x",), f"(byte {len(content) + 512})": "corrupt"}


def test_members_above_the_size_limits_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("mmjax.data.tar_index.MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr("mmjax.data.tar_index.MAX_TEXT_BYTES", 1000)
    members = [("a.png", bytes(1001)), ("a.txt", b"x"), ("b.png", bytes(1000)), ("b.txt", b"x" * 1001)]
    assert outcomes(write_tar(tmp_path / "a.tar", members)) == {"a": "too_large", "b": "too_large"}


def test_a_shard_that_shrinks_during_the_run_is_a_fault(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x")])
    source = WebDatasetData(shards=str(path)).source()
    os.truncate(path, 600)
    assert outcome(source, 0) == "truncated"


def test_a_file_that_is_no_tar_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(DataError, match="a.tar: not a tar file"):
        index_tar(path)
    with pytest.raises(DataError, match="b.tar: cannot read the shard"):
        index_tar(tmp_path / "b.tar")


def test_shards_without_samples_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("readme.md", b"x")])
    with pytest.raises(DataError, match="no samples in 1 shards"):
        WebDatasetData(shards=str(tmp_path / "a.tar")).source()


def test_an_empty_shard_among_others_is_fine(tmp_path):
    shards = write_shards(tmp_path, 3, 4)
    write_tar(tmp_path / "00001.tar", [])
    config = WebDatasetData(shards=shards, shuffle_window=1, num_threads=0)
    ids = np.concatenate([batch["ids"] for batch in take(iter(build(config)), 2)])
    assert sorted(ids.tolist()) == list(range(8))


def test_progress_is_told_after_every_shard(tmp_path):
    seen = []
    WebDatasetData(shards=write_shards(tmp_path)).source(progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="shuffle_window"):
        WebDatasetData(shards="a.tar", shuffle_window=0)
    with pytest.raises(ConfigError, match="set test_shards"):
        WebDatasetData(shards="a.tar").examples("test")
