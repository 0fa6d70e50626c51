"""Pure array functions that the modules call: dense, layer norm, dropout, embedding lookup.

Compute dtype is an argument. Sums run in at least float32 whatever it is: a bfloat16 product that also
returns bfloat16 is slower on CPU than one that returns float32, and less exact everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.nn.kernels import StoredKernel

Array = jax.Array


def accumulator(dtype: Any) -> Any:
    """The dtype that sums over `dtype` run in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dense(
    x: Array, kernel: Array, bias: Array | None = None, *, dtype: Any = None, keep_sums: bool = False
) -> Array:
    """x @ kernel + bias, summed in float32.

    Args:
        x: [..., D].
        kernel: [D, F], an array or a `StoredKernel`.
        bias: [F] or None.
        dtype: dtype of the factors and of the result; None means the kernel's.
        keep_sums: return the sums as they are, in at least float32.

    Returns:
        [..., F] in `dtype`.

    Deviation: with a `dtype` narrower than float32 there is a reverse gradient only, no `jax.jvp`.

    >>> dense(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)
    if isinstance(kernel, StoredKernel):
        y = kernel.product(x.astype(dtype), dtype)
    else:
        product = _product if accumulator(dtype) == dtype else _narrow_product
        y = product(x.astype(dtype), kernel, dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y if keep_sums else y.astype(dtype)


def _product(x: Array, kernel: Array, dtype: Any) -> Array:
    """x [..., D] times kernel [D, F] with factors in `dtype`, summed and returned in at least float32."""

    def product(x: Array, kernel: Array) -> Array:
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(x, kernel.astype(dtype), contract, preferred_element_type=accumulator(dtype))

    return by_rows(product, x, kernel) if x.size == x.shape[-1] else product(x, kernel)


def by_rows(product: Callable[[Array, Array], Array], x: Array, other: Array) -> Array:
    """product(x, other), where one narrow row is computed twice on CPU: alone it takes eight times as long.

    Args:
        product: of rows [..., R, D] and something, to rows [..., R, F].
        x: [..., R, D], or one row [D].
        other: the second factor.

    >>> by_rows(jnp.matmul, jnp.ones((1, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)).shape
    (1, 4)
    """
    one = x.ndim == 1 or x.shape[-2] == 1
    if accumulator(x.dtype) == x.dtype or not one:
        return product(x, other)

    def twice(x: Array, other: Array) -> Array:
        if x.ndim == 1:
            return product(jnp.stack([x, x]), other)[0]
        return product(jnp.concatenate([x, x], axis=-2), other)[..., :1, :]

    return lax.platform_dependent(x, other, cpu=twice, default=product)


# Autodiff would multiply the float32 gradient of a float32 sum, at half the speed or less: this rule narrows
# it first. The kernel comes in its own dtype, so that its gradient keeps the float32 sum.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(x: Array, kernel: Array, dtype: Any) -> Array:
    return _product(x, kernel, dtype)


def _narrow_product_fwd(x: Array, kernel: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, dtype), (x, kernel)


def _narrow_product_bwd(dtype: Any, factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = factors
    g = g.astype(dtype)
    dx = _product(g, kernel.T, dtype).astype(x.dtype)
    # All rows' axes are contracted at once, not flattened: XLA on CPU then stays in the narrow dtype.
    rows = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=accumulator(dtype))
    # The barrier keeps a later transpose apart: jaxlib 0.10 and 0.11 on CPU compile a bfloat16 product whose
    # float32 sum is transposed to something that they cannot run.
    return dx, lax.optimization_barrier(dkernel).astype(kernel.dtype)


_narrow_product.defvjp(_narrow_product_fwd, _narrow_product_bwd)


def layer_norm(x: Array, scale: Array | None, bias: Array | None, *, eps: float) -> Array:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift; in at least float32.

    Args:
        x: [..., D].
        scale, bias: [D]; None means one and zero.
        eps: added to the variance.

    Returns:
        [..., D] in x's dtype.

    Source: Ba et al. 2016, section 3.

    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2), eps=0.0).tolist()
    [-1.0, 1.0]
    """
    y = x.astype(accumulator(x.dtype))
    centred = y - y.mean(axis=-1, keepdims=True)
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is large.
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + eps)
    y = y if scale is None else y * scale.astype(y.dtype)
    y = y if bias is None else y + bias.astype(y.dtype)
    return y.astype(x.dtype)


def rms_norm(x: Array, scale: Array, *, eps: float, offset: float = 0.0) -> Array:
    """Divide the last axis by its root mean square, then scale; in at least float32.

    Args:
        x: [..., D].
        scale: [D].
        eps: added to the mean square.
        offset: added to the scale (1 for Gemma, whose scales are kept around zero).

    Returns:
        [..., D] in x's dtype.

    Source: Zhang & Sennrich 2019, equation 4.

    >>> rms_norm(jnp.array([3.0, 3.0]), jnp.ones(2), eps=0.0).tolist()
    [1.0, 1.0]
    """
    y = x.astype(accumulator(x.dtype))
    mean_square = jnp.square(y).mean(axis=-1, keepdims=True)
    y = y * lax.rsqrt(mean_square + eps) * (scale.astype(y.dtype) + offset)
    return y.astype(x.dtype)


def softcap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): x where it is small, never beyond the cap; None means x itself.

    >>> softcap(jnp.array([0.0, 1e9]), 30.0).tolist()
    [0.0, 30.0]
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
        x: any shape.
        rate: in [0, 1).
        key: a PRNG key; None means no dropout (evaluation).

    >>> dropout(jnp.ones(3), 0.5, None).tolist()
    [1.0, 1.0, 1.0]
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def l2_normalize(x: Array) -> Array:
    """Divide by the Euclidean norm over the last axis, in at least float32; the result is in x's dtype.

    >>> [round(float(x), 3) for x in l2_normalize(jnp.array([3.0, 4.0]))]
    [0.6, 0.8]
    """
    y = x.astype(accumulator(x.dtype))
    return (y / jnp.sqrt(jnp.sum(jnp.square(y), axis=-1, keepdims=True))).astype(x.dtype)
