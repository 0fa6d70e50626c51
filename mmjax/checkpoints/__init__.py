"""The key-rule engine and what it reads and writes: hub folders and training checkpoints."""

from mmjax.checkpoints.rules import KeyRules, Rule, prefixed, rule
from mmjax.checkpoints.transforms import (
    CONV,
    LINEAR,
    POINTWISE,
    SAME,
    Chain,
    Fused,
    Permute,
    Reshape,
    Transform,
)

__all__ = [
    "CONV",
    "LINEAR",
    "POINTWISE",
    "SAME",
    "Chain",
    "Fused",
    "KeyRules",
    "Permute",
    "Reshape",
    "Rule",
    "Transform",
    "prefixed",
    "rule",
]
