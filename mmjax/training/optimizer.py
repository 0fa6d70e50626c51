"""From ordered patterns to labels, and from labels to one optax optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mmjax.errors import ConfigError
from mmjax.training.schedules import Frozen, Schedule

OptimizerName = Literal["adamw", "muon"]
# Of the entries of Muon's step, before the rate: about as large as those of Adam's.
_MUON_RMS = 0.2


class Rule(NamedTuple):
    """Parameters whose whole path matches `pattern` (a regular expression) follow `schedule`."""

    pattern: str
    schedule: Schedule | Frozen


def label_parameters(paths: Iterable[str], rules: Sequence[Rule], stage: str) -> dict[str, int]:
    """Give every parameter the index of the first rule whose pattern matches its whole path.

    Args:
        paths: parameter paths, parts joined by "/".
        rules: ordered rules; the first match wins.
        stage: the stage's name, for messages.

    Returns:
        Path to index into `rules`.

    Raises:
        ConfigError: a pattern that is no regular expression, that matches nothing (or only what
            earlier patterns took), or parameters that no pattern covers; all are listed.

    >>> from mmjax.training.schedules import FROZEN, Constant
    >>> rules = [Rule("eyes/.*", FROZEN), Rule(".*", Constant(value=1.0))]
    >>> label_parameters(["eyes/w", "head/w"], rules, "align")
    {'eyes/w': 0, 'head/w': 1}
    """
    compiled = []
    for rule in rules:
        try:
            compiled.append(re.compile(rule.pattern))
        except re.error as error:
            raise ConfigError(
                f"stage {stage!r}: pattern {rule.pattern!r} is not a regular expression: {error}"
            ) from None
    labels: dict[str, int] = {}
    faults = []
    matched: set[int] = set()
    for path in paths:
        hits = [index for index, pattern in enumerate(compiled) if pattern.fullmatch(path)]
        matched.update(hits)
        if hits:
            labels[path] = hits[0]
        else:
            faults.append(f"no pattern covers parameter {path!r}")
    won = set(labels.values())
    for index, rule in enumerate(rules):
        if index not in matched:
            faults.append(f"pattern {rule.pattern!r} matches no parameter (it has to match the whole path)")
        elif index not in won:
            faults.append(f"pattern {rule.pattern!r} comes too late: earlier ones match all that it does")
    if faults:
        raise ConfigError(f"stage {stage!r}: " + "\n  ".join(faults))
    return labels


def trained_rules(rules: Sequence[Rule]) -> dict[int, Schedule]:
    """The rules that train, by index."""
    return {index: rule.schedule for index, rule in enumerate(rules) if not isinstance(rule.schedule, Frozen)}


def make_optimizer(
    labels: Mapping[str, int],
    schedules: Mapping[int, optax.Schedule],
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    optimizer: OptimizerName = "adamw",
) -> optax.GradientTransformation:
    """AdamW or Muon over a flat dict of parameters: clip, direction, decay, then each rule's own rate.

    With "muon" the kernels of two dimensions move along their orthogonalised momentum, scaled so that the
    rates of AdamW serve it too; all others (tables, norms, biases, patches) follow Adam.

    Args:
        labels: parameter path to rule index, for the trained parameters.
        schedules: rule index to learning-rate schedule.
        b1, b2, eps: Adam's constants.
        weight_decay: multiplies the parameter and is added to Adam's direction, before the rate;
            only for arrays of two or more dimensions, so never for biases, norms and scales.
        clip_norm: largest global norm of the gradients; 0 does not clip.
        optimizer: "adamw" or "muon".

    Returns:
        An optax transformation over dict[path, array].

    Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; Jordan et al.
    2024, "Muon", and Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2 (the scale).
    """
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if optimizer == "muon":
        muon = optax.chain(scale_by_muon(weight_dimension_numbers=_as_matrices), optax.stateless(_like_adam))
        direction = optax.partition({"muon": muon, "adam": direction}, _muon_or_adam)
    parts = [direction]
    if clip_norm:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=_matrices))
    return optax.chain(*parts, _scale_by_rule(labels, schedules))


def _muon_or_adam(params: Mapping[str, Any]) -> dict[str, str]:
    """Which parameters follow which direction, by path."""
    return {
        path: "muon" if path.endswith("/kernel") and leaf.ndim == 2 else "adam"
        for path, leaf in params.items()
    }


def _as_matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda _: MuonDimensionNumbers(), params)


def _like_adam(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Orthogonal matrices, scaled so that their entries are about as large as those of Adam's direction."""
    return jax.tree.map(lambda x: _MUON_RMS * max(x.shape) ** 0.5 * x, updates)


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _scale_by_rule(
    labels: Mapping[str, int], schedules: Mapping[int, optax.Schedule]
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: dict[str, jax.Array], state: optax.ScaleByScheduleState, params: optax.Params | None = None
    ) -> tuple[dict[str, jax.Array], optax.ScaleByScheduleState]:
        rates = {index: schedule(state.count) for index, schedule in schedules.items()}
        scaled = {path: (-rates[labels[path]] * x).astype(x.dtype) for path, x in updates.items()}
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
