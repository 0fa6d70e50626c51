"""A model's parameters as data: shapes, dtypes and logical axes, without computing anything."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from mmjax.nn.modules import AxesNote
from mmjax.parallel import ParamSpec


def parameter_specs(model: nn.Module) -> dict[str, Any]:
    """Nested dict of ParamSpec, in the shape of `model.init(...)["params"]`.

    Args:
        model: a module with `example_batch()` (every model of `mmjax.models` has it).
    """
    batch = model.example_batch()  # type: ignore[attr-defined]
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), **batch, mutable=True))
    notes = jax.tree.leaves_with_path(
        variables.get("intermediates", {}), is_leaf=lambda leaf: isinstance(leaf, AxesNote)
    )
    # sow wraps each note in a tuple: the last key of its path is the tuple's index.
    axes = {jax.tree_util.keystr(path[:-1]): note.axes for path, note in notes}
    return jax.tree.map_with_path(
        lambda path, leaf: ParamSpec(leaf.shape, leaf.dtype.name, axes[jax.tree_util.keystr(path)]),
        variables["params"],
    )
