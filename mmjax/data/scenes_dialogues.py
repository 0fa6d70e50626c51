"""Conversations about drawn scenes, as instruction data: nothing is read or stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmjax.data.config import Split, check_split
from mmjax.data.faults import BadSample
from mmjax.data.instruction_rows import Instruction
from mmjax.data.instruction_source import Conversations, Entry
from mmjax.data.instructions import InstructionData
from mmjax.data.scenes import make_scene
from mmjax.data.scenes_data import About, check_scene_counts, scene_conversation
from mmjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SceneDialogueData(InstructionData):
    """Pictures of scenes with what is in them, or with questions and answers, as `InstructionData`.

    Args:
        about: "caption": what is in the picture; "thing": what one thing in it is like; "questions": one
            question of each kind that has an answer; "question": some of kinds that are drawn; "all": in
            conversations of their own the picture, a thing in it, and some questions.
        draws: conversations with questions about each training scene, each with others.
        turns: questions of a conversation that has some.
        num_train, num_test, image_size, content_seed: as in `ScenesData`.
    """

    path: str = ""
    about: About | Literal["all"] = "questions"
    draws: int = 1
    turns: int = 1
    num_train: int = 20_000
    num_test: int = 500
    image_size: int = 48
    content_seed: int = 0
    sequence_length: int = 160
    num_threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scene_counts(self)
        for name in ("draws", "turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"SceneDialogueData.{name}={getattr(self, name)} has to be at least 1")
        if self.about not in ("caption", "thing", "questions", "question", "all"):
            raise ConfigError(
                f"SceneDialogueData.about={self.about!r} is none of caption, thing, questions, question, all"
            )
        if self.path or self.test_path or self.images:
            raise ConfigError("SceneDialogueData reads no files: leave path, test_path and images out")
        make_scene(0, image_size=self.image_size)

    def entries(self, split: Split = "train") -> Iterator[Entry | tuple[str, BadSample]]:
        """The conversations of a split; the name of an image is what its scene is made from."""
        check_split(split)
        asked: About = "question" if self.about == "all" else self.about
        # There is one thing to say about a picture as a whole.
        draws = self.draws if split == "train" and asked != "caption" else 1
        forms: list[tuple[About, int]] = [(asked, draw) for draw in range(draws)]
        if self.about == "all":
            forms += [("caption", 0), ("thing", 0)]
        for number in range(self.num_train if split == "train" else self.num_test):
            scene = make_scene(number, split, seed=self.content_seed)
            for about, draw in forms:
                messages = scene_conversation(scene, about, draw, self.turns)
                row = {"image": f"{split}/{number}", "messages": messages}
                yield Entry(json.dumps(row).encode(), Path(), f"scene {number}")

    def _source(self, processor: Any, entries: list[Entry]) -> Conversations:
        made = super()._source(processor, entries)
        return _Drawn(**vars(made), image_size=self.image_size, content_seed=self.content_seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn(Conversations):
    """Conversations whose images are drawn."""

    image_size: int
    content_seed: int

    def images(self, number: int) -> list[Image.Image]:
        found = []
        for name in self.names(number):
            split, scene = name.split("/")
            options = {"seed": self.content_seed, "image_size": self.image_size}
            found.append(make_scene(int(scene), split, **options).draw())  # type: ignore[arg-type]
        return found

    def _sizes(self, entry: Entry, talk: Instruction) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size)] * len(talk.images)
