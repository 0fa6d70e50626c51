"""Show what a model folder holds, from its config and the headers of its weights; none are loaded."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.commands.output import byte_text, count_text, print_json, print_table
from mmjax.commands.parser import add_json, positive_int

# The facts of a config that people look for first, in this order; --json has all of them.
_FACTS = (
    "model_type",
    "projector",
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "projection_dim",
    "num_labels",
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BITS = re.compile(r"\d+")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax info`."""
    parser.add_argument("folder", metavar="DIR", help="a model folder, or a hub id")
    parser.add_argument(
        "--depth", type=positive_int, default=3, metavar="N", help="levels of modules to show (default: 3)"
    )
    parser.add_argument("--all", action="store_true", help="show every module and parameter, each layer too")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run `mmjax info`."""
    facts = inspect(options.folder)
    if options.json:
        print_json(facts)
        return 0
    print_table(("fact", "value"), _fact_rows(facts))
    print()
    tree = _tree(facts["tensors"])
    rows = _module_rows(tree, options.depth if not options.all else 10**6, merge=not options.all)
    print_table(("module", "shape", "dtype", "parameters", "bytes"), rows, numeric=("parameters", "bytes"))
    return 0


def inspect(folder: str) -> dict[str, Any]:
    """Everything `mmjax info` knows about a folder, as JSON has it.

    Raises:
        ConfigError, CheckpointError: the folder cannot be opened; tensors that do not fit are all listed.
    """
    from flax.traverse_util import flatten_dict

    from mmjax.checkpoints.rules import link
    from mmjax.models.hub import find_folder, open_headers
    from mmjax.nn import Execution, parameter_specs

    path = find_folder(folder)
    with open_headers(path, Execution()) as (family, model, reader):
        specs = flatten_dict(parameter_specs(model), sep="/")
        links = link(family.rules(model), reader.shapes, specs, str(path))
        stored = {
            target: (entry.source, reader.dtypes[entry.source]) for entry in links for target in entry.targets
        }
        weights = {reader.file_of(name) for name in reader.shapes}
        files = {_file_name(file, path): file.stat().st_size for file in weights}
        tensors = []
        for name, spec in specs.items():
            source, dtype = stored[name]
            tensors.append(
                {
                    "path": name,
                    "shape": list(spec.shape),
                    "axes": list(spec.axes),
                    "dtype": _DTYPES.get(dtype, dtype.lower()),
                    "parameters": spec.size,
                    "bytes": spec.size * _width(dtype),
                    "source": source,
                    "file": _file_name(reader.file_of(source), path),
                }
            )
    return {
        "folder": str(path),
        "model": type(model).__name__,
        "parameters": sum(tensor["parameters"] for tensor in tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "dtypes": sorted({tensor["dtype"] for tensor in tensors}),
        "files": dict(sorted(files.items())),
        "processor": sorted(name for name in _processor_files(path)),
        "config": _plain(model.config),
        "tensors": tensors,
    }


def _width(dtype: str) -> int:
    """Bytes of one number of a safetensors dtype: its name holds its bits."""
    bits = _BITS.search(dtype)
    return int(bits[0]) // 8 if bits else 1


def _file_name(file: Path, folder: Path) -> str:
    """A file's name in the folder, or its whole path where it lies elsewhere, as the eyes may."""
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def _processor_files(folder: Path) -> list[str]:
    from mmjax.language.tokenizer_config import TOKENIZER_FILES

    names = (
        "preprocessor_config.json",
        "processor_config.json",
        *TOKENIZER_FILES,
        "chat_template.jinja",
        "chat_template.json",
    )
    return [name for name in names if (folder / name).is_file()]


def _plain(config: Any) -> dict[str, Any]:
    """A config's fields as JSON, without the texts of the files that it was read from."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: _plain(value) if dataclasses.is_dataclass(value) else value
        for name, value in fields.items()
        if name not in ("hub", "generation_config")
    }


def _fact_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("folder", facts["folder"]),
        ("model", facts["model"]),
        ("parameters", count_text(facts["parameters"])),
        ("weights", f"{byte_text(facts['bytes'])} in {', '.join(facts['dtypes'])}"),
        *((f"file {name}", byte_text(size)) for name, size in facts["files"].items()),
        ("processor", ", ".join(facts["processor"]) or "none"),
    ]
    sections = {"": facts["config"]} | {
        f"{name.removesuffix('_config')} ": value
        for name, value in facts["config"].items()
        if isinstance(value, Mapping)
    }
    # Fields that this model does not use, though its config has them.
    hidden = {(prefix, "projection_dim") for prefix in sections if prefix}
    if "Classification" not in facts["model"]:
        hidden.add(("", "num_labels"))
    for prefix, section in sections.items():
        rows += [
            (f"{prefix}{name}", _fact_text(section[name]))
            for name in _FACTS
            if section.get(name) is not None and (prefix, name) not in hidden
        ]
    return rows


def _fact_text(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


Tree = dict[str, Any]


def _tree(tensors: list[dict[str, Any]]) -> Tree:
    """Tensors as nested dicts by the parts of their paths."""
    root: Tree = {}
    for tensor in tensors:
        *parents, name = tensor["path"].split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = (tuple(tensor["shape"]), tensor["dtype"], tensor["parameters"], tensor["bytes"])
    return root


def _module_rows(
    tree: Tree, depth: int, *, merge: bool, level: int = 0
) -> list[tuple[str, str, str, str, str]]:
    """Rows of a tree, children indented; modules of the same shapes in a row become one row."""
    rows = []
    for names, node in _runs(tree) if merge else (([name], node) for name, node in tree.items()):
        times = len(names)
        label = names[0] if times == 1 else f"{names[0]} ... {names[-1]} ({times} alike)"
        leaves = [node] if isinstance(node, tuple) else list(_leaves(node))
        shape = " x ".join(map(str, node[0])) or "scalar" if isinstance(node, tuple) else ""
        dtypes = ", ".join(sorted({leaf[1] for leaf in leaves}))
        count, size = (times * sum(leaf[i] for leaf in leaves) for i in (2, 3))
        rows.append((f"{'  ' * level}{label}", shape, dtypes, count_text(count), byte_text(size)))
        if not isinstance(node, tuple) and level + 1 < depth:
            rows += _module_rows(node, depth, merge=merge, level=level + 1)
    return rows


def _runs(tree: Tree) -> list[tuple[list[str], Any]]:
    """Children in order, neighbours that differ only in their number taken together."""
    runs: list[tuple[list[str], Any]] = []
    for name, node in sorted(tree.items(), key=lambda item: _in_order(item[0])):
        stem = name.rstrip("0123456789")
        alike = runs and stem != name and runs[-1][0][0].rstrip("0123456789") == stem and runs[-1][1] == node
        if alike and isinstance(node, dict):
            runs[-1][0].append(name)
        else:
            runs.append(([name], node))
    return runs


def _in_order(name: str) -> tuple[str, int]:
    """Sorts layers_10 after layers_9."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def _leaves(tree: Tree) -> list[tuple]:
    return [leaf for node in tree.values() for leaf in ([node] if isinstance(node, tuple) else _leaves(node))]
