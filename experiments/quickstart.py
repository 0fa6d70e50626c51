"""A LLaVA from nothing: eyes, a brain, a bridge between them, and questions about pictures.

    mmjax train experiments/quickstart.py

Nothing is downloaded. The pictures are drawn: shapes, handwritten digits and words, in colours, sizes and
places, of which everything is known. Four things are trained one after another: eyes (a CLIP, from pictures
and captions), a brain (a decoder, from scenes told in words, with questions and answers), the bridge alone,
and then bridge and brain, first on what is in the pictures and then on questions about them. Pairs of a
colour and a name that no training scene has are in every test scene. `--train.seed=1` is the seed of all;
fields of the others are set by name: `--before.eyes.train.steps=300`, `--stages.description.steps=500`.

Source: Liu et al. 2023, "Visual Instruction Tuning", section 4.2 (the two stages).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.data import Question, SceneDialogueData, ScenesData, SceneTextData
from mmjax.language import DecoderConfig
from mmjax.models import CausalLM, CLIPConfig, CLIPModel
from mmjax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mmjax.nn import Execution
from mmjax.training import (
    FROZEN,
    Contrastive,
    Cosine,
    Experiment,
    FromConfig,
    KeepFeatures,
    LlavaFromParts,
    NextToken,
    Outcome,
    Stage,
    Train,
)

SCENES, IMAGE_SIZE, PATCH = 12_000, 48, 16
WORDS, CAPTION_VOCABULARY, VOCABULARY = 20, 640, 512
FEATURES = "{workdir}/features/{name}"
# With 300 test scenes chance alone moved the figures of single kinds by some points.
TEST_SCENES, GUESSED_FROM = 1_500, 4_000


def experiment() -> Experiment:
    """The experiment that `mmjax train` runs."""
    rate = Cosine(peak=3e-3, warmup=0.05)
    seeing = (("vision_tower/.*", FROZEN), (".*", rate))
    return Experiment(
        name="quickstart",
        before=(eyes(), brain()),
        model=LlavaFromParts(  # type: ignore[arg-type]
            eyes="{workdir}/models/{name}-eyes",
            brain="{workdir}/models/{name}-brain",
            # The patches themselves say best where they are; what is in them, the last layers.
            feature_layer=(0, -2),
            template=None,
            pad=False,
            execution=Execution(dtype="bfloat16"),
        ),
        # A row has room for nine questions in threes about a picture, and for six that have one each.
        data=dialogues("all", draws=4, turns=3),
        prepare=KeepFeatures(folder=FEATURES, data=dialogues("caption"), batch_size=256),
        stages=(
            Stage(
                name="alignment",
                loss=NextToken(),
                data=dialogues("caption"),
                rules=(("multi_modal_projector/.*", rate), (".*", FROZEN)),
                steps=100,
            ),
            # Whoever has learned to say what is where learns far sooner to answer questions about it.
            Stage(name="description", loss=NextToken(), data=dialogues("caption"), rules=seeing, steps=300),
            Stage(name="things", loss=NextToken(), data=dialogues("thing", draws=2), rules=seeing, steps=800),
            Stage(name="instruction", loss=NextToken(), rules=seeing),
        ),
        # With little decay, pairs of a colour and a name that training never shows are said not to be there.
        train=training(steps=2800, weight_decay=0.3),
        evaluate=evaluate,
        preview=draw_preview,
        smoke=(
            # Nearly all of its time is compiling, and that of programs which hardly run.
            "train.compiler_options=xla_backend_optimization_level=0",
            "train.steps=4",
            "stages.alignment.steps=2",
            "stages.description.steps=2",
            "stages.things.steps=2",
            "before.eyes.train.steps=3",
            "before.brain.train.steps=3",
            "before.brain.data.num_train=200",
            "data.num_train=200",
            "data.num_test=20",
            "stages.alignment.data.num_train=200",
            "stages.description.data.num_train=200",
            "stages.things.data.num_train=200",
            "prepare.data.num_train=200",
        ),
    )


def eyes() -> Experiment:
    """A CLIP whose patches are the cells of a scene."""
    shape: dict[str, Any] = {"hidden_act": "gelu", "num_hidden_layers": 3}
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        hidden_size=192,
        intermediate_size=768,
        num_attention_heads=6,
        **shape,
    )
    text = CLIPTextConfig(
        vocab_size=CAPTION_VOCABULARY,
        eos_token_id=CAPTION_VOCABULARY - 1,
        max_position_embeddings=WORDS,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=4,
        **shape | {"num_hidden_layers": 2},
    )
    return Experiment(
        name="eyes",
        model=FromConfig(
            config=CLIPConfig(vision_config=vision, text_config=text, projection_dim=192),
            model=CLIPModel,
            execution=Execution(dtype="bfloat16"),
            processor=make_eyes_processor,
        ),
        data=ScenesData(num_train=100_000, image_size=IMAGE_SIZE),
        stages=(
            Stage(name="contrastive", loss=Contrastive(), rules=((".*", Cosine(peak=3e-3, warmup=0.05)),)),
        ),
        train=training(steps=1200, batch_size=128, weight_decay=0.1),
    )


def brain() -> Experiment:
    """A decoder that learns to answer from scenes told in words."""
    config = DecoderConfig(
        model_type="qwen3",
        # Queries and keys of one length: attention gets sharp soon, as it has to be to say where a thing is.
        qk_norm=True,
        # Qwen3's own: what things are like is compared over tens of tokens, which faster rotations blur.
        rope_theta=1e6,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        # With two it was left to chance when a thing was found by its name, and its place with it.
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Experiment(
        name="brain",
        model=FromConfig(
            config=config,
            model=CausalLM,
            execution=Execution(dtype="bfloat16"),
            processor=make_brain_processor,
        ),
        data=SceneTextData(about="question", num_train=SCENES, sequence_length=128),
        stages=(Stage(name="text", loss=NextToken(), rules=((".*", Cosine(peak=3e-3, warmup=0.05)),)),),
        train=training(steps=400),
    )


def training(steps: int, batch_size: int = 16, weight_decay: float = 0.0) -> Train:
    """What the runs have in common."""
    return Train(
        steps=steps,
        batch_size=batch_size,
        optimizer="muon",
        weight_decay=weight_decay,
        log_every=100,
        checkpoint_every=500,
    )


def dialogues(about: Any, draws: int = 1, turns: int = 1) -> SceneDialogueData:
    """Conversations about pictures, whose features were kept."""
    return SceneDialogueData(
        about=about,
        draws=draws,
        turns=turns,
        num_train=SCENES,
        num_test=TEST_SCENES,
        features=FEATURES,
        sequence_length=128,
        # No row has more; with the same room in all, three stages are one compiled program.
        tiles_per_row=8,
    )


def make_eyes_processor(data: ScenesData) -> Any:
    """A tokenizer learned from captions, and pictures as they are."""
    from mmjax.data import make_scene, scene_captions
    from mmjax.language.tokenizer import train_clip_tokenizer
    from mmjax.models.processor import Processor
    from mmjax.vision.processing import ImageProcessor

    captions = [text for number in range(2_000) for text in scene_captions(make_scene(number))]
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # Small values leave the embeddings of positions a share in the patches': else the eyes forget places.
    return Processor(
        image_processor=ImageProcessor(size=side, do_center_crop=False, image_mean=0.1, image_std=4.0),
        tokenizer=train_clip_tokenizer(captions, vocab_size=CAPTION_VOCABULARY, max_length=WORDS),
    )


def make_brain_processor(data: SceneTextData) -> Any:
    """A tokenizer in which every word of the scenes is one token."""
    from mmjax.data import scene_tokenizer
    from mmjax.models.processor import Processor

    return Processor(tokenizer=scene_tokenizer())


def evaluate(outcome: Outcome) -> Mapping[str, Any]:
    """Accuracy on test scenes by kind of question, beside who sees no picture and who only guesses."""
    from mmjax.data import blind_guesses, make_scene, presence_probes, scene_questions
    from mmjax.evaluation import accuracy_by_kind

    training = [q for number in range(GUESSED_FROM) for q in scene_questions(make_scene(number))]
    pairs, answers = answered(outcome, scene_questions)
    asked = [question for _, question in pairs]
    kinds, truths = [question.kind for question in asked], [question.answer for question in asked]
    guess = blind_guesses(training)
    options = {kind: len({q.answer for q in training if q.kind == kind}) for kind in set(kinds)}
    probes, said = answered(outcome, presence_probes)
    opened, described = answered(outcome, open_questions, new=48)
    whole = [answer == question.answer for (_, question), answer in zip(opened, described, strict=True)]
    right = np.array([answer == question.answer for (_, question), answer in zip(probes, said, strict=True)])
    by_kind = accuracy_by_kind(kinds, answers, truths)
    blind = accuracy_by_kind(kinds, map(guess, asked), truths)
    unseen = [a == q.answer for q, a in zip(asked, answers, strict=True) if q.held_out]
    return {
        "accuracy": by_kind["all"],
        "blind": blind["all"],
        "chance": float(np.mean([1 / options[kind] for kind in kinds])),
        "probes": float(right.mean()),
        "said_yes_to_absent": float(np.mean([answer == "yes" for answer in said[1::2]])),
        "accuracy_on_unseen_pairs": float(np.mean(unseen)),
        "captions_right": float(np.mean(whole[::2])),
        "things_right": float(np.mean(whole[1::2])),
        "questions": len(asked),
        "accuracy_by_kind": by_kind,
        "blind_by_kind": blind,
        "dialogue": dialogue(opened + pairs, described + answers),
    }


def answered(outcome: Outcome, ask: Any, new: int = 4) -> tuple[list[tuple[Any, Question]], list[str]]:
    """Test scenes with their questions, and what the model says in at most `new` tokens."""
    from mmjax.data import make_scene
    from mmjax.evaluation import answer_questions

    numbers = range(outcome.data.num_test)
    scenes = [make_scene(number, "test", image_size=IMAGE_SIZE) for number in numbers]
    pairs = [(scene, question) for scene in scenes for question in ask(scene)]
    images, texts = [scene.draw() for scene, _ in pairs], [question.text for _, question in pairs]
    parts = (outcome.model, outcome.params, outcome.processor)
    return pairs, answer_questions(*parts, images, texts, max_new_tokens=new)


def open_questions(scene: Any) -> tuple[Question, Question]:
    """What is in the picture, and what one thing in it is like."""
    from mmjax.data import scene_caption, thing_question
    from mmjax.data.scenes_data import ASK_CAPTION

    boxes = tuple(thing.box for thing in scene.things)
    whole = Question(
        kind="caption", text=ASK_CAPTION, answer=scene_caption(scene), boxes=boxes, held_out=True
    )
    return whole, thing_question(scene)


def dialogue(pairs: list[tuple[Any, Question]], answers: list[str]) -> str:
    """What was asked about the first test scene and answered, as lines."""
    lines = []
    for (scene, question), answer in zip(pairs, answers, strict=True):
        if scene.number == 0:
            wrong = "" if answer == question.answer else f"   (right: {question.answer})"
            lines.append(f"{question.text}  {answer}{wrong}")
    return "\n".join(lines)


def draw_preview(outcome: Outcome, path: Path) -> None:
    """Test pictures with questions and where the answer looked, accuracy by kind, the loss of each stage.

    Beside it scene.png, the picture of the dialogue.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained", facecolor="white")
    figure.suptitle(
        f"{outcome.metrics['questions']:,} questions about unseen scenes: {outcome.metrics['accuracy']:.1%} "
        f"right (without the picture {outcome.metrics['blind']:.1%})",
        fontsize=15,
        fontweight="bold",
    )
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    _draw_scenes(halves[0], outcome)
    bars, *curves = halves[1].subplots(3, 1, height_ratios=(1.4, 1, 1))
    _draw_kinds(bars, outcome)
    earlier = [outcome.folder.parent / f"{outcome.name}-{name}" for name in ("eyes", "brain")]
    _draw_losses(curves, [*earlier, outcome.folder])
    figure.savefig(path)
    from mmjax.data import make_scene

    make_scene(0, "test", image_size=IMAGE_SIZE).draw().save(path.with_name("scene.png"))


