"""A small processor that sees, and instruction data with images for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax.language import Tokenizer, chat_format, train_bpe_tokenizer
from mmjax.models.llava.layout import ImageTokens, place

WORDS = ["what is this? a red cat. and that? a blue dog, sat on the mat.", "the user and the assistant"]
TOKENIZER = train_bpe_tokenizer(
    WORDS,
    330,
    special_tokens=("<image>", "<|im_start|>", "<|im_end|>"),
    bos_token="<s>",
    eos_token="</s>",
    chat_template=chat_format("vicuna"),
)
ONE_TILE = ImageTokens(kind="llava", tile=(8, 8), patches=(2, 2), rows=4)
TILES = ImageTokens(
    kind="llava_next", tile=(8, 8), patches=(2, 2), rows=4, pinpoints=((8, 16), (16, 8), (16, 16))
)
POOLED = dataclasses.replace(TILES, kind="llava_onevision", most_tiles=1)


@dataclasses.dataclass(frozen=True)
class Seeing:
    """What instruction data asks of a processor; the pixels of a tile are the image's mean and its number."""

    image_tokens: ImageTokens = ONE_TILE
    tokenizer: Tokenizer = TOKENIZER

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.token_to_id("<image>"))  # type: ignore[arg-type]

    def conversation(self, messages: Any, answers: bool, options: Any) -> tuple[np.ndarray, np.ndarray]:
        batch = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        return batch["input_ids"][0], batch["assistant_masks"][0]

    def encode(self, messages: Any, images: Any = None, return_assistant_tokens_mask: bool = False) -> Any:
        ids, learned = self.conversation(messages, True, {})
        if not images:
            return {"input_ids": ids, "assistant_masks": learned}
        tokens = self.image_tokens
        layouts = [tokens.layout((image.height, image.width), len(images)) for image in images]
        most = 3 if tokens.tiled else 1
        most = max(most, *(layout.tiles for layout in layouts))
        pixels = np.zeros((len(images), most, *tokens.tile, 3), np.float32)
        for number, (image, layout) in enumerate(zip(images, layouts, strict=True)):
            for tile in range(layout.tiles):
                pixels[number, tile] = np.asarray(image, np.float32).mean() + tile + 1
        stride = most * tokens.rows
        rows = [place(x, n * stride, len(images) * stride) for n, x in enumerate(layouts)]
        places = ids == self.image_token_id
        counts = np.ones(len(ids), int)
        counts[places] = [len(layout) for layout in layouts]
        ids, learned = np.repeat(ids, counts), np.repeat(learned, counts)
        index = np.full((len(ids), tokens.width), -1, np.int32)
        index[ids == self.image_token_id] = np.concatenate(rows)
        sample = {"input_ids": ids, "assistant_masks": learned, "image_index": index}
        if tokens.width > 1:
            weights = np.zeros(index.shape, np.float32)
            weights[ids == self.image_token_id] = np.concatenate([layout.weights for layout in layouts])
            sample["image_weights"] = weights
        return {**sample, "pixel_values": pixels if tokens.tiled else pixels[:, 0]}


def colour(number: int) -> tuple[int, int, int]:
    return (10 * number % 250, 7 * number % 250, 90)


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    """Pictures of one colour each, (width, height) in pixels; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, size in enumerate(sizes):
        names.append(f"{number}.png")
        Image.new("RGB", size, colour(number)).save(folder / names[-1])
    return names


def row(image: Any = None, *said: str, **more: Any) -> dict[str, Any]:
    """A row of LLaVA's: what the human and gpt say in turns."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    return {"id": "x", **({} if image is None else {"image": image}), "conversations": turns, **more}


def write_rows(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)
