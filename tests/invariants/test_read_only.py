"""No process can write to the working copy, which all workers score from, by accident."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from support import NOISES, SHARED_TILES, TINY, start, write_recipe

from es_lite.algorithm.jit import Threads
from es_lite.model.configuration import configuration
from es_lite.model.layout import Layout, skeleton
from es_lite.scoring.scratch import Scratch
from es_lite.weights.working_copy import WorkingCopy, allocate


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("noise", ["gaussian", "lowrank 1"])
def test_no_process_maps_the_working_copy_writable(noise: str, tmp_path: Path) -> None:
    """In bf16, so that low-rank noise multiplies the working copy as it is."""
    recipe = write_recipe(tmp_path, run={"iterations": 10000}, workers={"compute": "bf16"}, es=SHARED_TILES, noise=NOISES[noise])
    with start(recipe, tmp_path / "run") as live:
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_write_to_the_matrix_that_low_rank_noise_leaves_in_place_ends_the_process() -> None:
    """torch knows no read-only tensors: it is the pages that cannot be written."""
    layout = Layout.of(skeleton(configuration("", TINY)))
    descriptor = allocate(layout, "bf16")
    part = WorkingCopy(layout, "bf16", descriptor).part(layout.blocks[0].tensors[0])
    os.close(descriptor)
    matrix = Scratch(torch.bfloat16, Threads(1)).base({"weight": part})["weight"]
    assert matrix.data_ptr() == part.data.ctypes.data  # not a copy
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        matrix[0, 0] = 1.0
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
    assert not matrix.any()