def _draw_scenes(figure: Any, outcome: Outcome) -> None:
    """A question each about nine scenes; lighter cells are where the answer looked."""
    from mmjax.data import make_scene, scene_questions
    from mmjax.evaluation import answer_questions, attention_to_images

    parts = (outcome.model, outcome.params, outcome.processor)
    scenes = [make_scene(number, "test", image_size=IMAGE_SIZE) for number in range(9)]
    asked = [scene_questions(scene)[0] for scene in scenes]
    images, texts = [scene.draw() for scene in scenes], [question.text for question in asked]
    answers = answer_questions(*parts, images, texts, max_new_tokens=4)
    looked = attention_to_images(*parts, images, texts)
    cells = IMAGE_SIZE // PATCH
    shown = zip(figure.subplots(3, 3).flat, images, asked, answers, looked, strict=True)
    for axis, image, question, answer, shares in shown:
        axis.imshow(np.asarray(image))
        shade = np.kron((shares / shares.max()).reshape(cells, cells), np.ones((PATCH, PATCH)))
        axis.imshow(np.ones_like(shade), cmap="gray", vmin=0, vmax=1, alpha=0.45 * shade)
        axis.set_xticks([])
        axis.set_yticks([])
        good = answer == question.answer
        axis.set_title(question.text, fontsize=8)
        said = f"says: {answer}\ntruth: {question.answer}"
        axis.set_xlabel(said, fontsize=9, color="#2a7f4f" if good else "#c0392b")


