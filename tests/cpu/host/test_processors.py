"""How many CPUs a call uses by itself: a thread's affinity, and the CPU quota of control groups, in files made up."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

import fastattn
from fastattn.cpu.host import pool, processors
from fastattn.cpu.host import threads as counting

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="the system cannot bind threads to CPUs, or has but one CPU",
)


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("FASTATTN_NUM_THREADS", raising=False)
    monkeypatch.setattr("fastattn.cpu.host.threads._threads", None)
    processors._forget()
    yield
    processors._forget()


# -- quotas of control groups ------------------------------------------------------------------------------------------


class Groups:
    """A process's files about control groups, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.groups: list[str] = []
        self.mounts = ["22 1 0:21 / /proc rw,nosuid - proc proc rw", "23 1 8:1 / / rw,relatime - ext4 /dev/root rw"]

    def mount(self, kind: str, point: str, root: str = "/", options: str = "rw") -> None:
        """Have control groups of this kind, "cgroup" or "cgroup2", seen in a folder, from the group `root` on."""
        where = str(self.folder / point).replace(" ", "\\040")
        self.mounts.append(
            f"{30 + len(self.mounts)} 23 0:28 {root} {where} rw,nosuid shared:9 - {kind} {kind} {options}"
        )

    def mount_v1(self, root: str = "/", controllers: str = "cpu,cpuacct") -> None:
        """Have one of the hierarchies of the first version."""
        self.mount("cgroup", f"sys/{controllers}", root, f"rw,{controllers}")

    def v2(self, group: str, text: str) -> None:
        """Have a group of the second version with this quota."""
        self.write(f"sys/{group}", "cpu.max", text)

    def v1(self, group: str, quota: int, period: int = 100000) -> None:
        """Have a group of the first version with this quota."""
        self.write(f"sys/cpu,cpuacct/{group}", "cpu.cfs_quota_us", f"{quota}\n")
        self.write(f"sys/cpu,cpuacct/{group}", "cpu.cfs_period_us", f"{period}\n")

    def write(self, group: str, name: str, text: str) -> None:
        """Write one file of a group."""
        (self.folder / group).mkdir(parents=True, exist_ok=True)
        (self.folder / group / name).write_text(text)

    def quota(self) -> float:
        """Return what is read of all that."""
        (self.proc / "cgroup").write_text("".join(line + "\n" for line in self.groups))
        (self.proc / "mountinfo").write_text("".join(line + "\n" for line in self.mounts))
        return processors.quota(self.proc)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    """Return the files of a process that is in no group."""
    return Groups(tmp_path)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("max 100000\n", math.inf),
        ("200000 100000\n", 2),
        ("50000 100000\n", 0.5),
        ("150000 100000\n", 1.5),
        ("30000 20000", 1.5),
        ("", math.inf),
        ("lots of time", math.inf),
        ("100000 0", math.inf),
    ],
)
def test_a_container_sees_its_own_group_as_the_root(groups: Groups, text: str, cpus: float) -> None:
    groups.groups = ["0::/"]
    groups.mount("cgroup2", "sys")
    groups.v2("", text)
    assert groups.quota() == cpus


def test_the_least_of_nested_groups_counts(groups: Groups) -> None:
    groups.groups = ["0::/user.slice/job 1/step"]
    groups.mount("cgroup2", "sys")
    groups.write("sys", "cgroup.controllers", "cpu")  # the root has no quota
    groups.v2("user.slice", "800000 100000")
    groups.v2("user.slice/job 1", "300000 100000")
    groups.v2("user.slice/job 1/step", "max 100000")
    groups.v2("user.slice/another", "100000 100000")
    assert groups.quota() == 3


@pytest.mark.parametrize(("quota", "cpus"), [(-1, math.inf), (0, math.inf), (250000, 2.5)])
def test_the_first_version_of_control_groups(groups: Groups, quota: int, cpus: float) -> None:
    groups.groups = ["5:memory:/job", "4:cpu,cpuacct:/job", "3:cpuset:/job"]
    groups.mount_v1(controllers="memory")
    groups.mount_v1(controllers="cpuset")
    groups.mount_v1()
    groups.v1("", -1)
    groups.v1("job", quota)
    assert groups.quota() == cpus


def test_both_versions_at_once(groups: Groups) -> None:
    groups.groups = ["1:cpu,cpuacct:/job", "0::/job"]
    groups.mount_v1()
    groups.mount("cgroup2", "sys/unified")
    groups.write("sys/unified/job", "cgroup.procs", "1")
    groups.v1("job", 700000)
    assert groups.quota() == 7


def test_a_group_that_is_mounted_itself(groups: Groups) -> None:
    """A container of the first version knows its name outside, and sees its own group alone."""
    groups.groups = ["4:cpu,cpuacct:/docker/1234/inner"]
    groups.mount_v1(root="/docker/1234")
    groups.v1("", 400000)
    groups.v1("inner", 200000)
    assert groups.quota() == 2


@pytest.mark.parametrize("path", ["/kubepods/pod/1234", "/../../other"])
def test_a_group_that_is_out_of_sight(groups: Groups, path: str) -> None:
    groups.groups = [f"0::{path}"]
    groups.mount("cgroup2", "sys", root="/docker" if ".." not in path else "/")
    groups.v2("", "200000 100000")
    assert groups.quota() == 2


