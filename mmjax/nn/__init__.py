"""Bricks: pure array functions, and the small Linen modules that own parameters and call them."""

from mmjax.nn.activations import ACTIVATIONS, activation, gelu_erf, gelu_tanh, quick_gelu
from mmjax.nn.attention import attention, causal_mask, combine_masks, merge_heads, padding_mask, split_heads
from mmjax.nn.config import Execution, TransformerConfig, canonical_dtype
from mmjax.nn.encoder import Encoder, EncoderOutput
from mmjax.nn.functional import dense, dropout, l2_normalize, layer_norm
from mmjax.nn.modules import MLP, Attention, Dense, Embedding, EncoderLayer, LayerNorm, param
from mmjax.nn.outputs import ModelOutput
from mmjax.nn.patches import interpolate_positions, patchify, unpatchify
from mmjax.nn.specs import parameter_specs

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "Dense",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "EncoderOutput",
    "Execution",
    "LayerNorm",
    "ModelOutput",
    "TransformerConfig",
    "activation",
    "attention",
    "canonical_dtype",
    "causal_mask",
    "combine_masks",
    "dense",
    "dropout",
    "gelu_erf",
    "gelu_tanh",
    "interpolate_positions",
    "l2_normalize",
    "layer_norm",
    "merge_heads",
    "padding_mask",
    "param",
    "parameter_specs",
    "patchify",
    "quick_gelu",
    "split_heads",
    "unpatchify",
]
