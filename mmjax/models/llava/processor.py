"""Images, videos and text to what LLaVA models take, with the settings of a hub folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.checkpoints.files import read_json
from mmjax.checkpoints.weights import write_json
from mmjax.errors import CheckpointError, ConfigError, DataError
from mmjax.language.batching import Layout, checked_texts, side_of
from mmjax.models.llava.collate import collate, table_of
from mmjax.models.llava.config import LlavaConfig
from mmjax.models.llava.layout import ImageTokens, fill, place
from mmjax.models.llava.media import as_list, check_messages, groups_of, is_nested, places, pull_media
from mmjax.models.llava.prompts import chat_ids, cut
from mmjax.models.llava.settings import read_image_tokens, written_settings
from mmjax.models.processor import PROCESSOR_FILE, Processor
from mmjax.vision.tables import FeatureTable
from mmjax.vision.tiles import TileImageProcessor, stack_tiles

Sample = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LlavaProcessor(Processor):
    """Prompts with images: each place for an image becomes as many tokens as the image has features.

    Args:
        image_processor, tokenizer, processor_class: as for `Processor`; the tokenizer knows `image_token`.
        image_tokens: how many tokens images have; of a model, `ImageTokens.of(config)`.
        image_token, video_token: what stands in a prompt where an image or a video belongs.

    Example:
        >>> from mmjax.language import train_bpe_tokenizer
        >>> from mmjax.vision import ImageProcessor
        >>> tokenizer = train_bpe_tokenizer(["a b"], 260, special_tokens=["<image>"])
        >>> tokens = ImageTokens(kind="llava", tile=(8, 8), patches=(2, 2), rows=4)
        >>> eyes = ImageProcessor(size=8, crop_size=8)
        >>> processor = LlavaProcessor(eyes, tokenizer, image_tokens=tokens)
        >>> batch = processor(images=np.zeros((9, 5, 3), np.uint8), text="<image>a")
        >>> batch["input_ids"].shape, batch["image_index"][0, :, 0].tolist()
        ((1, 5), [0, 1, 2, 3, -1])
    """

    image_tokens: ImageTokens = ImageTokens.of(LlavaConfig())
    image_token: str = "<image>"
    video_token: str = "<video>"

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.tokenizer.token_to_id(self.image_token) is None:
            raise ConfigError(
                f"image_token: {self.image_token!r} is not in the tokenizer's vocabulary; add it as a "
                "special token"
            )

    @property
    def image_token_id(self) -> int:
        """The id that stands for one feature of an image."""
        return self._id_of(self.image_token)

    def _id_of(self, token: str) -> int:
        if self.tokenizer is None:
            raise DataError("text was given, but this processor has no tokenizer")
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise DataError(f"the tokenizer has no {token!r}: this model takes no such input")
        return number

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: Any = None,
        *,
        messages: Any = None,
        videos: Any = None,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_assistant_tokens_mask: bool = False,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Prepare prompts with their images.

        Args:
            images: One, a list for all prompts in order, or a list with a list for each prompt. As files,
                Pillow images, arrays.
            text: One finished prompt or a list, with an `image_token` for each image; special tokens count.
            messages: In place of text: a conversation or a list of them. Images are parts {"type": "image"},
                which may bring their image under "image" or "path". Nothing that people typed becomes a
                special token or a place for an image.
            videos: One video as an array [F, H, W, C], or a list with one for each `video_token`, each an
                array or a list of images (OneVision).
            return_tensors: None or "np"; arrays are always numpy's.
            padding, truncation, max_length, pad_to_multiple_of, padding_side: as for `Tokenizer`; tokens of
                images are never cut off.
            return_assistant_tokens_mask: return also where the assistant speaks.
            options: of `Tokenizer` with text, of `Tokenizer.apply_chat_template` with messages.

        Returns:
            ``input_ids``, ``attention_mask`` int32 [B, T]; ``pixel_values`` float32 [I, H, W, C] or tiles
            [I, N, H, W, C], with ``image_sizes`` int32 [I, 2] and, in OneVision, ``batch_num_images``;
            ``image_index`` int32 [B, T, K] and, where K is above 1, ``image_weights``; see `Llava`.

        Raises:
            DataError: images and places for them do not match, an image cannot be read, a text is too long.
        """
        self.check_call(images, text, messages, return_tensors)
        if text is None and messages is None:
            return dict(self.image_processor(images))  # type: ignore[misc]
        if text is not None:
            prompts: list[Any] = checked_texts(text)
            counts = [prompt.count(self.image_token) for prompt in prompts]
            pictures = groups_of(images, counts, "image")
            flat_companions = not is_nested(images)
        else:
            several = isinstance(messages, list | tuple) and isinstance(
                next(iter(messages), None), list | tuple
            )
            prompts = list(messages) if several else [messages]
            for prompt in prompts:
                check_messages(prompt)
            counts = [places(prompt, "image") for prompt in prompts]
            pictures = groups_of(images, counts, "image")
            options = {"add_generation_prompt": True, **options}
            flat_companions = False
        films = groups_of(videos, [self._films(prompt) for prompt in prompts], "video")
        samples = [
            self.encode(
                prompt,
                group,
                film,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                companions=1 if flat_companions else None,
                **options,
            )
            for prompt, group, film in zip(prompts, pictures, films, strict=True)
        ]
        layout = Layout.of(
            padding,
            truncation,
            max_length,
            None if self.tokenizer is None else self.tokenizer.model_max_length,
            multiple=pad_to_multiple_of,
            side=side_of(padding_side or self.tokenizer.padding_side, "padding_side"),  # type: ignore[union-attr]
            pad_id=self.tokenizer.pad_token_id,  # type: ignore[union-attr]
        )
        batch = self._laid_out(samples, layout)
        groups = [len(group) for group in pictures if group]
        if self.image_tokens.kind == "llava_onevision" and groups:
            batch["batch_num_images"] = np.asarray([1] * sum(groups) if flat_companions else groups, np.int32)
        return batch

    def _films(self, prompt: Any) -> int:
        if isinstance(prompt, str):
            return prompt.count(self.video_token) if self.image_tokens.kind == "llava_onevision" else 0
        return places(prompt, "video")

    def _laid_out(self, samples: Sequence[Sample], layout: Layout) -> dict[str, np.ndarray]:
        limit = layout.limit
        side = self.tokenizer.truncation_side if self.tokenizer is not None else "right"
        if limit is not None:
            samples = [cut(sample, limit, side) for sample in samples]
        ids, _ = layout.arrays([sample["input_ids"].tolist() for sample in samples])
        batch = collate(
            samples,
            rows=self.image_tokens.rows,
            pad_id=layout.pad_id or 0,
            length=ids.shape[1],
            side=layout.side,
        )
        batch["input_ids"] = ids
        return batch

    def encode(
        self,
        prompt: str | Sequence[Any],
        images: Any = None,
        videos: Any = None,
        *,
        return_assistant_tokens_mask: bool = False,
        companions: int | None = None,
        **options: Any,
    ) -> Sample:
        """One sample, by itself: a prompt or a conversation with its images.

        Args:
            prompt: A finished prompt, or messages.
            images, videos: for its places, in order.
            return_assistant_tokens_mask: messages only: return also where the assistant speaks.
            companions: count images as if the text had so many (OneVision cuts an image that is alone).
            options: of `Tokenizer` for a prompt, of `Tokenizer.apply_chat_template` for messages.

        Returns:
            ``input_ids`` int32 [T]; ``image_index`` int32 [T, K], rows of this sample's own table, and, where
            K is above 1, ``image_weights``; with images ``pixel_values`` float32 [I, (N,) H, W, C] and
            ``image_sizes`` int32 [I, 2]; ``assistant_masks`` int32 [T] if asked for; with videos
            ``pixel_values_videos`` [V, F, H, W, C].

        Raises:
            DataError: as in a call.
        """
        pictures, films = as_list(images), as_list(videos)
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, **options)["input_ids"][0]  # type: ignore[misc]
            answers = None
        else:
            prompt, pictures, films = pull_media(prompt, pictures, films)
            ids, answers = self.conversation(prompt, return_assistant_tokens_mask, options)
        alone = companions or len(pictures)
        sample, layouts = self._see(pictures, alone)
        shown, film_layouts = self._watch(films)
        table = self._table(sample, shown)
        stride = table.tiles * table.rows
        rows = [place(x, n * stride, table.newline) for n, x in enumerate(layouts)]
        stride = table.frames * table.rows
        film_rows = [
            place(x, table.first_video + n * stride, table.newline) for n, x in enumerate(film_layouts)
        ]
        groups = [(self.image_token, layouts, rows, "image")]
        if film_layouts or self.image_tokens.kind == "llava_onevision":
            groups.append((self.video_token, film_layouts, film_rows, "video"))
        counts = np.ones(len(ids), np.int64)
        for token, found, _, what in groups:
            self._count(ids, token, [len(x) for x in found], counts, what)
        ids = np.repeat(ids, counts)
        width = self.image_tokens.width
        index, weights = np.full((len(ids), width), -1, np.int32), np.zeros((len(ids), width), np.float32)
        for token, found, numbers, what in groups:
            if found:
                shares = np.concatenate([x.weights for x in found])
                fill(ids, self._id_of(token), np.concatenate(numbers), shares, index, weights, what)
        sample |= shown | {"input_ids": ids, "image_index": index}
        if width > 1:
            sample["image_weights"] = weights
        if answers is not None:
            sample["assistant_masks"] = np.repeat(answers, counts)
        return sample

    def _count(self, ids: np.ndarray, token: str, lengths: list[int], counts: np.ndarray, what: str) -> None:
        number = self.tokenizer.token_to_id(token)  # type: ignore[union-attr]
        here = ids == number if number is not None else np.zeros(len(ids), bool)
        if int(here.sum()) != len(lengths):
            raise DataError(
                f"{what}s: the prompt has {here.sum()} {token} places, but {len(lengths)} {what}s "
                f"were given; give one {what} for each place"
            )
        counts[here] = lengths

    def conversation(
        self, messages: Any, answers: bool, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids int32 [T] of messages, one for each image, and, if asked for, which the assistant says."""
        if self.tokenizer is None:
            raise DataError("text was given, but this processor has no tokenizer")
        return chat_ids(self.tokenizer, messages, answers, options)

    def _see(self, images: list[Any], companions: int) -> tuple[Sample, list[Any]]:
        if not images:
            return {}, []
        eyes = self.image_processor
        if eyes is None:
            raise DataError("images were given, but this processor has no image processor")
        if isinstance(eyes, TileImageProcessor):
            found = [eyes.tiles(image, companions) for image in images]
            sizes = [size for _, size in found]
            pixels = stack_tiles([tiles for tiles, _ in found])
        else:
            pixels = eyes(images)["pixel_values"]
            sizes = [tuple(image.shape[:2]) for image in pixels]
            if sizes[0] != self.image_tokens.tile:
                raise ConfigError(
                    f"size: images come out as {sizes[0]}, but a tile is {self.image_tokens.tile}"
                )
        layouts = [self.image_tokens.layout(size, companions) for size in sizes]
        sample = {"pixel_values": pixels}
        if self.image_tokens.tiled:
            sample["image_sizes"] = np.asarray(sizes, np.int32)
        return sample, layouts

    def _watch(self, videos: list[Any]) -> tuple[Sample, list[Any]]:
        if not videos:
            return {}, []
        eyes = self.image_processor
        if not isinstance(eyes, TileImageProcessor):
            raise DataError("videos: this model takes images only")
        for number, video in enumerate(videos):
            if isinstance(video, str | os.PathLike):
                raise DataError(f"videos: {os.fspath(video)!r} is no array of frames, nor a list of images")
            if not len(video):
                raise DataError(f"videos: video {number} has no frames")
        films = [np.stack([eyes.frame(frame) for frame in video]) for video in videos]
        layouts = [self.image_tokens.video_layout(len(film)) for film in films]
        return {"pixel_values_videos": stack_tiles(films)}, layouts

    def _table(self, sample: Sample, shown: Sample) -> FeatureTable:
        return table_of({**sample, **shown}, self.image_tokens.rows)

    def collate(
        self,
        samples: Sequence[Sample],
        length: int | None = None,
        images: int | None = None,
        tiles: int | None = None,
        padding_side: str | None = None,
    ) -> dict[str, np.ndarray]:
        """One batch of samples as `encode` gives them.

        Args:
            samples: with any more arrays that have one entry per token, such as labels.
            length, images, tiles: T, I and N of the batch, so that shapes are few; None: as many as needed.
            padding_side: "right" (the default) or "left".
        """
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return collate(
            samples,
            rows=self.image_tokens.rows,
            pad_id=pad or 0,
            length=length,
            images=images,
            tiles=tiles,
            side=side_of(padding_side or "right", "padding_side"),
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> LlavaProcessor | None:  # type: ignore[override]
        """Open the processor files of a LLaVA folder; None if it has none.

        Raises:
            CheckpointError, ConfigError: A file is damaged, or says something unknown; the message names it.
        """
        folder = Path(folder)
        plain = Processor.parts_of(folder)
        if plain is None:
            return None
        settings = read_json(folder / PROCESSOR_FILE) if (folder / PROCESSOR_FILE).is_file() else {}
        model = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = str(model.get("model_type") or "llava")
        named = settings.get("image_token") or "<image>"
        extra: dict[str, Any] = {
            "image_token": named,
            "video_token": settings.get("video_token") or "<video>",
        }
        if plain.image_processor is not None:
            extra["image_tokens"] = read_image_tokens(
                kind, plain.image_processor, settings, model, str(folder)
            )
        try:
            return cls(plain.image_processor, plain.tokenizer, plain.processor_class, **extra)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write files that transformers' AutoProcessor, AutoImageProcessor and AutoTokenizer open."""
        super().save(folder)
        settings = written_settings(self.image_tokens, self.image_token, self.video_token)
        if self.image_processor is not None:
            settings["image_processor"] = self.image_processor.to_dict()
        try:
            write_json(Path(folder) / PROCESSOR_FILE, settings)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error


__all__ = ["LlavaProcessor"]
