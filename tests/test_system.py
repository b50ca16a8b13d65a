"""The machine as es_lite.system sees it: cgroup trees made of files, and real processes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support import v1_cgroup

from es_lite import system
from es_lite.system import MemoryLimit
from es_lite.watching import PeakPss

MIB = 2**20
UNLIMITED_V1 = "9223372036854771712"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Machine:
    """A /proc and cgroup mounts made of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.mounts = ["22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda1 rw", "23 22 0:21 / /proc rw - proc proc rw"]

    def mount(self, point: str, kind: str, options: str, root: str = "/") -> Path:
        path = self.folder / point
        path.mkdir(parents=True, exist_ok=True)
        escaped = str(path).replace(" ", r"\040")
        self.mounts.append(f"30 22 0:30 {root} {escaped} rw,nosuid shared:9 master:2 - {kind} {kind} rw,{options}")
        (self.proc / "self/mountinfo").write_text("\n".join(self.mounts) + "\n")
        return path

    def cgroup(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("\n".join(lines) + "\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * MIB, total=4000 * MIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return Machine(tmp_path)


def v1(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 5\ninactive_file 7\ntotal_inactive_file {inactive_file}\n")


def v2(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0, high: int | str = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nworkingset_refault_file 3\n")


def test_no_cgroups_leave_available_memory(machine: Machine) -> None:
    assert system.memory_limit(proc=machine.proc) == MemoryLimit(1000 * MIB, "available memory")
    assert system.cores(machine.proc) == 8


def test_what_the_run_holds_already_counts_as_available_up_to_the_limit(machine: Machine) -> None:
    mount = machine.mount("memory", "cgroup", "memory")
    machine.cgroup("4:memory:/")
    v1(mount, 500 * MIB, usage=100 * MIB)
    assert system.memory_limit(0, machine.proc, held=60 * MIB).bytes == 460 * MIB
    assert system.memory_limit(0, machine.proc, held=200 * MIB).bytes == 500 * MIB
    assert system.memory_limit(300 * MIB, machine.proc, held=200 * MIB).bytes == 300 * MIB


def test_the_recipes_limit_counts_only_if_it_is_the_least(machine: Machine) -> None:
    assert system.memory_limit(300 * MIB, machine.proc) == MemoryLimit(300 * MIB, "memory.limit of the recipe")
    assert system.memory_limit(2000 * MIB, machine.proc) == MemoryLimit(1000 * MIB, "available memory")


def test_a_v1_limit_leaves_what_is_not_used_for_good(machine: Machine) -> None:
    mount = machine.mount("memory", "cgroup", "memory")
    machine.cgroup("9:name=systemd:/", "4:memory:/user/run", "0::/")
    v1(mount, UNLIMITED_V1, 700 * MIB)
    v1(mount / "user", UNLIMITED_V1, 500 * MIB)
    v1(mount / "user/run", 600 * MIB, 250 * MIB, 50 * MIB)
    expected = MemoryLimit(400 * MIB, f"cgroup {mount}/user/run/memory.limit_in_bytes")
    assert system.memory_limit(proc=machine.proc) == system.memory_limit(500 * MIB, machine.proc) == expected
    v1(mount / "user/run", UNLIMITED_V1, 250 * MIB)
    assert system.memory_limit(proc=machine.proc).source == "available memory"


def test_a_v2_ancestor_with_less_left_counts(machine: Machine) -> None:
    mount = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.cgroup("0::/user.slice/run.scope")
    v2(mount / "user.slice", 800 * MIB, 700 * MIB, 100 * MIB)
    v2(mount / "user.slice/run.scope", 500 * MIB, 100 * MIB)
    v2(mount / "other.slice", 1)
    assert system.memory_limit(proc=machine.proc) == MemoryLimit(200 * MIB, f"cgroup {mount}/user.slice/memory.max")
    v2(mount / "user.slice", 800 * MIB, 810 * MIB)
    assert system.memory_limit(proc=machine.proc).bytes == 0


def test_v2_max_is_no_limit_and_high_is_one(machine: Machine) -> None:
    mount = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.cgroup("0::/run")
    v2(mount / "run", "max", 100 * MIB)
    assert system.memory_limit(proc=machine.proc).source == "available memory"
    v2(mount / "run", "max", 100 * MIB, high=300 * MIB)
    assert system.memory_limit(proc=machine.proc) == MemoryLimit(200 * MIB, f"cgroup {mount}/run/memory.high")


def test_hybrid_reads_v1_and_v2(machine: Machine) -> None:
    memory = machine.mount("a mount with spaces", "cgroup", "memory")
    unified = machine.mount("unified", "cgroup2", "nsdelegate")
    machine.mount("cpu,cpuacct", "cgroup", "cpu,cpuacct")
    machine.cgroup("5:cpu,cpuacct:/a", "4:memory:/a/b", "0::/c")
    for folder in (memory / "a/b", unified / "c"):
        folder.mkdir(parents=True)
    assert system.cgroup_folders("memory", machine.proc) == [
        memory / "a/b", memory / "a", memory, unified / "c", unified
    ]  # fmt: skip
    v1(memory / "a", 400 * MIB)
    assert system.memory_limit(proc=machine.proc).bytes == 400 * MIB
    v2(unified / "c", 300 * MIB)
    assert system.memory_limit(proc=machine.proc).bytes == 300 * MIB


@pytest.mark.parametrize(
    ("root", "own"),
    [
        ("/docker/abc", "/docker/abc"),  # the mount shows the container's own cgroup only
        ("/", "/docker/abc"),  # the path is the host's, and does not exist here
        ("/", "/../abc"),  # a cgroup outside this cgroup namespace
        ("/../..", "/"),  # the host's tree mounted into a container with a namespace of its own
    ],
)
def test_in_a_containers_view_the_mount_is_the_own_cgroup(machine: Machine, root: str, own: str) -> None:
    mount = machine.mount("memory", "cgroup", "memory", root)
    machine.cgroup(f"4:memory:{own}", "0::/")
    (machine.folder / "abc").mkdir()  # what /../abc would reach
    v1(mount, 200 * MIB, 50 * MIB)
    assert system.cgroup_folders("memory", machine.proc) == [mount]
    assert system.memory_limit(proc=machine.proc).bytes == 150 * MIB


def test_a_container_may_have_cgroups_of_its_own(machine: Machine) -> None:
    mount = machine.mount("memory", "cgroup", "memory", "/docker/abc")
    machine.cgroup("4:memory:/docker/abc/run")
    v1(mount / "run", 200 * MIB)
    assert system.cgroup_folders("memory", machine.proc) == [mount / "run", mount]


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (150_000, 2), (50_000, 1), (900_000, 8)])
def test_cpu_quota_v1(machine: Machine, quota: int, cores: int) -> None:
    mount = machine.mount("cpu", "cgroup", "cpu,cpuacct")
    machine.cgroup("5:cpu,cpuacct:/")
    (mount / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (mount / "cpu.cfs_period_us").write_text("100000\n")
    assert system.cores(machine.proc) == cores


def test_cpu_quota_v2_of_an_ancestor(machine: Machine) -> None:
    mount = machine.mount("cgroup", "cgroup2", "nsdelegate")
    machine.cgroup("0::/slice/run")
    (mount / "slice/run").mkdir(parents=True)
    (mount / "slice/run/cpu.max").write_text("max 100000\n")
    (mount / "slice/cpu.max").write_text("250000 100000\n")
    assert system.cores(machine.proc) == 3


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("model name\t: x\nflags\t\t: fpu avx512f avx512_bf16\nbugs\t\t: none\n", "bf16"),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", "bf16"),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n", "fp32"),
        ("Features\t: fp asimd i8mm bf16\n", "bf16"),
        ("Features\t: fp asimd\n", "fp32"),
        ("", "fp32"),
    ],
)
def test_compute_dtype_auto_follows_the_cpu(machine: Machine, cpuinfo: str, dtype: str) -> None:
    (machine.proc / "cpuinfo").write_text(cpuinfo)
    assert system.compute_dtype("auto", machine.proc) == dtype
    assert [system.compute_dtype(given, machine.proc) for given in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_compute_dtype_auto_is_bf16_on_a_gpu(machine: Machine) -> None:
    (machine.proc / "cpuinfo").write_text("flags\t\t: fpu avx2\n")
    found = {device: system.compute_dtype("auto", machine.proc, device=device) for device in ("cpu", "torch", "cuda")}
    assert found == {"cpu": "fp32", "torch": "fp32", "cuda": "bf16"}
    assert system.compute_dtype("fp32", machine.proc, device="cuda") == "fp32"


def test_a_gpus_memory_is_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert system.gpu_memory() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (3 * MIB, 4 * MIB))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert system.gpu_memory() == MemoryLimit(3 * MIB, "a GPU")


