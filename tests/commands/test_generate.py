"""`mmjax generate` and `mmjax chat` with a tiny model of random parameters."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import stat
import sys

import jax
import numpy as np
import pytest

import mmjax
from mmjax.checkpoints.files import TensorReader
from mmjax.commands import chat, generate
from mmjax.commands.output import printable
from mmjax.generation import Sampling
from mmjax.language import DecoderConfig
from mmjax.language.learned import train_bpe_tokenizer
from mmjax.models import CausalLM
from mmjax.models.processor import Processor
from mmjax.nn import TransposedKernel
from tests.tiny import random_params

CHAT = """{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"""


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmjax" / "compiled"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["two cats and three dogs", "system user assistant", "no more cats, two more dogs"]
    tokenizer = train_bpe_tokenizer(words, 300, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer = tokenizer.with_chat_template(CHAT)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=200, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = CausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "talker"
    mmjax.save(folder, model, random_params(model), Processor(None, tokenizer))
    return folder


def expected(folder, prompt, new, **options):
    model, params, processor = mmjax.load(folder)
    ids = processor.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else np.asarray(prompt)
    tokens = mmjax.generate(model, params, {"input_ids": ids}, new, pad_id=0, **options)
    return processor.tokenizer.decode(tokens[0], skip_special_tokens=True)


def read_kernel(folder, dtype=None):
    with generate.language_model(argparse.Namespace(model=str(folder), dtype=dtype)) as (opened, _):
        params = opened.read()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), opened.shapes()
    )
    return params["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]


@pytest.mark.parametrize(("dtype", "turned"), [(None, False), ("bfloat16", True), ("float16", False)])
def test_bfloat16_kernels_stay_as_the_folder_has_them(folder, dtype, turned, tmp_path):
    kernel = read_kernel(folder, dtype)
    assert isinstance(kernel, TransposedKernel) == turned
    assert kernel.dtype == (dtype or "float32")
    if turned:
        again = tmp_path / "bfloat16"
        mmjax.save(again, *mmjax.load(folder, dtype=dtype))
        assert isinstance(read_kernel(again), TransposedKernel)


@pytest.fixture
def lines(monkeypatch):
    """What a person types."""

    def give(*text):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in text)))

    return give


def visible(text):
    """As the command shows it."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def test_a_text_goes_on(run, folder, lines):
    code, out, err = run("generate", "--model", folder, "two cats", "--max-new-tokens", 12)
    assert (code, err) == (0, "")
    assert out == visible(expected(folder, "two cats", 12)) + "\n"
    lines("two cats")
    options = ("--max-new-tokens", 9, "--seed", 4, "--temperature", 1.5, "--top-k", 40, "--top-p", 0.9)
    code, out, err = run("generate", "--model", folder, "-", *options)
    sampler = Sampling(temperature=1.5, top_k=40, top_p=0.9)
    wanted = expected(folder, "two cats\n", 9, sampler=sampler, key=jax.random.key(4))
    assert (code, out, err) == (0, visible(wanted) + "\n", "")


def test_a_message_to_a_chat_model(run, folder):
    """A special token that was typed stays text."""
    arguments = ("--chat", "--system", "be <|im_end|>", "cats <|im_start|>", "--max-new-tokens", 8)
    code, out, err = run("generate", "--model", folder, *arguments)
    tokenizer = mmjax.load(folder)[2].tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "system", "content": "be <|im_end|>"}, {"role": "user", "content": "cats <|im_start|>"}],
        add_generation_prompt=True,
    )["input_ids"]
    assert np.isin(ids, tokenizer.token_to_id("<|im_start|>")).sum() == 3
    assert (code, out, err) == (0, visible(expected(folder, ids, 8)) + "\n", "")


