"""Overrides: every kind of field is read by its annotation, and every mistake is one clear line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest

from mmjax.errors import ConfigError
from mmjax.training.experiment import Experiment, Stage
from mmjax.training.overrides import apply_overrides
from mmjax.training.schedules import FROZEN, Cosine
from mmjax.training.source import FromConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    heads: int = 2

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} is not a multiple of heads={self.heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    count: int = 1
    rate: float = 0.5
    on: bool = False
    word: str = "a"
    maybe: int | None = None
    either: int | float = 0
    choice: Literal["dot", "einsum", 3] = "dot"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    anything: Any = 4
    unknown: Any = None
    call: Callable[[int], int] | None = None
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("count=-3", "count", -3),
        ("count=1_000", "count", 1000),
        ("rate=1e-3", "rate", 1e-3),
        ("rate=2", "rate", 2.0),
        ("on=true", "on", True),
        ("on=No", "on", False),
        ("word=3=4", "word", "3=4"),
        ("word=", "word", ""),
        ("maybe=7", "maybe", 7),
        ("maybe=none", "maybe", None),
        ("either=3", "either", 3),
        ("either=0.25", "either", 0.25),
        ("choice=einsum", "choice", "einsum"),
        ("choice=3", "choice", 3),
        ("sizes=3,4,5", "sizes", (3, 4, 5)),
        ("sizes=(7,)", "sizes", (7,)),
        ("sizes=", "sizes", ()),
        ("pair=2,b", "pair", (2, "b")),
        ("axes=data=2,fsdp=-1", "axes", {"data": 2, "fsdp": -1}),
        ("anything=5", "anything", 5),
        ("unknown=2.5", "unknown", 2.5),
        ("unknown=text", "unknown", "text"),
        ("call=none", "call", None),
    ],
)
def test_each_kind_of_field_is_read(override: str, field: str, value: Any) -> None:
    found = getattr(apply_overrides(Fields(), [override]), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("count=3.5", ["--count", "a whole number (int)", "'3.5'"]),
        ("count=", ["--count", "a whole number (int)", "''"]),
        ("rate=fast", ["--rate", "a number (float)", "'fast'"]),
        ("on=maybe", ["--on", "true or false", "'maybe'"]),
        ("maybe=x", ["--maybe", "a whole number (int) or none", "'x'"]),
        ("choice=other", ["--choice", "'dot', 'einsum', 3", "'other'"]),
        ("sizes=1,x", ["--sizes", "values joined by commas", "'1,x'"]),
        ("pair=1", ["--pair", "'1'"]),
        ("axes=data", ["--axes", "pairs such as", "'data'"]),
        ("axes=data=two", ["--axes", "'data=two'"]),
        ("call=print", ["--call", "cannot be set on the command line"]),
        ("cuont=3", ["--cuont", "Fields has no 'cuont'", "did you mean count"]),
        ("inner.widht=3", ["--inner.widht", "inner has no 'widht'", "did you mean width"]),
        ("inner=3", ["--inner is a group", "width, heads"]),
        ("count.deep=3", ["--count.deep", "has no field 'deep'"]),
        ("sizes.5=1", ["--sizes.5", "has no '5'"]),
        ("inner.width=9", ["width=9 is not a multiple of heads=2"]),
        ("=3", ["path=value"]),
        ("count", ["path=value"]),
    ],
)
def test_each_mistake_is_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Fields(), [override])
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_fields_that_depend_on_each_other_are_checked_together() -> None:
    changed = apply_overrides(Fields(), ["inner.width=9", "inner.heads=3"])
    assert changed.inner == Inner(width=9, heads=3)


def test_a_group_and_its_field_cannot_both_be_set() -> None:
    for order in (["sizes.0=1", "sizes=2,3"], ["sizes=2,3", "sizes.0=1"]):
        with pytest.raises(ConfigError, match="both set"):
            apply_overrides(Fields(), order)


def test_later_overrides_win_and_the_original_stays() -> None:
    before = Fields()
    assert apply_overrides(before, ["count=2", "count=3"]).count == 3
    assert before == Fields()


def experiment() -> Experiment:
    return Experiment(
        name="demo",
        model=FromConfig(config=Inner(), model=dict),
        data=Fields(),
        stages=(
            Stage(name="align", loss=max, rules=(("eyes/.*", FROZEN), (".*", Cosine(peak=1e-3)))),
            Stage(name="tune", loss=max, rules=((".*", Cosine(peak=1e-4)),)),
        ),
    )


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=200", lambda e: e.train.steps, 200),
        ("stages.0.steps=10", lambda e: e.stages[0].steps, 10),
        ("stages.tune.steps=10", lambda e: e.stages[1].steps, 10),
        ("stages.tune.rules.0.schedule.peak=0.5", lambda e: e.stages[1].rules[0].schedule.peak, 0.5),
        ("stages.0.rules.1.schedule.warmup=0.03", lambda e: e.stages[0].rules[1].schedule.warmup, 0.03),
        ("model.config.width=16", lambda e: e.model.config.width, 16),
        ("data.word=path/to", lambda e: e.data.word, "path/to"),
        ("mesh=data=2,fsdp=4", lambda e: dict(e.mesh), {"data": 2, "fsdp": 4}),
        ("name=other", lambda e: e.name, "other"),
        ("preview=none", lambda e: e.preview, None),
        ("smoke=train.steps=3,train.seed=1", lambda e: e.smoke, ("train.steps=3", "train.seed=1")),
    ],
)
def test_any_field_of_an_experiment(override: str, read: Callable[[Experiment], Any], value: Any) -> None:
    changed = apply_overrides(experiment(), [override])
    assert read(changed) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=2", ["--train.stpes", "train has no 'stpes'", "did you mean steps"]),
        ("stages.aligm.steps=2", ["--stages.aligm", "did you mean align"]),
        ("stages.7.steps=2", ["--stages.7", "has no '7'"]),
        ("train.steps=0", ["train.steps must be at least 1", "got 0"]),
        ("name=../x", ["experiment name", "'../x'"]),
        ("train=3", ["--train is a group"]),
    ],
)
def test_mistakes_in_an_experiment(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(experiment(), [override])
    for word in words:
        assert word in str(caught.value)
