"""Bricks: pure array functions, and the small Linen modules that own parameters and call them."""

from mmjax.nn.activations import ACTIVATIONS, activation, gelu_erf, gelu_tanh, quick_gelu
from mmjax.nn.attention import attention, causal_mask, combine_masks, merge_heads, padding_mask, split_heads
from mmjax.nn.cache import KVCache, claim_slots, init_cache, write_slots
from mmjax.nn.config import Execution, TransformerConfig, canonical_dtype
from mmjax.nn.encoder import Encoder, EncoderOutput, run_layers
from mmjax.nn.experts import MixtureOfExperts, mix_experts, route
from mmjax.nn.functional import dense, dropout, l2_normalize, layer_norm, rms_norm, softcap
from mmjax.nn.modules import (
    MLP,
    Attention,
    Dense,
    Embedding,
    EncoderLayer,
    FeedForward,
    LayerNorm,
    RMSNorm,
    param,
)
from mmjax.nn.outputs import ModelOutput
from mmjax.nn.patches import interpolate_positions, patchify, unpatchify
from mmjax.nn.rope import RopeConfig, RopeScaling, apply_rope, rope_angles, rope_frequencies, rope_tables
from mmjax.nn.specs import parameter_specs
from mmjax.nn.transposed import TransposedKernel, transpose_kernels

__all__ = [
    "TransposedKernel",
    "transpose_kernels",
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "Dense",
    "Embedding",
    "Encoder",
    "EncoderLayer",
    "EncoderOutput",
    "Execution",
    "KVCache",
    "LayerNorm",
    "FeedForward",
    "MixtureOfExperts",
    "ModelOutput",
    "RMSNorm",
    "RopeConfig",
    "RopeScaling",
    "TransformerConfig",
    "activation",
    "apply_rope",
    "attention",
    "canonical_dtype",
    "causal_mask",
    "claim_slots",
    "combine_masks",
    "dense",
    "dropout",
    "gelu_erf",
    "gelu_tanh",
    "init_cache",
    "interpolate_positions",
    "l2_normalize",
    "layer_norm",
    "merge_heads",
    "mix_experts",
    "padding_mask",
    "param",
    "parameter_specs",
    "patchify",
    "quick_gelu",
    "rms_norm",
    "rope_angles",
    "rope_frequencies",
    "rope_tables",
    "run_layers",
    "route",
    "softcap",
    "split_heads",
    "unpatchify",
    "write_slots",
]
