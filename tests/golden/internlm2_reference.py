"""InternLM2 in torch, written from the published description of its layers: transformers does not have it.

It differs from LLaMA in names and in one fused product: wqkv's rows are grouped by key head, each group with
its queries one after the other, then its key, then its value. "dynamic" rotary positions change the base for
texts beyond max_position_embeddings.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Every tensor of a folder, random: products by their fan-in, scales around one."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fused = (heads + 2 * kv_heads) * (width // heads)
    shapes = {"model.tok_embeddings.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}attention_norm.weight": (width,), f"{prefix}ffn_norm.weight": (width,)}
        shapes |= {
            f"{prefix}attention.wqkv.weight": (fused, width),
            f"{prefix}attention.wo.weight": (width, width),
        }
        if config["bias"]:
            shapes |= {f"{prefix}attention.wqkv.bias": (fused,), f"{prefix}attention.wo.bias": (width,)}
        for name, shape in (("w1", (hidden, width)), ("w3", (hidden, width)), ("w2", (width, hidden))):
            shapes[f"{prefix}feed_forward.{name}.weight"] = shape
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scaled = noise / shape[-1] ** 0.5 if len(shape) == 2 else 0.2 * noise
        tensors[name] = 1 + scaled if name.endswith("norm.weight") else scaled
    return tensors


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """x [B, heads, T, H] turned by positions [B, T], as complex numbers x[i] + i x[i + H / 2]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, :, None] * frequencies)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).float()


def forward(config: dict[str, Any], tensors: Tensors, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T]; positions count the tokens that the mask [B, T] has."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width, groups, eps = config["hidden_size"] // heads, heads // kv_heads, config["rms_norm_eps"]
    batch, length = ids.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0).double()
    base, scaling = config["rope_theta"], config["rope_scaling"]
    longest, limit = int(positions.max()) + 1, config["max_position_embeddings"]
    if scaling is not None and longest > limit:
        stretch = scaling["factor"] * longest / limit - (scaling["factor"] - 1)
        base *= stretch ** (width / (width - 2))
    seen = torch.tril(torch.ones(length, length, dtype=torch.bool)) & (mask[:, None, None, :] > 0)
    x = tensors["model.tok_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = {name.split(f"layers.{layer}.")[-1]: value for name, value in tensors.items()}
        y = rms_norm(x, own["attention_norm.weight"], eps)
        fused = y @ own["attention.wqkv.weight"].T + own.get("attention.wqkv.bias", 0)
        fused = fused.view(batch, length, kv_heads, groups + 2, width)
        query = fused[..., :groups, :].reshape(batch, length, heads, width).transpose(1, 2)
        key, value = (fused[..., part, :].transpose(1, 2) for part in (-2, -1))
        query, key = rotate(query, positions, base), rotate(key, positions, base)
        rows = []
        for head in range(heads):
            scores = query[:, head] @ key[:, head // groups].transpose(1, 2) / math.sqrt(width)
            weights = scores.masked_fill(~seen[:, 0], -1e30).softmax(-1)
            rows.append(weights @ value[:, head // groups])
        out = torch.cat(rows, dim=-1)
        x = x + out @ own["attention.wo.weight"].T + own.get("attention.wo.bias", 0)
        y = rms_norm(x, own["ffn_norm.weight"], eps)
        gate = torch.nn.functional.silu(y @ own["feed_forward.w1.weight"].T)
        x = x + (gate * (y @ own["feed_forward.w3.weight"].T)) @ own["feed_forward.w2.weight"].T
    return rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["output.weight"].T
