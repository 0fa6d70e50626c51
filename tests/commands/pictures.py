"""Small pictures of three colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "deep_blue": (20, 30, 210)}


def picture(colour, seed=0):
    noise = np.random.default_rng(seed).integers(-20, 20, (10, 12, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
