"""Which files a specification of shards means, and indices kept between runs."""

import io

import numpy as np
import pytest

from mmjax.data.index_cache import load_or_index
from mmjax.data.shards import expand_braces, find_shards
from mmjax.data.tar_index import DTYPES, index_tar
from mmjax.errors import ConfigError, DataError
from tests.data.makers import png, write_shards, write_tar


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}", ["0", "1", "2"]),
        ("{09..11}", ["09", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("x{a,b}{1..2}", ["xa1", "xa2", "xb1", "xb2"]),
        ("{a,{b,c}}", ["a", "b", "a", "c"]),
        ("{a}", ["{a}"]),
        ("{}-{0..1}", ["{}-0", "{}-1"]),
    ],
)
def test_braces(pattern, expected):
    assert list(expand_braces(pattern)) == expected


def test_shards_by_pattern_folder_list_and_join(tmp_path):
    spec = write_shards(tmp_path)
    names = [tmp_path / f"0000{i}.tar" for i in range(3)]
    assert find_shards(spec) == names
    assert find_shards(str(tmp_path)) == names
    assert find_shards(str(tmp_path / "*.tar")) == names
    assert find_shards([str(name) for name in reversed(names)]) == names[::-1]
    assert find_shards(f"{names[2]}::{names[0]}") == [names[2], names[0]]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("", ConfigError, "no shards given"),
        ((), ConfigError, "no shards given"),
        ("s3://bucket/{0..9}.tar", ConfigError, "only local files"),
        ("pipe:curl x", ConfigError, "only local files"),
        ("{0..99999999999}.tar", ConfigError, "more than"),
        ("{x}/{00000..00004}.tar", DataError, "2 of 5 shards are missing: .*00003.tar"),
        ("{x}/*.zip", DataError, "no shards match"),
        ("{x}/00000.tar::{x}/00000.tar", DataError, "named twice"),
    ],
)
def test_wrong_shards_are_refused(tmp_path, spec, kind, message):
    write_shards(tmp_path)
    spec = spec.replace("{x}", str(tmp_path)) if isinstance(spec, str) else spec
    with pytest.raises(kind, match=message):
        find_shards(spec)


def same_index(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in DTYPES)


def test_the_index_cache_is_used_and_noticed_to_be_old(tmp_path, monkeypatch):
    path, cache = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x")]), tmp_path / "cache"
    first = load_or_index(path, cache)
    assert [entry.suffix for entry in cache.iterdir()] == [".npz"]
    calls = []
    monkeypatch.setattr("mmjax.data.index_cache.index_tar", lambda p: calls.append(p) or index_tar(p))
    assert same_index(load_or_index(path, cache), first) and not calls
    write_tar(path, [("a.png", png(0)), ("a.txt", b"x"), ("b.png", png(1)), ("b.txt", b"y")])
    assert len(load_or_index(path, cache)) == 2 and calls == [path]


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle", "outside", "ends", "dtype"])
def test_a_damaged_cache_entry_is_made_anew(tmp_path, damage):
    path, cache = write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"x")]), tmp_path / "cache"
    first = load_or_index(path, cache)
    (entry,) = cache.iterdir()
    arrays = {name: getattr(first, name) for name in DTYPES}
    changed = {
        "pickle": {"keys": np.array([{}], object)},
        "outside": {"image_offset": arrays["image_offset"] + 10**6},
        "ends": {"key_ends": arrays["key_ends"] + 1},
        "dtype": {"fault": arrays["fault"].astype(np.int64)},
    }
    if damage in changed:
        buffer = io.BytesIO()
        np.savez(buffer, **{**arrays, **changed[damage]})
        entry.write_bytes(buffer.getvalue())
    else:
        entry.write_bytes({"cut": entry.read_bytes()[:-100], "text": b"hello", "empty": b""}[damage])
    assert same_index(load_or_index(path, cache), first)
    assert same_index(load_or_index(path, cache), first)
    assert [e.name for e in cache.iterdir()] == [entry.name]


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png(0))])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file/cache: cannot keep the index"):
        load_or_index(path, tmp_path / "file" / "cache")
