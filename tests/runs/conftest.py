"""What several tests of `runs` need."""

from types import SimpleNamespace

import pytest
from support import Clock

from es_lite.runs import console, pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time as the console and the pace see it."""
    clock = Clock()
    for module in (console, pace):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock
