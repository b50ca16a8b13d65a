"""Commands that are stopped."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator

import pytest

from es_lite.terminal import stoppable


@pytest.fixture(autouse=True)
def foreground() -> Iterator[None]:
    """A shell starts programs in the background so that they ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_stops_even_where_python_drops_the_interrupt(number: signal.Signals):
    """As it does while compiled code is loaded, which C calls Python for."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    passed = []

    @ctypes.CFUNCTYPE(None)
    def called_back() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt), stoppable():
        called_back()
        passed.append(True)
        time.sleep(10)
    assert passed, "the interrupt was not dropped, so that this test shows nothing"
    assert {each: signal.getsignal(each) for each in before} == before


def test_what_else_python_drops_is_still_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: print("dropped", dropped.exc_value))

    @ctypes.CFUNCTYPE(None)
    def called_back() -> None:
        raise ValueError("a mistake")

    with stoppable():
        called_back()
    assert capsys.readouterr().out == "dropped a mistake\n"
