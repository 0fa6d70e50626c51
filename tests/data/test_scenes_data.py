"""Conversations and data made of scenes."""

import collections
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from mmjax.data import (
    SceneDialogueData,
    ScenesData,
    SceneTextData,
    make_scene,
    scene_caption,
    scene_captions,
    scene_conversation,
    scene_question,
    scene_questions,
    scene_tokenizer,
    thing_question,
    told_conversation,
)
from mmjax.data.instruction_rows import Instruction
from mmjax.data.instruction_source import KeptTokens
from mmjax.data.scenes import COLOR_NAMES
from mmjax.data.scenes_data import ASK_CAPTION
from mmjax.data.scenes_questions import KINDS
from mmjax.data.scenes_text import at_place, describe
from mmjax.errors import ConfigError
from tests.data.fakes import fake_processor
from tests.data.seeing import Seeing
from tests.data.test_scenes import TEST, TRAIN

FORMS = [("question", 0), ("question", 1), ("caption", 0), ("thing", 0)]


def turns_of(talk, first):
    """Questions and answers of a conversation whose first question is known."""
    questions = [first, *(m["content"] for m in talk[2::2])]
    return list(zip(questions, (m["content"] for m in talk[1::2]), strict=True))


def test_conversations_have_the_picture_or_words_in_its_place():
    scene = TRAIN[3]
    pictured, told = scene_conversation(scene), told_conversation(scene)
    for talk in (pictured, told):
        assert [m["role"] for m in talk] == ["user", "assistant"] * (len(talk) // 2)
    image, text = pictured[0]["content"]
    assert image == {"type": "image"}
    things, _, first = told[0]["content"].partition(". ")
    assert sorted(things.split(", ")) == sorted(scene_caption(scene)[:-1].split(", "))
    asked = {q: a for q, a in turns_of(pictured, text["text"])} | {ASK_CAPTION: scene_caption(scene)}
    some = turns_of(told, first)
    assert 1 <= len(some) <= 4 and all(asked[question] == answer for question, answer in some)
    assert scene_conversation(scene, "caption")[1]["content"] == scene_caption(scene)
    with pytest.raises(ConfigError, match="about='boxes'"):
        scene_conversation(scene, "boxes")


def test_the_vocabulary_has_one_id_for_every_word_and_none_is_learned_from_the_user():
    tokenizer = scene_tokenizer(1000)
    vocabulary = set()
    for scene in [*TRAIN[:200], *TEST[:200]]:
        chat = scene_conversation(scene)
        batch = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
        ids, learned = batch["input_ids"][0], batch["assistant_masks"][0] != 0
        assert np.sum(ids == tokenizer.token_to_id("<image>")) == 1
        answers = [message["content"] for message in chat[1::2]]
        assert tokenizer.decode(ids[learned]) == "".join(f" {text}<|end|>" for text in answers)
        texts = [scene_caption(scene), *(question.text for question in scene_questions(scene))]
        vocabulary |= {word for text in texts for word in re.findall(r"\w+", text)}
    assert len(vocabulary) > 80
    places = {at_place(thing.place) for scene in TRAIN for thing in scene.things}
    assert {"at the top", "at the top left"} < places
    assert all(len(tokenizer([f" {text}"])["input_ids"][0]) == 1 for text in vocabulary | places)
    said = tokenizer("a red star at the top left")["input_ids"][0]
    assert tokenizer.decode(said) == "a red star at the top left"
    typed = [{"role": "user", "content": "what is an <image>?"}]
    assert tokenizer.token_to_id("<image>") not in tokenizer.apply_chat_template(typed)["input_ids"][0]


def test_data_for_a_clip_draws_captions_of_the_scene():
    data = ScenesData(num_train=40, num_test=5, max_length=16)
    assert (len(data.examples("train")), len(data.examples("test"))) == (40, 5)
    example = data.examples("test")[2]
    np.testing.assert_array_equal(example["image"], TEST[2].draw())
    assert example["texts"] == scene_captions(TEST[2]) and example["label"] is None
    built = [data.build(processor=fake_processor(), batch_size=8, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (next(iter(batches)) for batches in built)
    np.testing.assert_array_equal(first["pixel_values"], again["pixel_values"])
    np.testing.assert_array_equal(first["input_ids"], again["input_ids"])
    assert not np.array_equal(first["ids"], other["ids"])
    identities = {ScenesData(content_seed=seed).source().identity for seed in (0, 1)}
    assert len(identities) == 2


def test_text_data_packs_told_conversations_with_answers_to_learn():
    processor = SimpleNamespace(tokenizer=scene_tokenizer(300))
    data = SceneTextData(num_train=30, sequence_length=192)
    batches = data.build(processor=processor, batch_size=4, seed=0)
    batch = next(iter(batches))
    assert batch["input_ids"].shape == (4, 192)
    row = batch["input_ids"][0][batch["segment_ids"][0] == 1]
    learned = batch["labels"][0][batch["segment_ids"][0] == 1]
    text = processor.tokenizer.decode(row)
    talks = [
        processor.tokenizer.apply_chat_template(told_conversation(s), tokenize=False) for s in TRAIN[:30]
    ]
    talk = talks.index(text)
    answers = [message["content"] for message in told_conversation(TRAIN[talk])[1::2]]
    assert processor.tokenizer.decode(learned[learned >= 0]) == "".join(f" {a}<|end|>" for a in answers)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_scene(0, image_size=50), "image_size=50"),
        (lambda: make_scene(0, image_size=33), "image_size=33"),
        (lambda: make_scene(0, "validation"), "validation"),
        (lambda: ScenesData(image_size=31), "image_size=31"),
        (lambda: ScenesData(num_train=0), "num_train"),
        (lambda: SceneTextData(num_test=0), "num_test"),
        (lambda: SceneTextData(path="x.jsonl"), "reads no files"),
        (lambda: SceneDialogueData(path="x.json"), "reads no files"),
        (lambda: SceneDialogueData(draws=0), "draws"),
        (lambda: SceneDialogueData(turns=0), "turns"),
        (lambda: SceneDialogueData(about="captions"), "about='captions'"),
        (lambda: SceneTextData(about="caption"), "about='caption'"),
        (lambda: SceneTextData(draws=0), "draws"),
        (lambda: SceneDialogueData(image_size=50), "image_size=50"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("about", ["caption", "thing", "questions"])
def test_dialogues_bring_pictures_and_answers_to_learn(about):
    tokenizer = scene_tokenizer(300)
    data = SceneDialogueData(about=about, num_train=12, num_test=3, sequence_length=200)
    batches = data.build(processor=Seeing(tokenizer=tokenizer), batch_size=2, seed=0)
    batch = next(iter(batches))
    seen = 0
    for row in range(2):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            labels, index = batch["labels"][row][here], batch["image_index"][row][here]
            said = tokenizer.decode(labels[labels >= 0])
            scene = next(
                scene
                for scene in TRAIN[:12]
                if said == "".join(f" {m['content']}<|end|>" for m in scene_conversation(scene, about)[1::2])
            )
            first = index[index[:, 0] >= 0][0, 0]
            tile = batch["tiles"][row][first // 4]
            assert tile.mean() == pytest.approx(np.asarray(scene.draw()).mean() + 1, rel=1e-4)
            seen += 1
    assert seen >= 2


def test_questions_asked_alone_are_of_all_kinds_and_the_slow_ones_more_often():
    alone = [scene_question(scene, draw) for scene in TRAIN[:300] for draw in range(3)]
    kinds = collections.Counter(question.kind for question in alone)
    assert set(kinds) == set(KINDS)
    assert kinds["relation"] > 1.5 * kinds["digit"] and kinds["count"] > 1.5 * kinds["size"]
    every = {(q.kind, q.text, q.answer) for draw in range(400) for q in scene_questions(TRAIN[0], draw)}
    assert {(q.kind, q.text, q.answer) for q in alone[:3]} <= every
    rows = [json.loads(e.data) for e in SceneDialogueData(about="question", draws=3, num_train=2).entries()]
    expected = [scene_conversation(scene, "question", draw) for scene in TRAIN[:2] for draw in range(3)]
    assert [row["messages"] for row in rows] == expected and {len(talk) for talk in expected} == {2}


def test_conversations_ask_as_many_questions_as_they_are_told_to():
    data = SceneDialogueData(about="all", turns=3, draws=2, num_train=1)
    talks = [json.loads(entry.data)["messages"] for entry in data.entries()]
    assert [len(talk) for talk in talks] == [6, 6, 2, 2]
    said = [message["content"] for talk in talks[:2] for message in talk[1::2]]
    assert said == [scene_question(TRAIN[0], draw).answer for draw in range(6)]


def test_things_are_described_whole_and_cannot_be_mistaken():
    forms = set()
    for scene in [*TRAIN[:300], *TEST[:100]]:
        question = thing_question(scene, 1)
        if question.kind != "thing":
            continue
        words = set(re.findall(r"\w+", question.text)) - {"describe", "what", "about", "the"}
        meant = [
            thing
            for thing in scene.things
            if words <= {thing.color, thing.sort if thing.sort != "shape" else thing.name}
        ]
        assert len(meant) == 1 and question.answer == describe(meant[0]) and question.boxes == (meant[0].box,)
        forms.add((len(words), bool(words & set(COLOR_NAMES))))
    assert forms == {(1, False), (1, True), (2, True)}


def test_what_is_said_twice_is_laid_out_once():
    asked = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "here"}]
    talks = [Instruction(asked, ("a",)), Instruction(asked, ("b",)), Instruction(asked[:1], ())]
    calls = []

    def lay_out():
        calls.append(1)
        return [5, 6], [0, 1]

    kept, none = KeptTokens(), KeptTokens(room=1)
    for talk in talks:
        ids, learned = kept.of(talk, lay_out)
        assert ids.tolist() == [5, 6] and learned.tolist() == [False, True]
    assert len(calls) == 2
    for talk in talks:
        none.of(talk, lay_out)
    assert len(calls) == 5


def test_dialogues_ask_other_questions_with_every_draw():
    rows = [
        [json.loads(entry.data) for entry in SceneDialogueData(draws=draws, num_train=5).entries()]
        for draws in (1, 2)
    ]
    assert rows[1][::2] == rows[0] and len(rows[1]) == 10
    assert [row["image"] for row in rows[1][1::2]] == [row["image"] for row in rows[0]]
    assert all(
        again["messages"] != row["messages"] for again, row in zip(rows[1][1::2], rows[0], strict=True)
    )
    every = [json.loads(e.data) for e in SceneDialogueData(about="all", draws=2, num_train=2).entries()]
    told = [scene_conversation(TRAIN[n], about, draw) for n in (0, 1) for about, draw in FORMS]
    assert [row["messages"] for row in every] == told
    test = [json.loads(entry.data) for entry in SceneDialogueData(num_test=2).entries("test")]
    assert [row["messages"] for row in test] == [scene_conversation(scene) for scene in TEST[:2]]
