"""Questions about scenes, of several kinds, each with its one right answer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mmjax.data.scenes import COLOR_NAMES, GRID, Dice, Scene, Sort, Thing, is_held_out
from mmjax.data.scenes_draw import SHAPES, Box
from mmjax.data.scenes_text import NUMBER_WORDS, at_place, describe, plural, side_by_side, with_article

KINDS = ("color", "shape", "size", "place", "count", "relation", "word", "digit", "presence")
# Of 100 scenes 32, 32, 20 and 16 have none, one, two and three of the shape that is counted.
_ASK_COUNT = (0.5, 0.5, 0.8, 1.0)
# Weights of the kinds that have an answer, where a question is asked alone: more for what is learned later.
_SHARES = {
    "color": 1,
    "shape": 2,
    "size": 1,
    "place": 4,
    "count": 9,
    "relation": 9,
    "word": 2,
    "digit": 2,
    "presence": 10,
}
_OPPOSITES = {"above": "below", "below": "above", "left": "right", "right": "left"}
# What a question is about comes last: a small model then has less far to look back for it.
_PHRASES = {
    "color": ("what color is {}?", "which color has {}?"),
    "shape": ("what shape is {}?", "which shape is {}?"),
    "size": ("what size is {}?", "how large is {}?"),
    "place": ("where is {}?", "in which part of the picture is {}?"),
    "count": ("how many {}?", "what is the number of {}?"),
    "relation": ("is {}?", "look: is {}?"),
    "word": ("what is the word?", "what says the word?"),
    "digit": ("what is the digit?", "which is the digit?"),
    "presence": ("is there {}?", "can you see {}?"),
    "thing": ("describe {}", "what about {}?"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: one of `KINDS`.
        text: the question.
        answer: the only right answer, in one or two words.
        boxes: of the things that it is about, left, top, right, bottom in pixels; none for absent ones.
        held_out: whether one of those things is a pair of name and colour that training never shows.
    """

    kind: str
    text: str
    answer: str
    boxes: tuple[Box, ...]
    held_out: bool


def scene_questions(scene: Scene, draw: int = 0) -> tuple[Question, ...]:
    """One question of each kind that the scene has an answer to, in an order that is drawn.

    Over many scenes the answers to a question are about equally frequent, whatever its words: who does not
    see the picture can only guess. "presence" asks whether something is there, and half of the time it is
    not, though most often its colour and its shape are, each on another thing.

    Args:
        scene: what they are about.
        draw: gives other questions about the same scene.

    >>> from mmjax.data.scenes import make_scene
    >>> {question.kind: question.answer for question in scene_questions(make_scene(9))}["digit"]
    'nine'
    """
    dice = Dice(scene.seed, "questions", scene.split, scene.number, draw)
    asked = [question for kind in KINDS if (question := _MAKERS[kind](scene, dice)) is not None]
    return tuple(dice.shuffled(asked))


def scene_question(scene: Scene, draw: int = 0) -> Question:
    """One question, of a kind that is drawn: kinds that take longer to learn come more often.

    Args:
        scene: what it is about.
        draw: gives another question about the same scene.

    >>> from mmjax.data.scenes import make_scene
    >>> scene_question(make_scene(9)).kind in KINDS
    True
    """
    dice = Dice(scene.seed, "question", scene.split, scene.number, draw)
    kinds = dice.shuffled([kind for kind in KINDS for _ in range(_SHARES[kind])])
    # Whether something is there can be asked about any scene.
    return next(question for kind in kinds if (question := _MAKERS[kind](scene, dice)) is not None)


def thing_question(scene: Scene, draw: int = 0) -> Question:
    """What a thing is like in all that is known of it; it is asked for by its name or by its colour.

    Every word of the answer has to be looked up at the same thing, so that to find things by what they are is
    learned from many words at once.

    Args:
        scene: what it is about.
        draw: gives another question about the same scene.

    >>> from mmjax.data.scenes import make_scene
    >>> question = thing_question(make_scene(9))
    >>> question.text, question.answer
    ('describe the purple circle', 'a large purple circle at the top')
    """
    dice = Dice(scene.seed, "thing", scene.split, scene.number, draw)
    colors = [thing.color for thing in scene.things]
    alone = [(thing, thing.color) for thing in scene.things if colors.count(thing.color) == 1]
    named = _named(scene.things, scene, dice)
    found = dice.pick(alone) if alone and (named is None or dice.chance(0.4)) else named
    if found is None:
        return scene_question(scene, draw)
    thing, words = found
    return _question("thing", dice, words, describe(thing), thing)


