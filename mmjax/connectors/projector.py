"""Projectors: every feature by itself, through one linear layer or through a small perceptron."""

from __future__ import annotations

import flax.linen as nn
import jax

from mmjax.errors import ConfigError
from mmjax.nn import Dense, Execution, activation
from mmjax.parallel import shard_rows

Array = jax.Array

#: Kinds of projector: one linear layer, or linear, activation, linear.
PROJECTORS = ("linear", "mlp2x")


class Projector(nn.Module):
    """Features of width Dv to embeddings of width D.

    Attributes:
        kind: "linear", or "mlp2x": linear, activation, linear.
        features: D.
        act: the activation of "mlp2x", by its hub name.
        use_bias: whether the linear layers have a bias.

    Source: Liu et al. 2023, "Visual Instruction Tuning", section 4.1 (linear); Liu et al. 2023, "Improved
    Baselines with Visual Instruction Tuning", section 3.2 (mlp2x).

    >>> projector = Projector("mlp2x", 6)
    >>> params = projector.init(jax.random.key(0), jax.numpy.ones((2, 4)))["params"]
    >>> sorted(params), params["linear_2"]["kernel"].shape
    (['linear_1', 'linear_2'], (6, 6))
    """

    kind: str
    features: int
    act: str = "gelu"
    use_bias: bool = True
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., Dv] to [..., D]."""
        if self.kind not in PROJECTORS:
            raise ConfigError(f"projector: unknown kind {self.kind!r}; known: {', '.join(PROJECTORS)}")

        def linear(name: str, axes: tuple[str | None, ...]) -> Dense:
            return Dense(self.features, axes, use_bias=self.use_bias, execution=self.execution, name=name)

        if self.kind == "linear":
            return shard_rows(linear("linear_1", (None, "embed"))(x))
        x = activation(self.act)(linear("linear_1", (None, "mlp"))(x))
        return shard_rows(linear("linear_2", ("mlp", "embed"))(x))


__all__ = ["PROJECTORS", "Projector"]