def test_a_folder_with_a_space(groups: Groups) -> None:
    groups.groups = ["0::/"]
    groups.mount("cgroup2", "sys of mine")
    groups.write("sys of mine", "cpu.max", "200000 100000")
    assert groups.quota() == 2


def test_no_control_groups(groups: Groups, tmp_path: Path) -> None:
    assert groups.quota() == math.inf
    assert processors.quota(tmp_path / "nowhere") == math.inf


# -- how many CPUs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quota", "count"), [(math.inf, 6), (6.5, 6), (2.0, 2), (1.5, 2), (0.2, 1)])
def test_a_quota_rounds_up(monkeypatch: pytest.MonkeyPatch, quota: float, count: int) -> None:
    monkeypatch.setattr(processors, "quota", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(6)), raising=False)
    assert fastattn.get_num_threads() == count
    fastattn.set_num_threads(5)
    assert fastattn.get_num_threads() == 5, "who says a number gets it"


def test_python_may_say_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHON_CPU_COUNT changes what `os.cpu_count` returns."""
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(6)), raising=False)
    assert fastattn.get_num_threads() == 3


def test_no_more_threads_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 5000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(5000)), raising=False)
    assert fastattn.get_num_threads() == pool.MOST


@pytest.mark.parametrize("error", [None, OSError("forbidden"), NotImplementedError()])
def test_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def fails(thread: int) -> None:
        assert error is not None
        raise error

    if error is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", fails, raising=False)
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert fastattn.get_num_threads() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    processors._forget()
    assert fastattn.get_num_threads() == 1


def test_a_call_looks_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the affinity, that is, if the call takes long enough not to notice; the calls that follow use what it saw."""
    cpus = set(range(6))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: cpus, raising=False)
    short, long = (np.zeros((3, 1, 4, length, 32), np.float32) for length in (8, 512))
    for threads in (1, 6, 2, 1, 4):
        fastattn.attention(*long)
        cpus = set(range(threads))
        fastattn.attention(*short)
        before = counting.threads_of_call()
        fastattn.attention(*long)
        assert counting.threads_of_call() == before, "it has not been a while"
        processors.known.old = time.perf_counter_ns()
        fastattn.attention(*long)
        assert counting.threads_of_call() == threads
        assert fastattn.get_num_threads() == threads


def test_who_asks_is_told_what_holds_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processors, "quota", lambda: math.inf)
    for threads in (1, 6, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda thread, n=threads: set(range(n)), raising=False)
        assert fastattn.get_num_threads() == counting.threads_of_call() == threads


# -- threads that are bound to CPUs ------------------------------------------------------------------------------------

PREAMBLE = """
import os, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import fastattn
from fastattn.cpu.host import pool, processors, session, threads
pool.WORTH_SHARING = pool.WORTH_WAKING = 0
x = np.random.default_rng(0).standard_normal((3, 1, 4, 200, 32), dtype=np.float32)
everywhere = os.sched_getaffinity(0)
here = {min(everywhere)}
count = processors.look()

def bound():
    os.sched_setaffinity(0, here)
    fastattn.attention(*x)
    return fastattn.get_num_threads()
"""


def run(code: str) -> str:
    """Run code in a process that has used fastattn in no thread yet."""
    return processes.run(PREAMBLE + code, FASTATTN_NUM_THREADS=None, PYTHONWARNINGS="ignore::DeprecationWarning")


@needs_affinity
def test_fewer_cpus_for_the_process_are_fewer_threads() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fastattn
print(fastattn.get_num_threads())
"""
    assert processes.run(code, FASTATTN_NUM_THREADS=None) == "1\n"


@needs_affinity
def test_the_thread_that_calls_first_decides_for_itself_alone() -> None:
    run("""
with ThreadPoolExecutor(1) as executor:
    assert executor.submit(bound).result() == 1
    assert fastattn.get_num_threads() == count
    fastattn.attention(*x)
    assert session.current.pool.staff == count - 1
    assert executor.submit(fastattn.get_num_threads).result() == 1
""")


@needs_affinity
def test_a_process_that_is_bound_after_its_first_call() -> None:
    run("""
fastattn.attention(*x)
assert bound() == 1
os.sched_setaffinity(0, everywhere)
assert fastattn.get_num_threads() == count
""")


@needs_affinity
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_that_is_bound() -> None:
    run("""
fastattn.attention(*x)
pid = os.fork()
if not pid:
    os.sched_setaffinity(0, here)
    fastattn.attention(*x)
    os._exit(0 if session.current.pool.staff == 0 and fastattn.get_num_threads() == 1 else 7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""")


@needs_affinity
@pytest.mark.skipif(pool._current_cpu() < 0, reason="the system does not tell on which CPU a thread runs")
def test_workers_are_not_bound_for_good_by_a_thread_that_is() -> None:
    run("""
def starts_workers():
    with fastattn.num_threads(2):
        bound()

with ThreadPoolExecutor(1) as executor:
    executor.submit(starts_workers).result()
fastattn.set_num_threads(2)
end, threads = time.monotonic() + 20, session.current.pool.threads
while (0 not in threads or os.sched_getaffinity(threads[0]) <= here) and time.monotonic() < end:
    time.sleep(0.01)  # until it has begun, sleeps, and the caller is on that CPU
    fastattn.attention(*x)
    if pool._current_cpu() not in here:
        os.sched_setaffinity(0, here)
        os.sched_setaffinity(0, everywhere)
assert not os.sched_getaffinity(threads[0]) <= here
assert os.sched_getaffinity(0) == everywhere
""")
