"""The small Linen modules that own parameters; all arithmetic is in the pure functions they call."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax.nn.activations import activation
from mmjax.nn.attention import attention, merge_heads, split_heads
from mmjax.nn.config import Execution, TransformerConfig
from mmjax.nn.functional import dense, dropout, layer_norm, lookup, rms_norm
from mmjax.nn.initializers import Initializer, layer_kernel, lecun_normal, normal, ones, zeros
from mmjax.nn.kernels import StoredKernel
from mmjax.parallel import LogicalAxes

Array = jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class AxesNote:
    """Logical axes as a pytree without leaves, so that tracing carries them along."""

    axes: LogicalAxes


def param(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: LogicalAxes
) -> Array:
    """Declare a float32 parameter with the logical names of its axes beside it.

    The names travel in the "intermediates" collection, which `init` returns only when asked
    (`mmjax.nn.parameter_specs` asks), so that parameters stay plain arrays. A kernel that is
    stored in another form comes back as it is.
    """
    if module.has_variable("params", name):
        stored: Any = module.get_variable("params", name)
        if isinstance(stored, StoredKernel):
            chex.assert_equal(tuple(stored.shape), tuple(shape))
            return stored  # type: ignore[return-value]
    if module.is_initializing() and module.is_mutable_collection("intermediates"):
        module.sow("intermediates", name, AxesNote(axes))
    return module.param(name, init, shape, jnp.float32)


class Dense(nn.Module):
    """x @ kernel + bias; kernel [D, F] has the logical axes `axes`."""

    features: int
    axes: LogicalAxes
    use_bias: bool = True
    kernel_init: Initializer = lecun_normal
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., F]."""
        kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        bias = param(self, "bias", zeros, (self.features,), self.axes[1:]) if self.use_bias else None
        return dense(x, kernel, bias, dtype=self.execution.dtype)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with a learned scale and bias unless `affine` is False."""

    eps: float
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., D]."""
        if not self.affine:
            return layer_norm(x, None, None, eps=self.eps)
        shape = (x.shape[-1],)
        scale = param(self, "scale", ones, shape, (None,))
        bias = param(self, "bias", zeros, shape, (None,))
        return layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; what multiplies is the learned scale plus `offset`."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., D]."""
        scale = param(self, "scale", zeros if self.offset else ones, (x.shape[-1],), (None,))
        return rms_norm(x, scale, eps=self.eps, offset=self.offset)


class Embedding(nn.Module):
    """A table [size, D]; calling it looks rows up."""

    size: int
    features: int
    axes: LogicalAxes = (None, "embed")
    table_init: Initializer = normal(0.02)
    execution: Execution = Execution()

    def setup(self) -> None:
        self.embedding = param(self, "embedding", self.table_init, (self.size, self.features), self.axes)

    def table(self) -> Array:
        """The whole table [size, D] in the compute dtype."""
        return self.embedding.astype(self.execution.dtype or self.embedding.dtype)

    def __call__(self, ids: Array) -> Array:
        """int [...] to [..., D]; an id beyond the table gives NaN, never another row."""
        rows = lookup(self.embedding, ids)
        return rows.astype(self.execution.dtype or rows.dtype)


class MLP(nn.Module):
    """Linear, activation, linear."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., D] through [..., F]."""
        config = self.config
        x = Dense(
            config.intermediate_size,
            ("embed", "mlp"),
            kernel_init=layer_kernel(config, "mlp_in"),
            execution=self.execution,
            name="fc1",
        )(x)
        x = activation(config.hidden_act)(x)
        return Dense(
            config.hidden_size,
            ("mlp", "embed"),
            kernel_init=layer_kernel(config, "mlp_out"),
            execution=self.execution,
            name="fc2",
        )(x)


class FeedForward(nn.Module):
    """act(gate) * up, then down; without a gate act(up), then down."""

    features: int
    act: str
    gated: bool = True
    use_bias: bool = False
    kernel_init: Initializer = lecun_normal
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] to [..., D] through [..., F]."""

        def project(name: str, features: int, axes: LogicalAxes) -> Dense:
            return Dense(features, axes, self.use_bias, self.kernel_init, self.execution, name=name)

        up = project("up_proj", self.features, ("embed", "mlp"))(x)
        if self.gated:
            gate = project("gate_proj", self.features, ("embed", "mlp"))(x)
            up = activation(self.act)(gate) * up
        else:
            up = activation(self.act)(up)
        return project("down_proj", x.shape[-1], ("mlp", "embed"))(up)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (itself by default)."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None = None, context: Array | None = None, key: Array | None = None
    ) -> tuple[Array, Array]:
        """Attend.

        Args:
            x: [B, T, D].
            mask: bool, broadcastable to [B, N, T, S].
            context: [B, S, D]; None means x.
            key: PRNG key for dropout on the weights; None means none.

        Returns:
            [B, T, D] and the weights [B, N, T, S].
        """
        config = self.config
        context = x if context is None else context

        def project(source: Array, name: str) -> Array:
            layer = Dense(
                config.hidden_size,
                ("embed", "heads"),
                use_bias=config.qkv_bias,
                kernel_init=layer_kernel(config, "attention_in"),
                execution=self.execution,
                name=name,
            )
            return split_heads(layer(source), config.num_attention_heads)

        out, weights = attention(
            project(x, "q_proj"),
            project(context, "k_proj"),
            project(context, "v_proj"),
            mask,
            dropout_rate=config.attention_dropout,
            dropout_key=key,
        )
        out = Dense(
            config.hidden_size,
            ("heads", "embed"),
            kernel_init=layer_kernel(config, "attention_out"),
            execution=self.execution,
            name="out_proj",
        )(merge_heads(out))
        return out, weights


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    config: TransformerConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, key: Array | None = None) -> tuple[Array, Array]:
        """[B, T, D] to [B, T, D] and the attention weights [B, N, T, T]."""
        config = self.config
        keys: Any = (None, None, None) if key is None else jax.random.split(key, 3)
        y = LayerNorm(config.layer_norm_eps, name="layer_norm1")(x)
        y, weights = Attention(config, self.execution, name="self_attn")(y, mask, key=keys[0])
        x = x + dropout(y, config.hidden_dropout, keys[1])
        y = LayerNorm(config.layer_norm_eps, name="layer_norm2")(x)
        y = MLP(config, self.execution, name="mlp")(y)
        return x + dropout(y, config.hidden_dropout, keys[2]), weights
