"""What a person sees of a run: lines in a log, live bars on a terminal; and what Ctrl-C does, once and twice."""

import re
import signal
import sys
from collections.abc import Callable
from functools import partial

import pytest
from tqdm import tqdm

from es_lite.runs import console as module
from es_lite.runs.console import SAME_SIGNAL_SECONDS, SILENCE_SECONDS, Console

STEP = {
    "step": 2,
    "score_mean": -2.5,
    "score_std": 0.25,
    "eval_score": None,
    "step_seconds": 3.21,
    "update_seconds": 0.45,
    "tokens_per_second": 123.4,
    "pss_gib": 1.5,
}
FIGURES = "score -2.5000 ± 0.2500 | 3.2 s (update 0.5) | 123 tokens/s | 1.50 GiB"
EVALUATED_FIGURES = "score -2.5000 ± 0.2500 | eval -2.2500 | 3.2 s (update 0.5) | 123 tokens/s | 1.50 GiB"

STOPPING = "\nstopping after this step; press Ctrl-C again to stop now (--resume then repeats this step)\n"


@pytest.fixture
def terminal(monkeypatch) -> Callable[[], None]:
    """Makes standard error a terminal, to be called in the test, since pytest replaces the stream before it."""
    monkeypatch.setattr(module, "tqdm", partial(tqdm, mininterval=0))  # shows every change
    return lambda: monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def lines(capsys) -> list[str]:
    """What has been printed to standard output since the last call; nothing went to standard error."""
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


# In a log


def test_messages_and_warnings_are_lines(capsys):
    with Console(3, 0) as console:
        console.say("a message")
        console.warn("a warning")
        assert capsys.readouterr() == ("a message\n", "warning: a warning\n")


def test_a_step_is_a_line(capsys):
    with Console(3, 1) as console:
        console.show_step(STEP)
        console.show_step(STEP | {"eval_score": -2.25, "tokens_per_second": 1.234})
        console.show_evaluation({"step": 0, "eval_score": -2.25})
    assert lines(capsys) == [
        f"step 2/3 | {FIGURES}",
        f"step 2/3 | {EVALUATED_FIGURES.replace('123', '1.2')}",
        "step 0/3 | eval -2.2500",
    ]


def test_long_work_says_how_far_it_is_whenever_nothing_was_printed_for_a_while(clock, capsys):
    with Console(3, 0) as console, console.progress("step 1/3", 40) as show:
        for share in (0.05, 0.1, 0.2):
            clock.now += SILENCE_SECONDS / 3
            show(share)
        assert lines(capsys) == []  # not longer than SILENCE_SECONDS
        clock.now += 10
        show(0.25)
        assert lines(capsys) == ["step 1/3: 10 of 40 members done in 30 s, about 90 s left"]
        clock.now += SILENCE_SECONDS
        show(0.5)
        assert lines(capsys) == []
        clock.now += 10
        show(0.5)
        assert lines(capsys) == ["step 1/3: 20 of 40 members done in 60 s, about 60 s left"]


def test_a_message_breaks_the_silence(clock, capsys):
    with Console(3, 0) as console, console.progress("step 1/3", 40) as show:
        clock.now += SILENCE_SECONDS - 1
        console.say("a message")
        clock.now += SILENCE_SECONDS - 1
        show(0.5)
        assert lines(capsys) == ["a message"]
        clock.now += 2
        show(0.5)
        assert lines(capsys) == ["step 1/3: 20 of 40 members done in 40 s, about 40 s left"]


@pytest.mark.parametrize(
    ("expected", "tail"), [(0.0, ""), (90.0, ", about 60 s left"), (20.0, "")], ids=["unknown", "longer", "exceeded"]
)
def test_as_long_as_too_little_is_done_to_tell_the_expected_time_counts(clock, capsys, expected, tail):
    with Console(3, 0) as console, console.progress("step 1/3", 100, expected) as show:
        clock.now += 30
        show(0.02)
        assert lines(capsys) == [f"step 1/3: 2 of 100 members done in 30 s{tail}"]


def test_short_work_is_no_line(clock, capsys):
    with Console(3, 0) as console:
        for _ in range(100):
            with console.progress("evaluation") as show:
                clock.now += 3
                show(0.5)
                clock.now += 3
                show(1.0)
            console.say("done")
        assert lines(capsys) == ["done"] * 100


def test_the_share_of_work_that_is_not_on_members_is_in_percent(clock, capsys):
    with Console(3, 0) as console, console.progress("weights") as show:
        clock.now += 30
        show(0.6)
    assert lines(capsys) == ["weights: 60% done in 30 s, about 20 s left"]


# On a terminal


def test_on_a_terminal_there_are_bars_instead_of_lines(clock, terminal, capsys):
    terminal()
    with Console(3, 1) as console:
        with console.progress("step 2/3", 40) as show:
            clock.now += 10 * SILENCE_SECONDS
            show(0.25)
            show(0.5)
            show(0.3)  # a task that a worker lost is done again
            show(0.75)
        console.show_step(STEP)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.findall(r"step 2/3:.* (\d+)/40 \[", err) == ["0", "10", "20", "30"]
    assert "2/3 [" in err.rpartition("\r")[2] and FIGURES in err.rpartition("\r")[2]


def test_on_a_terminal_evaluations_and_messages_are_lines_too(terminal, capsys):
    terminal()
    with Console(3, 1) as console:
        console.show_step(STEP | {"eval_score": -2.25})
        console.say("a message")
    assert capsys.readouterr().out.splitlines() == [f"step 2/3 | {EVALUATED_FIGURES}", "a message"]


def test_in_a_log_there_are_no_bars(capsys):
    with Console(3, 1) as console, console.progress("step 2/3", 40) as show:
        show(0.5)
        console.show_step(STEP)
    assert lines(capsys) == [f"step 2/3 | {FIGURES}"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_stopping_and_the_second_raises(clock, capfd, number):
    with Console(3, 0) as console:
        assert not console.stopping
        signal.raise_signal(number)
        assert console.stopping
        assert capfd.readouterr().err == STOPPING
        clock.now += SAME_SIGNAL_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert capfd.readouterr().err == ""


def test_a_signal_that_comes_twice_at_once_counts_once(clock, capfd):
    with Console(3, 0) as console:
        signal.raise_signal(signal.SIGTERM)
        clock.now += SAME_SIGNAL_SECONDS / 2
        signal.raise_signal(signal.SIGINT)
        assert console.stopping
        assert capfd.readouterr().err == STOPPING


def test_a_run_that_is_stopping_for_another_reason_is_stopped_immediately_by_a_signal(clock):
    """As when run.minutes is spent, and the last checkpoint is being written."""
    with Console(3, 0) as console:
        console.stopping = True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_after_the_run_signals_do_what_they_did_before(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Console(3, 0):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
