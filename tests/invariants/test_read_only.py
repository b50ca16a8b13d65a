"""No process can write to the working copy, which all workers score from, by accident."""

import os
import sys
from pathlib import Path

import pytest
from support import TINY, start

from es_lite.model.configuration import configuration
from es_lite.model.layout import Layout, skeleton
from es_lite.weights.working_copy import WorkingCopy, allocate


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_no_process_maps_the_working_copy_writable(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "run.iterations=10000") as live:
        live.wait_for_records(2)
        workers = live.workers()
        permissions = {process.pid: permissions_of_working_copy(process.pid) for process in workers}
        coordinators = permissions_of_working_copy(live.process.pid)
    assert len(workers) == 2
    assert all(permissions.values())
    for found in (*permissions.values(), coordinators):
        assert set(found) <= {"r--s"}


def permissions_of_working_copy(pid: int) -> list[str]:
    """The permissions of each mapping of the working copy that the process has."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if "es_lite-working-copy" in line]


def test_the_working_copy_cannot_be_written_through_its_view() -> None:
    layout = Layout.of(skeleton(configuration("", TINY)))
    descriptor = allocate(layout, "bf16")
    bits = WorkingCopy(layout, "bf16", descriptor).part(layout.tensors[0]).data
    os.close(descriptor)
    assert not bits.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        bits[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        bits.flags.writeable = True
