"""The base of what models return: a pytree with transformers' names, read as attribute or by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct


class ModelOutput(flax.struct.PyTreeNode):
    """A frozen pytree dataclass; `out.logits` and `out["logits"]` are the same, absent parts are None."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Names of the parts that are present."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
