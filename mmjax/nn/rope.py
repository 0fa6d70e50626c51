"""Rotary positions: frequencies with every published scaling, angles of any positions, the rotation.

Positions are inputs: one number per token, or several (time, height, width), of which a frequency reads one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import ConfigError
from mmjax.nn.products import accumulator

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every position divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """The base grows with a text longer than `original_max_position_embeddings` ("NTK-aware")."""

    factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (LLaMA 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Interpolation by the number of turns within the original context (Peng et al. 2023).

    Attributes:
        factor: how much longer than the original context.
        original_max_position_embeddings: the original context.
        beta_fast, beta_slow: turns above which nothing, and below which everything, is interpolated.
        attention_factor: multiplies cos and sin; None means the paper's, from `factor` (and the mscales).
        mscale, mscale_all_dim: where both are given, the factor is the ratio of their two.
        truncate: round the borders of the blend to whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """One divisor per frequency, other ones for texts beyond the original context (Ding et al. 2024).

    Attributes:
        short_factor, long_factor: H / 2 divisors each.
        original_max_position_embeddings: texts longer than this use `long_factor`.
        factor: how much longer than the original context the model is made for.
        attention_factor: multiplies cos and sin; None means sqrt(1 + log(factor) / log(original context)).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions of one width.

    Attributes:
        head_dim: H, even.
        theta: base of the wavelengths.
        scaling: how they are stretched, or None.
        sections: how many of the H / 2 frequencies read each position axis (time, height, width); () where
            positions have one axis.
        interleaved: the axes take turns (t h w t h w ...) in place of blocks; where the others' share is used
            up, the first axis has the rest.

    >>> RopeConfig(head_dim=8).theta
    10000.0
    """

    head_dim: int
    theta: float = 10000.0
    scaling: RopeScaling | None = None
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim: {self.head_dim} is not even; rotary positions turn pairs")
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise ConfigError(f"rope_theta: {self.theta} is not a positive number")
        half = self.head_dim // 2
        if self.sections and sum(self.sections) != half:
            raise ConfigError(f"mrope_section: {self.sections} does not add up to head_dim / 2 = {half}")
        if self.scaling is not None:
            _check_scaling(self.scaling, half)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        scaling = self.scaling
        if isinstance(scaling, YarnScaling):
            if scaling.attention_factor is not None:
                return scaling.attention_factor
            if scaling.mscale and scaling.mscale_all_dim:
                above = _yarn_mscale(scaling.factor, scaling.mscale)
                return above / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
            return _yarn_mscale(scaling.factor, 1.0)
        if isinstance(scaling, LongRopeScaling):
            if scaling.attention_factor is not None:
                return scaling.attention_factor
            if scaling.factor <= 1.0:
                return 1.0
            return math.sqrt(
                1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings)
            )
        return 1.0

    @property
    def axis_of_frequency(self) -> tuple[int, ...]:
        """Which position axis each of the H / 2 frequencies reads."""
        if not self.sections:
            return (0,) * (self.head_dim // 2)
        if not self.interleaved:
            return tuple(axis for axis, size in enumerate(self.sections) for _ in range(size))
        axes = [0] * (self.head_dim // 2)
        count = len(self.sections)
        for axis in range(1, count):
            for index in range(axis, self.sections[axis] * count, count):
                axes[index] = axis
        return tuple(axes)


def _check_scaling(scaling: RopeScaling, half: int) -> None:
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if value is None or isinstance(value, bool):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if not (isinstance(number, (int, float)) and math.isfinite(number) and number > 0):
                raise ConfigError(f"rope_scaling: {field.name} should be a positive number, got {number!r}")
        if isinstance(value, tuple) and len(value) != half:
            raise ConfigError(f"rope_scaling: {field.name} has {len(value)} numbers, head_dim / 2 is {half}")
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"rope_scaling: high_freq_factor {scaling.high_freq_factor} is not above "
            f"low_freq_factor {scaling.low_freq_factor}"
        )


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def depends_on_length(scaling: RopeScaling | None) -> bool:
    """Whether a token's rotation depends on how long its text is, and not on its position alone.

    >>> depends_on_length(DynamicScaling(factor=2.0, original_max_position_embeddings=8))
    True
    """
    return longest_unchanged(scaling) is not None


def longest_unchanged(scaling: RopeScaling | None) -> int | None:
    """How long a text may be and still be rotated as every shorter one is; None: as long as it likes.

    >>> longest_unchanged(DynamicScaling(factor=2.0, original_max_position_embeddings=8))
    8
    """
    if isinstance(scaling, (DynamicScaling, LongRopeScaling)):
        return scaling.original_max_position_embeddings
    return None


def rope_frequencies(config: RopeConfig, length: Any = None) -> Array:
    """Radians per position.

    Args:
        config: width, base and scaling.
        length: int [B], each text's length so far, for scalings that depend on it (dynamic, longrope), or
            int [B, T], that of each token's text; None means texts within the original context.

    Returns:
        float32 [H / 2], or [B, 1, H / 2] (or [B, T, H / 2]) where the scaling depends on the length.

    Source: Su et al. 2021, section 3.2.2; the scalings as their dataclasses say.
    Deviation: transformers takes the longest text of a batch for `length`; here each row (or packed text) has
    its own, so that a text's result does not depend on its neighbours.

    >>> [round(float(x), 3) for x in rope_frequencies(RopeConfig(head_dim=4))]
    [1.0, 0.01]
    """
    scaling = config.scaling
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    if length is not None:
        length = length[:, None, None] if length.ndim == 1 else length[..., None]
    if isinstance(scaling, DynamicScaling) and length is not None:
        ratio = jnp.maximum(length, scaling.original_max_position_embeddings).astype(jnp.float32)
        ratio = scaling.factor * ratio / scaling.original_max_position_embeddings - (scaling.factor - 1)
        base = config.theta * ratio ** (config.head_dim / (config.head_dim - 2))
        return (1.0 / base**exponent).astype(jnp.float32)
    plain = config.theta**-exponent
    if isinstance(scaling, LinearScaling):
        plain = plain / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        plain = _llama3(plain, scaling)
    elif isinstance(scaling, YarnScaling):
        plain = _yarn(plain, config, scaling)
    elif isinstance(scaling, LongRopeScaling):
        short, long = (
            jnp.asarray(plain / np.asarray(f), jnp.float32)
            for f in (scaling.short_factor, scaling.long_factor)
        )
        if length is None:
            return short
        return jnp.where(length > scaling.original_max_position_embeddings, long, short)
    return jnp.asarray(plain, jnp.float32)


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: np.ndarray, config: RopeConfig, scaling: YarnScaling) -> np.ndarray:
    def index_of(turns: float) -> float:
        """The (fractional) frequency that makes so many turns within the original context."""
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    high = high + 0.001 if low == high else high
    slowed = np.clip((np.arange(config.head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (slowed / scaling.factor + 1 - slowed)


def rope_angles(position_ids: Array, inv_freq: Array, axis_of_frequency: tuple[int, ...] = ()) -> Array:
    """Angle of every token at every frequency.

    Args:
        position_ids: [B, T], or [A, B, T] with A position axes.
        inv_freq: [H / 2], [B, 1, H / 2] or [B, T, H / 2].
        axis_of_frequency: for [A, B, T], the position axis that each of the H / 2 frequencies reads.

    Returns:
        float32 [B, T, H / 2].

    >>> rope_angles(jnp.array([[0, 2]]), jnp.array([1.0, 0.5])).tolist()
    [[[0.0, 0.0], [2.0, 1.0]]]
    """
    chex.assert_rank(position_ids, {2, 3})
    if position_ids.ndim == 2:
        return position_ids[..., None].astype(jnp.float32) * inv_freq
    chosen = jnp.asarray(position_ids, jnp.float32)[np.asarray(axis_of_frequency, np.int32)]
    return jnp.moveaxis(chosen, 0, -1) * inv_freq


def rope_tables(
    config: RopeConfig, position_ids: Array, segment_ids: Array | None = None
) -> tuple[Array, Array]:
    """cos and sin of every token's angles, times the scaling's attention factor.

    A scaling that depends on the length (dynamic, longrope) takes it from the positions of this call. Keys in
    a cache keep the angles of the text as it was when they were written, so beyond the original context a
    text that is decoded with a cache is not what one pass over the whole text gives. The published models
    are run so: transformers' decoding with a cache does the same.

    Args:
        config: width, base, scaling, and how several position axes are read.
        position_ids: [B, T], or [A, B, T] with A position axes.
        segment_ids: int [B, T], the text of each token where rows hold several; each has its own length.

    Returns:
        Two float32 [B, T, H / 2].

    >>> cos, sin = rope_tables(RopeConfig(head_dim=4), jnp.array([[0]]))
    >>> cos.tolist(), sin.tolist()
    ([[[1.0, 1.0]]], [[[0.0, 0.0]]])
    """
    length = None
    if depends_on_length(config.scaling):
        longest = position_ids if position_ids.ndim == 2 else position_ids.max(axis=0)
        length = 1 + (longest.max(axis=-1) if segment_ids is None else _segment_max(longest, segment_ids))
    angles = rope_angles(position_ids, rope_frequencies(config, length), config.axis_of_frequency)
    factor = config.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _segment_max(values: Array, segment_ids: Array) -> Array:
    """The largest of [B, T] values (or with 1 for B) within each token's segment, [B, T]."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.where(same, values[:, None, :], values.min()).max(axis=-1)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (x[i], x[i + H / 2]) by their angles, in at least float32.

    Args:
        x: [B, N, T, H].
        cos, sin: [B, T, H / 2] (or with 1 for B).

    Returns:
        [B, N, T, H] in x's dtype.

    Source: Su et al. 2021, equation 34, with the halves in place of neighbours as LLaMA's weights have them.

    >>> x = jnp.ones((1, 1, 1, 2))
    >>> apply_rope(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).tolist()
    [[[[-1.0, 1.0]]]]
    """
    chex.assert_rank([x, cos, sin], [4, 3, 3])
    first, second = jnp.split(x.astype(accumulator(x.dtype)), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
