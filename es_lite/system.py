"""The machine's resources, and how much of them a run uses. Sizes are in bytes.

On Linux from /proc and the cgroups (v1 and v2), elsewhere from psutil. Tests pass another `proc` to simulate other machines.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

import psutil

from es_lite import __version__

PROC = Path("/proc")

# A cgroup's limit, its usage, and the parts of memory.stat that the kernel reclaims before it kills: v1, then v2.
# Exceeding memory.high kills nothing, but slows processes to a crawl.
MEMORY_FILES = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_(?:in)?active_file"),
    ("memory.max", "memory.current", "(?:in)?active_file"),
    ("memory.high", "memory.current", "(?:in)?active_file"),
)

BF16_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "Arm BF16"}
OTHER_FLAGS = {"avx512f": "AVX512", "avx512_vnni": "AVX512-VNNI", "amx_int8": "AMX-INT8", "avx2": "AVX2"}


_most_cores = sys.maxsize


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that may be used, and the name of what limits them."""

    bytes: int
    source: str


def use_at_most(count: int) -> None:
    """From now on, `cores` says at most this: the rest of the machine is somebody else's."""
    global _most_cores
    _most_cores = count


def cores(proc: Path = PROC) -> int:
    """Cores this process can keep busy: its CPU affinity, limited by the CPU quotas of its cgroups (rounded up)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = min(usable, _most_cores)
    for folder in cgroup_folders("cpu", proc):
        quota_v1 = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        fields = (_read(folder / "cpu.max") or quota_v1).split()
        if len(fields) == 2 and fields[0].isdecimal():  # else "max", "-1", or no such files
            usable = min(usable, math.ceil(int(fields[0]) / int(fields[1])))
    return max(1, usable)


def memory_limit(recipe_limit: int = 0, proc: Path = PROC, held: int = 0) -> MemoryLimit:
    """The most memory that a run can use: the least of the machine's available memory and what each cgroup has left, both plus
    the bytes that the run already uses (`held`), and of `recipe_limit` (0: none)."""
    limits = [MemoryLimit(left.bytes + min(held, used), left.source) for left, used in memory_usage(proc)]
    if recipe_limit:
        limits.append(MemoryLimit(recipe_limit, "memory.limit of the recipe"))
    return min(limits, key=lambda limit: limit.bytes)


def memory_usage(proc: Path = PROC) -> list[tuple[MemoryLimit, int]]:
    """(what is left, bytes used that cannot be reclaimed) for the machine and for each cgroup with a memory limit."""
    machine = psutil.virtual_memory()
    return [(MemoryLimit(machine.available, "available memory"), machine.total - machine.available), *cgroup_usage(proc)]


def cgroup_usage(proc: Path = PROC) -> list[tuple[MemoryLimit, int]]:
    """The same for the cgroups alone."""
    limits = []
    for folder in cgroup_folders("memory", proc):
        for limit_name, usage_name, reclaimable in MEMORY_FILES:
            limit = _read(folder / limit_name).strip()
            if limit.isdecimal():
                usage = int(_read(folder / usage_name) or 0)
                cache = re.findall(rf"^{reclaimable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                used = max(0, usage - sum(map(int, cache)))
                limits.append((MemoryLimit(max(0, int(limit) - used), f"cgroup {folder / limit_name}"), used))
    return limits


def oom_kills(proc: Path = PROC) -> int:
    """Processes killed for lack of memory in this process's cgroup and its ancestors."""
    counts = []
    for folder in cgroup_folders("memory", proc):
        for name in ("memory.events", "memory.oom_control"):  # v2, v1
            counts += [int(n) for n in re.findall(r"^oom_kill (\d+)$", _read(folder / name), re.MULTILINE)]
    return sum(counts)


