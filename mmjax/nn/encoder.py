"""A stack of layers: one set of parameters, run unrolled or scanned, with or without remat."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmjax.nn.config import Execution, TransformerConfig
from mmjax.nn.modules import EncoderLayer
from mmjax.parallel import shard_rows

Array = jax.Array


@flax.struct.dataclass
class EncoderOutput:
    """What a stack returns.

    Attributes:
        last_hidden_state: [B, T, D], the last layer's output.
        hidden_states: the input of every layer, then the last layer's output, L + 1 arrays [B, T, D].
        attentions: every layer's weights, L arrays [B, N, T, T].
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


class Encoder(nn.Module):
    """`num_hidden_layers` layers whose parameters are layers_0, layers_1, ...

    The parameters stay apart layer by layer, as in every checkpoint; scanning stacks them on the way in.
    """

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        *,
        key: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Run the stack.

        Args:
            x: [B, T, D].
            mask: bool, broadcastable to [B, N, T, T].
            key: PRNG key for dropout; None means none.
            output_hidden_states, output_attentions: whether to return them.
        """
        depth = self.config.num_hidden_layers
        layers = [EncoderLayer(self.config, self.execution, name=f"layers_{i}") for i in range(depth)]
        if self.is_initializing():
            for layer in layers:
                x, _ = layer(x, mask)
            return EncoderOutput(x)

        run = _EncoderRun(self.config, self.execution, output_hidden_states, output_attentions)
        params = [self.variables["params"][f"layers_{i}"] for i in range(depth)]
        keys = [None] * depth if key is None else list(jax.random.split(key, depth))
        layers_in = list(zip(params, keys, strict=True))
        x, per_layer = run_layers(run, x, mask, layers_in, self.execution)
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=(*(states for states, _ in per_layer), x) if output_hidden_states else None,
            attentions=tuple(weights for _, weights in per_layer) if output_attentions else None,
        )


@dataclasses.dataclass(frozen=True)
class _EncoderRun:
    """One layer, as `run_layers` takes it; what is kept of it are its input and its weights, on request."""

    config: TransformerConfig
    execution: Execution
    hidden_states: bool
    attentions: bool

    def __call__(self, x: Array, mask: Array | None, params: Any, key: Array | None) -> Any:
        layer = EncoderLayer(self.config, self.execution, parent=None)
        y, weights = layer.apply({"params": params}, x, mask, key)  # type: ignore[misc]
        return y, (x if self.hidden_states else None, weights if self.attentions else None)


def run_layers(
    run: Callable[..., tuple[Array, Any]],
    x: Array,
    shared: Any,
    layers: Sequence[tuple[Any, ...]],
    execution: Execution,
) -> tuple[Array, list[Any]]:
    """Put x through every layer in turn.

    Layers that are alike are traced once, however many there are. So that jax knows them again, `run` is a
    value (hashable, equal where it does the same) with no arrays in it.

    Args:
        run: (x, shared, *what the layer has) to the next x and whatever else is to be kept of the layer.
        x: [B, T, D]; its rows stay split between devices, see `mmjax.parallel.shard_rows`.
        shared: a pytree of arrays that all layers see: masks, positions.
        layers: per layer what it has, pytrees of arrays: parameters, a key, a part of the cache.
        execution: `scan_layers` for one compiled layer in a loop, if all have the same shapes (otherwise one
            after the other), `remat` to keep no activations inside of layers.

    Returns:
        The last x, and what each layer kept.

    >>> def add(x, shared, a):
    ...     return x + shared * a, x
    >>> y, kept = run_layers(add, jnp.zeros(1), 2.0, [(1.0,), (2.0,)], Execution())
    >>> float(y[0]), len(kept)
    (6.0, 2)
    """
    way = _scanned if execution.scan_layers and len(layers) > 1 else _unrolled
    x, kept = way(functools.partial(_run_one, run, execution.remat), x, shared, layers)
    return shard_rows(x), kept


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_one(run: Any, remat: bool, x: Array, shared: Any, layer: tuple[Any, ...]) -> tuple[Array, Any]:
    return (jax.checkpoint(run) if remat else run)(shard_rows(x), shared, *layer)


def _unrolled(run: Any, x: Array, shared: Any, layers: Sequence[tuple[Any, ...]]) -> tuple[Array, list[Any]]:
    kept = []
    for index, layer in enumerate(layers):
        with jax.named_scope(f"layers_{index}"):
            x, extras = run(x, shared, layer)
        kept.append(extras)
    return x, kept


def _scanned(run: Any, x: Array, shared: Any, layers: Sequence[tuple[Any, ...]]) -> tuple[Array, list[Any]]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, extras = jax.lax.scan(lambda x, layer: run(x, shared, layer), x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], extras) for i in range(len(layers))]
