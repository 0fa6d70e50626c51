"""One engine for every family's table of checkpoint keys, used in both directions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from mmjax.checkpoints.transforms import SAME, Transform
from mmjax.errors import CheckpointError
from mmjax.parallel import ParamSpec


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: a source name, the target path(s) it fills, and how.

    Names may contain `{i}`, which stands for one number, the same on both sides. A source with `{e}` is one
    tensor for each entry of its target's first axis (experts, which folders keep apart).

    Attributes:
        source: tensor name in the folder, as it is written.
        targets: parameter paths joined with "/".
        transform: between them.
        aliases: other names the tensor is known by when reading.
    """

    source: str
    targets: tuple[str, ...]
    transform: Transform = SAME
    aliases: tuple[str, ...] = ()

    def pieces(self, shape: tuple[int, ...]) -> list[Rule]:
        """One rule per tensor: itself, or one for each entry of the first axis of its target's shape."""
        if "{e}" not in self.source:
            return [self]

        def fill(name: str, number: int) -> str:
            return name.replace("{e}", str(number))

        return [
            dataclasses.replace(
                self, source=fill(self.source, e), aliases=tuple(fill(a, e) for a in self.aliases)
            )
            for e in range(shape[0])
        ]


@dataclasses.dataclass(frozen=True)
class KeyRules:
    """A family's whole table.

    Attributes:
        rules: must cover every parameter of the model exactly once.
        ignored: (pattern of a whole source name, reason) for tensors that are left out on purpose.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()


def rule(source: str, targets: str | Sequence[str], transform: Transform = SAME, *aliases: str) -> Rule:
    """A Rule; one target may be given as a string.

    >>> rule("norm.weight", "norm/scale").targets
    ('norm/scale',)
    """
    return Rule(source, (targets,) if isinstance(targets, str) else tuple(targets), transform, aliases)


def prefixed(
    rules: Iterable[Rule], source: str, target: str, other_sources: Sequence[str] = ()
) -> tuple[Rule, ...]:
    """The same rules below a prefix on either side; `other_sources` are prefixes accepted when reading.

    >>> found = prefixed([rule("a", "b")], "model.", "tower/", [""])[0]
    >>> found.source, found.targets, found.aliases
    ('model.a', ('tower/b',), ('a',))
    """
    result = []
    for r in rules:
        names = [prefix + name for name in (r.source, *r.aliases) for prefix in (source, *other_sources)]
        result.append(Rule(names[0], tuple(target + t for t in r.targets), r.transform, tuple(names[1:])))
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class Link:
    """One tensor of a folder and the parameters it fills, or the one entry `index` of a parameter."""

    source: str
    targets: tuple[str, ...]
    transform: Transform
    index: int | None = None


def _number_in(pattern: str, name: str) -> str | None:
    """What `{i}` stands for if `name` fits `pattern` ("" where the pattern has none), else None."""
    if "{i}" not in pattern:
        return "" if pattern == name else None
    head, tail = pattern.split("{i}")
    found = re.fullmatch(re.escape(head) + r"(\d+)" + re.escape(tail), name)
    return found.group(1) if found else None


def expand(rules: KeyRules, targets: Iterable[str]) -> list[Rule]:
    """The table's rules for a model that has these parameter paths, with every `{i}` filled in.

    Raises:
        CheckpointError: a path that no rule or more than one rule fills: a fault of the table.
    """
    paths = sorted(targets)
    found: list[Rule] = []
    owners: dict[str, list[str]] = {path: [] for path in paths}
    for r in rules.rules:
        numbers = (_number_in(r.targets[0], path) for path in paths)
        for number in sorted({n for n in numbers if n is not None}):
            filled = Rule(
                r.source.replace("{i}", number),
                tuple(t.replace("{i}", number) for t in r.targets),
                r.transform,
                tuple(a.replace("{i}", number) for a in r.aliases),
            )
            found.append(filled)
            for target in filled.targets:
                owners.setdefault(target, []).append(filled.source)
    wrong = {path: sources for path, sources in owners.items() if len(sources) != 1}
    if wrong:
        raise CheckpointError(f"key rules: parameters not filled exactly once: {wrong}")
    return found


def link(
    rules: KeyRules, sources: Mapping[str, tuple[int, ...]], targets: Mapping[str, ParamSpec], where: str
) -> list[Link]:
    """Decide which tensor fills which parameters.

    Args:
        rules: the family's table.
        sources: shape of every tensor in the folder.
        targets: every parameter of the model.
        where: the folder, for messages.

    Raises:
        CheckpointError: missing, extra, doubled and misshapen tensors, all listed.
    """
    faults: list[str] = []
    links: list[Link] = []
    used: set[str] = set()
    for r in expand(rules, targets):
        stacked = "{e}" in r.source
        shapes = [targets[t].shape[1:] if stacked else targets[t].shape for t in r.targets]
        expected = r.transform.source_shape(shapes)
        for index, piece in enumerate(r.pieces(targets[r.targets[0]].shape)):
            present = [name for name in dict.fromkeys((piece.source, *piece.aliases)) if name in sources]
            used.update(present)
            if not present:
                faults.append(f"missing: {piece.source} (for {', '.join(r.targets)})")
                continue
            if len(present) > 1:
                faults.append(f"doubled: {' and '.join(present)} are the same parameter")
            if sources[present[0]] != expected:
                faults.append(
                    f"misshapen: {present[0]} is {list(sources[present[0]])}, expected {list(expected)}"
                )
            links.append(Link(present[0], r.targets, r.transform, index if stacked else None))
    patterns = [re.compile(pattern) for pattern, _ in rules.ignored]
    for name in sources:
        if name not in used and not any(p.fullmatch(name) for p in patterns):
            faults.append(f"extra: {name} {list(sources[name])} has no place in this model")
    if faults:
        lines = "\n  ".join(sorted(faults))
        raise CheckpointError(
            f"{where}: {len(faults)} tensors do not fit the model that config.json describes; "
            f"check that weights and config belong together:\n  {lines}"
        )
    return links
