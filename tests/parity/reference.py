"""Tiny random reference models with every parameter randomised, and how arrays are compared with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# The one table of tolerances: largest difference over the reference's largest magnitude.
FORWARD = 1e-5
GRADIENT = 1e-4
FULL_SIZE = 1e-4


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter, biases and norms too, values that a mistake would show in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                is_scale = name.endswith("norm.weight") or "norm" in name and name.endswith("weight")
                parameter.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def save_reference(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def assert_close(
    ours: Any, reference: torch.Tensor | np.ndarray, tolerance: float = FORWARD, what: str = ""
) -> None:
    """Whole arrays, relative to the reference's largest value."""
    expected = reference.detach().float().numpy() if isinstance(reference, torch.Tensor) else reference
    actual = np.asarray(ours, np.float32)
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    worst = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert worst <= tolerance, f"{what}: {worst:.2e} > {tolerance:.0e}"


def channels_last(pixels: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.numpy().transpose(0, 2, 3, 1))


def random_pixels(batch: int, height: int, width: int, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