def cgroup_folders(controller: str, proc: Path = PROC) -> list[Path]:
    """The cgroup of this process in the v1 hierarchy of `controller` and in v2, each followed by its ancestors
    as far up as they are mounted; empty if there are no cgroups."""
    own: dict[str, str] = {}  # v1 controller, "" for v2 -> path of this process's cgroup in that hierarchy
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    folders: list[Path] = []
    for line in _read(proc / "self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        hierarchy = "" if kind == "cgroup2" else controller
        if hierarchy not in own or not (kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))):
            continue
        root, point = map(_unescape, mount.split(" ")[3:5])
        folder = top = Path(point)
        # In a container, a path that does not exist under the mount means the mount itself.
        if PurePosixPath(own[hierarchy]).is_relative_to(root):
            inside = PurePosixPath(own[hierarchy]).relative_to(root)
            if ".." not in inside.parts and (top / inside).is_dir():
                folder = top / inside
        folders += [parent for parent in (folder, *folder.parents) if parent.is_relative_to(top)]
    return folders


def family() -> list[int]:
    """IDs of this process and all its descendants."""
    return [os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))]


def pss_bytes(pids: Iterable[int]) -> int:
    """Total PSS of the processes: a page that several share is divided among them. A process that has ended counts 0.

    Without /proc/PID/smaps_rollup (macOS), USS, which excludes shared pages. Raises PermissionError for another user's process.
    """
    measure = _pss if (PROC / "self/smaps_rollup").exists() else _uss
    return sum(map(measure, pids))


def io_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """Bytes that the processes have read from and written to disks; 0 if the system does not say.

    Reads that the page cache serves do not count; a write counts when it dirties the page cache.
    """
    read = written = 0
    for pid in pids:
        counts = dict(re.findall(r"^(\w+): (\d+)$", _read(PROC / str(pid) / "io"), re.MULTILINE))
        read += int(counts.get("read_bytes", 0))
        written += int(counts.get("write_bytes", 0))
    return read, written


def trim_memory() -> None:
    """Returns memory that this process has freed to the system, if the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def gpu_memory() -> MemoryLimit | None:
    """Free memory and name of the GPU that torch would use; None if there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return MemoryLimit(torch.cuda.mem_get_info()[0], torch.cuda.get_device_name())


def compute_dtype(requested: str, proc: Path = PROC, device: str = "cpu") -> str:
    """The type to compute layers in, "bf16" or "fp32"; "auto" is bf16 if the device computes it natively."""
    if requested != "auto":
        return requested
    if device == "cuda":
        return "bf16"
    return "bf16" if _cpu_flags(proc) & BF16_FLAGS.keys() else "fp32"


def free_disk_bytes(path: str | Path) -> int:
    """Bytes free to this user on the disk of `path`, which need not exist."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def folder_bytes(path: Path) -> int:
    """Size of all files under `path`; those that vanish meanwhile count 0."""
    size = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            size += file.lstat().st_size if file.is_file() else 0
    return size


def box() -> dict[str, str | int | float]:
    """Describes the machine for a measurement: hardware, the part of it that this process may use, and versions."""
    model = re.search(r"^model name\s*: (.+)$", _read(PROC / "cpuinfo"), re.MULTILINE)
    features = [words for flag, words in (BF16_FLAGS | OTHER_FLAGS).items() if flag in _cpu_flags(PROC)]
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_features": ", ".join(features) or "none known",
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "memory_left_gib": round(memory_limit().bytes / 2**30, 1),
        "os": platform.platform(),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of everything that a run's bits depend on."""
    packages = {package: _version(package) for package in ("torch", "transformers", "numpy", "numba")}
    return {"python": platform.python_version(), **packages, "es_lite": __version__}


def _read(path: Path) -> str:
    """The file's text; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(text: str) -> str:
    """A path from mountinfo, which writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _pss(pid: int) -> int:
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^Pss: +(\d+) kB$", rollup, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _uss(pid: int) -> int:
    try:
        memory = psutil.Process(pid).memory_full_info()
    except psutil.NoSuchProcess:  # a zombie too
        return 0
    except psutil.AccessDenied as error:
        raise PermissionError(str(error)) from None
    return getattr(memory, "uss", memory.rss)  # USS is missing if the kernel has no smaps at all


def _cpu_flags(proc: Path) -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*: (.+)$", _read(proc / "cpuinfo"), re.MULTILINE)
    return set(match[1].split()) if match else set()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
