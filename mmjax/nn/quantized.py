"""Kernels stored as int8, for parameters that do not train: half of the bytes of bfloat16.

A kernel [D, F] is kept as int8 `values` and one float32 `scale` per output channel:

    scale[f] = max over d of |kernel[d, f]| / 127          (1 where the column is all zero)
    values[d, f] = kernel[d, f] / scale[f], rounded to the nearest integer, halves to even

so that kernel ~ values * scale, each entry within scale / 2 of the original. The product multiplies with the
integers, which bfloat16 holds exactly, and scales the float32 sums. The backward pass starts from the
integers again, so that a scanned stack of layers (`Execution(scan_layers=True)`) holds a wide copy of one
kernel at a time; of unrolled layers the compiler may hold several.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.nn.kernels import LAYER_KERNELS, StoredKernel, as_array, replace_kernels
from mmjax.nn.products import accumulator

Array = jax.Array
_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
    """A kernel as int8 values and a scale per output channel; made by `quantize_kernel`.

    Attributes:
        values: int8 [D, F].
        scale: float32 [F].
        wide: name of the dtype that it was made from, and that it computes in where nothing else is said.
    """

    values: Array
    scale: Array
    wide: str = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[D, F]."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """The dtype before."""
        return jnp.dtype(self.wide)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.size + 4 * self.scale.size

    def product(self, x: Array, dtype: Any) -> Array:
        """x [..., D] times the kernel, in at least float32; gradients reach x alone."""
        return _product(jnp.dtype(dtype).name, x.astype(dtype), self.values, self.scale)

    def array(self) -> Array:
        """values * scale, [D, F] in the dtype before."""
        return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)


def quantize_kernel(kernel: Array) -> Int8Kernel:
    """Store a kernel as int8 (see the module for the definition).

    Args:
        kernel: [D, F], finite.

    Returns:
        An Int8Kernel; |its array - kernel| <= scale / 2 per entry, before rounding to the kernel's dtype.

    >>> stored = quantize_kernel(jnp.array([[1.0, 0.0], [-0.25, 0.0]]))
    >>> stored.values.tolist(), [round(float(s), 4) for s in stored.scale]
    ([[127, 0], [-32, 0]], [0.0079, 1.0])
    """
    wide = kernel.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=0)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1.0)
    values = jnp.clip(jnp.round(wide / scale), -_LARGEST, _LARGEST).astype(jnp.int8)
    return Int8Kernel(values, scale, jnp.dtype(kernel.dtype).name)


def quantize(params: Mapping[str, Any], pattern: str = LAYER_KERNELS) -> dict[str, Any]:
    """Store the kernels of a parameter tree as int8, one after another.

    Args:
        params: nested parameters.
        pattern: regular expression that has to match a parameter's whole path.

    Returns:
        The same tree with an Int8Kernel in place of each matching [D, F] array; models take it as it is.

    Raises:
        ConfigError: nothing matches, or something that does is no kernel.

    >>> tree = quantize({"layers_0": {"mlp": {"kernel": jnp.ones((2, 3))}}})
    >>> type(tree["layers_0"]["mlp"]["kernel"]).__name__
    'Int8Kernel'
    """
    return replace_kernels(params, pattern, quantize_kernel)


def dequantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter tree in which every stored kernel is one array again, as `mmjax.save` takes it.

    >>> dequantize(quantize({"layers_0": {"mlp": {"kernel": jnp.ones((1, 1))}}}))["layers_0"]["mlp"]
    {'kernel': Array([[1.]], dtype=float32)}
    """
    return jax.tree.map(as_array, dict(params), is_leaf=lambda leaf: isinstance(leaf, StoredKernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dtype: str, x: Array, values: Array, scale: Array) -> Array:
    return _multiply(dtype, x, values) * scale


def _multiply(dtype: str, x: Array, values: Array) -> Array:
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    sums = accumulator(dtype)
    return lax.dot_general(x, values.astype(dtype), contract, preferred_element_type=sums)


# The backward pass starts from the int8 values again: autodiff would keep every kernel's wide copy for it.
def _forward(dtype: str, x: Array, values: Array, scale: Array) -> tuple[Array, Any]:
    return _product(dtype, x, values, scale), (values, scale)


def _backward(dtype: str, saved: Any, g: Array) -> tuple[Array, None, None]:
    values, scale = saved
    # Without the barrier the compiler finds the same wide copy in the forward pass, and keeps it until here.
    values, g = lax.optimization_barrier((values, g))
    return _multiply(dtype, (g * scale).astype(dtype), values.T).astype(dtype), None, None


_product.defvjp(_forward, _backward)