def presence_probes(scene: Scene) -> tuple[Question, Question]:
    """Two questions whether a shape in a colour is there: one that is, and one that is not.

    The absent one has, where that is possible, a colour and a shape that are both in the picture, each on
    another thing: who says what is likely, and not what is there, says yes.

    Args:
        scene: what they are about.

    >>> from mmjax.data.scenes import make_scene
    >>> [question.answer for question in presence_probes(make_scene(9))]
    ['yes', 'no']
    """
    dice = Dice(scene.seed, "probes", scene.split, scene.number)
    names = sorted({thing.name for thing in scene.shapes})
    thing = dice.pick(scene.shapes)
    there = describe(thing, size=False, place=False)
    absent = with_article(_absent(scene, names, dice))
    return (
        _question("presence", dice, there, "yes", thing),
        _question("presence", dice, absent, "no"),
    )


def blind_guesses(training: Iterable[Question]) -> Callable[[Question], str]:
    """The best guess without a picture: what was most often right for the same words, else for the kind.

    Args:
        training: questions with answers.

    Returns:
        A function from a question to the guess; "" for a kind that was never met.

    >>> asked = Question(kind="size", text="is it small?", answer="small", boxes=(), held_out=False)
    >>> blind_guesses([asked])(asked)
    'small'
    """
    seen: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in training:
        seen[question.kind, question.text][question.answer] += 1
        seen[question.kind, ""][question.answer] += 1

    def guess(question: Question) -> str:
        counts = seen.get((question.kind, question.text)) or seen.get((question.kind, "")) or Counter()
        # Ties go by name, so that the same training questions give the same guesses.
        return max(sorted(counts), key=counts.__getitem__, default="")

    return guess


def _question(kind: str, dice: Dice, about: str, answer: str, *things: Thing) -> Question:
    return Question(
        kind=kind,
        text=dice.pick(_PHRASES[kind]).format(about),
        answer=answer,
        boxes=tuple(thing.box for thing in things),
        held_out=any(thing.held_out for thing in things),
    )


def _color(scene: Scene, dice: Dice) -> Question | None:
    """Of something that can be named without its colour."""
    shapes = [thing.name for thing in scene.shapes]
    options = [thing for thing in scene.things if thing.sort != "shape" or shapes.count(thing.name) == 1]
    if not options:
        return None
    thing = dice.pick(options)
    return _question("color", dice, f"the {_noun(thing)}", thing.color, thing)


def _shape(scene: Scene, dice: Dice) -> Question | None:
    """Of the only thing in its colour."""
    colors = [thing.color for thing in scene.things]
    options = [thing for thing in scene.shapes if colors.count(thing.color) == 1]
    if not options:
        return None
    thing = dice.pick(options)
    return _question("shape", dice, thing.color, thing.name, thing)


def _size(scene: Scene, dice: Dice) -> Question | None:
    found = _named(scene.shapes, scene, dice)
    return found and _question("size", dice, found[1], str(found[0].size), found[0])


def _place(scene: Scene, dice: Dice) -> Question | None:
    """Of what has one place: a word has two cells."""
    found = _named(tuple(thing for thing in scene.things if thing.columns == 1), scene, dice)
    return found and _question("place", dice, found[1], at_place(found[0].place), found[0])


def _count(scene: Scene, dice: Dice) -> Question | None:
    things = [thing for thing in scene.shapes if thing.name == scene.counted]
    if not dice.chance(_ASK_COUNT[len(things)]):
        return None
    return _question("count", dice, plural(scene.counted), NUMBER_WORDS[len(things)], *things)


