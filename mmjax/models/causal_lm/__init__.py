"""Causal language models: one decoder, which every family configures."""

from mmjax.models.causal_lm.config import read_config, write_config
from mmjax.models.causal_lm.families import DECODERS
from mmjax.models.causal_lm.model import CausalLM, CausalLMOutput
from mmjax.models.causal_lm.rules import rules
from mmjax.models.family import Family

FAMILIES = {
    model_type: Family(
        {decoder.architecture: CausalLM}, read_config, write_config, rules, own_code=decoder.own_code
    )
    for model_type, decoder in DECODERS.items()
}

__all__ = ["FAMILIES", "CausalLM", "CausalLMOutput"]
