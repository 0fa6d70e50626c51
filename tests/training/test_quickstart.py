"""What the quickstart says of its model."""

from __future__ import annotations

import runpy
from pathlib import Path

from mmjax.data import make_scene, scene_questions

FILE = Path(__file__).parents[2] / "experiments" / "quickstart.py"


def test_the_dialogue_has_all_that_was_asked_about_the_first_picture() -> None:
    """Also where its scene was made anew for other questions; wrong answers are marked."""
    made = runpy.run_path(str(FILE))
    pairs = [
        (scene, question)
        for ask in (made["open_questions"], scene_questions)
        for scene in (make_scene(number, "test") for number in range(2))
        for question in ask(scene)
    ]
    mine = [question for scene, question in pairs if scene.number == 0]
    assert len(mine) > 5 and mine[0].text == "what is in the picture?"
    answers = [question.answer for _, question in pairs]
    lines = made["dialogue"](pairs, answers).split("\n")
    assert lines == [f"{question.text}  {question.answer}" for question in mine]
    wrong = made["dialogue"](pairs, ["seven"] * len(pairs)).split("\n")
    assert len(wrong) == len(mine) and wrong[0].endswith(f"(right: {mine[0].answer})")
