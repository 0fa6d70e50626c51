"""A stack of layers: one set of parameters, run unrolled or scanned, with or without remat."""

from __future__ import annotations

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

        pure_layer = EncoderLayer(self.config, self.execution, parent=None)

        def run(x: Array, params: Any, key: Array | None) -> Any:
            y, weights = pure_layer.apply({"params": params}, x, mask, key)
            return y, (x if output_hidden_states else None, weights if output_attentions else None)

        run = jax.checkpoint(run) if self.execution.remat else run
        params = [self.variables["params"][f"layers_{i}"] for i in range(depth)]
        keys = [None] * depth if key is None else list(jax.random.split(key, depth))
        layers_in = list(zip(params, keys, strict=True))
        x, per_layer = run_layers(run, x, layers_in, scan=self.execution.scan_layers)
        return EncoderOutput(
            last_hidden_state=x,
            hidden_states=(*(states for states, _ in per_layer), x) if output_hidden_states else None,
            attentions=tuple(weights for _, weights in per_layer) if output_attentions else None,
        )


def run_layers(
    run: Callable[..., tuple[Array, Any]], x: Array, layers: Sequence[tuple[Any, ...]], *, scan: bool
) -> tuple[Array, list[Any]]:
    """Put x through every layer in turn.

    Args:
        run: (x, *what the layer has) to the next x and whatever else is to be kept of the layer.
        x: [B, T, D]; its rows stay split between devices, see `mmjax.parallel.shard_rows`.
        layers: per layer what it has, pytrees of arrays: parameters, a key, a part of the cache.
        scan: one compiled layer in a loop, if all have the same shapes; otherwise one after the other.

    Returns:
        The last x, and what each layer kept.

    >>> y, kept = run_layers(lambda x, a: (x + a, x), jnp.zeros(1), [(1.0,), (2.0,)], scan=False)
    >>> float(y[0]), len(kept)
    (3.0, 2)
    """

    def run_rows(x: Array, *layer: Any) -> tuple[Array, Any]:
        return run(shard_rows(x), *layer)

    x, kept = (_scanned if scan and len(layers) > 1 else _unrolled)(run_rows, x, layers)
    return shard_rows(x), kept


def _unrolled(run: Any, x: Array, layers: Sequence[tuple[Any, ...]]) -> tuple[Array, list[Any]]:
    kept = []
    for index, layer in enumerate(layers):
        with jax.named_scope(f"layers_{index}"):
            x, extras = run(x, *layer)
        kept.append(extras)
    return x, kept


def _scanned(run: Any, x: Array, layers: Sequence[tuple[Any, ...]]) -> tuple[Array, list[Any]]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, extras = jax.lax.scan(lambda x, layer: run(x, *layer), x, stacked)
    return x, [jax.tree.map(lambda leaf, i=i: leaf[i], extras) for i in range(len(layers))]