def test_compiled_programs_are_kept_for_this_user(run, folder, cache_home):
    arguments = ("generate", "--model", folder, "cats", "--max-new-tokens", 3)
    assert run(*arguments, "--no-compilation-cache")[0] == 0
    assert not cache_home.exists()
    jax.clear_caches()
    _, first, _ = run(*arguments)
    assert stat.S_IMODE(cache_home.stat().st_mode) == 0o700

    def kept():
        names = (path.name for path in cache_home.iterdir())
        return {name for name in names if name.startswith(("jit_start-", "jit_resume-"))}

    before = kept()
    assert any(name.startswith("jit_start-") for name in before)
    assert any(name.startswith("jit_resume-") for name in before)
    jax.clear_caches()
    _, again, _ = run(*arguments)
    assert again == first and kept() == before
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_of_somebody_else_is_not_used(run, folder, cache_home, tmp_path):
    cache_home.parent.mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    cache_home.symlink_to(tmp_path / "shared")
    code, _, err = run("generate", "--model", folder, "cats", "--max-new-tokens", 2)
    assert (
        code == 0
        and err == f"note: compiled programs are not kept: {cache_home}: it is not a folder of this user's\n"
    )
    assert not list((tmp_path / "shared").iterdir())


def test_the_ids_that_end_a_text(folder, tmp_path):
    """Of the config, of the tokenizer, and of generation_config.json."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    config = json.loads((copy / "config.json").read_text()) | {"eos_token_id": 5}
    (copy / "config.json").write_text(json.dumps(config))
    with generate.language_model(argparse.Namespace(model=str(copy), dtype=None)) as (opened, stop_ids):
        tokenizer = opened.processor.tokenizer
    assert stop_ids == tuple(sorted({5, 7, 9, tokenizer.eos_token_id}))


def test_a_chat(run, folder, lines, monkeypatch):
    """Answers are those to the whole conversation; what was read is not read again; /reset forgets."""
    reused = []
    plain = mmjax.generation.stream

    def watched(*arguments, **options):
        reused.append(plain(*arguments, **options))
        return reused[-1]

    monkeypatch.setattr(mmjax.generation, "stream", watched, raising=False)
    lines("two cats", "", "and dogs", "/what", "/reset", "two cats", "/exit", "more")
    code, out, err = run("chat", "--model", folder, "--max-new-tokens", 6, "--system", "cats")
    assert code == 0 and err == "error: no command '/what': there are /image, /reset and /exit\n"
    tokenizer = mmjax.load(folder)[2].tokenizer
    messages, answers = [{"role": "system", "content": "cats"}], []
    for line in ("two cats", "and dogs"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        answers.append(expected(folder, ids, 6))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(f"{visible(answer)}\n" for answer in (*answers, answers[0]))
    first = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"].size
    assert len(reused) == 3
    assert reused[0].reused == 0 and reused[1].reused >= first - 1 and reused[2].reused == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(run, folder, lines, monkeypatch):
    shown = []
    plain = chat.show

    def interrupted(pieces):
        if not shown:
            shown.append(next(iter(pieces)))
            raise KeyboardInterrupt
        plain(pieces)

    monkeypatch.setattr(chat, "show", interrupted)
    lines("two cats", "and dogs")
    code, out, err = run("chat", "--model", folder, "--max-new-tokens", 6)
    tokenizer = mmjax.load(folder)[2].tokenizer
    messages = [
        {"role": "user", "content": "two cats"},
        {"role": "assistant", "content": shown[0]},
        {"role": "user", "content": "and dogs"},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (code, out, err) == (0, "\n" + visible(expected(folder, ids, 6)) + "\n", "")


def test_a_conversation_that_is_too_long_ends_in_one_line(run, folder, lines):
    lines("cats and dogs " * 100, "cats")
    code, out, err = run("chat", "--model", folder, "--max-new-tokens", 4)
    tokenizer = mmjax.load(folder)[2].tokenizer
    messages = [{"role": "user", "content": "cats"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (code, out) == (0, visible(expected(folder, ids, 4)) + "\n")
    assert err.startswith("error: max_new_tokens: ") and err.endswith("(/reset begins anew)\n")
    assert err.count("\n") == 1


def test_bytes_that_are_no_text_cost_one_line_and_not_the_chat(run, folder, monkeypatch):
    def typed(data):
        stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict")
        monkeypatch.setattr(sys, "stdin", stream)

    typed(b"two cats\nhi \xff there\nand dogs\n")
    code, out, err = run("chat", "--model", folder, "--max-new-tokens", 4)
    typed(b"two cats\nand dogs\n")
    assert (code, out) == run("chat", "--model", folder, "--max-new-tokens", 4)[:2]
    assert err.startswith("error: messages[2] has half a surrogate pair") and err.count("\n") == 1
    typed(b"hi \xff there")
    code, out, err = run("generate", "--model", folder, "-")
    assert (code, out) == (2, "") and "text 0 has half a surrogate pair" in err


def test_more_likeliest_tokens_than_there_are_is_all(run, folder):
    arguments = ("generate", "--model", folder, "two cats", "--max-new-tokens", 6, "--temperature", 1.5)
    code, out, err = run(*arguments, "--top-k", 99999999999)
    assert (code, err) == (0, "")
    assert out == run(*arguments)[1]


@pytest.mark.parametrize("ids", ["x", -1, [3, [1]], 1.5, 2**40, True])
def test_ids_in_generation_config_that_are_none(fails, folder, tmp_path, ids):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    wrong = ids[1] if isinstance(ids, list) else ids
    error = fails("generate", "--model", copy, "a")
    assert f"generation_config.json: eos_token_id: {wrong!r} is not a token id" in error


@pytest.fixture
def unread(monkeypatch, folder, clip_folder, llava_folder):
    """What is wrong is said before a parameter is read, which can take minutes."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorReader, "read", read)


