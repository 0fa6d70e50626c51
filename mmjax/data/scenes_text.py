"""Captions of scenes: in full, and such as leave most of it out."""

from __future__ import annotations

from mmjax.data.scenes import Dice, Scene, Thing

NUMBER_WORDS = ("zero", "one", "two", "three", "four")
# How often a caption of one thing says what it is, and its colour, size and place: what is written always,
# and little besides, so that the picture cannot be found without reading it.
_SHAPE_SHARES = {"name": 0.8, "color": 0.4, "size": 0.2, "place": 0.6}
_WRITTEN_SHARES = {"name": 1.0, "color": 0.3, "size": 0.0, "place": 0.4}
# How often such a caption is about a thing of each sort: the hardest to read the most.
_SORT_WEIGHTS = {"shape": 3, "digit": 5, "word": 4}


def describe(
    thing: Thing, *, name: bool = True, color: bool = True, size: bool = True, place: bool = True
) -> str:
    """A thing in words.

    Args:
        thing: what is described.
        name: whether it is said what it is; else it is "something".
        color, size, place: whether they are said.

    >>> from mmjax.data.scenes import make_scene
    >>> describe(make_scene(6).things[0])
    'a large green square at the bottom'
    """
    tint = f"{thing.color} " if color else ""
    if not name:
        text = f"something {tint}".rstrip()
    elif thing.sort == "word":
        text = f"the {tint}word {thing.name}"
    elif thing.sort == "digit":
        text = with_article(f"{tint}digit {thing.name}")
    else:
        text = with_article(f"{thing.size} {tint}{thing.name}" if size else f"{tint}{thing.name}")
    return f"{text} {at_place(thing.place)}" if place else text


def scene_caption(scene: Scene) -> str:
    """Everything in a scene, in reading order.

    >>> from mmjax.data.scenes import make_scene
    >>> scene_caption(make_scene(9))
    'a large purple circle at the top, a blue digit nine at the top right.'
    """
    return ", ".join(describe(thing) for thing in scene.things) + "."


def scene_captions(scene: Scene, partial: int = 6) -> tuple[str, ...]:
    """The full caption, and several that leave most things and properties out, as people do.

    A short caption says little, but all of it has to be found in the picture. Who learns which pictures and
    captions belong together from full ones alone gets by with the few properties that are the easiest to see.

    Args:
        scene: what they describe.
        partial: how many captions of one thing there are.
    """
    dice = Dice(scene.seed, "captions", scene.split, scene.number)
    texts = [scene_caption(scene)]
    sorts = sorted({thing.sort for thing in scene.things})
    for _ in range(partial):
        sort = dice.pick([sort for sort in sorts for _ in range(_SORT_WEIGHTS[sort])])
        thing = dice.pick([thing for thing in scene.things if thing.sort == sort])
        shares = _SHAPE_SHARES if sort == "shape" else _WRITTEN_SHARES
        said = {part: dice.chance(share) for part, share in shares.items()}
        said["name"] |= not (said["color"] or said["place"])
        texts.append(describe(thing, **said))
    pair = side_by_side(scene, dice)
    if pair is not None:
        one, other, direction = pair
        texts.append(f"{describe(one, place=False)} {direction} {describe(other, place=False)}")
    number = sum(thing.name == scene.counted for thing in scene.shapes)
    if number > 1:
        texts.append(f"{NUMBER_WORDS[number]} {plural(scene.counted)}")
    return tuple(texts)


def side_by_side(scene: Scene, dice: Dice) -> tuple[Thing, Thing, str] | None:
    """Two shapes that no other shape is like, and where the first is: above, below, left of, right of.

    Returns:
        None if there are no two such shapes.
    """
    names = [thing.name for thing in scene.shapes]
    alone = dice.shuffled([thing for thing in scene.shapes if names.count(thing.name) == 1])
    if len(alone) < 2:
        return None
    one, other = alone[:2]
    directions = []
    if one.row != other.row:
        directions.append("above" if one.row < other.row else "below")
    if one.column != other.column:
        directions.append("left of" if one.column < other.column else "right of")
    return one, other, dice.pick(directions)


def with_article(text: str) -> str:
    """A noun with "a" or "an".

    >>> with_article("orange ring")
    'an orange ring'
    """
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def plural(name: str) -> str:
    """Several of a shape.

    >>> plural("cross"), plural("ring")
    ('crosses', 'rings')
    """
    return f"{name}es" if name.endswith("s") else f"{name}s"


def at_place(place: str) -> str:
    """Where something is, as one says it.

    >>> at_place("center"), at_place("left"), at_place("top left")
    ('in the center', 'on the left', 'at the top left')
    """
    word = {"center": "in", "left": "on", "right": "on"}.get(place, "at")
    return f"{word} the {place}"
