"""Images and text to model inputs, with the settings of a hub folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.checkpoints.files import read_json
from mmjax.checkpoints.weights import write_json
from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.tokenizer import Tokenizer
from mmjax.language.tokenizer_config import TOKENIZER_FILES
from mmjax.vision.processing import ImageProcessor
from mmjax.vision.tiles import read_image_processor

PROCESSOR_FILE, _IMAGES_FILE = "processor_config.json", "preprocessor_config.json"
# What transformers takes for a model type where the processor files name no class.
_IMAGE_TYPES = {"clip": "CLIPImageProcessor", "vit": "ViTImageProcessor", "siglip": "SiglipImageProcessor"}
_TOKENIZER_CLASSES = {
    "clip": "CLIPTokenizer",
    "siglip": "SiglipTokenizer",
    "opt": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "llama": "LlamaTokenizer",
    "internlm2": "InternLM2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
}
_PROCESSOR_CLASSES = {"CLIPImageProcessor": "CLIPProcessor", "SiglipImageProcessor": "SiglipProcessor"}


@dataclasses.dataclass(frozen=True)
class Processor:
    """An image processor, a tokenizer, or both.

    Args:
        image_processor: For models that see.
        tokenizer: For models that read.
        processor_class: transformers' class for the pair; by default that of the image processor's family.

    Example:
        >>> processor = Processor(ImageProcessor(size=8, crop_size=8))
        >>> processor(images=np.zeros((9, 12, 3), np.uint8))["pixel_values"].shape
        (1, 8, 8, 3)
    """

    image_processor: ImageProcessor | None = None
    tokenizer: Tokenizer | None = None
    processor_class: str | None = None

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        messages: Any = None,
        return_tensors: str | None = None,
        **tokenizer_args: Any,
    ) -> dict[str, np.ndarray]:
        """Prepare images, text or messages, or both.

        Args:
            images: One image or a list, as `ImageProcessor` takes them.
            text: One finished prompt or a list; special tokens in it count.
            messages: In place of text: a conversation or a list of them, as
                `Tokenizer.apply_chat_template` takes them. Nothing in them becomes a special token, and they
                end with what begins the assistant's answer unless `add_generation_prompt` is False.
            return_tensors: None or "np"; arrays are always numpy's.
            tokenizer_args: padding, truncation, max_length, ... as `Tokenizer` takes them; with messages
                also those of `Tokenizer.apply_chat_template`.

        Returns:
            ``input_ids`` int32 [B, T] and, if the folder asks for it, ``attention_mask`` int32 [B, T];
            ``pixel_values`` float32 [B, H, W, C].

        Raises:
            DataError: Neither was given, or what was given has no part here to take it.
        """
        self.check_call(images, text, messages, return_tensors)
        batch: dict[str, np.ndarray] = {}
        if text is not None and self.tokenizer is not None:
            batch |= self.tokenizer(text, **tokenizer_args)
        if messages is not None and self.tokenizer is not None:
            batch |= self.tokenizer.apply_chat_template(
                messages, **{"add_generation_prompt": True, **tokenizer_args}
            )
        if images is not None and self.image_processor is not None:
            batch |= self.image_processor(images)
        return batch

    def check_call(self, images: Any, text: Any, messages: Any, return_tensors: str | None) -> None:
        """Refuse a call that asks for nothing, for both of two, or for what there is no part for.

        Raises:
            DataError: what is wrong with it.
        """
        if return_tensors not in (None, "np"):
            raise DataError(
                f"return_tensors: the arrays are numpy's, so None or 'np', got {return_tensors!r}"
            )
        if images is None and text is None and messages is None:
            raise DataError("nothing to process: pass images, text or messages, or both")
        if text is not None and messages is not None:
            raise DataError("text and messages were given: pass a finished prompt or what it is made of")
        if images is not None and self.image_processor is None:
            raise DataError("images were given, but this processor has no image processor")
        if (text is not None or messages is not None) and self.tokenizer is None:
            raise DataError("text was given, but this processor has no tokenizer")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Processor | None:
        """Open the processor files of a hub folder.

        Args:
            folder: May hold preprocessor_config.json or processor_config.json, and a tokenizer's files.

        Returns:
            The processor, None if the folder has no such files.

        Raises:
            CheckpointError, ConfigError: A file is damaged, or says something unknown; the message names it.
        """
        from mmjax.models.family import FAMILIES, family_of_type

        kind = _read(Path(folder) / "config.json").get("model_type")
        if isinstance(kind, str) and kind in FAMILIES:
            own = family_of_type(kind, str(folder)).processor
            if own is not None:
                return own.from_folder(folder)
        return cls.parts_of(folder)

    @classmethod
    def parts_of(cls, folder: str | os.PathLike[str]) -> Processor | None:
        """The image processor and the tokenizer of a folder, as `from_folder`, whatever its family."""
        folder = Path(folder)
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
        joint = _read(folder / PROCESSOR_FILE)
        images = _read(folder / _IMAGES_FILE)
        where = folder / _IMAGES_FILE
        if joint.get("image_processor"):
            images, where = joint["image_processor"], folder / PROCESSOR_FILE
        if not images and not has_tokenizer:
            return None
        family = str(_read(folder / "config.json").get("model_type") or "").split("_")[0]
        image_processor = tokenizer = None
        if images:
            try:
                image_processor = read_image_processor(images, default_type=_IMAGE_TYPES.get(family))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        if has_tokenizer:
            tokenizer = Tokenizer.from_folder(folder, tokenizer_class=_TOKENIZER_CLASSES.get(family))
        named = joint.get("processor_class") or (images or {}).get("processor_class")
        return Processor(image_processor, tokenizer, named)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write files that transformers' AutoProcessor, AutoImageProcessor and AutoTokenizer open."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
            if self.image_processor is None:
                return
            images = self.image_processor.to_dict()
            named = self.processor_class or _PROCESSOR_CLASSES.get(images["image_processor_type"])
            write_json(folder / _IMAGES_FILE, images)
            # The joint file wins over the other, so an old one must not stay.
            (folder / PROCESSOR_FILE).unlink(missing_ok=True)
            if self.tokenizer is not None and named is not None:
                write_json(folder / PROCESSOR_FILE, {"processor_class": named, "image_processor": images})
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


__all__ = ["Processor"]
