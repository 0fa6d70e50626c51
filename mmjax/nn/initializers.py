"""Fresh parameters, by the rule that a family was published with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from mmjax.nn.config import TransformerConfig

Initializer = Callable[..., Any]
Role = Literal["attention_in", "attention_out", "mlp_in", "mlp_out"]

normal = jax.nn.initializers.normal
zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones
xavier_uniform = jax.nn.initializers.xavier_uniform()
lecun_normal = jax.nn.initializers.lecun_normal()


def truncated_normal(std: float) -> Initializer:
    """Normal with standard deviation `std`, cut at two standard deviations (the cut is not corrected for)."""
    return jax.nn.initializers.truncated_normal(std)


def layer_kernel(config: TransformerConfig, role: Role) -> Initializer:
    """The initializer of one kernel of a transformer layer.

    "normal": one standard deviation for all (ViT). "xavier": uniform by fan-in and fan-out (SigLIP).
    "clip": by width and depth, so that the residual stream keeps its size (Radford et al. 2021, section 2.4,
    with the constants of the published code).

    >>> layer_kernel(TransformerConfig(), "mlp_in")(jax.random.key(0), (4, 8)).shape
    (4, 8)
    """
    if config.initializer == "xavier":
        return xavier_uniform
    if config.initializer == "normal":
        return normal(config.initializer_range)
    width = config.hidden_size**-0.5
    deep = width / math.sqrt(2 * max(config.num_hidden_layers, 1))
    std = {
        "attention_in": deep,
        "attention_out": width,
        "mlp_in": (2 * config.hidden_size) ** -0.5,
        "mlp_out": deep,
    }[role]
    return normal(std * config.initializer_factor)
