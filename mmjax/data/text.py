"""Text files and conversations for language models, as packed batches of token ids."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data.config import Progress, Split, check_split
from mmjax.data.faults import BadSample, FaultTally
from mmjax.data.files import read_file
from mmjax.data.packing import PackedBatches, cut_into_rows, example_row, fit_into_rows
from mmjax.data.shards import expand_braces
from mmjax.data.sources import as_path, digest
from mmjax.errors import ConfigError, DataError, MmjaxError

MAX_TEXT_BYTES = 8 << 30
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Text files, each a document or several, one after another in rows of tokens.

    Files are tokenized when a run begins and kept in memory, 4 bytes a token. The tokenizer's end token ends
    every document. A document that is not UTF-8, or empty, is left out and counted.

    Args:
        path: UTF-8 files, folders (their .txt and .md files, also in folders below) and wildcards; several
            joined by `::`.
        test_path: the same for the test split.
        split_on: what ends a document inside a file, such as a blank line "\\n\\n"; None: a file is one.
        sequence_length: tokens of a row.
        max_fault_share: largest share of broken documents that a run accepts.
    """

    path: str
    test_path: str | None = None
    split_on: str | None = None
    sequence_length: int = 512
    max_fault_share: float = 0.05

    suffixes = (".txt", ".md")

    def __post_init__(self) -> None:
        _check(self)
        if self.split_on == "":
            raise ConfigError("TextData.split_on is empty: name what ends a document, or leave it out")

    def example_batch(self, model: Any) -> dict[str, np.ndarray]:
        """The arrays of a batch of one row, all zero, for a plan of a run."""
        return example_row(self.sequence_length)

    def texts(self, split: Split = "train") -> Iterator[str]:
        """The documents that can be read, in order, such as to learn a vocabulary from.

        Raises:
            DataError: the files cannot be found.
        """
        for _, data in self.raw(split):
            try:
                yield _decode(data, "")
            except BadSample:
                continue

    def raw(self, split: Split) -> Iterator[tuple[str, bytes | BadSample]]:
        """Name and bytes of every document, or why it cannot be had."""
        mark = None if self.split_on is None else self.split_on.encode()
        for path in files_of(self, split):
            try:
                data = read_file(path, path.name, MAX_TEXT_BYTES)
            except BadSample as error:
                yield path.name, error
                continue
            parts = [data] if mark is None else [part for part in data.split(mark) if part.strip()]
            for number, part in enumerate(parts):
                yield (path.name if len(parts) == 1 else f"{path.name}, document {number}"), part

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
    ) -> PackedBatches:
        """Endless batches of one split; see `PackedBatches.batch` for what is in them.

        Args:
            processor: has a `tokenizer` with an end token.
            batch_size, seed, split, process_index, process_count, progress: as in `DataConfig.build`.

        Raises:
            ConfigError: the tokenizer or the split does not fit.
            DataError: the files cannot be found, nothing in them can be used, or too much cannot.
        """
        tokenizer = tokenizer_of(processor)
        end = tokenizer.eos_token_id
        if end is None:
            raise ConfigError("TextData needs a tokenizer with an eos_token, which ends every document")

        def encode(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
            ids = tokenizer([_decode(data, name)])["input_ids"][0]
            return np.append(ids, np.int32(end)) if ids[-1:] != end else ids, None

        placing = {"batch_size": batch_size, "process_index": process_index, "process_count": process_count}
        return _pack(self, encode, cut_into_rows, tokenizer, seed, split, progress, **placing)


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Conversations, a JSON object a line, of which only what the assistant says is learned.

    A line is {"messages": [{"role": ..., "content": ...}]}, or {"conversations": [{"from": "human" | "gpt",
    "value": ...}]}, or {"text": ...}, of which all is learned. The tokenizer's chat template lays messages
    out, and nothing that is said in them becomes a special token. Whole conversations are packed into rows;
    a longer one is cut. Lines that cannot be used are left out and counted.

    Args:
        path: .jsonl files, folders and wildcards; several joined by `::`.
        test_path, sequence_length, max_fault_share: see `TextData`.
    """

    path: str
    test_path: str | None = None
    sequence_length: int = 1024
    max_fault_share: float = 0.05

    suffixes = (".jsonl",)

    def __post_init__(self) -> None:
        _check(self)

    def example_batch(self, model: Any) -> dict[str, np.ndarray]:
        """The arrays of a batch of one row, all zero, for a plan of a run."""
        return example_row(self.sequence_length)

    def raw(self, split: Split) -> Iterator[tuple[str, bytes | BadSample]]:
        """Name and bytes of every line, or why its file cannot be read."""
        for path in files_of(self, split):
            try:
                data = read_file(path, path.name, MAX_TEXT_BYTES)
            except BadSample as error:
                yield path.name, error
                continue
            for number, line in enumerate(data.split(b"\n"), start=1):
                if line.strip():
                    yield f"{path.name}, line {number}", line

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
    ) -> PackedBatches:
        """Endless batches of one split; arguments, batches and errors as in `TextData.build`."""
        tokenizer = tokenizer_of(processor)

        def encode(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
            said = _conversation(_decode(data, name), name)
            if isinstance(said, str):
                ids = tokenizer([said])["input_ids"][0]
                end = tokenizer.eos_token_id
                return (ids if end is None else np.append(ids, np.int32(end))), np.ones(len(ids) + 1, bool)
            batch = tokenizer.apply_chat_template(said, return_assistant_tokens_mask=True)
            learned = batch["assistant_masks"][0] != 0
            if not learned[: self.sequence_length].any():
                raise BadSample("bad_record", name, "nothing that an assistant says is in reach")
            return batch["input_ids"][0], learned

        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError("ChatData needs a tokenizer with a chat template: add chat_template.jinja")
        placing = {"batch_size": batch_size, "process_index": process_index, "process_count": process_count}
        return _pack(self, encode, fit_into_rows, tokenizer, seed, split, progress, **placing)


def _check(data: TextData | ChatData) -> None:
    name = type(data).__name__
    if data.sequence_length < 2:
        raise ConfigError(f"{name}.sequence_length={data.sequence_length} has to be at least 2")
    if not 0 <= data.max_fault_share <= 1:
        raise ConfigError(f"{name}.max_fault_share={data.max_fault_share} has to lie between 0 and 1")


def tokenizer_of(processor: Any) -> Any:
    """The processor's tokenizer.

    Raises:
        ConfigError: it has none.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("batches of text need a processor with a tokenizer")
    return tokenizer


def files_of(data: Any, split: Split) -> list[Path]:
    """The files of a split, in order.

    Args:
        data: has path, test_path, and the suffixes of files that are taken out of folders.
        split: "train" or "test".

    Raises:
        ConfigError: the split is not configured.
        DataError: a file or folder is not there.
    """
    check_split(split)
    name = type(data).__name__
    spec = data.path if split == "train" else data.test_path
    if spec is None:
        raise ConfigError(f"{name} has no test split: set test_path")
    paths: list[Path] = []
    for item in (part for each in spec.split("::") if each for part in expand_braces(each)):
        path = as_path(item)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in data.suffixes and p.is_file())
        elif path.exists() or not any(c in item for c in "*?["):
            found = [path] if path.is_file() else []
        else:
            found = [p for p in map(Path, sorted(glob.glob(str(path)))) if p.is_file()]
        if not found:
            raise DataError(
                f"{name}: {item!r} is no file, and no folder with {' or '.join(data.suffixes)} files"
            )
        paths += found
    if not paths:
        raise ConfigError(f"{name}.path is empty: name files or folders")
    return paths


