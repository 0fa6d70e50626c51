"""Kernels stored as their transpose, for parameters that do not train and are multiplied with few rows.

On CPU, XLA's bfloat16 product of a few rows, which is what decoding a token is, takes about half of the time
where the kernel lies as [F, D]: it is then read once, as it lies, by all cores. Folders of torch have kernels
so, too. Which factor has to come first depends on the processor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mmjax.nn.kernels import LAYER_KERNELS, replace_kernels
from mmjax.nn.products import is_narrow, product_along

Array = jax.Array
# On a CPU with tiles: fewer rows than the first take as long or longer; with more than the second the usual
# order is as fast.
_FEWEST, _FEW = 4, 64
#: The kernels that are worth it: those of layers, but not experts', which are no matrices, and the last one.
FEW_ROWS_KERNELS = rf"(?!.*experts/){LAYER_KERNELS}|.*lm_head/kernel"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedKernel:
    """A kernel [D, F] that is kept as [F, D].

    Attributes:
        values: [F, D].

    >>> TransposedKernel(jnp.ones((3, 2))).shape
    (2, 3)
    """

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[D, F]."""
        return (*self.values.shape[:-2], self.values.shape[-1], self.values.shape[-2])

    @property
    def dtype(self) -> Any:
        """The values'."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    def product(self, x: Array, dtype: Any) -> Array:
        """x [..., D], in `dtype`, times the kernel, summed and returned in at least float32."""
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)
        product = functools.partial(product_along, dtype=dtype, axis=1)
        if is_narrow(dtype) and 0 < len(rows) <= _FEW and _has_tiles():
            few = functools.partial(_product_of_few, dtype=dtype)
            y = lax.platform_dependent(rows, self.values, cpu=few, default=product)
        else:
            y = product(rows, self.values)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def array(self) -> Array:
        """The kernel as one array [D, F]."""
        return self.values.T


def _product_of_few(rows: Array, values: Array, *, dtype: Any) -> Array:
    """[R, D] times [F, D] transposed, with the kernel as the first factor, for processors with tiles."""
    padded = jnp.pad(rows, ((0, max(0, _FEWEST - len(rows))), (0, 0)))
    y = product_along(values.astype(dtype), padded, dtype, axis=1)
    # Without the barrier XLA takes the transpose into the product, and with it the order of the factors.
    return lax.optimization_barrier(y).T[: len(rows)]


@functools.cache
def _has_tiles() -> bool:
    """Whether this machine's processor multiplies tiles of bfloat16 (AMX).

    There only kernels as first factors were found to be fast; without tiles a 1.1B LLaMA decodes a third
    faster with them as second ones.
    """
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def transpose_kernels(params: Mapping[str, Any], pattern: str = FEW_ROWS_KERNELS) -> dict[str, Any]:
    """Store kernels as their transposes, for generating text in bfloat16 on a CPU.

    `mmjax.load(folder, transpose_kernels=True)` does so while it reads, when nothing has to be turned.
    The values stay the same to the bit; `mmjax.nn.quantized.dequantize` makes plain arrays of them again.

    Args:
        params: nested parameters.
        pattern: regular expression that has to match a parameter's whole path.

    Returns:
        The same tree with a TransposedKernel in place of each matching [D, F] array; models take it as it is.

    Raises:
        ConfigError: nothing matches, or something that does is no kernel.

    >>> tree = transpose_kernels({"layers_0": {"mlp": {"kernel": jnp.ones((2, 3))}}})
    >>> tree["layers_0"]["mlp"]["kernel"].values.shape
    (3, 2)
    """
    return replace_kernels(params, pattern, lambda kernel: TransposedKernel(kernel.T))


__all__ = ["TransposedKernel", "transpose_kernels"]
