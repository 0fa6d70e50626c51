"""Next-token cross-entropy straight from hidden states: the logits of all positions are never held.

Logits are made one tile at a time, some positions by some of the vocabulary, and made again in the backward
pass. Per position only two numbers stay: the label's logit, and the log-sum-exp of all other logits. The loss
is the softplus of their difference and its gradient a sigmoid of it, so nothing cancels where the model is
nearly certain. Positions whose label is ignored, such as those of an image, are put last and cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from mmjax.errors import ConfigError
from mmjax.losses.pairs import once_only
from mmjax.losses.rows import Axis, Rows
from mmjax.nn.products import accumulator

Array = jax.Array
IGNORED = -100
# A tile of float32 logits then takes at most 64 MiB.
TOKENS_PER_BLOCK = 2048
VOCABULARY_PER_BLOCK = 8192
# Few tokens make some tiles too, so that ignored ones can be left out.
TILES, FEWEST_TOKENS = 4, 128


def next_token(
    hidden: Array,
    kernel: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    weights: Array | None = None,
    softcap: float | None = None,
    sequence_block: int | None = None,
    vocabulary_block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
) -> Array:
    """Mean cross-entropy of every token given those before it.

    Labels are laid out as transformers lays them out: `labels` are the input ids, and the label of position t
    is compared with what position t - 1 predicts. The shift happens here; the first label of a row is never
    used.

    Args:
        hidden: [B, T, D], the decoder's last hidden states after the final norm.
        kernel: [D, V], of the output layer; products run in hidden's dtype and are summed in float32.
        labels: int [B, T]; -100 is ignored. An id outside the vocabulary gives NaN.
        bias: [V], of the output layer.
        weights: [B, T], zero or more, of each label; the mean is weighted by them.
        softcap: logits become softcap * tanh(logits / softcap).
        sequence_block: positions per row in a tile; None: so many that a tile has about 2,048.
        vocabulary_block: vocabulary entries in a tile; None means 8,192.
        mesh: rows are sharded over `axis` of this mesh; each device sums its own rows, and the kernel's
            gradient travels once. None: one device, or a layout left to the compiler.
        axis: mesh axis or axes of the rows.

    Returns:
        Scalar in at least float32; 0, with zero gradients, where every label is ignored. First derivatives
        only, of hidden, kernel, bias and weights.

    Raises:
        ConfigError: a block size or softcap that is not positive, or rows that the mesh cannot split evenly.

    Source: Gemma 2 report (2024), section 2, for the soft cap.

    >>> hidden, kernel = jnp.zeros((1, 3, 2)), jnp.zeros((2, 4))
    >>> round(float(next_token(hidden, kernel, jnp.array([[3, 1, -100]]))), 4)
    1.3863
    """
    targets = _shift(labels, IGNORED)
    losses = token_losses(
        hidden,
        kernel,
        targets,
        bias=bias,
        softcap=softcap,
        sequence_block=sequence_block,
        vocabulary_block=vocabulary_block,
        mesh=mesh,
        axis=axis,
    )
    share = (targets != IGNORED).astype(losses.dtype)
    if weights is not None:
        chex.assert_equal_shape([weights, labels])
        share = share * _shift(weights, 0).astype(losses.dtype)
    total = share.sum()
    return (losses * share).sum() / jnp.where(total > 0, total, 1)


def token_losses(
    hidden: Array,
    kernel: Array,
    targets: Array,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    sequence_block: int | None = None,
    vocabulary_block: int | None = None,
    mesh: Mesh | None = None,
    axis: Axis = "data",
) -> Array:
    """Cross-entropy of each position's own target, in the same blocks as `next_token`; nothing is shifted.

    Args:
        hidden, kernel, bias, softcap, sequence_block, vocabulary_block, mesh, axis: see `next_token`.
        targets: int [B, T], what position t should predict; -100 is ignored.

    Returns:
        [B, T] in at least float32: minus the target's log-probability, 0 where it is ignored.

    Raises:
        ConfigError: see `next_token`.

    >>> losses = token_losses(jnp.zeros((1, 2, 3)), jnp.zeros((3, 4)), jnp.array([[0, -100]]))
    >>> [round(float(x), 4) for x in losses[0]]
    [1.3863, 0.0]
    """
    chex.assert_rank([hidden, kernel, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    chex.assert_equal(hidden.shape[2], kernel.shape[0])
    if bias is not None:
        chex.assert_shape(bias, (kernel.shape[1],))
    blocks = _blocks(hidden, kernel, softcap, sequence_block, vocabulary_block, mesh, axis)
    return _token_losses(blocks, hidden, kernel, bias, targets)


def _shift(x: Array, last: Any) -> Array:
    """What position t + 1 has, at t."""
    return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], last)], axis=1)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What is static: tile sizes, the soft cap, and where the rows lie."""

    positions: int
    entries: int
    softcap: float | None
    rows: Rows


