"""Products in a traced program: FLOPs and the bytes of their operands and results, loops included.

XLA's own cost analysis counts the body of a loop once, whatever its number of turns; a jaxpr has that number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


@dataclasses.dataclass
class Work:
    """What the products of a program come to, over all devices.

    Attributes:
        flops: by the dtype of the operands; a multiplication and an addition are two.
        bytes: read and written by products, each operand and each result once.
        loops_of_unknown_length: `while` loops, whose bodies are counted once.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: float = 0.0
    loops_of_unknown_length: int = 0

    @property
    def total_flops(self) -> float:
        """FLOPs of all dtypes."""
        return sum(self.flops.values())

    def add(self, other: Work, times: float = 1) -> None:
        """Add another's work, `times` times."""
        for dtype, flops in other.flops.items():
            self.flops[dtype] = self.flops.get(dtype, 0.0) + flops * times
        self.bytes += other.bytes * times
        self.loops_of_unknown_length += other.loops_of_unknown_length


def count_work(function: Callable[..., Any], *arguments: Any) -> Work:
    """Trace a function and count its products; nothing is computed.

    Args:
        function: of arrays; jitted or not.
        arguments: arrays, or shapes in their place (jax.ShapeDtypeStruct).

    >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
    >>> count_work(lambda x: jax.lax.scan(lambda c, _: (c @ (x.T @ x), None), x, length=5)[0], x).flops
    {'float32': 360.0}
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def count_jaxpr(closed: ClosedJaxpr, *, devices: int = 1, cache: float = 0) -> Work:
    """Count the products of a traced program that its results need.

    What no result needs is not counted, since XLA removes it: a model may return more than a loss looks at.

    Args:
        closed: the program.
        devices: that share every product equally, except inside shard_map, where shapes are one device's.
        cache: bytes; a product whose operands and result together are no larger, on one device, may find
            and leave them in the chip's own memory, and its bytes are not counted.
    """
    from jax.interpreters import partial_eval

    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(jaxpr, cache * devices, cache)


def _count(jaxpr: Jaxpr, cache: float, local: float) -> Work:
    """Count; `cache` is that of all devices together, `local` that of one."""
    work = Work()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            product = _PRODUCTS[name](equation)
            product.bytes *= product.bytes > cache
            work.add(product)
        elif name == "scan":
            work.add(_count(params["jaxpr"].jaxpr, cache, local), params["length"])
        elif name == "while":
            work.add(_count(params["body_jaxpr"].jaxpr, cache, local))
            work.loops_of_unknown_length += 1
        elif name == "cond":
            branches = [_count(branch.jaxpr, cache, local) for branch in params["branches"]]
            work.add(max(branches, key=lambda branch: branch.total_flops))
        elif name == "shard_map":
            # Inside, shapes are those of one device.
            axes = params.get("manual_axes") or params["mesh"].axis_names
            inside = _count(params["jaxpr"], local, local)
            work.add(inside, math.prod(params["mesh"].shape[axis] for axis in axes))
        else:
            for inner in _inner(params):
                work.add(_count(inner, cache, local))
    return work


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Programs that an equation calls once: pjit, remat, custom_jvp, custom_vjp and whatever else."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _product(equation: Any, multiplied: float) -> Work:
    operands = [variable.aval for variable in equation.invars]
    result = equation.outvars[0].aval
    moved = sum(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize for aval in (*operands, result))
    return Work({operands[0].dtype.name: 2.0 * math.prod(result.shape) * multiplied}, float(moved))


def _dot(equation: Any) -> Work:
    (contracted, others), (batch, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars)
    rows, columns = (len(x) - len(axes) - len(batch) for x, axes in ((left, contracted), (right, others)))
    if not contracted or not (rows or columns):
        return Work()  # Factors entry by entry, or sums of such: fused, as all else that is no product.
    return _product(equation, math.prod(left[axis] for axis in contracted))


def _conv(equation: Any) -> Work:
    kernel = equation.invars[1].aval.shape
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return _product(equation, math.prod(kernel) / out_features)


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv}
