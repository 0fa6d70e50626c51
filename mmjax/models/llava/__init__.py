"""LLaVA 1.0, 1.5, NeXT and OneVision (Liu et al. 2023, 2024; Li et al. 2024)."""

from mmjax.models.family import Family
from mmjax.models.llava.config import LlavaConfig
from mmjax.models.llava.hub import read_config, write_config
from mmjax.models.llava.layout import ImageTokens
from mmjax.models.llava.model import Llava, LlavaOutput
from mmjax.models.llava.original import BRAINS, load_original, original_tensors
from mmjax.models.llava.processor import LlavaProcessor
from mmjax.models.llava.rules import rules

_ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
FAMILIES = {
    model_type: Family(
        {_ARCHITECTURES.get(model_type, _ARCHITECTURES["llava"]): Llava},
        read_config,
        write_config,
        rules,
        processor=LlavaProcessor,
        other_layout=load_original,
        other_tensors=original_tensors,
    )
    for model_type in dict.fromkeys((*_ARCHITECTURES, *BRAINS))
}

__all__ = ["FAMILIES", "ImageTokens", "Llava", "LlavaConfig", "LlavaOutput", "LlavaProcessor"]
