"""What chips can do at most, from their vendors' data sheets: the roofs that a plan is held against."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from mmjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak figures of one chip, and of the links between chips.

    Attributes:
        name: for people.
        bfloat16: dense products of bfloat16 (or float16) numbers, FLOP/s.
        float32: dense products of float32 numbers at jax's default precision, FLOP/s: TF32 on NVIDIA's
            chips, one bfloat16 pass on TPUs.
        memory: bytes of device memory.
        bandwidth: of that memory, bytes/s.
        link: bytes/s that leave a chip for others of its node (a TPU: of its pod), in one direction.
        network: bytes/s per chip between nodes (pods), in one direction.
        devices_per_node: chips that `link` joins.
        source: where the figures stand.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    devices_per_node: int
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of products whose operands are of this dtype; float64 counts as float32.

        >>> CHIPS["h100"].peak("bfloat16") > CHIPS["h100"].peak("float32")
        True
        """
        return self.bfloat16 if dtype in ("bfloat16", "float16") else self.float32


# NVIDIA prints rates with sparsity, which are twice the dense ones here, and NVLink in both directions added,
# which is halved. Between nodes: one network card per chip, as in the vendor's own DGX of that chip.
CHIPS = {
    "a100": Chip(
        name="NVIDIA A100 SXM 80GB",
        bfloat16=312e12,
        float32=156e12,
        memory=80e9,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        devices_per_node=8,
        source="NVIDIA A100 80GB data sheet; DGX A100 data sheet (200 Gb/s per GPU)",
    ),
    "h100": Chip(
        name="NVIDIA H100 SXM",
        bfloat16=989.5e12,
        float32=494.5e12,
        memory=80e9,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA H100 data sheet; DGX H100 data sheet (400 Gb/s per GPU)",
    ),
    "h200": Chip(
        name="NVIDIA H200 SXM",
        bfloat16=989.5e12,
        float32=494.5e12,
        memory=141e9,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA H200 data sheet; DGX H200 data sheet (400 Gb/s per GPU)",
    ),
    "b200": Chip(
        name="NVIDIA B200 SXM",
        bfloat16=2250e12,
        float32=1125e12,
        memory=180e9,
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA HGX B200 data sheet; DGX B200 data sheet (180 GB and 400 Gb/s per GPU)",
    ),
    # Google prints the links of a chip in both directions added; halved here.
    "v4": Chip(
        name="Google TPU v4",
        bfloat16=275e12,
        float32=275e12,
        memory=32 * 2**30,
        bandwidth=1.2e12,
        link=300e9,
        network=6.25e9,
        devices_per_node=4096,
        source="cloud.google.com/tpu/docs/v4; Jouppi et al. 2023, table 4 (six links of 50 GB/s)",
    ),
    "v5e": Chip(
        name="Google TPU v5e",
        bfloat16=197e12,
        float32=197e12,
        memory=16e9,
        bandwidth=819e9,
        link=200e9,
        network=3.125e9,
        devices_per_node=256,
        source="cloud.google.com/tpu/docs/v5e (6.4 Tb/s between pods of 256)",
    ),
    "v5p": Chip(
        name="Google TPU v5p",
        bfloat16=459e12,
        float32=459e12,
        memory=95e9,
        bandwidth=2.765e12,
        link=600e9,
        network=6.25e9,
        devices_per_node=8960,
        source="cloud.google.com/tpu/docs/v5p (50 Gb/s per chip between pods)",
    ),
    "v6e": Chip(
        name="Google TPU v6e (Trillium)",
        bfloat16=918e12,
        float32=918e12,
        memory=32e9,
        bandwidth=1.638e12,
        link=400e9,
        network=12.5e9,
        devices_per_node=256,
        source="cloud.google.com/tpu/docs/v6e (25.6 Tb/s between pods of 256)",
    ),
}
_NUMBERS = ("bfloat16", "float32", "memory", "bandwidth", "link", "network", "devices_per_node")


def find_chip(text: str) -> Chip:
    """A chip by its name, with figures of one's own where some are given.

    Args:
        text: a name of the table such as "h100", "tpu-v5e" or "TPU v4"; own figures follow as
            "h100,memory=94e9", or stand alone when all of them are given.

    Raises:
        ConfigError: no such chip, no such figure, or a figure that is no positive number.

    >>> find_chip("tpu-v5e").name, find_chip("h100,memory=94e9").memory
    ('Google TPU v5e', 94000000000.0)
    """
    name, *pairs = (part.strip() for part in text.split(","))
    base = None
    if "=" in name:
        pairs.insert(0, name)
    else:
        key = re.sub(r"^(tpu|nvidia|google)?[ _-]*", "", name.lower())
        base = CHIPS.get(key)
        if base is None:
            raise ConfigError(
                f"--chip: no chip {name!r}; known: {', '.join(CHIPS)}; or give figures: {_example()}"
            )
    own = dict(_figure(pair) for pair in pairs)
    missing = [figure for figure in _NUMBERS if base is None and figure not in own]
    if missing:
        raise ConfigError(f"--chip: {missing[0]} is missing; a chip of your own needs all: {_example()}")
    if base is None:
        return Chip(name="own figures", source="the command line", **_typed(own))
    changed = f"{base.name} with own {', '.join(own)}" if own else base.name
    return dataclasses.replace(base, name=changed, **_typed(own))


def _figure(pair: str) -> tuple[str, float]:
    name, _, text = pair.partition("=")
    name = name.strip()
    if name not in _NUMBERS:
        raise ConfigError(f"--chip: no figure {name!r}; there are {', '.join(_NUMBERS)}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (name == "devices_per_node" and not value.is_integer()):
        raise ConfigError(f"--chip: {name}={text} is not a positive number")
    return name, value


def _typed(own: dict[str, float]) -> dict[str, Any]:
    return {name: int(value) if name == "devices_per_node" else value for name, value in own.items()}


def _example() -> str:
    figures = (989e12, 494e12, 80e9, 3.35e12, 450e9, 50e9, 8)
    return ",".join(f"{name}={figure:g}" for name, figure in zip(_NUMBERS, figures, strict=True))
