"""Causal language models: one decoder, which every family configures."""

from mmjax.models.causal_lm.config import DECODERS, read_config, write_config
from mmjax.models.causal_lm.model import CausalLM, CausalLMOutput
from mmjax.models.causal_lm.rules import rules
from mmjax.models.family import Family

FAMILIES = {
    model_type: Family({decoder.architecture: CausalLM}, read_config, write_config, rules)
    for model_type, decoder in DECODERS.items()
}

__all__ = ["FAMILIES", "CausalLM", "CausalLMOutput"]
