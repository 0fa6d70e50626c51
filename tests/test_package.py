"""The house as a whole: rooms, re-exports, sizes of files, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmjax"
MODULES = sorted(PACKAGE.rglob("*.py"))
# From the ground up: a room imports only from those before it, and from itself.
ROOMS = (
    ("errors",),
    ("lazy",),
    ("parallel",),
    ("nn",),
    ("vision",),
    ("connectors",),
    ("language",),
    ("losses",),
    ("checkpoints",),
    ("models",),
    ("generation",),
    ("data",),
    ("training",),
    ("evaluation",),
    ("commands", "cli"),
)
FLOOR = {name: level for level, names in enumerate(ROOMS) for name in names}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules of mmjax that a file imports, at the top or inside functions."""
    found = set()
    package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # "from mmjax import data" names a room, "from mmjax.data import X" need not.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "mmjax" else {base}
    return {name for name in found if name.split(".")[0] == "mmjax"}


def test_every_module_lives_in_a_room():
    assert len(MODULES) > 80
    outside = {path.name for path in MODULES if path.parent == PACKAGE}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms | {name.removesuffix(".py") for name in outside} - {"__init__"} <= set(FLOOR)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent != PACKAGE or p.stem != "__init__"], ids=dotted
)
def test_a_room_imports_only_from_those_before_it(path):
    room = dotted(path).split(".")[1]
    for name in imported(path):
        _, _, other = name.partition(".")
        other = other.split(".")[0]
        if other in ("", "__version__"):
            # The whole package reaches every room.
            assert room in ROOMS[-1], f"{dotted(path)} imports mmjax as a whole"
            continue
        assert other in FLOOR, f"{dotted(path)} imports {name}"
        below = FLOOR[other] < FLOOR[room] or other == room or {other, room} == set(ROOMS[-1])
        assert below, f"{dotted(path)} imports {name}"


def public(module: object) -> list[str]:
    return list(getattr(module, "__all__", ()))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_what_is_exported_exists_and_says_what_it_is(path):
    module = importlib.import_module(dotted(path))
    assert module.__doc__
    names = public(module)
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(module, name)
        assert name in dir(module)
        if inspect.isfunction(value) or inspect.isclass(value):
            first = (value.__doc__ or "").split("\n")[0]
            generated = first.startswith(f"{name}(")
            assert first and not generated, f"{dotted(path)}.{name} has no docstring"


def test_rooms_name_what_they_give():
    for name in (
        "parallel",
        "nn",
        "vision",
        "language",
        "losses",
        "checkpoints",
        "models",
        "generation",
        "data",
        "training",
    ):
        assert public(importlib.import_module(f"mmjax.{name}")), name


def test_the_public_surface():
    import mmjax

    assert {"load", "save", "losses", "models", "nn", "parallel", "__version__"} <= {
        *mmjax.__all__,
        "__version__",
    }
    assert callable(mmjax.load) and callable(mmjax.save)
    with pytest.raises(AttributeError, match="module 'mmjax' has no attribute 'nothing'"):
        _ = mmjax.nothing


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_files_and_functions_fit_in_a_head(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def test_init_files_only_re_export():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr, ast.If)
    for path in MODULES:
        if path.name == "__init__.py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                assert isinstance(node, allowed), f"{path}: line {node.lineno}"


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running code."""
    script = f"{code}\nimport sys\nprint(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA", "JAX", "COV"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


HEAVY = {
    *("PIL", "grain", "orbax", "sklearn", "scipy", "matplotlib", "tensorboardX", "rich", "optax", "pandas"),
    *("torch", "transformers", "tensorflow", "huggingface_hub", "tokenizers", "safetensors"),
}


def test_import_brings_nothing_heavy():
    loaded = modules_after("import mmjax")
    assert "mmjax" in loaded
    assert not loaded & HEAVY


HELP = """
import contextlib, io, mmjax.cli
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    mmjax.cli.main(["--help"])
assert "zeroshot" in out.getvalue()
"""


@pytest.mark.parametrize("code", ["import mmjax.cli", HELP])
def test_the_command_line_starts_without_jax(code):
    loaded = modules_after(code)
    assert "mmjax" in loaded
    assert not loaded & {*HEAVY, "jax", "jaxlib", "flax", "numpy"}


def test_models_need_no_other_framework():
    loaded = modules_after("import mmjax.models, mmjax.losses\nmmjax.models.CLIPModel")
    assert "jax" in loaded
    assert not loaded & {"torch", "transformers", "tensorflow", "grain", "orbax", "sklearn", "matplotlib"}
