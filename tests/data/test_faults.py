import numpy as np
import pytest

from mmjax.data.faults import FAULTS, BadSample, FaultTally, cause_of, check_faults, fault_counts, printable
from mmjax.errors import DataError
from mmjax.vision.images import CAUSES


def test_every_cause_of_the_decoder_is_counted_by_name():
    assert set(CAUSES) - set(FAULTS) == {"bad_array"}


def test_cause_of():
    assert cause_of(FileNotFoundError("x")) == "missing_file"
    assert cause_of(PermissionError("x")) == "unreadable"
    assert cause_of(DataError("x")) == "unreadable"
    assert cause_of(BadSample("too_large", "x")) == "too_large"


def test_fault_counts_has_every_cause():
    counts = fault_counts([*FAULTS, "too_large"])
    expected = np.ones(len(FAULTS), np.int32)
    expected[FAULTS.index("too_large")] = 2
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int32


def test_tally_stops_above_the_share_with_causes_and_three_names():
    tally = FaultTally.for_source(20)
    broken = [
        ("truncated", "a.jpg"),
        ("no_caption", "b\n.jpg"),
        ("unsafe_path", "/c.jpg"),
        ("truncated", "d.jpg"),
    ]
    tally.add(16, broken)
    tally.check(0.2)
    with pytest.raises(DataError) as caught:
        tally.check(0.19)
    assert str(caught.value) == (
        "4 of 16 samples (25.0%) broken: truncated 2, unsafe_path 1, no_caption 1; for example "
        "a.jpg (truncated), b\\n.jpg (no_caption), /c.jpg (unsafe_path); that is more than "
        "max_fault_share=0.19; image names must be relative and stay inside the data folder (set root to it)"
    )


def test_one_early_fault_does_not_stop_a_long_run():
    tally = FaultTally.for_source(1_000_000)
    tally.add(8, [("truncated", "a")])
    tally.check(0.001)
    with pytest.raises(DataError):
        tally.check(0.0)
    tally.add(8, [("truncated", "a")])
    with pytest.raises(DataError):
        tally.check(0.001)


def test_tally_state_round_trip():
    tally = FaultTally.for_source(10)
    tally.add(5, [("truncated", "a")])
    other = FaultTally.for_source(10)
    other.load_state(tally.to_state())
    assert other == tally


def test_check_faults_takes_sums_of_batches():
    counts = fault_counts(["truncated"] * 6)
    check_faults(counts, 100, 0.06, samples=100)
    with pytest.raises(DataError, match=r"6 of 100 samples \(6.0%\) broken: truncated 6; that is more"):
        check_faults(counts, 100, 0.05, samples=100)


@pytest.mark.parametrize("name", ["x\x1b[31m", "\ud800", "a\0b", "y" * 500, "tab\t"])
def test_names_from_data_print_on_one_short_line(name):
    assert printable(name).isprintable() and len(printable(name)) <= 80
