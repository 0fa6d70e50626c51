"""A resumed run says which of its settings are no longer those of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmjax.training.cli import main

TOY = str(Path(__file__).with_name("toy.py"))


def test_changed_settings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [TOY, "--workdir", str(tmp_path), "--train.steps=2", "--stages.tune.steps=1"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--resume", "--train.log_every=1"]) == 0
    assert "changed since" not in capsys.readouterr().out
    peak = "--stages.tune.rules.1.schedule.peak=0.5"
    assert main([*argv, "--resume", "--train.clip_norm=2", "--stages.tune.steps=2", peak]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    start = "changed since that checkpoint: stages."
    assert lines == [
        f"{start}align.clip_norm was 1.0, is 2.0",
        f"{start}tune.steps was 1, is 2",
        f"{start}tune.clip_norm was 1.0, is 2.0",
        f"{start}tune.rules .* was Cosine(peak=0.01, warmup=0.25, end=0.0), "
        "is Cosine(peak=0.5, warmup=0.25, end=0.0)",
    ]