def test_oom_kills_of_v1_and_v2_are_summed(machine: Machine) -> None:
    memory, unified = machine.mount("memory", "cgroup", "memory"), machine.mount("unified", "cgroup2", "nsdelegate")
    machine.cgroup("4:memory:/a", "0::/b")
    (memory / "a").mkdir()
    (unified / "b").mkdir()
    assert system.oom_kills(machine.proc) == 0
    (memory / "a/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (unified / "b/memory.events").write_text("low 0\nhigh 0\nmax 5\noom 4\noom_kill 3\noom_group_kill 7\n")
    assert system.oom_kills(machine.proc) == 5


def test_a_folders_bytes_are_those_of_its_files(tmp_path: Path) -> None:
    assert system.folder_bytes(tmp_path / "absent") == 0
    (tmp_path / "inside").mkdir()
    (tmp_path / "one").write_bytes(b"x" * 5)
    (tmp_path / "inside/two").write_bytes(b"x" * 7)
    assert system.folder_bytes(tmp_path) == 12


def test_free_disk_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert 0 < system.free_disk_bytes(tmp_path / "runs/new/master") <= psutil.disk_usage(str(tmp_path)).total


def test_box_is_complete() -> None:
    box = system.box()
    assert box["cores"] >= 1 and box["memory_gib"] > 0 and box["memory_left_gib"] >= 0
    assert all(value != "" for value in box.values())
    assert {"cpu", "cpu_features", "os", "python", "torch", "transformers", "numpy", "numba", "es_lite"} <= box.keys()


@pytest.fixture
def child() -> Iterator[object]:
    """Starts a child that runs `code` and waits until it is ready; it is killed when the test ends."""
    children = []

    def start(code: str, *fds: int) -> subprocess.Popen:
        code += "\nprint('ready', flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen([sys.executable, "-c", code], pass_fds=fds, **pipes))
        assert children[-1].stdout.readline() == "ready\n"
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.communicate()


def test_pss_sees_what_a_child_touched(child) -> None:
    idle, holding = child(""), child(f"held = bytearray(b'x') * {64 * MIB}")
    extra = system.pss_bytes([holding.pid]) - system.pss_bytes([idle.pid])
    assert abs(extra - 64 * MIB) < 4 * MIB


@linux
def test_pss_counts_shared_pages_once(child) -> None:
    fd = os.memfd_create("shared")
    os.truncate(fd, 64 * MIB)
    idle = [child("").pid, child("").pid]
    code = f"import mmap; shared = mmap.mmap({fd}, {64 * MIB}); sum(shared[i] for i in range(0, {64 * MIB}, 4096))"
    sharing = [child(code, fd).pid, child(code, fd).pid]
    os.close(fd)
    extra = system.pss_bytes(sharing) - system.pss_bytes(idle)
    assert abs(extra - 64 * MIB) < 4 * MIB
    assert sum(psutil.Process(pid).memory_info().rss for pid in sharing) > 128 * MIB


def test_processes_that_are_gone_count_0(child) -> None:
    gone = child("")
    gone.kill()
    time.sleep(0.1)
    zombie = system.pss_bytes([gone.pid])
    gone.communicate()
    assert (zombie, system.pss_bytes([gone.pid]), system.io_bytes([gone.pid])) == (0, 0, (0, 0))


def test_without_smaps_rollup_it_is_uss(child, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", machine.proc)
    holding = child(f"held = bytearray(b'x') * {64 * MIB}")
    assert 64 * MIB < system.pss_bytes([holding.pid]) < 96 * MIB
    holding.kill()
    holding.communicate()
    assert system.pss_bytes([holding.pid]) == 0


@linux
def test_io_counts_what_was_written(child, tmp_path: Path) -> None:
    filesystems = [part for part in psutil.disk_partitions(all=True) if tmp_path.is_relative_to(part.mountpoint)]
    if max(filesystems, key=lambda part: len(part.mountpoint)).fstype in ("tmpfs", "ramfs"):
        pytest.skip("the temporary folder is in memory")
    path = str(tmp_path / "written")
    writer = child(f"import os\nwith open({path!r}, 'wb', 0) as file: file.write(b'x' * {4 * MIB}); os.fsync(file)")
    _, written = system.io_bytes([writer.pid, os.getpid()])
    assert written >= 4 * MIB


def test_peak_outlives_what_caused_it_and_errors_end_nothing(child) -> None:
    pids: list[int] = []
    with PeakPss(lambda: [pids[0]], every_seconds=0.01) as peak:  # an IndexError until there is a child
        time.sleep(0.05)
        holding = child(f"held = bytearray(b'x') * {64 * MIB}")
        pids.append(holding.pid)
        deadline = time.monotonic() + 10
        while not peak.peak_bytes and time.monotonic() < deadline:
            time.sleep(0.02)
        holding.kill()
        holding.communicate()
        assert peak.sample() == 0
    assert 64 * MIB < peak.peak_bytes < 96 * MIB
    assert not any(thread.name == "peak-pss" for thread in threading.enumerate())


@pytest.fixture
def real_v1_cgroup() -> Iterator[Path]:
    with v1_cgroup() as folder:
        yield folder


def test_a_real_v1_cgroup_limits_its_process(real_v1_cgroup: Path) -> None:
    (real_v1_cgroup / "memory.limit_in_bytes").write_text(f"{256 * MIB}")
    code = "from es_lite.system import memory_limit; limit = memory_limit(); print(limit.bytes, limit.source)"
    shell = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    command = ["sh", "-c", shell, str(real_v1_cgroup), sys.executable, "-c", code]
    result = subprocess.run(command, cwd=Path(system.__file__).parents[1], capture_output=True, text=True, check=True)
    left, source = result.stdout.strip().split(" ", 1)
    assert source == f"cgroup {real_v1_cgroup}/memory.limit_in_bytes"
    assert 200 * MIB < int(left) < 256 * MIB
