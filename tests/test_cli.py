"""The command line: what it prints, its exit codes, and one line for every failure."""

from __future__ import annotations

import csv
import gc
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import mmjax
from mmjax import cli
from mmjax.commands import COMMANDS
from mmjax.data import DigitsData
from mmjax.language.tokenizer import train_clip_tokenizer
from mmjax.models import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification
from mmjax.models.clip.config import CLIPTextConfig, CLIPVisionConfig
from mmjax.models.processor import Processor
from mmjax.nn import parameter_specs
from mmjax.vision.processing import ImageProcessor

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "deep_blue": (20, 30, 210)}


def image_processor():
    return ImageProcessor.from_dict(
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 8},
            "crop_size": {"height": 8, "width": 8},
        }
    )


def randomised(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: rng.normal(0.1, 0.3, spec.shape).astype(np.float32), parameter_specs(model)
    )


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    tokenizer = train_clip_tokenizer(["a photo of a red, green or blue cat"], vocab_size=530, max_length=12)
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **SIZES),
        text_config=CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=12,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES,
        ),
        projection_dim=6,
    )
    model = CLIPModel(config)
    folder = tmp_path_factory.mktemp("models") / "clip"
    mmjax.save(folder, model, randomised(model), Processor(image_processor(), tokenizer))
    return str(folder)


@pytest.fixture(scope="session")
def together(clip_folder):
    """The joint forward of image files and three texts, without the command line."""
    model, params, processor = mmjax.load(clip_folder)
    forward = jax.jit(lambda batch: model.apply({"params": params}, **batch))

    def call(images, texts):
        return forward(processor(images=images, text=texts, padding="max_length", truncation=True))

    return call


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory):
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))
    folder = tmp_path_factory.mktemp("models") / "vit"
    mmjax.save(folder, model, randomised(model), Processor(image_processor(), None))
    return str(folder)


@pytest.fixture(scope="session")
def bare_folder(clip_folder, tmp_path_factory):
    model, params, _ = mmjax.load(clip_folder)
    folder = tmp_path_factory.mktemp("models") / "bare"
    mmjax.save(folder, model, params)
    return str(folder)