def _draw_kinds(axis: Any, outcome: Outcome) -> None:
    right, blind = outcome.metrics["accuracy_by_kind"], outcome.metrics["blind_by_kind"]
    kinds = [kind for kind in right if kind != "all"]
    axis.barh(kinds, [right[kind] for kind in kinds], color="#1f4e79", label="with the picture")
    axis.barh(kinds, [blind[kind] for kind in kinds], height=0.4, color="#e8a33d", label="best blind guess")
    axis.set_xlim(0, 1)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axis.set_title("right answers by kind of question", fontsize=10)


def _draw_losses(axes: list[Any], folders: list[Path]) -> None:
    """The contrastive loss above, the language losses below."""
    from mmjax.training import read_metrics

    for folder in folders:
        history = read_metrics(folder / "metrics.csv")
        for stage in dict.fromkeys(history["stage"]):
            here = history["stage"] == stage
            axis = axes[0] if stage == "contrastive" else axes[1]
            loss = history["loss"][here]
            width = max(1, len(loss) // 40)
            axis.plot(np.convolve(loss, np.ones(width) / width, mode="valid"), label=stage)
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.grid(color="#e5e5e5")
    axes[0].set_title("loss of each stage", fontsize=10)
    axes[1].set_yscale("log")
    axes[-1].set_xlabel("step of the stage")
