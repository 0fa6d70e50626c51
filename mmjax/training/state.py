"""What a training step takes and gives back, as one pytree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from mmjax.parallel import replicated

FlatParams = dict[str, jax.Array]
NOT_BAD = -1


@flax.struct.dataclass
class TrainState:
    """The state of one stage; every field is an array or a dict of arrays keyed by parameter path.

    Attributes:
        step: int32 [], updates done in this stage.
        params: the trained parameters.
        frozen: the others; no gradient is taken and no optimizer state is kept for them.
        opt_state: optax state over `params`.
        ema: exponential moving average of `params`, or None.
        key: typed PRNG key of the stage; step n uses fold_in(key, n).
        bad_step: int32 [], the step (from 1) whose loss or gradient was not finite, or -1. From
            then on the state no longer moves.
        bad_term: int32 [], which term it was: index into the task's terms, or their number for
            the gradient.
    """

    step: jax.Array
    params: FlatParams
    frozen: FlatParams
    opt_state: Any
    ema: FlatParams | None
    key: jax.Array
    bad_step: jax.Array
    bad_term: jax.Array


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters as one dict keyed by path.

    >>> flatten({"head": {"kernel": 1}})
    {'head/kernel': 1}
    """
    return flatten_dict(params, sep="/")


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Flat dicts of parameters as one nested dict, as `model.apply` takes it.

    >>> merge({"head/kernel": 1}, {"head/bias": 2})
    {'head': {'kernel': 1, 'bias': 2}}
    """
    return unflatten_dict({path: leaf for part in parts for path, leaf in part.items()}, sep="/")


def create_state(
    params: Mapping[str, Any],
    trained: frozenset[str],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema: bool = False,
) -> TrainState:
    """A stage's first state.

    Args:
        params: all parameters, flat, keyed by path.
        trained: the paths that train.
        optimizer: made over the trained paths.
        key: typed PRNG key.
        ema: whether to keep an average of the trained parameters.
    """
    moving = {path: leaf for path, leaf in params.items() if path in trained}
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=moving,
        frozen={path: leaf for path, leaf in params.items() if path not in trained},
        opt_state=optimizer.init(moving),
        # A copy: the step donates the state, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, moving) if ema else None,
        key=key,
        bad_step=jnp.full([], NOT_BAD, jnp.int32),
        bad_term=jnp.full([], NOT_BAD, jnp.int32),
    )


def state_shardings(state: TrainState, shardings: Mapping[str, NamedSharding], mesh: Mesh) -> TrainState:
    """A sharding for every leaf: moments and averages lie as their parameter does, the rest is whole.

    Args:
        state: the state, or its shapes (jax.eval_shape).
        shardings: parameter path to sharding.
        mesh: the mesh.
    """
    whole = replicated(mesh)
    shapes = {**state.params, **state.frozen}

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        same = name in shapes and shapes[name].shape == leaf.shape
        return shardings.get(name, whole) if same and name is not None else whole

    return jax.tree_util.tree_map_with_path(choose, state)


def state_to_arrays(state: TrainState) -> dict[str, jax.Array]:
    """The state as one flat dict of plain arrays with names fit for a checkpoint.

    The key is stored as its uint32 data, and a stage that stopped at a bad step may go on.
    """
    state = state.replace(  # type: ignore[attr-defined]
        key=jax.random.key_data(state.key),
        bad_step=jnp.full_like(state.bad_step, NOT_BAD),
        bad_term=jnp.full_like(state.bad_term, NOT_BAD),
    )
    return named_leaves(state)


def state_from_arrays(template: TrainState, arrays: Mapping[str, jax.Array]) -> TrainState:
    """The inverse of `state_to_arrays`; `template` gives the structure (shapes are enough)."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    state = jax.tree_util.tree_unflatten(treedef, [arrays[_name(path)] for path, _ in paths])
    return state.replace(key=jax.random.wrap_key_data(state.key))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a state (its arrays, shapes or shardings) by the names that checkpoints use."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    # A dot joins the parts, since a slash already joins those of a parameter's path.
    parts = []
    for part in path:
        part_name = getattr(part, "key", getattr(part, "name", getattr(part, "idx", None)))
        parts.append(str(part_name))
    return ".".join(parts).replace("/", ".")
