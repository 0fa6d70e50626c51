"""Products whose sums run in at least float32, with gradients from narrow factors.

XLA's CPU backend multiplies narrow factors as they are, on processors that can, only where it likes the form
of the product; any other form it widens to float32 first, at a quarter of the speed or less. The forms here
are those that it likes, in both directions; to other backends all forms are one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def accumulator(dtype: Any) -> Any:
    """The dtype that sums over `dtype` run in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def is_narrow(dtype: Any) -> bool:
    """Whether sums over `dtype` run in a wider one.

    >>> is_narrow(jnp.bfloat16), is_narrow(jnp.float32)
    (True, False)
    """
    return accumulator(dtype) != dtype


def kernel_product(x: Array, kernel: Array, dtype: Any) -> Array:
    """x [..., D], in `dtype`, times kernel [D, F], summed and returned in at least float32.

    Deviation: with a `dtype` narrower than float32 there is a reverse gradient only, no `jax.jvp`.
    """
    return (_narrow_product if is_narrow(dtype) else product_along)(x, kernel, dtype)


def batched_product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Sum over an axis of x and one of y, for every batch row and head.

    The gradient of a bfloat16 product is of bfloat16 factors; float16 has not the range for that.

    Args:
        x, y: [B, K, I, J] and [B, K, S, H], of one dtype.
        x_axis, y_axis: 2 or 3, the axes that are summed over.

    Returns:
        [B, K, I or J, S or H], the axes that stay, in at least float32.

    Deviation: in bfloat16 there is a reverse gradient only, no `jax.jvp`.

    >>> batched_product(jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 5, 4)), 3, 3).shape
    (1, 2, 3, 5)
    """
    return (_narrow_batched if x.dtype == jnp.bfloat16 else _batched)(x, y, x_axis, y_axis)


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
    if not is_narrow(x.dtype) or not one:
        return product(x, other)

    def twice(x: Array, other: Array) -> Array:
        if x.ndim == 1:
            return product(jnp.stack([x, x]), other)[0]
        return product(jnp.concatenate([x, x], axis=-2), other)[..., :1, :]

    return lax.platform_dependent(x, other, cpu=twice, default=product)


def product_along(x: Array, kernel: Array, dtype: Any, axis: int = 0) -> Array:
    """x [..., D] times kernel [D, F] with factors in `dtype`, summed and returned in at least float32.

    Args:
        axis: of the kernel, to be summed over.
    """

    def product(x: Array, kernel: Array) -> Array:
        contract = (((x.ndim - 1,), (axis,)), ((), ()))
        return lax.dot_general(x, kernel.astype(dtype), contract, preferred_element_type=accumulator(dtype))

    return by_rows(product, x, kernel) if x.size == x.shape[-1] else product(x, kernel)


# Autodiff would multiply the float32 gradient of a float32 sum, at half the speed or less: this rule narrows
# it first. The kernel comes in its own dtype, so that its gradient keeps the float32 sum.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(x: Array, kernel: Array, dtype: Any) -> Array:
    return product_along(x, kernel, dtype)


def _narrow_product_fwd(x: Array, kernel: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return product_along(x, kernel, dtype), (x, kernel)


def _narrow_product_bwd(dtype: Any, factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = factors
    g = g.astype(dtype)
    # A kernel that is transposed first would be widened.
    dx = product_along(g, kernel, dtype, axis=1).astype(x.dtype)
    # All rows' axes are contracted at once, not flattened: XLA on CPU then stays in the narrow dtype.
    rows = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=accumulator(dtype))
    return dx, _apart(dkernel).astype(kernel.dtype)


_narrow_product.defvjp(_narrow_product_fwd, _narrow_product_bwd)


def _batched(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    contract = (((x_axis,), (y_axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(x, y, contract, preferred_element_type=accumulator(x.dtype))


# As above: the gradient is narrowed before it is multiplied.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _narrow_batched(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    # Summing over its rows, XLA on CPU turns the first factor around: let that be the smaller one.
    if x_axis == y_axis == 2 and x.size > y.size:
        return _narrow_batched(y, x, y_axis, x_axis).swapaxes(2, 3)
    # With a second axis to sum over, of one entry, it takes any order of axes as it is. It then may turn the
    # second factor, too: not worth it for a few queries of a whole cache, which lies in order.
    if x_axis == y_axis == 3 and x.shape[2] < y.shape[2]:
        return _apart(_batched(x, y, x_axis, y_axis))
    x, y = jnp.expand_dims(x, 2), jnp.expand_dims(y, 2)
    contract = (((2, x_axis + 1), (2, y_axis + 1)), ((0, 1), (0, 1)))
    return _apart(lax.dot_general(x, y, contract, preferred_element_type=accumulator(x.dtype)))


def _narrow_batched_fwd(x: Array, y: Array, x_axis: int, y_axis: int) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_batched(x, y, x_axis, y_axis), (x, y)


def _narrow_batched_bwd(
    x_axis: int, y_axis: int, factors: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, y = factors
    g = g.astype(x.dtype)
    x_other, y_other = 5 - x_axis, 5 - y_axis
    dx = _narrow_batched(g, y, 3, y_other) if x_axis == 3 else _narrow_batched(y, g, y_other, 3)
    dy = _narrow_batched(g, x, 2, x_other) if y_axis == 3 else _narrow_batched(x, g, x_other, 2)
    return dx.astype(x.dtype), dy.astype(y.dtype)


_narrow_batched.defvjp(_narrow_batched_fwd, _narrow_batched_bwd)


def _apart(sums: Array) -> Array:
    """The sums, kept from a later transpose: jaxlib 0.10 and 0.11 on CPU compile a bfloat16 product whose
    float32 sum is transposed to something that they cannot run.
    """
    return lax.platform_dependent(sums, cpu=lax.optimization_barrier, default=lambda sums: sums)
