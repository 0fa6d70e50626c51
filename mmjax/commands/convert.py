"""Read a model folder and write it again: another dtype, another size of files, or only to check it.

The processor's files come along, and generation_config.json as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from mmjax.commands.output import byte_text, count_text, print_json, print_table
from mmjax.commands.parser import DTYPES, add_json, byte_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax convert`."""
    parser.add_argument("source", metavar="SRC", help="a model folder, or a hub id")
    parser.add_argument("target", metavar="DST", help="the folder to write: a new one, or an empty one")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the parameters (default: the folder's)")
    parser.add_argument(
        "--shard-size",
        type=byte_size,
        metavar="SIZE",
        help="largest weights file, such as 2GB (default: 4GB)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run `mmjax convert`."""
    import mmjax
    from mmjax.models.hub import find_folder

    target = Path(options.target).expanduser()
    check_target(target)
    source = find_folder(options.source)
    model, params, processor = mmjax.load(source, dtype=options.dtype)
    shards = {} if options.shard_size is None else {"shard_bytes": options.shard_size}
    # Written beside the target and moved there when whole, so that no half folder ever has its name.
    part = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent))
    try:
        mmjax.save(part, model, params, processor, **shards)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o777 & ~mask)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _print(options, target, params)
    return 0


def check_target(target: Path) -> None:
    """Refuse a folder to write before the work starts.

    Raises:
        DataError: it is a file or not empty, or its parent does not exist or cannot be written.
    """
    from mmjax.errors import DataError

    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise DataError(f"{target}: is not empty; name another folder, or empty it first")
    if not target.parent.is_dir():
        raise DataError(f"{target.parent}: no such folder; make it first")
    if not os.access(target.parent, os.W_OK):
        raise DataError(f"{target.parent}: cannot be written to")


def _print(options: argparse.Namespace, target: Path, params: dict) -> None:
    import jax

    leaves = jax.tree.leaves(params)
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    sizes = {path.name: path.stat().st_size for path in sorted(target.iterdir()) if path.is_file()}
    if options.json:
        report = {"source": options.source, "target": str(target), "files": sizes}
        print_json({**report, "parameters": sum(leaf.size for leaf in leaves), "dtypes": dtypes})
        return
    rows = [(name, byte_text(size)) for name, size in sizes.items()]
    print_table(("file", "size"), rows, numeric=("size",))
    print(f"{target}: {count_text(sum(leaf.size for leaf in leaves))} parameters, {', '.join(dtypes)}")
