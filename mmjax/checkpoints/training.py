"""Training checkpoints: arrays through orbax, the rest as JSON, all of it under a checked manifest.

A checkpoint is written into a hidden folder, every file is flushed to disk, the manifest with each
file's size and SHA-256 is written last, and one rename makes it visible. So a folder named after a
step is whole; where its files no longer agree with its manifest, it was damaged later, and it is
never restored. Orbax alone would hand out flipped bits as if nothing were wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmjax.errors import CheckpointError

MANIFEST = "manifest.json"
ARRAYS = "arrays"
STATE = "state.json"
DAMAGED = ".damaged"
_WRITING = ".writing-"
_REMOVING = ".removing-"
_FORMAT = 1
_CHUNK = 1 << 22


class CheckpointStore:
    """The checkpoints of one run: a folder with one folder per kept step.

    Args:
        folder: where they live; made when the first is written.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first; nothing is checked."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal())

    def path(self, step: int) -> Path:
        """The folder of one step."""
        return self.folder / str(step)

    def save(self, step: int, arrays: Mapping[str, jax.Array], state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, make it visible at once, and drop those beyond `keep`.

        Args:
            step: names the checkpoint; one of the same name is replaced.
            arrays: name to array, sharded or not; every process calls this together.
            state: JSON-serialisable; every process may give its own.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it cannot be written (the message says why).
        """
        target, writing = self.path(step), self.folder / f"{_WRITING}{step}"
        try:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                writing.mkdir()
            _barrier(f"checkpoint {step} begins")
            _save_arrays(writing / ARRAYS, arrays)
            shapes = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in arrays.items()}
            body = {"format": _FORMAT, "step": step, "arrays": shapes, "state": dict(state)}
            _write(writing / _state_file(jax.process_index()), json.dumps(body, sort_keys=True))
            _barrier(f"checkpoint {step} written")
            if jax.process_index() == 0:
                write_manifest(writing)
                self._discard(target)
                self._discard(Path(f"{target}{DAMAGED}"))
                os.rename(writing, target)
                _sync_folder(self.folder)
                for old in [kept for kept in self.steps() if kept < step][: -self.keep + 1 or None]:
                    self._discard(self.path(old))
            _barrier(f"checkpoint {step} kept")
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoint {target}: {error}") from error
        return target

    def newest(self, report: Callable[[str], None]) -> int | None:
        """The newest step whose files all agree with their manifest; None if nothing was ever kept.

        Args:
            report: called with one line for every damaged checkpoint met on the way.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            faults = check_manifest(self.path(step))
            if not faults:
                return step
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            report(f"damaged checkpoint {self.path(step)}: {faults[0]}{more}")
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; "
                "start again with --overwrite, or bring the files back"
            )
        return None

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of later steps, which `newest` found damaged, to <step>.damaged."""
        for step in self.steps():
            if step > after:
                aside = Path(f"{self.path(step)}{DAMAGED}")
                self._discard(aside)
                os.rename(self.path(step), aside)

    def read_state(self, step: int) -> dict[str, Any]:
        """The JSON state that this process gave to `save` (that of process 0 where it gave none)."""
        return self._body(step)["state"]

    def read_arrays(
        self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Restore the arrays onto the given shardings, which may span another number of devices.

        Args:
            step: a step that `newest` returned.
            shapes: name to shape and dtype wanted; has to be exactly what was saved.
            shardings: name to sharding.

        Raises:
            CheckpointError: names, shapes or dtypes differ (all are listed), or orbax fails.
        """
        wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in shapes.items()}
        saved = self._body(step)["arrays"]
        faults = [f"{name} is missing" for name in wanted if name not in saved]
        faults += [f"{name} is not in the experiment" for name in saved if name not in wanted]
        faults += [
            f"{name} is {_shape(saved[name])}, the experiment has {_shape(wanted[name])}"
            for name in wanted
            if name in saved and saved[name] != wanted[name]
        ]
        if faults:
            raise CheckpointError(
                f"checkpoint {self.path(step)} does not fit the experiment: " + "\n  ".join(faults)
            )
        try:
            return _load_arrays(self.path(step) / ARRAYS, shapes, shardings)
        except Exception as error:
            # Whatever orbax raises here, the reader needs the folder's name and one line.
            raise CheckpointError(f"cannot read checkpoint {self.path(step)}: {error}") from error

    def _body(self, step: int) -> dict[str, Any]:
        mine = self.path(step) / _state_file(jax.process_index())
        body = json.loads((mine if mine.is_file() else self.path(step) / _state_file(0)).read_text("utf-8"))
        if body["format"] != _FORMAT:
            raise CheckpointError(
                f"checkpoint {self.path(step)} has format {body['format']!r}; "
                f"this version reads format {_FORMAT}"
            )
        return body

    def _sweep(self) -> None:
        """Remove what an interrupted write or removal left."""
        for entry in self.folder.iterdir():
            if entry.name.startswith((_WRITING, _REMOVING)):
                shutil.rmtree(entry)

    def _discard(self, path: Path) -> None:
        # Renamed first: a folder half removed must not look like a damaged checkpoint.
        if path.exists():
            hidden = self.folder / f"{_REMOVING}{path.name}"
            os.rename(path, hidden)
            shutil.rmtree(hidden)


def write_manifest(folder: Path) -> None:
    """Flush every file under `folder` to disk and write its manifest, with a digest of its own."""
    entries = _measure(folder, sorted(_files(folder)), flush=True)
    listing = json.dumps({"format": _FORMAT, "files": entries}, sort_keys=True)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    _write(folder / MANIFEST, f"{listing}\n{digest}\n")
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync_folder(inner)


def check_manifest(folder: Path) -> list[str]:
    """What is wrong with a folder that `write_manifest` sealed, one line each; empty if nothing is."""
    try:
        listing, digest, end = (folder / MANIFEST).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if end or hashlib.sha256(listing).hexdigest().encode() != digest:
        return [f"{MANIFEST} does not agree with its own digest"]
    entries: dict[str, Any] = json.loads(listing)["files"]
    faults, present = [], []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        else:
            present.append(name)
    try:
        found = _measure(folder, present, flush=False)
    except OSError as error:
        return [*faults, f"{error.filename} cannot be read ({error.strerror})"]
    return faults + [f"{name} has another SHA-256" for name in present if found[name] != entries[name]]


def _measure(folder: Path, names: list[str], *, flush: bool) -> dict[str, dict[str, Any]]:
    def measure(name: str) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
            if flush:
                os.fsync(file.fileno())
        return {"bytes": size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(max_workers=min(8, max(1, len(names)))) as pool:
        return dict(zip(names, pool.map(measure, names), strict=True))


def _files(folder: Path) -> list[str]:
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in found if name != MANIFEST]


def _save_arrays(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    # Compression halves the speed and saves a twelfth: random mantissas do not compress.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as writer:
        writer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))


def _load_arrays(
    path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], shardings: Mapping[str, Any]
) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    wanted = {
        name: ocp.ArrayRestoreArgs(sharding=shardings[name], global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in shapes.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=ocp.args.PyTreeRestore(item=dict(shapes), restore_args=wanted))


def _state_file(process: int) -> str:
    return STATE if process == 0 else f"state.{process}.json"


def _shape(entry: list[Any]) -> str:
    return f"{entry[1]}{entry[0]}"


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
