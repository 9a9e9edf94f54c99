"""How many CPUs a call may use: those that its thread may run on, or fewer where a container has a quota.

Both are the system's to say. The quota and the machine are asked once per process. A thread's affinity is its own, and
may change, so that it is asked again: whenever a user asks for the number, and now and then by calls that are long
enough not to notice.
"""

import math
import os
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from fastattn.machine.os_threads import local

MOST = 1024  # threads of a call
LOOK_AGAIN = 100_000_000  # nanoseconds after which what is known of a thread's affinity is old


class _Known(local):
    """What is known of the calling thread."""

    count = 0  # CPUs it may use, 0 before the first look
    cpus: frozenset[int] = frozenset()  # on which it may run, empty where the system does not tell
    old = 0  # when to look again, by `time.perf_counter_ns`


known = _Known()


def look() -> int:
    """Look how many CPUs the calling thread may use, and note it in `known`."""
    known.cpus = affinity()
    known.count = count = min(len(known.cpus) or limit(), limit())
    known.old = time.perf_counter_ns() + LOOK_AGAIN
    return count


def look_if_old() -> None:
    """The same, for the calls to come, if the last look was long ago."""
    if time.perf_counter_ns() > known.old:
        look()


def affinity() -> frozenset[int]:
    """The CPUs on which the calling thread may run, none where the system does not tell."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, NotImplementedError, OSError):  # not on this platform, or not in this sandbox
        return frozenset()


@cache
def limit() -> int:
    """The CPUs that the machine has (or ``PYTHON_CPU_COUNT`` says), or as many as the quota is for, rounded up."""
    return max(1, math.ceil(min(os.cpu_count() or 1, quota(), MOST)))


def quota(proc: Path = Path("/proc/self")) -> float:
    """How many CPUs' time the process may use by the quotas of its control groups (Linux), infinity if there are none.

    Parameters
    ----------
    proc : Path
        Where the system describes the process: which groups it is in, and where these are mounted.
    """
    try:
        groups, mounts = ((proc / name).read_text(errors="replace").splitlines() for name in ("cgroup", "mountinfo"))
    except OSError:  # not on this platform
        return math.inf
    return min((_quota_of(folder) for folder in _folders(groups, mounts)), default=math.inf)


def _folders(groups: list[str], mounts: list[str]) -> Iterator[Path]:
    """The folders of the groups that limit the process: its own, and all that these are in.

    Lines are like ``4:cpu,cpuacct:/docker/1234`` and, of the second version of control groups, ``0::/docker/1234``;
    and ``31 24 0:28 /docker /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct``, where /docker is what is seen at
    /sys/fs/cgroup/cpu: in a container often the group itself.
    """
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        system, _, options = kind.partition(" ")
        if system not in ("cgroup", "cgroup2"):
            continue
        root, point = fields.split(" ")[3:5]
        for group in groups:
            number, controllers, path = group.split(":", 2)
            if system == "cgroup2":
                is_meant = number == "0"
            else:
                is_meant = "cpu" in controllers.split(",") and "cpu" in options.split(" ")[-1].split(",")
            if is_meant:
                folder = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))  # a space is \040
                yield folder
                for part in _below(path, root):
                    folder /= part
                    yield folder


def _below(path: str, root: str) -> tuple[str, ...]:
    """The names that lead from what is mounted to a group; none if the group is not in there, and cannot be seen."""
    try:
        parts = PurePosixPath(path).relative_to(root).parts
    except ValueError:
        return ()
    return () if ".." in parts else parts


def _quota_of(group: Path) -> float:
    """The quota of one group: microseconds of all CPUs' time in a period of so many."""
    try:
        if (group / "cpu.max").exists():
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        quota = float(allowed) / float(period)  # "max" is no number, -1 means the same
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return quota if quota > 0 else math.inf


def _forget() -> None:
    """In a forked child, which may be in other groups."""
    limit.cache_clear()
    known.count = known.old = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
