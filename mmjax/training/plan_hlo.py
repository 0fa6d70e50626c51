"""Collectives of a compiled program, read from its text: what every step sends over the links."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|[sufi]\d+)(?:e\w+)?\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_COLLECTIVE = re.compile(r"= (.*?) (" + "|".join(_KINDS) + r")(-start)?\(")
_CALLED = re.compile(
    r"\b(body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)
_DEFINED = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_OPERATION = re.compile(r" = \S+ ([\w-]+)\(%?([\w.-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass
class Computation:
    """The lines of a computation by the name of the value that each defines, and its result's name."""

    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    root: str = ""


@dataclasses.dataclass
class Traffic:
    """What one device sends in one step by one kind of collective.

    Attributes:
        count: how often the collective runs.
        bytes: sent by a device, where rings are used: an all-reduce of n bytes among k devices sends
            2 n (k - 1) / k.
        between_nodes: the part of `bytes` that leaves the node. Devices of a node first join what they have,
            and each carries its share on, as NCCL's rings do; of a permute that leaves a node anywhere
            all counts, since its devices wait for each other.
    """

    count: int = 0
    bytes: float = 0.0
    between_nodes: float = 0.0


def collectives(hlo_text: str, devices: int, devices_per_node: int) -> tuple[dict[str, Traffic], int]:
    """Read the collectives of a compiled program, times the turns of the loops they stand in.

    What the program has in bfloat16 counts as such: CPUs have no collectives of it, so that their compiler
    widens what it sends.

    Args:
        hlo_text: of one device's program, as `compiled.as_text()` gives it.
        devices: how many run it.
        devices_per_node: device i lies on node i // devices_per_node.

    Returns:
        Traffic by kind of collective, and the number of loops with collectives whose turns the program
        does not tell (counted once).

    >>> text = '''ENTRY %main (x: f32[4]) -> f32[4] {
    ...   ROOT %sum = f32[4]{0} all-reduce(%x), replica_groups=[1,2]<=[2], to_apply=%add
    ... }'''
    >>> collectives(text, devices=2, devices_per_node=8)[0]["all-reduce"]
    Traffic(count=1, bytes=16.0, between_nodes=0.0)
    """
    computations, entry = _computations(hlo_text)
    total: dict[str, Traffic] = {}
    unknown = 0
    for line, around, times, known in _walk(computations, entry, 1, True):
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        kind = match[2]
        groups = _groups(line, devices)
        sizes = _sizes(match[1])
        operands = [part.strip(" %") for part in line[match.end() :].partition(")")[0].split(",")]
        if len(operands) == len(sizes):
            widened = [_is_widened(name, around, computations) for name in operands]
            sizes = [size / 2 if wide else size for size, wide in zip(sizes, widened, strict=True)]
        # The result of an asynchronous one holds its operand too: the larger part is sent.
        whole = match[3] is None or kind == "all-reduce"
        sent = times * _sent(kind, sum(sizes) if whole else max(sizes, default=0), groups.shape[1])
        traffic = total.setdefault(kind, Traffic())
        traffic.count += times
        traffic.bytes += sent
        traffic.between_nodes += sent * _share_between(kind, groups // devices_per_node)
        unknown += not known
    return total, unknown


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """Every computation by its name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, here = "", Computation()
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            here = found[match[2]] = Computation()
            entry = match[2] if match[1] else entry
        elif defined := _DEFINED.match(line):
            here.lines[defined[2]] = line
            here.root = defined[2] if defined[1] else here.root
    return found, entry


def _is_widened(name: str, around: Computation, computations: dict[str, Computation]) -> bool:
    """Whether a value is bfloat16 to the program: what the compiler converts itself names no operation."""
    line = around.lines.get(name, "")
    match = _OPERATION.search(line)
    if match is None:
        return False
    kind, operand = match.groups()
    if kind == "fusion":
        called = _CALLED.search(line)
        inner = computations.get(called[2], Computation()) if called else Computation()
        return _is_widened(inner.root, inner, computations)
    if kind in ("bitcast", "copy", "reshape", "transpose"):
        return _is_widened(operand, around, computations)
    return kind == "convert" and "op_name" not in line and " = bf16[" in around.lines.get(operand, "")


def _walk(
    computations: dict[str, Computation], name: str, times: int, known: bool
) -> Iterator[tuple[str, Computation, int, bool]]:
    """Every line that runs, where it stands, how often, and whether that is known; inside fusions too."""
    here = computations.get(name, Computation())
    for line in here.lines.values():
        yield line, here, times, known
        turns, certain = 1, True
        if " while(" in line:
            found = _TURNS.search(line)
            turns, certain = (int(found[1]), True) if found else (1, False)
        for match in _CALLED.finditer(line):
            called = [match[2]] if match[2] else [part.strip(" %") for part in match[3].split(",")]
            for inner in called:
                yield from _walk(computations, inner, times * turns, known and certain)


def _groups(line: str, devices: int) -> np.ndarray:
    """Who talks to whom: int [groups, devices of a group]; a permute's pairs are groups of two."""
    iota = _IOTA.search(line)
    if iota:
        shape, dims = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        order = tuple(map(int, iota[3].split(","))) if iota[3] else tuple(range(len(dims)))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
    listed = _LISTED.search(line)
    if listed and listed[1]:
        rows = [tuple(map(int, row.split(","))) for row in re.findall(r"\{([\d, ]+)\}", listed[0])]
        return np.array(rows)
    return np.arange(devices)[None]


def _share_between(kind: str, nodes: np.ndarray) -> float:
    """Which part of what a device sends leaves its node, from the node of every member of every group."""
    members = nodes.shape[1]
    spanned = max(len(set(row)) for row in nodes.tolist())
    if spanned == 1:
        return 0.0
    if kind == "collective-permute":
        return 1.0
    if kind == "all-to-all":
        return (members - members / spanned) / (members - 1)
    return (spanned - 1) / (members - 1)


def _sizes(type_text: str) -> list[float]:
    """Bytes of every part of a result."""
    return [
        float(math.prod(int(n) for n in shape.split(",") if n) * _WIDTHS.get(kind, _bits(kind) // 8 or 1))
        for kind, shape in _SHAPE.findall(type_text)
    ]


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind) or 0)


def _sent(kind: str, size: float, members: int) -> float:
    """Bytes that a device sends for a collective with a result of `size` bytes, by the usual ring."""
    share = (members - 1) / members
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "reduce-scatter":
        return size * (members - 1)
    return float(size) if kind == "collective-permute" else size * share
