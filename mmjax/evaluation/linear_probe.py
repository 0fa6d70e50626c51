"""Linear probe: multinomial logistic regression on frozen features, by full-batch L-BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from numpy.typing import ArrayLike, NDArray

from mmjax.errors import DataError
from mmjax.evaluation.metrics import accuracy, class_labels


class _Weights(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted classifier: standardise, multiply, add.

    Attributes:
        mean: [E], subtracted from the features.
        scale: [E], then divides them; 1 where a training feature was constant.
        kernel: [E, C].
        bias: [C].
        objective: mean cross-entropy (nats) plus the penalty, at the solution.
        gradient: the largest absolute entry of the objective's gradient there.
        steps: how many L-BFGS steps were taken.
        converged: whether the gradient fell to the tolerance.
    """

    mean: NDArray[Any]
    scale: NDArray[Any]
    kernel: NDArray[Any]
    bias: NDArray[Any]
    objective: float
    gradient: float
    steps: int
    converged: bool

    def logits(self, features: ArrayLike) -> NDArray[Any]:
        """[N, C] scores of features [N, E]."""
        array = np.asarray(features, self.kernel.dtype)
        if array.ndim != 2 or array.shape[1] != len(self.kernel):
            raise DataError(f"the probe takes features [N, {len(self.kernel)}], got shape {array.shape}")
        return (array - self.mean) / self.scale @ self.kernel + self.bias

    def predict(self, features: ArrayLike) -> NDArray[np.int64]:
        """[N] class numbers of features [N, E]."""
        return self.logits(features).argmax(axis=1)

    def accuracy(self, features: ArrayLike, labels: ArrayLike) -> float:
        """The share of features [N, E] whose class is predicted as in labels [N]."""
        return accuracy(self.predict(features), np.asarray(labels))


def probe_objective(weights: Any, features: jax.Array, labels: jax.Array, l2: jax.Array | float) -> jax.Array:
    """Mean cross-entropy plus l2 / 2 times the squared kernel; the bias is free.

    With l2 = 1 / (c * N) this is scikit-learn's logistic regression objective divided by c * N.

    Args:
        weights: kernel [E, C] and bias [C].
        features: [N, E].
        labels: [N] int32.
        l2: penalty.

    Returns:
        [] in the features' dtype.

    Example:
        >>> zeros = (jnp.zeros((3, 4)), jnp.zeros(4))
        >>> round(float(probe_objective(zeros, jnp.ones((2, 3)), jnp.array([0, 1]), 0.1)), 4)
        1.3863
    """
    kernel, bias = weights
    logits = jnp.matmul(features, kernel, precision=lax.Precision.HIGHEST) + bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean() + 0.5 * l2 * jnp.sum(kernel * kernel)


@partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _minimise(
    features: jax.Array,
    labels: jax.Array,
    l2: jax.Array,
    tolerance: jax.Array,
    num_classes: int,
    max_steps: int,
) -> tuple[_Weights, jax.Array, jax.Array, jax.Array]:
    """L-BFGS from zero: weights, objective, largest gradient entry, steps."""
    solver = optax.lbfgs(memory_size=10)

    def objective(weights: _Weights) -> jax.Array:
        return probe_objective(weights, features, labels, l2)

    value_and_grad = optax.value_and_grad_from_state(objective)

    def gradient_size(state: Any) -> jax.Array:
        gradient = optax.tree.get(state, "grad")
        return jnp.maximum(jnp.abs(gradient.kernel).max(), jnp.abs(gradient.bias).max())

    def unfinished(carry: tuple[_Weights, Any, jax.Array]) -> jax.Array:
        _, state, step = carry
        # The state has no gradient before the first step; the line search leaves it one after each.
        return (step == 0) | ((step < max_steps) & (gradient_size(state) > tolerance))

    def advance(carry: tuple[_Weights, Any, jax.Array]) -> tuple[_Weights, Any, jax.Array]:
        weights, state, step = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = solver.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=objective
        )
        return optax.apply_updates(weights, updates), state, step + 1

    weights = _Weights(
        jnp.zeros((features.shape[1], num_classes), features.dtype), jnp.zeros(num_classes, features.dtype)
    )
    carry = (weights, solver.init(weights), jnp.int32(0))
    weights, state, steps = lax.while_loop(unfinished, advance, carry)
    return weights, optax.tree.get(state, "value"), gradient_size(state), steps


def fit_linear_probe(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int | None = None,
    l2: float = 1e-3,
    standardize: bool = True,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
) -> LinearProbe:
    """Fit a softmax classifier on frozen features; the same input gives the same bits.

    Args:
        features: [N, E]; float64 is kept when jax has it enabled, everything else is fitted in float32.
        labels: [N] class numbers.
        num_classes: C; None means the largest label plus one.
        l2: penalty on the kernel beside the mean loss; scikit-learn's C is 1 / (l2 * N).
        standardize: bring every feature to mean 0 and deviation 1 over the N samples.
        max_steps: L-BFGS steps at most.
        tolerance: stop when no entry of the gradient is larger.

    Returns:
        LinearProbe.

    Raises:
        DataError: shapes do not fit, a feature is not finite, l2 is negative, or fewer than two classes.

    Example:
        >>> probe = fit_linear_probe([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
        >>> probe.converged, probe.predict([[0.2], [2.9]]).tolist()
        (True, [0, 1])
    """
    wide = (
        jax.dtypes.canonicalize_dtype(np.float64) if np.asarray(features).dtype == np.float64 else np.float32
    )
    array = np.asarray(features, wide)
    if array.ndim != 2 or not array.size:
        raise DataError(f"features must be [samples, width] and not empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{int((~np.isfinite(array).all(axis=1)).sum())} rows of features are not finite")
    if not l2 >= 0 or max_steps < 1 or not tolerance >= 0:
        raise DataError(
            f"l2 {l2} and tolerance {tolerance} must not be negative, max_steps {max_steps} at least 1"
        )
    if np.shape(labels) != (len(array),):
        raise DataError(f"{len(array)} features but labels of shape {np.shape(labels)}")
    classes = int(np.max(labels)) + 1 if num_classes is None else num_classes
    if classes < 2:
        raise DataError("a linear probe needs at least two classes")
    wanted = class_labels(labels, classes)
    # float64 sums: the mean of many float32 values loses digits that the division by a small deviation shows.
    mean = array.mean(axis=0, dtype=np.float64) if standardize else np.zeros(array.shape[1])
    scale = array.std(axis=0, dtype=np.float64) if standardize else np.ones(array.shape[1])
    # A constant feature still shows a deviation of a few roundings; dividing by it would blow up noise.
    scale = np.where(scale > 10 * np.finfo(wide).eps * np.maximum(np.abs(mean), 1e-30), scale, 1.0)
    mean, scale = mean.astype(wide), scale.astype(wide)
    weights, value, error, steps = _minimise(
        (array - mean) / scale,
        wanted.astype(np.int32),
        np.asarray(l2, wide),
        np.asarray(tolerance, wide),
        num_classes=classes,
        max_steps=max_steps,
    )
    return LinearProbe(
        mean=mean,
        scale=scale,
        kernel=np.asarray(weights.kernel),
        bias=np.asarray(weights.bias),
        objective=float(value),
        gradient=float(error),
        steps=int(steps),
        converged=bool(error <= tolerance),
    )
