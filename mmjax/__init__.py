"""Vision-language systems in JAX, as pure functions.

Names are imported on first use, so that ``import mmjax`` costs little more than jax and flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmjax.models.hub import load, save

__version__ = "0.1.0"
__all__ = ["load", "losses", "save"]

_FUNCTIONS = {"load": "mmjax.models.hub", "save": "mmjax.models.hub"}
_ROOMS = ("checkpoints", "data", "evaluation", "language", "losses", "models", "nn", "parallel", "training", "vision")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"mmjax.{name}")
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS, *_ROOMS})
