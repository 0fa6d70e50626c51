"""Vision-language systems in JAX, as pure functions.

Names are imported on first use, so that `import mmjax` costs little more than jax and flax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax import (
        checkpoints,
        data,
        errors,
        evaluation,
        language,
        losses,
        models,
        nn,
        parallel,
        training,
        vision,
    )
    from mmjax.models.hub import load, save

__version__ = "0.1.0"

__all__ = [
    "checkpoints",
    "data",
    "errors",
    "evaluation",
    "language",
    "load",
    "losses",
    "models",
    "nn",
    "parallel",
    "save",
    "training",
    "vision",
]
_FUNCTIONS = ("load", "save")
_ROOMS = {name: () for name in __all__ if name not in _FUNCTIONS}
__getattr__, __dir__ = attach(__name__, {"models.hub": _FUNCTIONS, **_ROOMS})
