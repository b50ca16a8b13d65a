"""What several tests of the weights use."""

import pytest

from es_lite.weights import conveyor


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary's matrix streams in several sections, in every storage."""
    monkeypatch.setattr(conveyor, "VOCABULARY_ROWS", 64)
