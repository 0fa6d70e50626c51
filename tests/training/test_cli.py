"""The command line: flags, files and errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmjax.errors import ConfigError
from mmjax.training.cli import Command, load_experiment, main, parse

TOY = str(Path(__file__).with_name("toy.py"))


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["a.py"], Command(file="a.py")),
        (["--resume", "a.py", "--debug"], Command(file="a.py", resume=True, debug=True)),
        (["a.py", "--workdir", "d"], Command(file="a.py", workdir="d")),
        (["a.py", "--workdir=d=e", "--overwrite"], Command(file="a.py", workdir="d=e", overwrite=True)),
        (["a.py", "--a.b=3", "--c", "-4"], Command(file="a.py", overrides=("a.b=3", "c=-4"))),
        (["a.py", "--mesh=data=2,fsdp=4"], Command(file="a.py", overrides=("mesh=data=2,fsdp=4",))),
        (["a.py", "--smoke", "--x="], Command(file="a.py", smoke=True, overrides=("x=",))),
    ],
)
def test_arguments(argv: list[str], wanted: Command) -> None:
    assert parse(argv) == wanted


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one experiment file"),
        (["a.py", "b.py"], "got a.py b.py"),
        (["a.py", "--train.steps"], "--train.steps needs a value"),
        (["a.py", "--workdir", "--resume"], "--workdir needs a value"),
    ],
)
def test_arguments_that_make_no_sense(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(argv)


def test_smoke_settings_go_under_overrides() -> None:
    experiment = load_experiment(TOY, ["train.seed=3"], smoke=True)
    assert (experiment.name, experiment.train.steps, experiment.train.seed) == ("toy-smoke", 2, 3)
    assert load_experiment(TOY, ["train.steps=5"], smoke=True).train.steps == 5
    assert load_experiment(TOY).train.steps == 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such experiment file"),
        ("x = 1", "there is no function experiment()"),
        ("def experiment(): return 3", "returned a int and not an Experiment"),
        ("import nothing_of_the_kind", "cannot be read: ModuleNotFoundError: No module named"),
        ("def experiment(:", "cannot be read: SyntaxError"),
        ("from mmjax.errors import ConfigError\nraise ConfigError('own words')", "own words"),
    ],
)
def test_files_that_are_no_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    file = tmp_path / "e.py"
    if content is not None:
        file.write_text(content)
    assert main([str(file)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--train.stpes=3", "error: --train.stpes: train has no 'stpes'; did you mean steps?"),
        ("--train.steps=many", "error: --train.steps: expected a whole number (int), got 'many'"),
        (
            "--stages.tune.rules.0.schedule.value=x",
            "error: --stages.tune.rules.0.schedule.value: expected a number",
        ),
    ],
)
def test_overrides_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    assert main([TOY, "--workdir", str(tmp_path), flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [TOY, "--workdir", str(tmp_path), "--train.steps", "2", "--stages.tune.steps=1"]
    assert main(argv) == 0
    assert (tmp_path / "output/toy/result.json").is_file()
    assert "tune  1/1  loss" in capsys.readouterr().out
    assert main(argv) == 2
    assert "pass --resume to go on with it or --overwrite to delete it" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert main([*argv, "--overwrite"]) == 0


def test_unforeseen_errors_are_one_line_with_the_way_to_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "e.py"
    file.write_text("def experiment(): return 1 / 0")
    assert main([str(file)]) == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: division by zero (--debug shows where)\n"
    assert main([str(file), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert main([]) == 2
