"""Scenes as training data: pairs for a CLIP, text for a language model, conversations about pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmjax.data.config import DataConfig, Progress, Split, check_split
from mmjax.data.faults import BadSample
from mmjax.data.scenes import PLACES, Dice, Scene, make_scene
from mmjax.data.scenes_questions import Question, scene_question, scene_questions, thing_question
from mmjax.data.scenes_text import at_place, describe, scene_caption, scene_captions
from mmjax.data.sources import Record, digest
from mmjax.data.text import ChatData
from mmjax.errors import ConfigError
from mmjax.language.learned import train_bpe_tokenizer
from mmjax.language.tokenizer import Tokenizer

Message = dict[str, Any]
About = Literal["caption", "thing", "questions", "question"]
IMAGE_TOKEN = "<image>"
_TOLD_QUESTIONS = 4
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
ASK_CAPTION = "what is in the picture?"
# A space goes before every text, so that a word has the same id wherever it stands. Question marks, and an
# end of what the user says, would only stand between the question and its answer.
SCENE_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{USER}' if message.role == 'user' else '{ASSISTANT}' }}}}"
    "{% set marks = '?' if message.role == 'user' else '' %}"
    "{% if message.content is string %}{{ ' ' + message.content.rstrip(marks) }}{% else %}"
    "{% for part in message.content %}"
    f"{{{{ '{IMAGE_TOKEN}' if part.type == 'image' else ' ' + part.text.rstrip(marks) }}}}"
    "{% endfor %}{% endif %}"
    f"{{{{ '{END}' if message.role == 'assistant' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


@dataclass(frozen=True, kw_only=True)
class ScenesData(DataConfig):
    """Pictures of scenes with captions, for contrastive training; nothing is read or stored.

    A training sample has a full caption and several partial ones, of which each epoch draws one; see
    `mmjax.data.make_scene` for what is in a scene and which combinations only the test split has.

    Args:
        num_train, num_test: scenes of each split.
        image_size: height and width in pixels, a multiple of 3 and at least 36.
        content_seed: gives other scenes.

    >>> example = ScenesData().examples("test")[0]
    >>> example["image"].size, example["text"]
    ((48, 48), 'a small purple square at the top left, the cyan word cat at the bottom left.')
    """

    num_train: int = 20_000
    num_test: int = 500
    image_size: int = 48
    content_seed: int = 0
    num_threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scene_counts(self)
        make_scene(0, image_size=self.image_size)

    def source(self, split: Split = "train", progress: Progress | None = None) -> ScenesSource:
        """The scenes of one split; they are drawn when read."""
        check_split(split)
        return ScenesSource(self, split)


@dataclass(frozen=True)
class ScenesSource:
    """Makes scenes from their numbers.

    Args:
        config: numbers, size and seed.
        split: each split has scenes of its own.
    """

    config: ScenesData
    split: Split
    has_text: bool = True
    has_labels: bool = False
    window: int = 1

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """All scenes are one shard."""
        return (len(self),)

    @property
    def identity(self) -> str:
        """Changes with what decides the contents."""
        config = self.config
        return digest("scenes 2", self.split, len(self), config.image_size, config.content_seed)

    def __len__(self) -> int:
        return self.config.num_train if self.split == "train" else self.config.num_test

    def __getitem__(self, index: int) -> Record:
        config = self.config
        scene = make_scene(index, self.split, seed=config.content_seed, image_size=config.image_size)
        return Record(image=scene.draw(), texts=scene_captions(scene), label=None, name=f"scene {index}")


@dataclass(frozen=True, kw_only=True)
class SceneTextData(ChatData):
    """Conversations about scenes that are told in words, for a language model that has seen no picture.

    The user tells what is in a scene and asks; the assistant answers. Of every conversation only the answers
    are learned, as in `ChatData`.

    Args:
        about, draws: as in `SceneDialogueData`, but "questions" are a few, perhaps what is in the scene too.
        num_train, num_test, content_seed: as in `ScenesData`.
        sequence_length: tokens of a row, into which several conversations are packed.
    """

    path: str = ""
    about: Literal["questions", "question"] = "questions"
    draws: int = 1
    num_train: int = 20_000
    num_test: int = 500
    content_seed: int = 0
    sequence_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scene_counts(self)
        if self.path or self.test_path:
            raise ConfigError("SceneTextData reads no files: leave path and test_path out")
        if self.draws < 1:
            raise ConfigError(f"SceneTextData.draws={self.draws} has to be at least 1")
        if self.about not in ("questions", "question"):
            raise ConfigError(f"SceneTextData.about={self.about!r} has to be 'questions' or 'question'")

    def raw(self, split: Split) -> Iterator[tuple[str, bytes | BadSample]]:
        """Name and JSON of every conversation."""
        check_split(split)
        for number in range(self.num_train if split == "train" else self.num_test):
            scene = make_scene(number, split, seed=self.content_seed)
            for draw in range(self.draws if split == "train" else 1):
                row = {"messages": told_conversation(scene, draw, self.about)}
                yield f"scene {number}", json.dumps(row).encode()


def scene_conversation(
    scene: Scene, about: About = "questions", draw: int = 0, turns: int = 1
) -> list[Message]:
    """What is asked and answered about a picture, which comes first.

    Args:
        scene: what the picture shows.
        about: "caption": what is in it; "thing": what one thing in it is like; "questions": one of each kind
            that has an answer; "question": one of a kind that is drawn.
        draw: gives other questions about the same scene.
        turns: how many with "question", each drawn anew.

    >>> talk = scene_conversation(make_scene(9), "caption")
    >>> talk[0]["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'what is in the picture?'}]
    >>> talk[1]["content"]
    'a large purple circle at the top, a blue digit nine at the top right.'
    """
    if about == "caption":
        said = [(ASK_CAPTION, scene_caption(scene))]
    elif about == "questions":
        said = _said(*scene_questions(scene, draw))
    elif about == "question":
        said = _said(*(scene_question(scene, turns * draw + turn) for turn in range(turns)))
    elif about == "thing":
        said = _said(thing_question(scene, draw))
    else:
        raise ConfigError(f"about={about!r} has to be 'caption', 'thing', 'questions' or 'question'")
    messages = _messages(said)
    first = messages[0]["content"]
    messages[0] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first}]}
    return messages


def told_conversation(scene: Scene, draw: int = 0, about: About = "questions") -> list[Message]:
    """The same with words in place of the picture: all things, in any order, begin the first question.

    One of several questions may be what is in the picture, which is answered in reading order: so whoever
    learns from it learns to look things up by what they are and where they stand, and to put them in order.

    >>> told_conversation(make_scene(9))[0]["content"]  # doctest: +ELLIPSIS
    'a blue digit nine at the top right, a large purple circle at the top. ...?'
    """
    dice = Dice(scene.seed, "told", scene.split, scene.number, draw)
    asked = [scene_question(scene, draw)] if about == "question" else scene_questions(scene, draw)
    turns = _said(*asked)
    if about != "question":
        turns = dice.shuffled([*turns, (ASK_CAPTION, scene_caption(scene))])[:_TOLD_QUESTIONS]
    messages = _messages(turns)
    told = ", ".join(describe(thing) for thing in dice.shuffled(scene.things))
    messages[0]["content"] = f"{told}. {messages[0]['content']}"
    return messages


def scene_tokenizer(texts: int = 2_000) -> Tokenizer:
    """A vocabulary learned from captions and questions, in which their words and places have one id each.

    Its chat template writes `<image>` where a message has an image.

    Args:
        texts: how many training scenes it is learned from.

    >>> tokenizer = scene_tokenizer(200)
    >>> ids = tokenizer.apply_chat_template(scene_conversation(make_scene(9), "caption"))["input_ids"][0]
    >>> tokenizer.decode(ids[:7])
    '<|user|><image> what is in the picture'
    """
    said = []
    for number in range(texts):
        scene = make_scene(number)
        said += [f" {scene_caption(scene)}", f" {ASK_CAPTION}"]
        asked = (*scene_questions(scene), thing_question(scene))
        said += [f" {question.text} {question.answer}" for question in asked]
    return train_bpe_tokenizer(
        said,
        1024,
        eos_token=END,
        special_tokens=(USER, ASSISTANT, IMAGE_TOKEN),
        # A place follows what is there at once: who reads a name has the key to look it up. After "at the"
        # the name would have to be fetched first.
        phrases=[f" {at_place(place)}" for row in PLACES for place in row],
        chat_template=SCENE_TEMPLATE,
    )


def _said(*questions: Question) -> list[tuple[str, str]]:
    return [(question.text, question.answer) for question in questions]


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def check_scene_counts(data: Any) -> None:
    """Refuse a data configuration without scenes."""
    if min(data.num_train, data.num_test) < 1:
        raise ConfigError(f"{type(data).__name__}: num_train and num_test have to be positive")
