"""Activation functions under the names that hub configs use.

The three GELUs are different functions: swapping them costs 1e-3 in the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from mmjax.errors import ConfigError

Array = jax.Array


def gelu_erf(x: Array) -> Array:
    """x * Phi(x) with the error function, any shape (Hendrycks & Gimpel 2016).

    >>> float(gelu_erf(jnp.float32(0.0)))
    0.0
    """
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU, any shape.

    >>> float(gelu_tanh(jnp.float32(0.0)))
    0.0
    """
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), any shape: the activation of the original CLIP weights.

    >>> float(quick_gelu(jnp.float32(0.0)))
    0.0
    """
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": gelu_erf,
        "gelu_python": gelu_erf,
        "gelu_new": gelu_tanh,
        "gelu_fast": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "gelu_python_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that a hub config calls `name`.

    Raises:
        ConfigError: the name is not known.

    >>> activation("quick_gelu").__name__
    'quick_gelu'
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act: unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
