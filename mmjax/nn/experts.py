"""A mixture of experts: a router picks a few perceptrons for every token."""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mmjax.nn.activations import activation
from mmjax.nn.config import Execution
from mmjax.nn.initializers import Initializer, lecun_normal
from mmjax.nn.modules import Dense, param
from mmjax.nn.products import accumulator, by_rows
from mmjax.parallel import LogicalAxes

Array = jax.Array


def route(logits: Array, count: int, *, normalize: bool) -> tuple[Array, Array]:
    """The experts that each token takes, and their weights.

    Args:
        logits: [..., X], one per expert.
        count: experts per token.
        normalize: whether the weights of those taken add up to one.

    Returns:
        Weights [..., count] in at least float32, largest first, and the experts' numbers, int32 [..., count].

    Source: Shazeer et al. 2017, section 2.1, with the softmax before the choice.

    >>> weights, chosen = route(jnp.array([0.0, 2.0, 1.0]), 2, normalize=True)
    >>> chosen.tolist(), round(float(weights.sum()), 5)
    ([1, 2], 1.0)
    """
    weights = jax.nn.softmax(logits.astype(accumulator(logits.dtype)), axis=-1)
    weights, chosen = lax.top_k(weights, count)
    return weights / weights.sum(axis=-1, keepdims=True) if normalize else weights, chosen


def mix_experts(
    x: Array,
    weights: Array,
    chosen: Array,
    gate: Array,
    up: Array,
    down: Array,
    *,
    act: str,
    dtype: Any = None,
) -> Array:
    """The weighted sum of what the chosen experts make of each token.

    No token is dropped. Few tokens fetch their experts' kernels; many are sorted by expert, so that each
    expert is one product.

    Args:
        x: [M, D], the tokens.
        weights, chosen: [M, k], from `route`.
        gate, up: [X, D, F].
        down: [X, F, D].
        act: name of the activation.
        dtype: of factors and result; None means the kernels'.

    Returns:
        [M, D].

    Deviation: no `jax.vmap`, since `jax.lax.ragged_dot` has none; more tokens are more rows.

    >>> ones = jnp.ones((4, 2, 3))
    >>> y = mix_experts(jnp.ones((5, 2)), jnp.ones((5, 1)), jnp.zeros((5, 1), int), ones, ones,
    ...     jnp.ones((4, 3, 2)), act="relu")
    >>> y.shape, float(y[0, 0])
    ((5, 2), 12.0)
    """
    chex.assert_rank([x, weights, chosen, gate, up, down], [2, 2, 2, 3, 3, 3])
    chex.assert_equal_shape([weights, chosen])
    dtype = jnp.dtype(dtype or gate.dtype)
    experts, (tokens, count) = gate.shape[0], chosen.shape
    flat = chosen.reshape(-1)
    one_row_each = functools.partial(jnp.einsum, "mtd,mdf->mtf", preferred_element_type=accumulator(dtype))
    if tokens * count <= experts:
        order = jnp.arange(tokens * count)

        def product(rows: Array, kernel: Array) -> Array:
            taken = kernel[flat].astype(dtype)
            return by_rows(one_row_each, rows[:, None], taken)[:, 0].astype(dtype)

    else:
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)

        def product(rows: Array, kernel: Array) -> Array:
            return lax.ragged_dot(rows, kernel.astype(dtype), sizes)

    rows = x.astype(dtype)[order // count]
    y = product(activation(act)(product(rows, gate)) * product(rows, up), down)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(tokens, count, -1)
    # In float32, as every other sum.
    return jnp.einsum("mkd,mk->md", y.astype(weights.dtype), weights).astype(dtype)


class ExpertKernels(nn.Module):
    """One kernel [X, D, F] for all experts."""

    shape: tuple[int, int, int]
    axes: LogicalAxes
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        """The kernels themselves."""
        return param(self, "kernel", self.kernel_init, self.shape, self.axes)


class Experts(nn.Module):
    """Gated perceptrons side by side; see `mix_experts`."""

    num_experts: int
    features: int
    act: str
    kernel_init: Initializer = lecun_normal
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array) -> Array:
        """[M, D] to [M, D], each token through the experts that were chosen for it."""
        inward = (self.num_experts, x.shape[-1], self.features)
        outward = (self.num_experts, self.features, x.shape[-1])
        init = self.kernel_init
        gate = ExpertKernels(inward, (None, "embed", "mlp"), init, name="gate_proj")()
        up = ExpertKernels(inward, (None, "embed", "mlp"), init, name="up_proj")()
        down = ExpertKernels(outward, (None, "mlp", "embed"), init, name="down_proj")()
        dtype = self.execution.dtype
        return mix_experts(x, weights, chosen, gate, up, down, act=self.act, dtype=dtype)


class MixtureOfExperts(nn.Module):
    """A router and its experts in place of one perceptron."""

    num_experts: int
    num_experts_per_tok: int
    features: int
    act: str
    normalize: bool = False
    kernel_init: Initializer = lecun_normal
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, T, D]."""
        tokens = x.reshape(-1, x.shape[-1])
        count, init = self.num_experts, self.kernel_init
        logits = Dense(count, ("embed", None), False, init, self.execution, name="gate")(tokens)
        weights, chosen = route(logits, self.num_experts_per_tok, normalize=self.normalize)
        experts = Experts(
            self.num_experts, self.features, self.act, self.kernel_init, self.execution, name="experts"
        )
        return experts(tokens, weights, chosen).reshape(x.shape)
