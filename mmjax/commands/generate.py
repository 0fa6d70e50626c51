"""Let a language model go on with a text, or answer about images; the text is shown as it is made."""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmjax.commands.output import printable
from mmjax.commands.parser import UsageError, add_model, positive_int


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax generate`."""
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the text to go on with; '-' reads it from stdin"
    )
    parser.add_argument("--prompt", dest="prompt_option", metavar="PROMPT", help="PROMPT, given by name")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message to a chat model")
    add_language_model(parser, max_new_tokens=64)


def add_language_model(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options that `generate` and `chat` share."""
    add_model(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image that the first message is about; may be given several times",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of a conversation")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer, in tokens (default: {max_new_tokens})",
    )
    group = parser.add_argument_group("sampling (default: always the likeliest token)")
    group.add_argument("--temperature", type=float, metavar="T", help="above 1 more varied, below less")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that add up to P")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="draw from those with P times the best's share"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 for fewer repetitions")
    group.add_argument(
        "--seed", type=seed_number, default=0, help="the same seed gives the same text (default: 0)"
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile anew; else compiled programs are kept in XDG_CACHE_HOME/mmjax/compiled (~/.cache)",
    )


def run(options: argparse.Namespace) -> int:
    """Run `mmjax generate`."""
    if options.system is not None and not (options.chat or options.image):
        raise UsageError("--system is for conversations: give --chat too (see mmjax generate --help)")
    if options.prompt is not None and options.prompt_option is not None:
        raise UsageError("PROMPT was given twice (see mmjax generate --help)")
    prompt = options.prompt if options.prompt_option is None else options.prompt_option
    if prompt is None:
        raise UsageError("the following arguments are required: PROMPT (see mmjax generate --help)")
    if prompt == "-":
        keep_bytes(sys.stdin)
        prompt = sys.stdin.read()
    if not prompt or (options.image and not prompt.strip()):
        raise UsageError("the prompt is empty (see mmjax generate --help)")
    sampler = sampler_of(options)
    with compilation_cache(not options.no_compilation_cache), language_model(options) as (folder, stop_ids):
        show(_said(options, prompt, sampler, folder, stop_ids))
    print()
    return 0


def _said(
    options: argparse.Namespace, prompt: str, sampler: Any, folder: Any, stop_ids: tuple[int, ...]
) -> Iterator[str]:
    """Pieces of text that go on with a prompt."""
    import jax

    from mmjax.generation import stream, stream_text

    processor = folder.processor
    if options.chat or options.image:
        batch = read_messages(processor, [*opening(options), user_message(prompt, options.image)])
    elif hasattr(processor, "encode"):
        # Who sees counts the places for images, of which there are none here.
        batch = processor(text=prompt)
    else:
        batch = {"input_ids": processor.tokenizer(prompt)["input_ids"]}
    key = jax.random.key(options.seed)

    def begin(params: Any) -> Any:
        return stream(folder.model, params, batch, options.max_new_tokens, sampler, key, stop_ids)

    begin(folder.shapes())  # what is wrong with the call is said before anything is read
    return stream_text(begin(folder.read()), processor.tokenizer)


def keep_bytes(stream: Any) -> None:
    """Let bytes that are not UTF-8 be read as half surrogate pairs, which tokenizers refuse in one line."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="surrogateescape")


def seed_number(text: str) -> int:
    """A whole number that a PRNG key can be made of.

    >>> seed_number("-7")
    -7
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from -2**63 to 2**63 - 1")
    return int(text)


def opening(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def user_message(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """What a person says, with the images it is about in front."""
    if not images:
        return {"role": "user", "content": text}
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def read_messages(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation as a model takes it, up to where the assistant speaks.

    Raises:
        DataError: images for a model that does not see, or that cannot be read.
    """
    from mmjax.errors import DataError

    if hasattr(processor, "encode"):
        return processor(messages=messages)
    if any(not isinstance(message["content"], str) for message in messages):
        raise DataError("--image: the model reads text only; give the folder of a model that sees")
    ids = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return {"input_ids": ids}


def show(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come; what could steer a terminal is escaped."""
    for piece in pieces:
        print("".join(c if c in "\n\t" else printable(c) for c in piece), end="", flush=True)


def sampler_of(options: argparse.Namespace) -> Any:
    """The sampler that the options ask for.

    Raises:
        ConfigError: a number out of range.
    """
    from mmjax.generation.samplers import Greedy, Sampling

    drawn = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    given = {name: value for name, value in drawn.items() if value is not None}
    penalty = options.repetition_penalty
    return Sampling(**given, repetition_penalty=penalty) if given else Greedy(repetition_penalty=penalty)


@contextmanager
def language_model(options: argparse.Namespace) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """The folder of a language model, as `mmjax.models.hub.open_folder`, and the ids that end its texts.

    Raises:
        CheckpointError, ConfigError: the folder cannot be opened, or is no language model's.
    """
    from mmjax.errors import CheckpointError
    from mmjax.generation.prompts import check_model, ending_ids
    from mmjax.models.hub import find_folder, open_folder

    path = find_folder(options.model)
    turned = _rather_transposed(path, options.dtype)
    with open_folder(path, options.dtype, transpose_kernels=turned) as folder:
        check_model(folder.model)
        tokenizer = getattr(folder.processor, "tokenizer", None)
        if tokenizer is None:
            raise CheckpointError(
                f"{path}: no tokenizer.json or tokenizer.model, so there is no text; add one"
            )
        # Chat models end an answer with other ids than a document, and folders name them in several places.
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        stop_ids = {*ending_ids(folder.model, None), *own, *_ids_in(path / "generation_config.json")}
        yield folder, tuple(sorted(stop_ids))


def _ids_in(path: Path) -> list[int]:
    """The ids that end a text as a generation_config.json names them; none where there is no such file."""
    from mmjax.checkpoints.files import read_json
    from mmjax.errors import CheckpointError

    named = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    for number in ids:
        if type(number) is not int or not 0 <= number < 2**31:
            raise CheckpointError(f"{path}: eos_token_id: {number!r} is not a token id; correct or remove it")
    return ids


def _rather_transposed(folder: Path, dtype: str | None) -> bool:
    """Whether text comes sooner with kernels as the folder has them: in bfloat16 on a CPU."""
    import jax

    from mmjax.checkpoints.files import read_json

    path = folder / "config.json"
    if jax.default_backend() != "cpu" or not path.exists():
        return False
    config = read_json(path)
    return (dtype or config.get("dtype") or config.get("torch_dtype")) == "bfloat16"


@contextmanager
def compilation_cache(wanted: bool) -> Iterator[None]:
    """Keep compiled programs in the user's cache folder for the next start, unless jax has a folder already.

    The folder is the user's alone: whoever writes into it decides what runs here.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    settled = getattr(jax.config, "jax_compilation_cache_dir", None) is not None
    folder = private_folder() if wanted and not settled else None
    if folder is None:
        yield
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    # The first program compiled in a process settles where they are kept.
    cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        cache.reset_cache()


def private_folder() -> Path | None:
    """The folder of compiled programs, made if need be; None where it cannot be the user's alone."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(root) if os.path.isabs(root) else Path("~/.cache").expanduser()
    folder = base / "mmjax" / "compiled"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            folder.chmod(0o700)
            return folder
        reason = "it is not a folder of this user's"
    except OSError as error:
        reason = error.strerror or str(error)
    print(f"note: compiled programs are not kept: {printable(folder)}: {reason}", file=sys.stderr)
    return None
