"""How long steps are expected to take, when that is corrected, and the budget of minutes, by itself and in the command."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import Finished, digest, leftovers, metrics, records, train_here, write_recipe

from es_lite.runs import pace as module
from es_lite.runs.pace import MEASURED, NOTICEABLE, SECONDS, SHARE, Pace


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


# What a step is expected to take


def test_before_the_first_step_the_estimate_counts():
    pace = Pace(30.0, 10.0, 0)
    assert pace.step_seconds == 40
    assert pace.outlook(9) == "a step takes about 40 s on this machine, the remaining 9 steps about 6 min"
    assert pace.rest(1) == "the remaining 1 step about 40 s"


def test_after_that_the_median_of_the_last_steps_counts():
    pace = Pace(30.0, 10.0, 0)
    for seconds, expected in zip([100, 20, 24, 22, 26, 23, 3, 2, 1], [100, 60, 24, 23, 24, 23, 23, 22, 3], strict=True):
        pace.stepped(seconds)
        assert pace.step_seconds == expected
    assert MEASURED == 5


@pytest.mark.parametrize("score_seconds", [1.0, 1000.0], ids=["slower", "faster"])
def test_the_estimate_is_corrected_once_in_the_first_steps_scoring(score_seconds):
    pace = Pace(score_seconds, 10.0, 0)
    assert pace.scored(0.25, 30.0)
    assert pace.step_seconds == 120 + 10
    assert not pace.scored(0.5, 1000.0)
    assert pace.step_seconds == 130


def test_too_little_is_no_reason_to_correct():
    """The first work of a process is slow."""
    pace = Pace(30.0, 10.0, 0)
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
    pace = Pace(80.0, 20.0, 0)
    assert pace.scored(0.5, 0.5 * (100 * factor - 20)) is noticeable
    assert pace.step_seconds == pytest.approx(100 * factor)


def test_an_estimate_of_nothing_is_corrected():
    assert Pace(0.0, 0.0, 0).scored(0.5, 10.0)


def test_the_second_step_corrects_for_the_last_time():
    pace = Pace(30.0, 10.0, 0)
    assert not pace.stepped(100.0)  # the first step of a process is slow
    assert pace.stepped(100.0)
    assert not any(pace.stepped(1.0) for _ in range(20))


def test_the_second_step_is_compared_with_what_was_said_last():
    pace = Pace(1.0, 0.0, 0)
    assert pace.scored(0.5, 50.0)  # 100 s
    assert not pace.scored(0.9, 1.0)
    assert not pace.stepped(101.0)
    assert not pace.stepped(99.0)


def test_no_scoring_corrects_what_steps_have_measured():
    pace = Pace(30.0, 10.0, 0)
    pace.stepped(40.0)
    assert not pace.scored(0.5, 1000.0)
    assert pace.step_seconds == 40


# The budget


def test_without_a_budget_it_is_never_spent(clock):
    pace = Pace(30.0, 10.0, 0)
    pace.stepped(40.0)
    clock.now += 10**9
    assert not pace.exhausted


def test_the_budget_is_spent_when_the_next_step_would_exceed_it(clock):
    pace = Pace(1.0, 0.0, minutes=5)
    for _ in range(5):
        assert not pace.exhausted
        clock.now += 50
        pace.stepped(50.0)
    assert not pace.exhausted  # 250 s, and the next 50 make 300
    clock.now += 0.1
    assert pace.exhausted


def test_the_budget_is_not_spent_before_a_step_is_done(clock):
    pace = Pace(30.0, 10.0, minutes=1e-6)
    clock.now += 10**9
    assert not pace.exhausted
    pace.stepped(0.001)
    assert pace.exhausted


def test_what_came_before_the_first_step_counts(clock):
    pace = Pace(1.0, 0.0, minutes=5)
    clock.now += 280
    pace.stepped(15.0)
    assert not pace.exhausted
    clock.now += 10
    assert pace.exhausted


# Through the command


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), run={"iterations": 3})


def lines(finished: Finished) -> list[str]:
    assert (finished.code, finished.err) == (0, ""), finished.err
    return finished.out.splitlines()


def only(found: list[str], beginning: str) -> int:
    """Where the one line is that begins with these words."""
    (at,) = [at for at, line in enumerate(found) if line.startswith(beginning)]
    return at


def test_a_budget_ends_the_run_with_a_checkpoint_and_resuming_changes_no_bit(recipe: Path, tmp_path: Path) -> None:
    run, budget = tmp_path / "run", "run.minutes=1e-6"
    for done in (1, 2):  # each command does one step
        said = lines(train_here(recipe, run, budget, resume=done > 1))
        assert said[-2] == "the next step would exceed run.minutes = 1e-06"
        assert said[-1] == f"{done} of 3 steps done; add --resume to continue from step {done}"
        assert [line["step"] for line in metrics(run)] == list(range(1, done + 1))
        assert records(run) == done
        assert json.loads((run / "checkpoint/es_lite.json").read_text())["step"] == done
        assert leftovers(run) == []
    said = lines(train_here(recipe, run, budget, resume=True))
    assert said[-1] == "3 of 3 steps done"
    assert not any("run.minutes = " in line for line in said)
    lines(train_here(recipe, tmp_path / "undisturbed"))
    assert digest(run) == digest(tmp_path / "undisturbed")


def test_a_run_says_before_the_first_step_how_long_it_will_take_and_corrects_itself(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARE", 0.01)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "NOTICEABLE", 1.0)  # every correction is
    said = lines(train_here(recipe, tmp_path / "run", "run.minutes=90"))
    expected = only(said, "a step takes about ")
    assert re.fullmatch(r"a step takes about .+ on this machine, 3 steps about .+ \(run.minutes ends it after 90 min\)", said[expected])
    assert expected < only(said, "bringing the weights to the journal's end") < only(said, "step 1/3 ")
    early, late = (at for at, line in enumerate(said) if line.startswith("as measured now, a step takes about "))
    assert expected < early < only(said, "step 1/3 ") < late
    assert said[early].partition(" machine, ")[2].startswith("the remaining 3 steps about ")
    assert said[late].partition(" machine, ")[2].startswith("the remaining 1 step about ")
    assert "run.minutes ends it" not in said[late]