def _blocks(
    hidden: Array,
    kernel: Array,
    softcap: float | None,
    sequence_block: int | None,
    vocabulary_block: int | None,
    mesh: Mesh | None,
    axis: Axis,
) -> _Blocks:
    for name, value in (("sequence_block", sequence_block), ("vocabulary_block", vocabulary_block)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected a positive integer, got {value}")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"softcap: expected a number above 0, got {softcap}")
    rows = Rows.over(mesh, axis, hidden.shape[0], "hidden")
    if sequence_block is None:
        tokens = hidden.shape[0] // rows.devices * hidden.shape[1]
        number = max(-(-tokens // TOKENS_PER_BLOCK), min(TILES, tokens // FEWEST_TOKENS), 1)
    else:
        number = max(1, -(-hidden.shape[1] // sequence_block))
    entries = min(kernel.shape[1], vocabulary_block or VOCABULARY_PER_BLOCK)
    # Blocks of one size with as little padding as their number allows.
    positions = max(1, -(-hidden.shape[1] // number))
    return _Blocks(positions, entries, softcap, rows)


class _Tiles:
    """The tiles of one device's rows: index arithmetic, and the logits of one tile.

    Each row's positions are in an order of their own here, those whose label is ignored last.
    """

    def __init__(
        self, blocks: _Blocks, hidden: Array, kernel: Array, bias: Array | None, targets: Array
    ) -> None:
        self.blocks, self.kernel, self.bias = blocks, kernel, bias
        self.order = jnp.argsort(targets == IGNORED, axis=1, stable=True)
        self.hidden, self.targets = self.lay_out(hidden), self.lay_out(targets, IGNORED)
        self.sums = accumulator(hidden.dtype)
        self.vocabulary = kernel.shape[1]
        self.columns = jnp.arange(-(-self.vocabulary // blocks.entries)) * blocks.entries
        learned = (targets != IGNORED).sum(axis=1).max(initial=0)
        self.needed = (learned + blocks.positions - 1) // blocks.positions

    def lay_out(self, x: Array, value: Any = 0) -> Array:
        """x [B, T, ...] in this order and in whole blocks."""
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -x.shape[1] % self.blocks.positions)
        return jnp.pad(_reorder(x, self.order), padding, constant_values=value)

    def bring_back(self, x: Array) -> Array:
        """What `lay_out` was given."""
        return _reorder(x, jnp.argsort(self.order, axis=1))

    def each_block(self, step: Callable[[Any, Array], Any], state: Any) -> Any:
        """state = step(state, position of the block's first) for all blocks in which something is learned."""
        size = self.blocks.positions

        def next_block(state: Any, number: Array) -> tuple[Any, None]:
            # A loop of a known length, so that `mmjax plan` can count the most that it may cost.
            skip = number >= self.needed
            return lax.cond(skip, lambda state, row: state, step, state, number * size), None

        return lax.scan(next_block, state, jnp.arange(self.hidden.shape[1] // size))[0]

    def take(self, x: Array, row: Array) -> Array:
        """A block of positions of x [B, T, ...]."""
        return lax.dynamic_slice_in_dim(x, row, self.blocks.positions, axis=1)

    def output(self, column: Array) -> tuple[Array, Array | None, Array, Array]:
        """A block of the output layer: kernel [D, v], bias [v], ids [v], and which of them are its own.

        The last block is moved back to end where the vocabulary ends; what it then shares with the block
        before is not its own.
        """
        start = jnp.minimum(column, self.vocabulary - self.blocks.entries)
        kernel = lax.dynamic_slice_in_dim(self.kernel, start, self.blocks.entries, axis=1)
        bias = self.bias
        if bias is not None:
            bias = lax.dynamic_slice_in_dim(bias, start, self.blocks.entries).astype(self.sums)
        ids = start + jnp.arange(self.blocks.entries)
        return kernel.astype(self.hidden.dtype), bias, ids, ids >= column

    def logits(self, x: Array, kernel: Array, bias: Array | None) -> Array:
        """[B, t, v] in at least float32."""
        logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=self.sums)
        logits = logits if bias is None else logits + bias
        cap = self.blocks.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _reorder(x: Array, order: Array) -> Array:
    """x [B, T, ...] with row b's positions in the order [B, T]."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _statistics(tiles: _Tiles) -> tuple[Array, Array]:
    """Per position, [B, T]: the log-sum-exp of all logits but the label's, and the label's logit."""

    def by_column(state: Any, column: Array) -> tuple[Any, None]:
        kernel, bias, ids, own = tiles.output(column)

        def by_row(state: Any, row: Array) -> Any:
            highest, total, picked = (tiles.take(x, row) for x in state)
            logits = tiles.logits(tiles.take(tiles.hidden, row), kernel, bias)
            label = (ids == tiles.take(tiles.targets, row)[..., None]) & own
            others = jnp.where(label | ~own, -jnp.inf, logits)
            new = jnp.maximum(highest, others.max(axis=-1))
            # Nothing but the label so far: no maximum yet, and any finite number will do.
            finite = jnp.where(jnp.isfinite(new), new, 0)
            total = total * jnp.exp(highest - finite) + jnp.exp(others - finite[..., None]).sum(axis=-1)
            picked = picked + jnp.where(label, logits, 0).sum(axis=-1)
            parts = zip(state, (new, total, picked), strict=True)
            return tuple(lax.dynamic_update_slice_in_dim(x, part, row, axis=1) for x, part in parts)

        return tiles.each_block(by_row, state), None

    zeros = jnp.zeros(tiles.targets.shape, tiles.sums)
    start = (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    (highest, total, picked), _ = lax.scan(by_column, start, tiles.columns)
    return tiles.bring_back(highest + jnp.log(total)), tiles.bring_back(picked)


def _gradients(
    tiles: _Tiles, rest: Array, picked: Array, cotangent: Array, axis: Any
) -> tuple[Array, Array, Array | None]:
    """Gradients of hidden, kernel and bias for a cotangent [B, T]."""
    rest, picked, cotangent = (tiles.lay_out(x) for x in (rest, picked, cotangent))
    every = jnp.logaddexp(rest, picked)
    missing = jax.nn.sigmoid(rest - picked)
    cap = tiles.blocks.softcap

    def by_column(state: Any, column: Array) -> tuple[Any, None]:
        to_hidden, to_kernel, to_bias = state
        kernel, bias, ids, own = tiles.output(column)
        bias_block: Any = None

        def by_row(state: Any, row: Array) -> Any:
            to_hidden, block, bias_block = state
            x, targets, lse, short, g = (
                tiles.take(a, row) for a in (tiles.hidden, tiles.targets, every, missing, cotangent)
            )
            logits = tiles.logits(x, kernel, bias)
            label = ids == targets[..., None]
            slope = jnp.where(label, -short[..., None], jnp.exp(logits - lse[..., None])) * g[..., None]
            slope = jnp.where((targets == IGNORED)[..., None], 0, slope)
            if cap is not None:
                slope = slope * (1 - jnp.square(logits / cap))
            narrow = slope.astype(x.dtype)
            mine = jnp.where(own, narrow, 0)
            part = jnp.einsum("btv,dv->btd", mine, kernel, preferred_element_type=tiles.sums)
            part = part + tiles.take(to_hidden, row)
            block = block + _summed_outer(x, narrow, tiles.sums)
            bias_block = None if bias is None else bias_block + slope.sum(axis=(0, 1))
            to_hidden = lax.dynamic_update_slice_in_dim(to_hidden, part, row, axis=1)
            return to_hidden, block, bias_block

        empty = jnp.zeros(kernel.shape, tiles.sums)
        start = (to_hidden, empty, None if bias is None else empty[0])
        to_hidden, block, bias_block = tiles.each_block(by_row, start)
        if axis is not None:
            block, bias_block = lax.psum((block, bias_block), axis)
        # Columns that two blocks share are written twice, with the same values.
        to_kernel = lax.dynamic_update_slice_in_dim(to_kernel, block.astype(to_kernel.dtype), ids[0], axis=1)
        if bias is not None:
            to_bias = lax.dynamic_update_slice_in_dim(to_bias, bias_block.astype(to_bias.dtype), ids[0], 0)
        return (to_hidden, to_kernel, to_bias), None

    start = (
        jnp.zeros(tiles.hidden.shape, tiles.sums),
        jnp.zeros_like(tiles.kernel),
        None if tiles.bias is None else jnp.zeros_like(tiles.bias),
    )
    to_hidden, to_kernel, to_bias = lax.scan(by_column, start, tiles.columns)[0]
    return tiles.bring_back(to_hidden), to_kernel, to_bias


def _summed_outer(x: Array, y: Array, sums: Any) -> Array:
    """[B, T, D] and [B, T, V] to [D, V], summed over B and T.

    Over two axes, XLA's CPU backend has no product of narrow numbers with wide sums where tokens are few, and
    fails while it runs: there they are one axis.
    """
    if x.dtype == sums:
        return jnp.einsum("btd,btv->dv", x, y)
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    return jnp.einsum("nd,nv->dv", x, y, preferred_element_type=sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(blocks: _Blocks, hidden: Array, kernel: Array, bias: Array | None, targets: Array) -> Array:
    return _forward(blocks, hidden, kernel, bias, targets)[0]


def _forward(blocks: _Blocks, hidden: Array, kernel: Array, bias: Array | None, targets: Array) -> Any:
    def local(rows: Any, whole: Any, axis: Any) -> Any:
        (hidden, targets), (kernel, bias) = rows, whole
        return _statistics(_Tiles(blocks, hidden, kernel, bias, targets))

    rest, picked = blocks.rows.run(local, (hidden, targets), (kernel, bias), (True, True))
    outside = (targets != IGNORED) & ((targets < 0) | (targets >= kernel.shape[1]))
    losses = jnp.where(outside, jnp.nan, jnp.where(targets == IGNORED, 0, jax.nn.softplus(rest - picked)))
    return losses, (hidden, kernel, bias, targets, rest, picked)


def _backward(blocks: _Blocks, saved: Any, cotangent: Array) -> Any:
    hidden, kernel, bias, targets, rest, picked = saved

    def local(rows: Any, whole: Any, axis: Any) -> Any:
        (hidden, targets, rest, picked, cotangent), (kernel, bias) = rows, whole
        tiles = _Tiles(blocks, hidden, kernel, bias, targets)
        to_hidden, to_kernel, to_bias = _gradients(tiles, rest, picked, cotangent, axis)
        return to_hidden.astype(hidden.dtype), to_kernel, to_bias

    rows = (hidden, targets, rest, picked, cotangent)
    out = (True, False, None if bias is None else False)
    return *once_only("next_token", blocks.rows.run(local, rows, (kernel, bias), out)), None


_token_losses.defvjp(_forward, _backward)
