"""Talk to a chat model; answers are shown as they are made.

Ctrl-C stops an answer. /image FILE shows an image with the next message, /reset begins anew, /exit (or the
end of the input) leaves.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mmjax.commands.generate import (
    add_language_model,
    compilation_cache,
    keep_bytes,
    language_model,
    opening,
    read_messages,
    sampler_of,
    show,
    user_message,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmjax chat`."""
    add_language_model(parser, max_new_tokens=512)


def run(options: argparse.Namespace) -> int:
    """Run `mmjax chat`."""
    sampler = sampler_of(options)
    with compilation_cache(not options.no_compilation_cache):
        return _talk(Chat(options, sampler))


def _talk(chat: Chat) -> int:
    from mmjax.errors import MmjaxError

    keep_bytes(sys.stdin)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return 0
        if line == "/exit":
            return 0
        if line == "/reset":
            chat.reset()
        elif line.split(maxsplit=1)[:1] == ["/image"]:
            try:
                chat.show_image(line.removeprefix("/image").strip())
            except MmjaxError as error:
                print(f"error: {error}", file=sys.stderr)
        elif line.startswith("/") and len(line.split()) == 1:
            print(f"error: no command {line!r}: there are /image, /reset and /exit", file=sys.stderr)
        elif line:
            try:
                chat.answer(line)
            except MmjaxError as error:
                # A text that became too long, for example; what was said before still stands.
                print(f"error: {error} (/reset begins anew)", file=sys.stderr)


class Chat:
    """A conversation with the model of a folder."""

    def __init__(self, options: argparse.Namespace, sampler: Any) -> None:
        self.options, self.sampler = options, sampler
        with language_model(options) as (folder, self.stop_ids):
            self.model, self.processor = folder.model, folder.processor
            self.reset()
            # A folder without a template, and an image that is none, are found out now, not after a wait.
            self._batch([user_message(".", self.waiting)])
            self.params = folder.read()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = opening(self.options)
        self.conversation: Any = None
        self.waiting: list[Any] = []
        for name in self.options.image:
            self.show_image(name)

    def show_image(self, name: str) -> None:
        """Keep an image for the next message.

        Raises:
            DataError: it cannot be read.
        """
        from mmjax.errors import DataError
        from mmjax.vision import open_image

        if not name:
            raise DataError("/image: give the name of a file")
        if not hasattr(self.processor, "encode"):
            raise DataError(f"{name}: the model reads text only; give the folder of a model that sees")
        # Read once: the conversation goes on from what was seen, whatever becomes of the file.
        self.waiting.append(open_image(name, exif=True))

    def _batch(self, messages: list[dict[str, Any]]) -> Any:
        return read_messages(self.processor, self.messages + messages)

    def answer(self, line: str) -> None:
        """Show the answer to a line; Ctrl-C ends it, and what was said until then stands."""
        import jax

        from mmjax.generation import stream, stream_text
        from mmjax.generation.prompts import longest_text

        question = user_message(line, self.waiting)
        batch = self._batch([question])
        ids = batch["input_ids"]
        longest = longest_text(self.model)
        room = self.options.max_new_tokens
        if longest is not None:
            room = max(1, min(room, longest - ids.shape[1]))
        turn = sum(message["role"] == "user" for message in self.messages)
        key = jax.random.fold_in(jax.random.key(self.options.seed), turn)
        tokens = stream(
            self.model,
            self.params,
            batch,
            room,
            self.sampler,
            key,
            self.stop_ids,
            conversation=self.conversation,
        )
        said: list[str] = []

        def heard() -> Any:
            for piece in stream_text(tokens, self.processor.tokenizer):
                said.append(piece)
                yield piece

        try:
            show(heard())
            self.conversation = tokens.conversation
        except KeyboardInterrupt:
            # In the middle of a step its state is lost; the one before this answer is whole.
            tokens.close()
        print(flush=True)
        self.messages = [*self.messages, question, {"role": "assistant", "content": "".join(said)}]
        self.waiting = []
