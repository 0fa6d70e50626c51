"""The training step: pure, one screen, the same for every stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mmjax.training.state import NOT_BAD, FlatParams, TrainState, merge

Batch = Mapping[str, jax.Array]
Terms = dict[str, jax.Array]
GRADIENT = "gradient"


class Task(Protocol):
    """A loss: named float32 scalars whose sum is minimised.

    A task whose call takes `mesh` is given the mesh that the batch is split over (None on one device).
    A task whose call takes `micro_batches` is given their number and the whole batch, since its loss is no
    mean over samples (see `in_micro_batches`); the gradients of any other are averaged over micro-batches.
    A task may also have `project(params)`, which maps the trained parameters (flat, by path) back
    into the set they have to stay in after every update.
    """

    def __call__(self, model: nn.Module, params: Mapping[str, Any], batch: Batch, key: jax.Array) -> Terms:
        """Terms for one batch; `params` is nested, `key` is the batch's own."""


Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: nn.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    rates: Mapping[str, optax.Schedule] | None = None,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Make `train_step(state, batch) -> (state, metrics)`, ready for jit.

    Args:
        model: the Linen module handed to the task.
        task: the loss.
        optimizer: made over the trained parameters.
        accumulate: micro-batches per step, run one after another; the loss is the whole batch's.
        ema_decay: share of the average that stays each step; 0 keeps none.
        rates: learning rates to report, by name.
        mesh: given to a task that asks for it; None where the batch lies on one device.

    Returns:
        The step. Its metrics are float32 scalars: "loss", "terms" (by name), "grad_norm" and
        "rates" (by name). When the loss or the gradient is not finite the state comes back as it
        was, with `bad_step` and `bad_term` set (see `term_name`), and stays so.
    """
    project = getattr(task, "project", lambda params: params)
    offered = {"mesh": mesh, "micro_batches": accumulate}
    asked = {name: offered[name] for name in offered if name in inspect.signature(task).parameters}
    averaged = 1 if "micro_batches" in asked else accumulate

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params: FlatParams, part: Batch, key: jax.Array) -> tuple[jax.Array, Terms]:
            terms = task(model, merge(params, state.frozen), part, key, **asked)
            return sum(terms.values(), start=jnp.zeros([])), terms

        key = jax.random.fold_in(state.key, state.step)
        grads, terms = average_gradients(loss, state.params, batch, key, averaged)
        norm = optax.tree.norm(grads)
        bad = ~jnp.isfinite(jnp.stack([*(terms[name] for name in sorted(terms)), norm]))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = project(optax.apply_updates(state.params, updates))
        ema = state.ema and jax.tree.map(
            lambda old, new: old * ema_decay + new * (1.0 - ema_decay), state.ema, params
        )
        moved = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)  # type: ignore[attr-defined]

        good = ~bad.any() & (state.bad_step == NOT_BAD)
        failed = bad.any() & (state.bad_step == NOT_BAD)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state)
        kept = kept.replace(
            frozen=state.frozen,
            bad_step=jnp.where(failed, state.step + 1, state.bad_step),
            bad_term=jnp.where(failed, jnp.argmax(bad).astype(jnp.int32), state.bad_term),
        )
        reported = {name: schedule(state.step) for name, schedule in (rates or {}).items()}
        total = sum(terms.values(), start=jnp.zeros([]))
        return kept, {"loss": total, "terms": terms, "grad_norm": norm, "rates": reported}

    return train_step


def term_name(metrics: Metrics, bad_term: int) -> str:
    """The name behind a state's `bad_term`.

    >>> term_name({"terms": {"itm": 0.0, "itc": 0.0}}, 1), term_name({"terms": {"itc": 0.0}}, 1)
    ('itm', 'gradient')
    """
    return [*sorted(metrics["terms"]), GRADIENT][bad_term]


def average_gradients(
    loss: Callable[[FlatParams, Batch, jax.Array], tuple[jax.Array, Terms]],
    params: FlatParams,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[FlatParams, Terms]:
    """Gradients and terms, averaged over `parts` micro-batches that run one after another.

    Args:
        loss: (params, batch, key) -> (scalar, terms).
        params: flat parameters.
        batch: arrays [B, ...]; B is a multiple of `parts`.
        key: split among the micro-batches by fold_in.
        parts: number of micro-batches.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient(params, batch, key)
    part = _parts(batch, parts)

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        found = gradient(params, part(index), jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(gradient, params, jax.eval_shape(part, 0), key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(parts))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def in_micro_batches(
    function: Callable[[Batch, jax.Array], Any], batch: Batch, key: jax.Array, parts: int
) -> Any:
    """Apply `function` to micro-batches one after another and put the rows together again.

    The backward pass runs `function` a second time, one micro-batch after another, in place of keeping its
    activations: between the two lie only the results, such as embeddings, of which a loss can then see the
    whole batch. That is gradient caching. The gradient is exact, dropout included, since a micro-batch has
    the same key both times.

    Args:
        function: (batch [B / parts, ...], key) -> pytree of arrays [B / parts, ...].
        batch: arrays [B, ...]; B is a multiple of `parts`.
        key: split among the micro-batches by fold_in; used as it is where there is one.
        parts: number of micro-batches.

    Returns:
        The pytree with arrays [B, ...], rows in the batch's order.

    Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".

    >>> double = lambda part, key: 2 * part["x"]
    >>> in_micro_batches(double, {"x": jnp.arange(4)}, jax.random.key(0), 2).tolist()
    [0, 2, 4, 6]
    """
    if parts == 1:
        return function(batch, key)

    part = _parts(batch, parts)

    def one(_: None, index: jax.Array) -> tuple[None, Any]:
        return None, function(part(index), jax.random.fold_in(key, index))

    # A loop's body cannot be merged with that of the backward loop, so nothing has to be held apart.
    _, results = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, jnp.arange(parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def _parts(batch: Batch, parts: int) -> Callable[[Any], Any]:
    """Micro-batch number i, cut out where it is needed: row j belongs to micro-batch j modulo `parts`.

    So every device splits its own rows, none has to travel, and the batch is never laid out anew.
    """
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), batch)

    def part(index: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), split)

    return part