def _decode(data: bytes | BadSample, name: str) -> str:
    if isinstance(data, BadSample):
        raise data
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("bad_record", name, f"not UTF-8 at byte {error.start}") from error
    if not text.strip():
        raise BadSample("empty", name)
    return text


def _conversation(line: str, name: str) -> list[dict[str, Any]] | str:
    """The messages, or the plain text, of one line."""
    try:
        row = json.loads(line)
        if isinstance(row.get("text"), str):
            if not row["text"].strip():
                raise BadSample("empty", name)
            return row["text"]
        if "messages" in row:
            return [dict(message) for message in row["messages"]]
        turns = row["conversations"]
        return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    except BadSample:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadSample("bad_record", name, "no messages, conversations or text") from error


def _pack(
    data: TextData | ChatData,
    encode: Callable[[str, bytes], tuple[np.ndarray, np.ndarray | None]],
    arrange: Callable[[list[int], int], Any],
    tokenizer: Any,
    seed: int,
    split: Split,
    progress: Progress | None,
    **placing: int,
) -> PackedBatches:
    documents: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    broken: list[tuple[str, str]] = []
    state = hashlib.blake2b(digest_size=8)
    for number, (name, content) in enumerate(data.raw(split)):
        try:
            ids, which = encode(name, content)  # type: ignore[arg-type]
        except MmjaxError as error:
            # The template, too, may refuse what a line says.
            broken.append((error.cause if isinstance(error, BadSample) else "bad_record", name))
            continue
        documents.append(np.asarray(ids, np.int32))
        state.update(documents[-1].tobytes())
        if which is not None:
            learned.append(which[: len(ids)])
            state.update(learned[-1].tobytes())
        if progress is not None:
            progress(number + 1, number + 1)
    tally = FaultTally.for_source(len(documents) + len(broken))
    tally.add(len(documents) + len(broken), broken)
    if not documents:
        raise DataError(f"{type(data).__name__}: no document can be used: {tally.summary()}")
    tally.check(data.max_fault_share)
    rows = arrange([len(ids) for ids in documents], data.sequence_length)
    source = digest(state.hexdigest(), [len(ids) for ids in documents], data.sequence_length)
    return PackedBatches(
        documents=documents,
        learned=learned or None,
        rows=rows,
        row_length=data.sequence_length,
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None),
        seed=seed,
        tally=tally,
        max_fault_share=data.max_fault_share,
        identity={
            "source": source,
            "rows": len(rows),
            "split": split,
            "seed": seed,
            "batch_size": placing["batch_size"],
        },
        **placing,
    )
