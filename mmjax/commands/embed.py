"""Write embeddings of images and texts to a file: .npz with names, or .npy of one kind."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmjax.commands.data import embed_data, embed_lines, open_data
from mmjax.commands.models import open_model
from mmjax.commands.output import check_output, count_text, print_json, print_table, write_whole
from mmjax.commands.parser import UsageError, add_batch_size, add_data, add_json, add_model

_SUFFIXES = (".npz", ".npy")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax embed`."""
    add_model(parser)
    parser.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="images to embed")
    parser.add_argument("--text", nargs="+", action="extend", metavar="TEXT", help="texts to embed")
    parser.add_argument("--text-file", metavar="FILE", help="texts to embed, one per line (UTF-8)")
    parser.add_argument(
        "--captions", action="store_true", help="embed the captions of --data too, each distinct one once"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".npz: image_embeds [N, E] with image_names, text_embeds [M, E] with texts; "
        ".npy: the embeddings of one kind, names beside them in FILE.names.json",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE when it exists")
    parser.add_argument("--raw", action="store_true", help="leave embeddings as they are, not of length 1")
    add_batch_size(parser)
    add_json(parser)
    add_data(parser, required=False)


def run(options: argparse.Namespace) -> int:
    """Run `mmjax embed`."""
    out = Path(options.out).expanduser()
    names_file = out.with_name(f"{out.name}.names.json")
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"{out}: the name has to end in {' or '.join(_SUFFIXES)} (see mmjax embed --help)")
    _check(options, single=out.suffix == ".npy")
    for path in (out, names_file) if out.suffix == ".npy" else (out,):
        check_output(path, force=options.force)
    arrays = _embed(options)
    if out.suffix == ".npz":
        _write_npz(out, arrays, options.force)
    else:
        kind = "image" if "image_embeds" in arrays else "text"
        names = arrays["image_names" if kind == "image" else "texts"]
        # Names first: an array without names is worse than names without an array.
        text = json.dumps(list(names)).encode()
        write_whole(names_file, lambda file: file.write(text), force=options.force)
        _write_npy(out, arrays[f"{kind}_embeds"], options.force)
    _print(options, out, arrays)
    return 0


def _check(options: argparse.Namespace, *, single: bool) -> None:
    images = bool(options.image or options.data)
    texts = bool(options.text or options.text_file or options.captions)
    if options.image and options.data:
        raise UsageError("give --image or --data, not both (see mmjax embed --help)")
    if options.captions and not options.data:
        raise UsageError("--captions needs --data (see mmjax embed --help)")
    if not images and not texts:
        raise UsageError(
            "nothing to embed: give --image, --text, --text-file or --data (see mmjax embed --help)"
        )
    if single and images and texts:
        raise UsageError("a .npy file holds one kind of embedding: name a .npz for images and texts")


def _embed(options: argparse.Namespace) -> dict[str, Any]:
    """The arrays of the .npz, by name."""
    import numpy as np

    texts = _texts(options)
    examples, labelled = None, False
    if options.image:
        from mmjax.evaluation.sources import image_files

        examples = image_files(options.image)
    elif options.data:
        examples = open_data(options, options.data, options.split).examples
        labelled = examples.has_labels
    opened = open_model(
        options.model, options.dtype, images=examples is not None, texts=bool(texts) or options.captions
    )
    arrays: dict[str, Any] = {}
    if examples is not None:
        embeds, reading = embed_data(options, opened, examples, normalize=not options.raw)
        arrays |= {"image_embeds": embeds, "image_names": np.array(reading.names)}
        if labelled:
            arrays["labels"] = reading.class_labels()
        if options.captions:
            texts += dict.fromkeys(text for several in reading.texts for text in several)
    if texts:
        arrays["text_embeds"] = embed_lines(options, opened, texts, normalize=not options.raw)
        arrays["texts"] = np.array(texts)
    return arrays


def _texts(options: argparse.Namespace) -> list[str]:
    from mmjax.errors import DataError

    texts = list(options.text or ())
    if options.text_file:
        path = Path(options.text_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise DataError(f"{path}: no lines of text")
        texts += lines
    if any(not text.strip() for text in texts):
        raise DataError("a text is empty")
    return texts


def _write_npz(path: Path, arrays: dict[str, Any], force: bool) -> None:
    import numpy as np

    write_whole(path, lambda file: np.savez(file, **arrays), force=force)


def _write_npy(path: Path, array: Any, force: bool) -> None:
    import numpy as np

    write_whole(path, lambda file: np.save(file, array, allow_pickle=False), force=force)


def _print(options: argparse.Namespace, out: Path, arrays: dict[str, Any]) -> None:
    shapes = {name: list(arrays[name].shape) for name in ("image_embeds", "text_embeds") if name in arrays}
    if options.json:
        print_json({"model": options.model, "out": str(out), "dtype": "float32", "arrays": shapes})
        return
    rows = [(str(out), name, count_text(shape[0]), count_text(shape[1])) for name, shape in shapes.items()]
    print_table(("file", "array", "rows", "width"), rows, numeric=("rows", "width"))