def picture(colour, seed=0):
    noise = np.random.default_rng(seed).integers(-20, 20, (10, 12, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Class folders of three colours, a test and a train split of them, and a table of captions."""
    root = tmp_path_factory.mktemp("colours")
    rows = []
    for split, count in (("train", 4), ("test", 2)):
        for name, colour in COLOURS.items():
            folder = root / "splits" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(colour, seed=number + 10 * (split == "test")).save(folder / f"{number}.png")
                path = f"splits/{split}/{name}/{number}.png"
                rows += [(path, f"a {name} one, {split} {number}"), (path, f"{name} {split} {number}")]
    with open(root / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return root


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        small = ("zeroshot", "eval", "embed")
        if arguments and arguments[0] in small and not {"--help", "--batch-size"} & set(arguments):
            arguments += ("--batch-size", "2")  # one compiled shape for every test
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def fails(run):
    """Run a command line that has to fail with one line; the line."""

    def call(*arguments, code=2):
        found, out, err = run(*arguments)
        assert found == code, err
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err
        return err[len("error: ") : -1]

    return call


@pytest.fixture
def report(run):
    """Run a command line with --json: the parsed document."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert err == ""
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    return call


# --- the command itself -------------------------------------------------------------------------


def test_help_names_every_command(run):
    code, out, err = run("--help")
    assert code == 0 and err == ""
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run, name):
    code, out, err = run(name, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: mmjax {name}")


def test_version(run):
    assert run("--version") == (0, f"mmjax {mmjax.__version__}\n", "")


def python(code, *arguments, **options):
    return subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, **options)


def test_help_and_usage_errors_import_nothing_heavy():
    lines = (
        "['--help'], ['zeroshot', '--help'], ['eval'], ['embed', '--help'], ['info', '--help'], ['convert']"
    )
    done = python(
        "import sys; from mmjax.cli import main\n"
        f"for line in ({lines}): main(line)\n"
        "heavy = {'jax', 'numpy', 'flax', 'PIL', 'rich', 'sklearn', 'safetensors', 'tokenizers'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    assert done.returncode == 0, done.stderr


def test_the_exit_code_reaches_the_shell():
    done = subprocess.run([sys.executable, "-m", "mmjax.cli", "zeroshoot"], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no command 'zeroshoot': did you mean zeroshot? (see mmjax --help)\n"


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "mmjax.cli", "--version"], stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given: choose from train, eval"),
        (["frobnicate"], "no command 'frobnicate': choose from"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["zeroshot", "--model", "m", "--image", "a.png"], "required: --labels"),
        (["zeroshot", "--lab", "x"], "required: --model"),
        (["eval", "--model", "m", "--data", "digits"], "required: --task"),
        (["eval", "--model", "m", "--data", "digits", "--task", "vqa"], "invalid choice: 'vqa'"),
        (["info"], "required: DIR"),
        (["info", "a", "--depth", "0"], "'0' is not a whole number of at least 1"),
        (["convert", "a"], "required: DST"),
        (["convert", "a", "b", "--shard-size", "big"], "'big' is not a size such as 500MB"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["embed", "--model", "m", "--out", "x.npz", "--batch-size", "-1"], "'-1' is not a whole number"),
        (["eval", "--max-broken", "nan"], "not a number between 0 and 1"),
        (["eval", "--l2", "inf"], "not a finite number of at least 0"),
        (["info", "a", "b\n\x1b[31m"], r"unrecognized arguments: b\\n\\x1b\[31m"),
        (["train", "no-such-file.py"], "no-such-file.py: no such experiment file"),
    ],
)
def test_usage_errors(fails, arguments, message):
    assert re.search(message, fails(*arguments))


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("one\ntwo\x1b[0m"), 1, "unexpected ValueError: one two\\x1b[0m (run with --debug"),
        (FileNotFoundError(2, "No such file or directory", "a\nb"), 2, "a\\nb: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 1, "out of memory: try a smaller --batch-size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 1, "out of memory"),
    ],
)
def test_failures_are_one_line(fails, run, monkeypatch, raised, code, message):
    def boom(arguments, debug):
        raise raised

    monkeypatch.setattr(cli, "_dispatch", boom)
    assert fails("info", code=code).startswith(message)
    found, out, err = run("info", "--debug")
    assert (found, out) == (code, "") and err.startswith("Traceback") and "boom" in err


def test_an_interrupt_that_the_garbage_collector_swallows_comes_again(fails, monkeypatch):
    def collect(phase, details):
        if phase == "start":
            gc.callbacks.remove(collect)
            signal.raise_signal(signal.SIGINT)

    def work(arguments, debug):
        gc.callbacks.append(collect)
        gc.collect()
        threading.Event().wait(30)

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_for_an_import_to_end(fails, monkeypatch, tmp_path):
    (tmp_path / "slow_module_of_a_test.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\nDONE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def work(arguments, debug):
        assert importlib.import_module("slow_module_of_a_test").DONE
        threading.Event().wait(30)

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"


def test_an_interrupt_in_disguise_is_still_one(fails, monkeypatch):
    def work(arguments, debug):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("while initializing the extension") from None

    monkeypatch.setattr(cli, "_dispatch", work)
    assert fails("info", code=130) == "interrupted"


def test_lists_of_faults_keep_their_lines(run, monkeypatch):
    def boom(arguments, debug):
        raise mmjax.errors.CheckpointError("two faults:\n  a\n  b\x07")

    monkeypatch.setattr(cli, "_dispatch", boom)
    assert run("info") == (2, "", "error: two faults:\n  a\n  b\\x07\n")


# --- zeroshot -----------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    paths = [
        tmp_path / "a picture with quite a long name, so that a narrow terminal would cut it.png",
        tmp_path / "b.jpg",
    ]
    for path, colour in zip(paths, COLOURS.values(), strict=False):
        picture(colour).save(path)
    return [str(path) for path in paths]


LABELS = ["a cat", "a [bold]dog[/bold]", "something\x1b[31m else"]


