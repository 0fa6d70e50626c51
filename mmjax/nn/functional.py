"""Pure array functions that the modules call: dense, layer norm, dropout, embedding lookup.

Compute dtype is an argument. Sums run in at least float32 whatever it is: a bfloat16 product that also
returns bfloat16 is slower on CPU than one that returns float32, and less exact everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmjax.nn.kernels import StoredKernel
from mmjax.nn.products import accumulator, kernel_product

Array = jax.Array


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
        y = kernel_product(x.astype(dtype), kernel, dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y if keep_sums else y.astype(dtype)


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


def lookup(table: Array, ids: Array) -> Array:
    """The rows of a table.

    Args:
        table: [V, D].
        ids: int [...].

    Returns:
        [..., D] in the table's dtype; an id of V or more gives NaN, a negative one counts from the end.

    Deviation: for a table of 16-bit numbers there is a reverse gradient only, no `jax.jvp`.

    >>> lookup(jnp.array([[1.0], [2.0]]), jnp.array([1, 0, 7]))[:, 0].tolist()
    [2.0, 1.0, nan]
    """
    return (_narrow_lookup if table.dtype.itemsize == 2 else _lookup)(table, ids)


def _lookup(table: Array, ids: Array) -> Array:
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


# XLA on CPU widens a whole narrow table before it takes a few rows of it; bits are left alone.
@jax.custom_vjp
def _narrow_lookup(table: Array, ids: Array) -> Array:
    bits = lax.bitcast_convert_type(table, jnp.uint16)
    nan = int(np.array(np.nan, table.dtype).view(np.uint16))
    return lax.bitcast_convert_type(bits.at[ids].get(mode="fill", fill_value=nan), table.dtype)


def _narrow_lookup_fwd(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_lookup(table, ids), (table, ids)


def _narrow_lookup_bwd(inputs: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, ids = inputs
    return jax.vjp(lambda table: _lookup(table, ids), table)[1](g)[0], None


_narrow_lookup.defvjp(_narrow_lookup_fwd, _narrow_lookup_bwd)
