"""How long steps are expected to take, when that is corrected, and the budget of minutes, by itself and in the command."""

import json
import re
from pathlib import Path

import pytest
from support import Finished, digest, leftovers, metrics, records, train_here, write_recipe

from es_lite.runs import pace as module
from es_lite.runs.pace import MEASURED, NOTICEABLE, SECONDS, SHARE, Pace

# What a step is expected to take


def test_before_the_first_step_the_estimate_counts():
    pace = Pace(30.0, 10.0, 0, began=0.0)
    assert pace.step_seconds == 40
    assert pace.outlook(9) == "a step takes about 40 s on this machine, the remaining 9 steps about 6 min"
    assert pace.rest(1) == "the remaining 1 step about 40 s"


def test_after_that_the_median_of_the_last_steps_counts():
    pace = Pace(30.0, 10.0, 0, began=0.0)
    for seconds, expected in zip([100, 20, 24, 22, 26, 23, 3, 2, 1], [100, 60, 24, 23, 24, 23, 23, 22, 3], strict=True):
        pace.stepped(seconds)
        assert pace.step_seconds == expected
    assert MEASURED == 5


@pytest.mark.parametrize("score_seconds", [1.0, 1000.0], ids=["slower", "faster"])
def test_the_estimate_is_corrected_once_in_the_first_steps_scoring(score_seconds):
    pace = Pace(score_seconds, 10.0, 0, began=0.0)
    assert pace.scored(0.25, 30.0)
    assert pace.step_seconds == 120 + 10
    assert not pace.scored(0.5, 1000.0)
    assert pace.step_seconds == 130


def test_too_little_is_no_reason_to_correct():
    """The first work of a process is slow."""
    pace = Pace(30.0, 10.0, 0, began=0.0)
    assert not pace.scored(SHARE - 0.01, 1000.0)
    assert not pace.scored(1.0, SECONDS - 0.1)
    assert pace.step_seconds == 40
    assert pace.scored(SHARE, SECONDS)
    assert pace.step_seconds == pytest.approx(SECONDS / SHARE + 10)


@pytest.mark.parametrize(
    ("factor", "noticeable"),
    [(NOTICEABLE - 0.01, False), (NOTICEABLE + 0.01, True), (1 / (NOTICEABLE - 0.01), False), (1 / (NOTICEABLE + 0.01), True)],
)
def test_a_correction_counts_but_is_said_only_if_it_is_noticeable(factor, noticeable):
    pace = Pace(80.0, 20.0, 0, began=0.0)
    assert pace.scored(0.5, 0.5 * (100 * factor - 20)) is noticeable
    assert pace.step_seconds == pytest.approx(100 * factor)


def test_an_estimate_of_nothing_is_corrected():
    assert Pace(0.0, 0.0, 0, began=0.0).scored(0.5, 10.0)


def test_the_second_step_corrects_for_the_last_time():
    pace = Pace(30.0, 10.0, 0, began=0.0)
    assert not pace.stepped(100.0)  # the first step of a process is slow
    assert pace.stepped(100.0)
    assert not any(pace.stepped(1.0) for _ in range(20))


def test_the_second_step_is_compared_with_what_was_said_last():
    pace = Pace(1.0, 0.0, 0, began=0.0)
    assert pace.scored(0.5, 50.0)  # 100 s
    assert not pace.scored(0.9, 1.0)
    assert not pace.stepped(101.0)
    assert not pace.stepped(99.0)


def test_what_was_not_said_is_not_what_was_said_last():
    """Two corrections too small to be said, which together are not."""
    pace = Pace(100.0, 0.0, 0, began=0.0)
    assert not pace.scored(0.5, 60.0)  # 120 s
    assert not pace.stepped(130.0)
    assert pace.stepped(140.0)


def test_no_scoring_corrects_what_steps_have_measured():
    pace = Pace(30.0, 10.0, 0, began=0.0)
    pace.stepped(40.0)
    assert not pace.scored(0.5, 1000.0)
    assert pace.step_seconds == 40


# The budget


def test_without_a_budget_it_is_never_spent(clock):
    pace = Pace(30.0, 10.0, 0, began=0.0)
    pace.stepped(40.0)
    clock.now += 10**9
    assert not pace.exhausted


def test_the_budget_is_spent_when_the_next_step_would_exceed_it(clock):
    pace = Pace(1.0, 0.0, minutes=5, began=clock.now)
    for _ in range(5):
        assert not pace.exhausted
        clock.now += 50
        pace.stepped(50.0)
    assert not pace.exhausted  # 250 s, and the next 50 make 300
    clock.now += 0.1
    assert pace.exhausted


def test_the_budget_is_not_spent_before_a_step_is_done(clock):
    pace = Pace(30.0, 10.0, minutes=1e-6, began=clock.now)
    clock.now += 10**9
    assert not pace.exhausted
    pace.stepped(0.001)
    assert pace.exhausted


def test_what_came_before_the_first_step_counts(clock):
    pace = Pace(1.0, 0.0, minutes=5, began=clock.now)
    clock.now += 280
    pace.stepped(15.0)
    assert not pace.exhausted
    clock.now += 10
    assert pace.exhausted


# Through the command


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), run={"iterations": 3})


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An undisturbed run with time enough, and what it printed; every correction of the pace counts as noticeable."""
    run = tmp_path_factory.mktemp("reference") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARE", 0.01)
        patch.setattr(module, "SECONDS", 0.0)
        patch.setattr(module, "NOTICEABLE", 1.0)
        return run, lines(train_here(recipe, run, "run.minutes=90"))


def lines(finished: Finished) -> list[str]:
    assert (finished.code, finished.err) == (0, ""), finished.err
    return finished.out.splitlines()


def test_a_run_says_before_the_first_step_how_long_it_will_take_and_corrects_itself(reference: tuple[Path, list[str]]) -> None:
    said = reference[1]
    patterns = [
        r"a step takes about .+ on this machine, 3 steps about .+ \(run.minutes ends it after 90 min\)",
        r"advancing the weights to the end of the journal",
        r"as measured now, a step takes about .+ on this machine, the remaining 3 steps about .+",
        r"step 1/3 .+",
        r"as measured now, a step takes about .+ on this machine, the remaining 1 step about .+",
    ]
    matches = [[at for at, line in enumerate(said) if re.fullmatch(pattern, line)] for pattern in patterns]
    assert [len(found) for found in matches] == [1] * 5
    assert matches == sorted(matches)
    assert said[-1] == "3 of 3 steps done"


def test_a_budget_ends_the_run_with_a_checkpoint_and_resuming_changes_no_bit(
    recipe: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = lines(train_here(recipe, run, "run.minutes=1e-6"))
    assert said[-2:] == [
        "the next step would exceed run.minutes = 1e-06",
        "1 of 3 steps done; add --resume to continue from step 1",
    ]
    assert [line["step"] for line in metrics(run)] == [1]
    assert records(run) == 1
    assert json.loads((run / "checkpoint/es_lite.json").read_text())["step"] == 1
    assert leftovers(run) == []
    assert lines(train_here(recipe, run, resume=True))[-1] == "3 of 3 steps done"
    assert digest(run) == digest(reference[0])


def test_after_the_last_step_the_budget_does_not_matter(recipe: Path, tmp_path: Path) -> None:
    said = lines(train_here(recipe, tmp_path / "run", "run.iterations=1", "run.minutes=1e-6"))
    assert said[-1] == "1 of 1 steps done" and not any("exceed" in line for line in said)
    assert not (tmp_path / "run/checkpoint").exists()