def test_zeroshot_json_is_the_models_softmax(report, clip_folder, together, images):
    found = report("zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS)
    logits = np.asarray(together(images, [f"a photo of {label}" for label in LABELS]).logits_per_image)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = [[image["probabilities"][label] for label in LABELS] for image in found["images"]]
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    assert [image["image"] for image in found["images"]] == images
    assert [image["best"] for image in found["images"]] == [LABELS[i] for i in logits.argmax(axis=1)]
    assert found["templates"] == ["a photo of {}"]


def test_zeroshot_table_is_plain_when_piped(run, clip_folder, images, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    arguments = ["--template", "{}", "--template", "the {}", "--top", "2"]
    code, out, err = run(
        "zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS, *arguments
    )
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].split() == ["image", "label", "probability"]
    assert len(lines) == 1 + 2 * 2 and [image in out for image in images] == [True, True]
    assert "a [bold]dog[/bold]" in out or "something\\x1b[31m else" in out


def test_zeroshot_table_on_a_terminal(clip_folder, images, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["zeroshot", "--model", clip_folder, "--image", images[1], "--labels", *LABELS]) == 0
    assert "[bold]dog[/bold]" in shown.getvalue() and "\x1b[31m" not in shown.getvalue()


def test_zeroshot_in_half_precision(report, clip_folder, images):
    arguments = ["zeroshot", "--model", clip_folder, "--image", *images, "--labels", *LABELS]
    full, half = (
        [list(image["probabilities"].values()) for image in report(*arguments, *extra)["images"]]
        for extra in ([], ["--dtype", "bfloat16"])
    )
    assert full != half
    np.testing.assert_allclose(half, full, atol=0.1)


def test_zeroshot_bad_input(fails, clip_folder, vit_folder, bare_folder, images, tmp_path):
    def fault(model=clip_folder, image=images[0], labels=("a", "b"), extra=()):
        return fails("zeroshot", "--model", model, "--image", image, "--labels", *labels, *extra)

    (tmp_path / "broken.png").write_bytes(Path(images[0]).read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    assert fault(image=tmp_path / "none.png").endswith("none.png: no such file")
    assert "is a folder" in fault(image=tmp_path)
    assert "broken.png (truncated)" in fault(image=tmp_path / "broken.png")
    assert "text.png (not_an_image)" in fault(image=tmp_path / "text.png")
    assert "'a' is given twice" in fault(labels=("a", "a"))
    assert "empty" in fault(labels=("a", " "))
    assert "has no {}" in fault(extra=("--template", "a photo"))
    assert "takes no texts" in fault(model=vit_folder)
    assert "no preprocessor_config.json" in fault(model=bare_folder)
    assert "no such folder" in fault(model=f"{tmp_path}/nothing")
    assert "config.json: no such file" in fault(model=tmp_path)


# --- eval ---------------------------------------------------------------------------------------


def test_eval_zeroshot_on_digits(report, run, clip_folder):
    arguments = [
        "eval",
        "--model",
        clip_folder,
        "--task",
        "zeroshot",
        "--data",
        "digits",
        "--batch-size",
        "128",
    ]
    found = report(*arguments)
    confusion = np.array(found["confusion"])
    count = len(DigitsData().examples("test"))
    assert found["samples"] == confusion.sum() == count and found["left_out"] == {}
    assert found["classes"][3] == "three" and len(found["templates"]) == 5
    assert found["accuracy"]["top1"] == np.trace(confusion) / count <= found["accuracy"]["top5"]
    code, out, _ = run(*arguments, "--templates", "photo")
    assert code == 0 and "top-1 accuracy" in out and "class seven" in out


def test_eval_zeroshot_on_a_folder_and_on_a_table_agree(report, clip_folder, colours):
    def accuracy(*data):
        found = report(
            "eval", "--model", clip_folder, "--task", "zeroshot", "--template", "{}", "--data", *data
        )
        assert found["classes"] == sorted(name.replace("_", " ") for name in COLOURS)
        return found["samples"], found["accuracy"], found["confusion"]

    table = colours / "classes.tsv"
    rows = [
        f"{path.relative_to(colours)}\t{path.parent.name.replace('_', ' ')}"
        for path in sorted((colours / "splits" / "test").glob("*/*.png"))
    ]
    table.write_text("\n".join(["file\tkind", *rows]) + "\n")
    keys = ["--csv-img-key", "file", "--csv-caption-key", "kind"]
    assert accuracy(colours / "splits")[0] == 6
    assert accuracy(colours / "splits", "--split", "train")[0] == 12
    assert accuracy(colours / "splits") == accuracy(colours / "splits" / "test") == accuracy(table, *keys)


def test_eval_probe_learns_colours(report, fails, vit_folder, colours):
    def probe(*data):
        return report("eval", "--model", vit_folder, "--task", "probe", "--data", *data)

    found = probe(colours / "splits")
    assert (found["samples"], found["train_samples"], found["features"]) == (6, 12, 16)
    assert found["converged"] and found["train_accuracy"] == 1.0 and found["accuracy"]["top1"] == 1.0
    test, train = colours / "splits" / "test", colours / "splits" / "train"
    assert probe(test, "--train-data", train)["accuracy"] == found["accuracy"]
    assert probe(test, "--train-data", colours / "splits")["accuracy"] == found["accuracy"]
    assert "give --train-data" in fails("eval", "--model", vit_folder, "--task", "probe", "--data", test)


def test_eval_retrieval_groups_captions_by_image(report, run, clip_folder, colours):
    arguments = ["eval", "--model", clip_folder, "--task", "retrieval", "--data", colours / "pairs.csv"]
    found = report(*arguments, "--block-size", "7")
    assert (found["samples"], found["captions"], found["groups"]) == (18, 36, 18)
    assert found["image_to_text"] == report(*arguments)["image_to_text"]
    for direction in ("image_to_text", "text_to_image"):
        recall = [found[direction][f"R@{k}"] for k in (1, 5, 10)]
        assert recall == sorted(recall) and 0 <= recall[0] <= recall[2] <= 1
    code, out, _ = run(*arguments)
    assert code == 0 and "text_to_image R@10" in out


def test_eval_retrieval_counts_broken_samples_of_tars(report, fails, clip_folder, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number, colour in enumerate([*COLOURS.values()] * 2):
            data = io.BytesIO()
            picture(colour, number).save(data, "PNG")
            body = data.getvalue()[: 50 if number == 4 else None]
            for suffix, content in (("png", body), ("txt", f"picture {number}".encode())):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    arguments = [
        "eval",
        "--model",
        clip_folder,
        "--task",
        "retrieval",
        "--data",
        tmp_path / "{00000..00000}.tar",
    ]
    assert "1 of 5 samples" in fails(*arguments) and "00004 (truncated)" in fails(*arguments)
    found = report(*arguments, "--max-broken", "0.2")
    assert (found["samples"], found["left_out"], found["captions"]) == (5, {"truncated": 1}, 5)


def test_eval_retrieval_of_digits_takes_equal_captions_together(report, clip_folder):
    found = report(
        "eval", "--model", clip_folder, "--task", "retrieval", "--data", "digits", "--batch-size", "128"
    )
    assert (found["captions"], found["groups"]) == (50, 10)


def test_eval_bad_input(fails, clip_folder, vit_folder, colours, tmp_path):
    def fault(task, data, *extra, model=clip_folder):
        return fails("eval", "--model", model, "--task", task, "--data", data, *extra)

    assert "no such data" in fault("zeroshot", tmp_path / "nothing")
    assert "no class folders" in fault("zeroshot", tmp_path)
    assert "no column 'caption'" in fault("retrieval", colours / "pairs.csv", "--csv-caption-key", "caption")
    assert "no.csv" in fault("retrieval", tmp_path / "no.csv")
    assert "has no splits" in fault("retrieval", colours / "pairs.csv", "--split", "train")
    assert "to choose the split 'train'" in fault("probe", colours / "splits" / "test", "--split", "train")
    assert "no captions" in fault("retrieval", colours / "splits" / "test")
    assert "its class" in fault("zeroshot", colours / "pairs.csv")
    assert "--template or --templates" in fault(
        "zeroshot", "digits", "--template", "{}", "--templates", "photo"
    )
    assert "takes no texts" in fault("retrieval", "digits", model=vit_folder)
    assert "give --train-data" in fault("probe", "digits", "--split", "train")


# --- embed --------------------------------------------------------------------------------------


TEXTS = ["a red cat", "b", "c d"]


def test_embed_images_and_texts(run, report, clip_folder, together, images, tmp_path):
    out = tmp_path / "embeds.npz"
    arguments = ["embed", "--model", clip_folder, "--image", *images, "--text", *TEXTS, "--out", out]
    found = report(*arguments)
    assert found["arrays"] == {"image_embeds": [2, 6], "text_embeds": [3, 6]}
    with np.load(out) as arrays:
        assert arrays["image_names"].tolist() == images and arrays["texts"].tolist() == TEXTS
        wanted = together(images, TEXTS)
        np.testing.assert_allclose(arrays["image_embeds"], wanted.image_embeds, atol=1e-6)
        np.testing.assert_allclose(arrays["text_embeds"], wanted.text_embeds, atol=1e-6)
    before = out.read_bytes()
    code, printed, err = run(*arguments)
    assert (code, printed) == (2, "") and "overwrite it with --force" in err
    assert out.read_bytes() == before
    assert run(*arguments, "--force", "--raw")[0] == 0
    assert out.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(Path(i).name for i in images), out.name]
    )


def test_embed_one_kind_to_npy(report, clip_folder, tmp_path):
    lines, out = tmp_path / "lines.txt", tmp_path / "texts.npy"
    lines.write_text("one\n\ntwo\nthree\n", encoding="utf-8")
    report("embed", "--model", clip_folder, "--text-file", lines, "--out", out, "--batch-size", "2")
    assert np.load(out).shape == (3, 6)
    assert json.loads((tmp_path / "texts.npy.names.json").read_text()) == ["one", "two", "three"]


def test_embed_a_dataset_with_labels_and_captions(report, vit_folder, clip_folder, colours, tmp_path):
    report("embed", "--model", vit_folder, "--data", colours / "splits", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["image_embeds"].shape == (6, 16)
        np.testing.assert_array_equal(arrays["labels"], [0, 0, 1, 1, 2, 2])
        assert arrays["image_names"][0] == "deep_blue/0.png"
    table = ["--data", colours / "pairs.csv", "--captions", "--out", tmp_path / "b.npz"]
    report("embed", "--model", clip_folder, *table)
    with np.load(tmp_path / "b.npz") as arrays:
        assert arrays["image_embeds"].shape == (18, 6) and arrays["text_embeds"].shape == (36, 6)


def test_embed_leaves_nothing_behind_when_writing_fails(fails, clip_folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    arguments = ["embed", "--model", clip_folder, "--text", "a", "--out", tmp_path / "a.npz"]
    assert fails(*arguments) == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_embed_bad_input(fails, clip_folder, vit_folder, images, tmp_path):
    def fault(*extra, out="x.npz", model=clip_folder):
        return fails("embed", "--model", model, "--out", tmp_path / out, *extra)

    assert "nothing to embed" in fault()
    assert "has to end in .npz or .npy" in fault("--text", "a", out="x.txt")
    assert "one kind" in fault("--text", "a", "--image", images[0], out="x.npy")
    assert "not both" in fault("--image", images[0], "--data", "digits")
    assert "--captions needs --data" in fault("--captions")
    assert "no such folder" in fault("--text", "a", out="none/x.npz")
    assert "a text is empty" in fault("--text", "")
    assert "takes no texts" in fault("--text", "a", model=vit_folder)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in fault("--text-file", tmp_path / "latin.txt")
    assert "No such file" in fault("--text-file", tmp_path / "none.txt")


@pytest.mark.parametrize("command", ["zeroshot", "embed"])
def test_embeddings_that_are_not_finite_are_refused(fails, clip_folder, images, tmp_path, command):
    model, params, processor = mmjax.load(clip_folder)
    params["visual_projection"]["kernel"] *= np.nan
    mmjax.save(tmp_path / "nan", model, params, processor)
    arguments = {"zeroshot": ["--labels", "a"], "embed": ["--out", tmp_path / "a.npz"]}[command]
    line = fails(command, "--model", tmp_path / "nan", "--image", *images, *arguments)
    assert line.endswith("nan: 2 of 2 image embeddings are not finite")


# --- convert and info ---------------------------------------------------------------------------


def same_tree(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_convert_keeps_every_bit(run, report, clip_folder, tmp_path):
    found = report("convert", clip_folder, tmp_path / "copy", "--shard-size", "10kB")
    assert sum(name.endswith(".safetensors") for name in found["files"]) > 1
    assert "model.safetensors.index.json" in found["files"] and found["dtypes"] == ["float32"]
    first, second = mmjax.load(clip_folder), mmjax.load(tmp_path / "copy")
    same_tree(first[1], second[1])
    assert first[0] == second[0] and second[2] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    code, out, _ = run("convert", clip_folder, tmp_path / "again")
    assert code == 0 and "model.safetensors" in out


def test_convert_to_another_dtype(report, clip_folder, tmp_path):
    (tmp_path / "half").mkdir()
    assert report("convert", clip_folder, tmp_path / "half", "--dtype", "bfloat16")["dtypes"] == ["bfloat16"]
    wanted = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), mmjax.load(clip_folder)[1])
    same_tree(mmjax.load(tmp_path / "half")[1], wanted)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_convert_bad_input(fails, clip_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not empty" in fails("convert", clip_folder, tmp_path / "full")
    assert "is not empty" in fails("convert", clip_folder, clip_folder)
    assert "is a file" in fails("convert", clip_folder, tmp_path / "full" / "file")
    assert "no such folder; make it first" in fails("convert", clip_folder, tmp_path / "a" / "b")
    assert "no such folder" in fails("convert", tmp_path / "none", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_convert_leaves_nothing_behind_when_it_fails(fails, clip_folder, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mmjax, "save", full, raising=False)
    assert fails("convert", clip_folder, tmp_path / "new") == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_info_counts_what_load_gives(report, clip_folder):
    found = report("info", clip_folder)
    params = mmjax.load(clip_folder)[1]
    leaves = jax.tree.leaves(params)
    assert found["parameters"] == sum(leaf.size for leaf in leaves)
    assert found["bytes"] == sum(leaf.nbytes for leaf in leaves)
    assert (found["model"], found["dtypes"]) == ("CLIPModel", ["float32"])
    assert found["config"]["vision_config"]["image_size"] == [8, 8]
    shapes = {tuple(t["path"].split("/")): tuple(t["shape"]) for t in found["tensors"]}
    assert shapes["text_model", "encoder", "layers_1", "mlp", "fc1", "kernel"] == (16, 24)
    assert shapes["logit_scale",] == ()
    assert "tokenizer.json" in found["processor"]


def test_info_tree_takes_equal_layers_together(run, clip_folder):
    code, out, err = run("info", clip_folder)
    assert (code, err) == (0, "")
    assert "layers_0 ... layers_1 (2 alike)" in out and "\x1b" not in out
    code, out, _ = run("info", clip_folder, "--all")
    assert code == 0 and "alike" not in out and "layers_1" in out and "4 x 4 x 3 x 16" in out
    code, out, _ = run("info", clip_folder, "--depth", "1")
    assert code == 0 and "layers_0" not in out and "vision_model" in out


def test_info_reads_no_weights(report, clip_folder, monkeypatch):
    from mmjax.checkpoints.files import TensorReader

    monkeypatch.setattr(TensorReader, "read", lambda *arguments: pytest.fail("a tensor was read"))
    assert report("info", clip_folder)["parameters"] > 0


def test_info_bad_input(fails, run, clip_folder, tmp_path):
    assert "no such folder" in fails("info", tmp_path / "none")
    assert "config.json: no such file" in fails("info", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in fails("info", tmp_path)
    shutil.copy(Path(clip_folder, "config.json"), tmp_path)
    assert "no weights" in fails("info", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "model.safetensors: not a whole safetensors file" in fails("info", tmp_path)
    save_file({"visual_projection.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    code, out, err = run("info", tmp_path)
    assert (code, out) == (2, "") and "missing: logit_scale" in err and "misshapen: visual_projection" in err
