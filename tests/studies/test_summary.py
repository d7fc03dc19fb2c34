import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from tests.studies.stand_ins import config, pretend, result

from conjugo.studies import CompareResult, compare, summary


def shown(result: CompareResult) -> str:
    console = Console(width=120, file=io.StringIO())
    for table in summary.tables(result):
        console.print(table)
    return console.file.getvalue()


def with_accuracies(accuracies, **changes):
    """A comparison whose fresh seeds reach *accuracies*[optimizer, batch size]."""

    def run(config, task):
        outcome = pretend(config, task)
        if task.phase == "final":
            value = accuracies[task.contender, task.batch_size][task.index]
            outcome = replace(outcome, accuracy=value, curve=tuple((step, value * step / 15) for step in (5, 10, 15)))
        return outcome

    return compare(config(**changes), run=run)


BY_HAND = {
    ("momentum", 16): (0.95, 0.97, 0.96),
    ("sgd", 16): (0.97, 0.98, 0.975),
    ("momentum", 120): (0.80, 0.82, 0.81),
    ("sgd", 120): (0.70, 0.72, 0.71),
}


@pytest.fixture
def by_hand():
    return with_accuracies(BY_HAND, seeds=3)


def test_rows(by_hand):
    rows = {(row.optimizer, row.batch_size): row for row in summary.rows(by_hand)}
    assert list(rows) == [("momentum", 16), ("sgd", 16), ("momentum", 120), ("sgd", 120)]
    row = rows["sgd", 120]
    assert row.accuracy == pytest.approx(0.71)
    assert row.sd == pytest.approx(0.01)
    assert row.gain == pytest.approx(-0.10)
    assert row.rival == "momentum"
    assert row.p_baseline == row.p_rival < 0.001
    assert row.verdict == "worse"
    assert rows["sgd", 16].verdict == ""  # 1.5 points, p = 0.09
    assert rows["momentum", 16].gain is None
    assert rows["momentum", 16].verdict == ""


def test_steps_to_target(by_hand):
    assert by_hand.target == pytest.approx(0.95)
    rows = {(row.optimizer, row.batch_size): row for row in summary.rows(by_hand)}
    assert rows["momentum", 16].steps_to_target == 15
    assert rows["momentum", 16].samples_to_target == 15 * 16
    assert rows["momentum", 16].reached == 3
    assert rows["sgd", 120].steps_to_target is None
    assert rows["sgd", 120].reached == 0


def test_headline_and_scaling(by_hand):
    assert summary.headline(by_hand) == (
        "At the full batch of 120 (2 steps) momentum is best with 81.0 ± 1.0 % test accuracy, "
        "10.0 points above sgd (p < 0.001)."
    )
    assert summary.scaling(by_hand) == (
        "Losing at most one point against the best at batch 16 (97.5 %), the batch can grow to 16 with sgd; "
        "momentum did not reach that at any batch."
    )


def test_headline_against_the_baseline():
    text = summary.headline(with_accuracies({**BY_HAND, ("sgd", 120): (0.82, 0.83, 0.82)}, seeds=3))
    assert (
        "sgd is best with 82.3 ± 0.6 % test accuracy, 1.3 points above tuned momentum (p = 0.13, not significant)."
        in text
    )
    one = summary.headline(with_accuracies({**BY_HAND, ("sgd", 120): (0.9,)}, seeds=1))
    assert one.endswith(
        "sgd is best with 90.0 % test accuracy, 10.0 points above tuned momentum (too few seeds to say how surely)."
    )


def test_the_batch_grows_only_as_far_as_all_smaller_ones_are_good():
    same = {
        ("momentum", 16): (0.97,) * 3,
        ("sgd", 16): (0.95,) * 3,
        ("momentum", 120): (0.961,) * 3,
        ("sgd", 120): (0.97,) * 3,
    }
    assert summary.largest_batches(with_accuracies(same, seeds=3)) == {"momentum": 120, "sgd": None}


def test_terminal_tables(by_hand):
    text = shown(by_hand)
    assert "120 (full)" in text
    assert "96.0 ±1.0" in text
    assert "71.0 ±1.0 ▼" in text
    assert "not reached" in text
    assert "momentum (lr, momentum)" in text
    assert "Mean ± sd of 3 fresh seeds" in text


def test_edges_are_flagged():
    at_edge = compare(config(), run=lambda c, t: replace(pretend(c, t), accuracy=math.log10(t.lr) / 10 + 0.5))
    assert any("lr" in row.edges for row in summary.rows(at_edge))
    assert "*" in shown(at_edge).split("Tuned settings")[1]


def test_unfinished_cells_are_dashes():
    def run(config, task):
        if task.contender == "sgd":
            raise RuntimeError
        return pretend(config, task)

    partial = compare(config(), run=run)
    assert "–" in shown(partial)
    assert {row.optimizer for row in summary.rows(partial)} == {"momentum"}
    assert summary.headline(partial).startswith("At the full batch of 120 (2 steps) momentum is best")
    assert "sgd" not in summary.scaling(partial)
    nothing = compare(config(), run=lambda c, t: 1 / 0)
    assert summary.headline(nothing) == "No cell of this comparison is finished yet."
    assert summary.scaling(nothing) == ""
    assert "–" in shown(nothing)


def test_csv_has_a_line_per_cell_and_empty_fields_for_nothing():
    lines = summary.csv_text(result()).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("optimizer,batch_size,seeds,accuracy,sd,gain,p_baseline")
    assert lines[1].split(",")[5:7] == ["", ""]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.00001, "< 0.001"), (0.01234, "0.012"), (0.0999, "0.100"), (0.51, "0.51")]
)
def test_p_values(value, text):
    assert summary.p_text(value) == text
