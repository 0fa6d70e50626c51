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
        generation,
        language,
        losses,
        models,
        nn,
        parallel,
        training,
        vision,
    )
    from mmjax.generation.scoring import score
    from mmjax.generation.text import generate
    from mmjax.models.hub import load, save

__version__ = "0.1.0"

__all__ = [
    "checkpoints",
    "data",
    "errors",
    "evaluation",
    "generate",
    "generation",
    "language",
    "load",
    "losses",
    "models",
    "nn",
    "parallel",
    "save",
    "score",
    "training",
    "vision",
]
_FUNCTIONS = {
    "generation.scoring": ("score",),
    "generation.text": ("generate",),
    "models.hub": ("load", "save"),
}
_ROOMS: dict[str, tuple[str, ...]] = {
    name: () for name in __all__ if name not in ("generate", "load", "save", "score")
}
__getattr__, __dir__ = attach(__name__, {**_FUNCTIONS, **_ROOMS})