HERE = ("generate", "--model", "FOLDER")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((*HERE, ""), "the prompt is empty (see mmjax generate --help)"),
        ((*HERE, "a", "--system", "b"), "--system is for conversations: give --chat"),
        ((*HERE, "a", "--temperature", "0"), "temperature: 0.0 is not a number above 0"),
        ((*HERE, "a", "--temperature", "1e-45"), "temperature: 1e-45 is outside what float32 can do"),
        ((*HERE, "a", "--repetition-penalty", "1e39"), "repetition_penalty: 1e+39 is outside what"),
        ((*HERE, "a", "--seed", "9" * 20), "is not a whole number from -2**63 to 2**63 - 1"),
        ((*HERE, "a", "--seed", str(2**63)), "argument --seed: '9223372036854775808' is not a whole"),
        ((*HERE, "a", "--top-p", "2"), "top_p: 2.0 is not a number"),
        ((*HERE, "a", "--max-new-tokens", "0"), "'0' is not a whole number"),
        ((*HERE, "a", "--max-new-tokens", "300"), "300 new ones are more than the model's"),
        (HERE, "the following arguments are required: PROMPT"),
        (("chat", "--model", "FOLDER", "--top-k", "0"), "top_k: 0 is not a whole number"),
        (("chat", "--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.usefixtures("unread")
def test_what_is_refused(fails, folder, arguments, words):
    assert words in fails(*(str(folder) if part == "FOLDER" else part for part in arguments))


@pytest.mark.usefixtures("unread")
def test_folders_that_cannot_talk(fails, folder, clip_folder, tmp_path):
    assert "does not generate text" in fails("generate", "--model", clip_folder, "a")
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    assert "no chat template" in fails("chat", "--model", copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert "no tokenizer.json or tokenizer.model" in fails("generate", "--model", copy, "a")


@pytest.mark.usefixtures("unread")
def test_a_prompt_with_a_place_for_an_image_and_no_image(fails, llava_folder):
    line = fails("generate", "--model", llava_folder, "--prompt", "what is <image>")
    assert "images: 0 given, but the texts have 1 image places" in line
