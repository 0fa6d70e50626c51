"""Instruction data: conversations about images, in LLaVA's JSON or as chat messages."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmjax.data.config import Progress, Split
from mmjax.data.faults import BadSample, FaultTally
from mmjax.data.features import FeatureStore
from mmjax.data.instruction_batches import GroupedOrder, InstructionBatches, PackedOrder
from mmjax.data.instruction_layout import RowShape
from mmjax.data.instruction_rows import read_rows
from mmjax.data.instruction_source import Conversations, Entry, KeptTokens
from mmjax.data.packing import example_row, fit_into_rows
from mmjax.data.sources import as_path, digest
from mmjax.data.text import files_of, tokenizer_of
from mmjax.errors import ConfigError, DataError, MmjaxError

_CHUNK, _PIECE = 1024, 64
_MISPLACED = ("no_image", "unplaced_image")


@dataclass(frozen=True, kw_only=True)
class InstructionData:
    """Conversations about images, of which only what the assistant says is learned.

    A row is LLaVA's {"image": name or names, "conversations": [{"from": "human" | "gpt", "value": ...}]},
    where `<image>` marks the place of an image, or {"messages": [{"role", "content"}]} with parts of type
    "image" in its contents. Nothing that is said becomes a special token. Every row is checked when a run
    begins; those that cannot be used are left out and counted by cause.

    Args:
        path: .json files (a list of rows) and .jsonl files (a row a line), folders of them and wildcards;
            several joined by `::`.
        images: folder of the images, which no name can leave; None: that of the rows' own file.
        test_path: rows of the test split.
        template: one of `mmjax.language.CHAT_FORMATS`; None: the processor's own chat template.
        arrange: "pack": whole conversations side by side in rows of `sequence_length`, each seeing only
            itself. "group": a conversation a row, in batches of about equal length and of few sizes.
        sequence_length: tokens of a row, those of images included; a longer conversation is cut.
        tiles_per_row: most images (tiles, where they are cut into tiles) of a packed row, and what every row
            has room for, so that data with the same number need no other program; None: as many as there are
            tokens for, and room for those of the fullest row.
        image_first: a message's only `<image>` moves to its beginning, as in LLaVA's training.
        pad_images: pad images to squares, where the processor can, or do not; None: as the processor does.
        mismatch: what becomes of a row whose images are not as many as its places for them: "skip" leaves it
            out as any other fault, "refuse" stops.
        features: folder of features that `mmjax.training.keep_features` computed; the images are then not
            read at all.
        max_fault_share: largest share of broken rows and images that a run accepts.
        num_threads, prefetch_batches: as in `mmjax.data.DataConfig`.
    """

    path: str
    images: str | None = None
    test_path: str | None = None
    template: str | None = None
    arrange: Literal["pack", "group"] = "pack"
    sequence_length: int = 2048
    tiles_per_row: int | None = None
    image_first: bool = True
    pad_images: bool | None = None
    mismatch: Literal["skip", "refuse"] = "skip"
    features: str | None = None
    max_fault_share: float = 0.05
    num_threads: int = 4
    prefetch_batches: int = 2

    suffixes = (".json", ".jsonl")

    def __post_init__(self) -> None:
        for name, choices in (("arrange", ("pack", "group")), ("mismatch", ("skip", "refuse"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"InstructionData.{name}={getattr(self, name)!r} is none of {choices}")
        if self.sequence_length < 2:
            raise ConfigError(f"InstructionData.sequence_length={self.sequence_length} has to be at least 2")
        if self.tiles_per_row is not None and self.tiles_per_row < 1:
            raise ConfigError(f"InstructionData.tiles_per_row={self.tiles_per_row} has to be at least 1")
        if not 0 <= self.max_fault_share <= 1:
            raise ConfigError(
                f"InstructionData.max_fault_share={self.max_fault_share} has to lie between 0 and 1"
            )
        if self.num_threads < 0 or self.prefetch_batches < 1:
            raise ConfigError(
                "InstructionData: num_threads must be at least 0 and prefetch_batches at least 1"
            )
        if self.template is not None:
            from mmjax.language import chat_format

            chat_format(self.template)

    def entries(self, split: Split = "train") -> Iterator[Entry | tuple[str, BadSample]]:
        """The rows of a split as they are found, unchecked; (name, why) where a file cannot be read."""
        for path in files_of(self, split):
            root = as_path(self.images) if self.images else path.parent
            for name, data in read_rows(path):
                yield (name, data) if isinstance(data, BadSample) else Entry(data, root, name)

    def conversations(self, processor: Any, split: Split = "train") -> Conversations:
        """The rows of a split for random access, unchecked.

        Args:
            processor: of a model that sees.
            split: "train" or "test".
        """
        entries = [entry for entry in self.entries(split) if isinstance(entry, Entry)]
        return self._source(processor, entries)

    def build(
        self,
        *,
        processor: Any,
        batch_size: int,
        seed: int,
        split: Split = "train",
        process_index: int = 0,
        process_count: int = 1,
        progress: Progress | None = None,
    ) -> InstructionBatches:
        """Endless batches of one split; see `InstructionBatches.row` for what is in them.

        Args:
            processor: of a model that sees.
            batch_size, seed, split, process_index, process_count, progress: as in `DataConfig.build`.

        Raises:
            ConfigError: a field, the processor or the split does not fit.
            DataError: the files cannot be found, nothing in them can be used, or too much cannot.
        """
        broken, entries = [], []
        for entry in self.entries(split):
            if isinstance(entry, Entry):
                entries.append(entry)
            else:
                broken.append((entry[1].cause, entry[0]))
        source = self._source(processor, entries)
        shape = _row_shape(source)
        found = list(self._measured(source, progress))
        good = [number for number, measured in enumerate(found) if not isinstance(measured, BadSample)]
        broken += [(measured.cause, measured.name) for measured in found if isinstance(measured, BadSample)]
        tally = FaultTally.for_source(len(good) + len(broken))
        tally.add(len(good) + len(broken), broken)
        if not good:
            raise DataError(f"InstructionData: no row can be used: {tally.summary()}{_first(found)}")
        tally.check(self.max_fault_share)
        source = dataclasses.replace(source, entries=[entries[number] for number in good])
        lengths, tiles = np.array([found[number] for number in good], np.int64).T
        lengths = np.minimum(lengths, self.sequence_length)
        return InstructionBatches(
            read=source.read,
            lengths=lengths,
            tiles=tiles,
            order=self._order(lengths, tiles, batch_size, seed),
            shape=shape,
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            num_threads=self.num_threads,
            prefetch_batches=self.prefetch_batches,
            max_fault_share=self.max_fault_share,
            seed=seed,
            tally=tally,
            identity={
                "source": _identity(source, lengths),
                "rows": len(good),
                "arrange": f"{self.arrange} {self.sequence_length} {self.tiles_per_row}",
                "pad_images": self.pad_images,
                "split": split,
                "seed": seed,
                "batch_size": batch_size,
            },
        )

    def example_batch(self, model: Any) -> dict[str, np.ndarray]:
        """The arrays of the largest batch of one row, all zero, for a plan of a run.

        Args:
            model: `Llava`.
        """
        config, length = model.config, self.sequence_length
        of_one = config.tiles_per_image
        many = max(length // config.tile_rows, 1) if self.tiles_per_row is None else self.tiles_per_row
        tiles = of_one if self.arrange == "group" else max(many, of_one)
        batch = example_row(length)
        batch["image_index"] = np.zeros((1, length, config.index_width), np.int32)
        if config.index_width > 1:
            batch["image_weights"] = np.zeros((1, length, config.index_width), np.float32)
        if self.features is not None:
            width = config.vision_config.hidden_size * len(config.feature_layers)
            batch["tile_features"] = np.zeros((1, tiles, config.tile_rows, width), np.float32)
        else:
            shape = (*((1,) if config.tiled else ()), *config.tile, config.vision_config.num_channels)
            batch["tiles"] = np.zeros((1, tiles, *shape), np.float32)
        return batch

    def fitted(self, processor: Any) -> Any:
        """A model's processor with the template and the padding that are set here.

        Raises:
            ConfigError: it is of no model that sees, or cannot pad.
        """
        tokenizer = tokenizer_of(processor)
        if getattr(processor, "image_tokens", None) is None:
            raise ConfigError("InstructionData needs the processor of a model that sees, such as LLaVA's")
        if self.template is not None:
            from mmjax.language import chat_format

            tokenizer = tokenizer.with_chat_template(chat_format(self.template))
            processor = dataclasses.replace(processor, tokenizer=tokenizer)
        if self.pad_images is not None:
            try:
                eyes = dataclasses.replace(processor.image_processor, do_pad=self.pad_images)
            except (AttributeError, TypeError) as error:
                raise ConfigError(
                    f"InstructionData.pad_images: the processor cannot pad ({error})"
                ) from error
            processor = dataclasses.replace(processor, image_processor=eyes)
        return processor

    def _source(self, processor: Any, entries: list[Entry]) -> Conversations:
        processor = self.fitted(processor)
        if processor.tokenizer.chat_template is None:
            raise ConfigError("InstructionData: the processor has no chat template: set template")
        kept = None if self.features is None else FeatureStore(self.features)
        source = Conversations(
            entries=entries,
            processor=processor,
            image_first=self.image_first,
            length=self.sequence_length,
            features=kept,
            # Where images are read, each conversation is laid out anew beside them.
            tokens=KeptTokens(0) if kept is None else KeptTokens(),
        )
        if kept is not None:
            source.check_names()
        return source

    def _measured(
        self, source: Conversations, progress: Progress | None
    ) -> Iterator[tuple[int, int] | BadSample]:
        """Tokens and tiles of every row, or why it cannot be used."""

        def measure(number: int) -> tuple[int, int] | BadSample:
            try:
                return source.measure(number)
            except BadSample as error:
                if self.mismatch == "refuse" and error.cause in _MISPLACED:
                    raise DataError(f"{error}; mismatch='skip' leaves such rows out") from error
                # An image's name says less than the row's, whose number it is looked for under.
                return BadSample(error.cause, source.entries[number].name, str(error))

        def measure_all(numbers: range) -> list[tuple[int, int] | BadSample]:
            return [measure(number) for number in numbers]

        # With features there is nothing to wait for, and several threads only wait for one another.
        workers = 1 if source.features is not None else max(self.num_threads, 1)
        with ThreadPoolExecutor(workers) as threads:
            for first in range(0, len(source), _CHUNK):
                numbers = range(first, min(first + _CHUNK, len(source)))
                # Handing over a row takes as long as measuring one, so that threads get many at once.
                pieces = [numbers[start : start + _PIECE] for start in range(0, len(numbers), _PIECE)]
                for found in threads.map(measure_all, pieces):
                    yield from found
                if progress is not None:
                    progress(numbers.stop, len(source))

    def _order(
        self, lengths: np.ndarray, tiles: np.ndarray, batch_size: int, seed: int
    ) -> PackedOrder | GroupedOrder:
        if self.arrange == "group":
            return GroupedOrder(lengths, tiles, self.sequence_length, batch_size, seed)
        most = int(tiles.sum()) if self.tiles_per_row is None else self.tiles_per_row
        pieces = fit_into_rows(lengths.tolist(), self.sequence_length, tiles.tolist(), most)
        rows = [[number for number, _, _ in row] for row in pieces]
        fullest = max(int(tiles[row].sum()) for row in rows)
        return PackedOrder(rows, self.sequence_length, max(self.tiles_per_row or 0, fullest), seed)


def _row_shape(source: Conversations) -> RowShape:
    """What all rows have in common, seen on a conversation about a grey image.

    Raises:
        ConfigError: the chat template does not take images.
    """
    processor, tokenizer = source.processor, source.processor.tokenizer
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    messages = [ask, {"role": "assistant", "content": "!"}]
    image = Image.new("RGB", processor.image_tokens.tile[::-1], (127, 127, 127))
    try:
        sample = processor.encode(messages, [image], return_assistant_tokens_mask=True)
        if not np.any(sample["assistant_masks"]):
            raise DataError("it does not show what the assistant says")
    except MmjaxError as error:
        raise ConfigError(
            f"InstructionData: the chat template does not fit conversations about images ({error}); set "
            "template"
        ) from error
    tokens, index = processor.image_tokens, np.asarray(sample["image_index"])
    pixels = np.asarray(sample["pixel_values"])
    own = (1, *pixels.shape[2:]) if pixels.ndim == 5 else pixels.shape[1:]
    kept = source.features
    return RowShape(
        length=source.length,
        tiles=0,
        tile=own if kept is None else kept.shape,
        tile_rows=tokens.rows,
        width=index.shape[-1],
        weighted=sample.get("image_weights") is not None,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        name="tiles" if kept is None else "tile_features",
    )


def _identity(source: Conversations, lengths: np.ndarray) -> str:
    state = hashlib.blake2b(digest_size=8)
    for entry in source.entries:
        state.update(entry.data)
    template = source.processor.tokenizer.chat_template
    kept = None if source.features is None else source.features.identity
    return digest(state.hexdigest(), lengths.tolist(), template, source.image_first, kept)


def _first(found: Iterable[Any]) -> str:
    error = next((each for each in found if isinstance(each, BadSample)), None)
    return "" if error is None else f"; {error}"


__all__ = ["InstructionData"]
