"""Kernels that are stored in another form than one array, and multiply by themselves.

Such a kernel takes an array's place in a parameter tree. It is a pytree, so that `jax.jit` and `jax.lax.scan`
over layers treat it as they treat an array; `mmjax.nn.dense` asks it for the product.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mmjax.errors import ConfigError

Array = jax.Array
#: Every kernel inside the layers; embeddings, norms, biases and the output layer stay as they are.
LAYER_KERNELS = r".*layers_\d+/.*/kernel"


@runtime_checkable
class StoredKernel(Protocol):
    """What `dense` needs of a kernel that is no array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[D, F]."""

    @property
    def dtype(self) -> Any:
        """The dtype that it computes in where nothing else is said."""

    def product(self, x: Array, dtype: Any) -> Array:
        """x [..., D], in `dtype`, times the kernel, summed and returned in at least float32."""

    def array(self) -> Array:
        """The kernel as one array [D, F] in its `dtype`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """One low-rank change of a kernel: scale * a @ b.

    Attributes:
        a: [D, R].
        b: [R, F].
        scale: multiplies the product.
        rate: share of x's entries that a dropout in front of `a` zeroes.
        key: of that dropout, as key data (uint32); None for none.
    """

    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    key: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """A kernel with low-rank changes beside it; the sum is never made.

    x times it is x @ base + scale * (x @ a) @ b for each change, so that no gradient of the base's size is
    taken where only the changes train. Dropout, where a change has it, falls on its own x.

    Attributes:
        base: [D, F], an array or a stored kernel.
        changes: any number of them.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    >>> kernel = AdaptedKernel(jnp.eye(2), (LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5),))
    >>> kernel.array().tolist()
    [[1.5, 0.5], [0.5, 1.5]]
    """

    base: Any
    changes: tuple[LowRank, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """[D, F]."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The base's."""
        return self.base.dtype

    def product(self, x: Array, dtype: Any) -> Array:
        """x [..., D] times the kernel, in at least float32."""
        from mmjax.nn.functional import dense, dropout

        y = dense(x, self.base, dtype=dtype, keep_sums=True)
        for change in self.changes:
            key = None if change.key is None else jax.random.wrap_key_data(change.key)
            inner = dense(dropout(x, change.rate, key), change.a, dtype=dtype)
            y = y + change.scale * dense(inner, change.b, dtype=dtype, keep_sums=True)
        return y

    def array(self) -> Array:
        """base + the sum of scale * a @ b, summed in at least float32; dropout plays no part."""
        from mmjax.nn.products import accumulator

        base = self.base if isinstance(self.base, jax.Array) else as_array(self.base)
        total = base.astype(accumulator(base.dtype))
        for change in self.changes:
            a, b = (x.astype(total.dtype) for x in (change.a, change.b))
            total = total + change.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return total.astype(base.dtype)


def as_array(kernel: Any) -> Array:
    """The kernel as one array, whatever it is stored as.

    >>> as_array(jnp.ones((1, 2))).shape
    (1, 2)
    """
    return kernel.array() if isinstance(kernel, StoredKernel) else kernel


def replace_kernels(params: Mapping[str, Any], pattern: str, store: Callable[[Array], Any]) -> dict[str, Any]:
    """A parameter tree with some kernels stored in another form, one made after another.

    Args:
        params: nested parameters.
        pattern: regular expression that has to match a parameter's whole path.
        store: an array [D, F] to a stored kernel.

    Raises:
        ConfigError: nothing matches, or something that does is no array [D, F].
    """
    flat = flatten_dict(dict(params), sep="/")
    chosen = [path for path in flat if re.fullmatch(pattern, path)]
    if not chosen:
        raise ConfigError(f"no parameter matches {pattern!r}; one is {next(iter(flat), 'none')!r}")
    for path in chosen:
        if getattr(flat[path], "ndim", 0) != 2:
            raise ConfigError(f"{path} is no kernel [D, F]; narrow the pattern {pattern!r}")
    return unflatten_dict({**flat, **{path: store(flat[path]) for path in chosen}}, sep="/")
