"""What a transformer tower is (TransformerConfig) and how it is computed (Execution)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from mmjax.errors import ConfigError
from mmjax.nn.activations import activation

DTYPES = ("float16", "bfloat16", "float32", "float64")


def canonical_dtype(dtype: Any) -> str:
    """The name of a floating dtype given as a name, a numpy dtype or a jax scalar type.

    >>> canonical_dtype(jnp.bfloat16), canonical_dtype("float32")
    ('bfloat16', 'float32')
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} is not a floating type; use one of {', '.join(DTYPES)}")
    return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed. Parameters and results stay the same but for rounding.

    Attributes:
        dtype: dtype of activations and products; None means the parameters' own.
        scan_layers: one compiled layer in a loop (fast to compile) in place of unrolled layers.
        remat: recompute each layer's activations in the backward pass instead of keeping them.

    >>> Execution(dtype=jnp.bfloat16).dtype
    'bfloat16'
    """

    dtype: str | None = None
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", canonical_dtype(self.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A stack of pre-norm layers: attention and a two-layer perceptron, each with a residual.

    Attributes:
        hidden_size: D.
        intermediate_size: F.
        num_hidden_layers: number of layers, 0 or more.
        num_attention_heads: N; divides hidden_size, H = D / N.
        hidden_act: activation by its hub name.
        layer_norm_eps: epsilon of every layer norm.
        attention_dropout: rate on attention weights.
        hidden_dropout: rate on embeddings and on each residual branch.
        qkv_bias: whether the query, key and value products have a bias.
        initializer: the rule for fresh kernels (see `mmjax.nn.initializers`).
        initializer_range: standard deviation where the rule uses one.
        initializer_factor: multiplies the standard deviations of the rule "clip".
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    qkv_bias: bool = True
    initializer: Literal["normal", "clip", "xavier"] = "normal"
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "intermediate_size", "num_attention_heads")
        check_int(self, "num_hidden_layers", least=0)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} does not divide "
                f"hidden_size {self.hidden_size}"
            )
        activation(self.hidden_act)
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [0, 1)")
        if not self.layer_norm_eps >= 0:
            raise ConfigError(f"layer_norm_eps: {self.layer_norm_eps} is not a number >= 0")


def check_int(config: Any, name: str, *, least: int) -> None:
    """Raise ConfigError unless the field is an int of at least `least`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless every named field is a positive int."""
    for name in names:
        check_int(config, name, least=1)
