"""Training checkpoints: what was written comes back bitwise, what was damaged is named and passed over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mmjax.checkpoints.training import CheckpointStore, check_manifest
from mmjax.errors import CheckpointError
from mmjax.parallel import make_mesh, replicated


def example(seed: int) -> dict[str, jax.Array]:
    """Arrays of several dtypes and ranks, with the bit patterns that copies like to lose."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((8, 12)).astype(np.float32)
    weights[0, :3] = [np.nan, -0.0, np.inf]
    return {
        "params.head.kernel": jnp.asarray(weights),
        "params.head.bias": jnp.asarray(generator.standard_normal(7), jnp.bfloat16),
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
    }


def restore(store: CheckpointStore, step: int, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.items()}
    return store.read_arrays(step, shapes, {name: x.sharding for name, x in like.items()})


def bits(tree: dict[str, jax.Array]) -> dict[str, bytes]:
    return {name: np.asarray(x).tobytes() for name, x in tree.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "run"
    store = CheckpointStore(folder, keep=3)
    for step in (1, 2):
        store.save(step, example(step), {"data": {"next": step}})
    return folder


def test_what_was_saved_comes_back_bitwise(written: Path) -> None:
    store = CheckpointStore(written)
    assert store.newest(pytest.fail) == 2
    assert store.read_state(2) == {"data": {"next": 2}}
    for step in (1, 2):
        assert bits(restore(store, step, example(step))) == bits(example(step))


def test_arrays_return_onto_another_number_of_devices(tmp_path: Path) -> None:
    eight = NamedSharding(make_mesh({"data": 8}), PartitionSpec("data"))
    two = NamedSharding(make_mesh({"data": 2}, jax.devices()[:2]), PartitionSpec(None, "data"))
    value = np.arange(64, dtype=np.float32).reshape(8, 8)
    store = CheckpointStore(tmp_path / "run")
    store.save(5, {"w": jax.device_put(value, eight)}, {})
    back = store.read_arrays(5, {"w": jax.ShapeDtypeStruct((8, 8), np.float32)}, {"w": two})["w"]
    assert back.sharding == two
    np.testing.assert_array_equal(np.asarray(back), value)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep=2)
    for step in (1, 2, 9, 10):
        store.save(step, {"w": jnp.ones(2)}, {})
    assert store.steps() == [9, 10]
    assert sorted(entry.name for entry in store.folder.iterdir()) == ["10", "9"]
    one = CheckpointStore(tmp_path / "one", keep=1)
    for step in (1, 2, 3):
        one.save(step, {"w": jnp.ones(2)}, {})
    assert one.steps() == [3]


def test_nothing_written_is_nothing_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    assert store.newest(pytest.fail) is None
    assert store.steps() == []


def test_an_unfinished_write_does_not_exist_and_is_swept(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    for left in (".writing-3", ".removing-1"):
        shutil.copytree(folder / "2", folder / left)
        (folder / left / "manifest.json").unlink()
    store = CheckpointStore(folder)
    assert store.newest(pytest.fail) == 2
    store.save(3, example(3), {})
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2", "3"]


def names_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flip_bit(path: Path, generator: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    position = int(generator.integers(len(content)))
    content[position] ^= 1 << int(generator.integers(8))
    path.write_bytes(bytes(content))


def truncate(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: int(generator.integers(path.stat().st_size))])


def remove(path: Path, generator: np.random.Generator) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, truncate, remove])
def test_damage_to_any_file_is_named(
    written: Path, tmp_path: Path, damage: Callable[[Path, np.random.Generator], None]
) -> None:
    generator = np.random.default_rng(0)
    names = names_of(written / "2")
    assert {"manifest.json", "state.json"} < set(names)
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        damage(folder / "2" / name, generator)
        reports: list[str] = []
        store = CheckpointStore(folder)
        assert store.newest(reports.append) == 1, name
        assert len(reports) == 1
        assert name in reports[0]
        assert str(folder / "2") in reports[0]
        assert bits(restore(store, 1, example(1))) == bits(example(1))


def test_every_single_bit_of_the_manifest_counts(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "2"
    shutil.copytree(written / "2", folder)
    good = (folder / "manifest.json").read_bytes()
    assert check_manifest(folder) == []
    for position in range(0, len(good) * 8, 7):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        (folder / "manifest.json").write_bytes(bytes(bad))
        assert check_manifest(folder), position


def test_all_damaged_is_an_error(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    for step in ("1", "2"):
        (folder / step / "state.json").unlink()
    reports: list[str] = []
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        CheckpointStore(folder).newest(reports.append)
    assert len(reports) == 2


def test_damaged_ones_are_set_aside_until_their_step_is_written_again(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    (folder / "2" / "state.json").unlink()
    store = CheckpointStore(folder)
    store.set_aside(after=1)
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2.damaged"]
    assert store.steps() == [1]
    store.save(2, example(2), {})
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_model_lists_every_difference(written: Path) -> None:
    like = example(2)
    like["params.head.kernel"] = jnp.zeros((8, 13))
    like["params.tail.bias"] = like.pop("params.head.bias")
    with pytest.raises(CheckpointError) as caught:
        restore(CheckpointStore(written), 2, like)
    text = str(caught.value)
    assert "params.tail.bias is missing" in text
    assert "params.head.bias is not in the experiment" in text
    assert "params.head.kernel is float32[8, 12], the experiment has float32[8, 13]" in text


def test_a_newer_format_is_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    state = folder / "2" / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        CheckpointStore(folder).read_state(2)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        CheckpointStore(tmp_path / "file" / "run").save(1, {"w": jnp.ones(2)}, {})


def test_restoring_where_nothing_moves_keeps_the_mesh(tmp_path: Path) -> None:
    whole = replicated(make_mesh({"data": 8}))
    store = CheckpointStore(tmp_path / "run")
    store.save(1, {"w": jax.device_put(np.float32(3), whole)}, {})
    back = store.read_arrays(1, {"w": jax.ShapeDtypeStruct((), np.float32)}, {"w": whole})["w"]
    assert back.sharding == whole
    assert float(back) == 3.0