def _relation(scene: Scene, dice: Dice) -> Question | None:
    """Of two shapes to each other, across or up and down.

    A shape at an edge tells the answer alone. Of pairs with one in the middle, that one comes last three
    times in four: who has learned to look at the last has to look at the first as well.
    """
    pair = side_by_side(scene, dice)
    if pair is None:
        return None
    one, other, direction = pair
    answer = direction.removesuffix(" of")
    upright = answer in ("above", "below")
    if (one.row if upright else one.column) == GRID // 2 and dice.chance(0.5):
        one, other, answer = other, one, _OPPOSITES[answer]
    choice = "above or below" if upright else "left or right of"
    return _question("relation", dice, f"the {one.name} {choice} the {other.name}", answer, one, other)


def _word(scene: Scene, dice: Dice) -> Question | None:
    return _written(scene, "word", dice)


def _digit(scene: Scene, dice: Dice) -> Question | None:
    return _written(scene, "digit", dice)


def _written(scene: Scene, sort: Sort, dice: Dice) -> Question | None:
    thing = scene.only(sort)
    return None if thing is None else _question(sort, dice, "", thing.name, thing)


def _presence(scene: Scene, dice: Dice) -> Question:
    """To be answered with yes or no as a coin falls, whatever is asked for: another question, another coin.

    Were it the scene's own, a model could learn the pictures' answers in place of looking.
    """
    yes = dice.chance(0.5)
    answer = "yes" if yes else "no"
    form = dice.below(8)
    sorts: tuple[Sort, ...] = ("digit", "word")
    if form < len(sorts):
        thing = scene.only(sorts[form])
        # Half of the scenes have one, so that leaving the others out keeps yes and no equally frequent.
        if (thing is not None) == yes:
            return _question("presence", dice, f"a {sorts[form]}", answer, *([thing] if thing else []))
    names = sorted({thing.name for thing in scene.shapes})
    if form == len(sorts):
        name = dice.pick(names if yes else [name for name in SHAPES if name not in names])
        alike = [thing for thing in scene.shapes if thing.name == name]
        return _question("presence", dice, with_article(name), answer, *alike)
    if yes:
        thing = dice.pick(scene.shapes)
        return _question("presence", dice, describe(thing, size=False, place=False), answer, thing)
    return _question("presence", dice, with_article(_absent(scene, names, dice)), answer)


def _absent(scene: Scene, names: list[str], dice: Dice) -> str:
    """A colour and a shape that are not met in the scene; training does not mention held-out ones."""
    there = {(thing.color, thing.name) for thing in scene.shapes}
    colors = sorted({thing.color for thing in scene.things})
    # Both are there apart from each other, or one of them is, or perhaps none.
    both = (colors, names)
    tries = (both, both, (COLOR_NAMES, names), (colors, SHAPES))[dice.below(4) :]
    for some_colors, some_names in (*tries, (COLOR_NAMES, SHAPES)):
        absent = [
            (color, name)
            for color in some_colors
            for name in some_names
            if (color, name) not in there and (scene.split == "test" or not is_held_out("shape", name, color))
        ]
        if absent:
            break
    return " ".join(dice.pick(absent))


def _named(things: tuple[Thing, ...], scene: Scene, dice: Dice) -> tuple[Thing, str] | None:
    """One of some things, and words that mean no other thing in the scene."""
    shapes = [thing.name for thing in scene.shapes]
    tinted = [(thing.name, thing.color) for thing in scene.shapes]
    options = [
        thing for thing in things if thing.sort != "shape" or tinted.count((thing.name, thing.color)) == 1
    ]
    if not options:
        return None
    thing = dice.pick(options)
    if thing.sort == "shape" and (shapes.count(thing.name) > 1 or dice.chance(0.3)):
        return thing, f"the {thing.color} {thing.name}"
    return thing, f"the {_noun(thing)}"


def _noun(thing: Thing) -> str:
    return thing.name if thing.sort == "shape" else thing.sort


_MAKERS: dict[str, Callable[[Scene, Dice], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "place": _place,
    "count": _count,
    "relation": _relation,
    "word": _word,
    "digit": _digit,
    "presence": _presence,
}
