"""Class names of classification heads."""

from __future__ import annotations

from typing import Any

from mmjax.errors import ConfigError
from mmjax.nn.config import check_int


def check_labels(config: Any) -> None:
    """Fill in the labels of a frozen config with `num_labels` and `labels`, or refuse them.

    Raises:
        ConfigError: a negative number, or names that are not that many.
    """
    check_int(config, "num_labels", least=0)
    if config.labels is None:
        object.__setattr__(config, "labels", tuple(f"LABEL_{i}" for i in range(config.num_labels)))
    object.__setattr__(config, "labels", tuple(config.labels))
    if len(config.labels) != config.num_labels:
        raise ConfigError(f"labels: {len(config.labels)} names for num_labels={config.num_labels} classes")
