"""Bridges: what turns the features of eyes into embeddings for a brain."""

from typing import TYPE_CHECKING

from mmjax.lazy import attach

if TYPE_CHECKING:
    from mmjax.connectors.projector import PROJECTORS, Projector

_HOMES = {"projector": ("PROJECTORS", "Projector")}
__getattr__, __dir__ = attach(__name__, _HOMES)

__all__ = ["PROJECTORS", "Projector"]
