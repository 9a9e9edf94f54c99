"""An hour of what a server does: `make soak`, or `make soak ARGS="--minutes 5"`.

Threads make calls of everything in changing shapes, and some of them again: the bits are what they were the first time.
Meanwhile the process forks, and the child computes; signals interrupt calls, or make calls of their own; calls are
refused; caches grow, are taken back and written to files. Memory, threads, open files and remembered plans are looked
at all the while: from when most shapes have been there, none of them grows.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn import BlockMask, KVCache
from fastattn.cpu.host import session

SHAPES = 3000  # seeds of calls: they come again, and so do their bits
PLANS = 2 * session.REMEMBERED
GROWTH = 24  # MiB from one part of the time to another: what allocators of threads keep differs by as much
FILES, EXTRA_THREADS = 8, 40
HANGS = 1200.0  # seconds: a turn takes no longer, though it compiles; who is where then is written to stderr


def near(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A function of scores."""
    return score - abs(query - key) * 0.1


def call_of(seed: int) -> list[Any]:
    """Make the calls of a seed, and return what they give."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(rng.choice(("f4", "f8", "f2")))
    rows, group, queries, keys, features = (int(rng.integers(1, most)) for most in (4, 4, 150, 300, 70))
    queries = queries if seed % 3 else 1
    arrays = [
        rng.standard_normal((rows, heads, n, features)).astype(dtype)
        for heads, n in ((2 * group, queries), (2, keys), (2, keys))
    ]
    options: dict[str, Any] = {
        "is_causal": (False, True, "bottom-right")[seed % 3],
        "enable_gqa": True,
        "return_lse": True,
    }
    table = rng.standard_normal(5)
    further: list[dict[str, Any]] = [
        {},
        {"window": (int(rng.integers(0, 60)), None)},
        {"attn_mask": rng.random((queries, keys)) < 0.7},
        {"softcap": 5.0, "sinks": rng.standard_normal(2 * group)},
        {"dropout_p": 0.3, "rng": seed},
        {"key_lengths": rng.integers(0, keys + 1, rows)},
        {"score_mod": near},
        {"score_mod": lambda score, batch, head, query, key: score + table[key % 5]},
        {"block_mask": BlockMask.from_intervals(np.zeros(queries, int), rng.integers(0, keys + 1, queries), keys)},
    ]
    options |= further[seed % len(further)]
    with fastattn.num_threads(1 + seed % 3):
        found = fastattn.attention(*arrays, **options)
        if seed % 5 == 0:
            del options["return_lse"]
            return [*found, *fastattn.attention_backward(found[0], *arrays, *found, **options)]
        if seed % 5 == 1 and "dropout_p" not in options:
            del options["return_lse"]
            return [*found, *fastattn.attention_summary(*arrays[:2], **options)]
    return list(found)


def with_a_cache(seed: int, folder: Path) -> list[Any]:
    """Let a cache grow, take some back, keep it in a file, and ask it."""
    rng = np.random.default_rng(seed)
    cache = KVCache(2, 2, 16, dtype=("float32", "int8", "bfloat16")[seed % 3], window=(400, 0))
    for count in rng.integers(1, 300, 4):
        key, value = rng.standard_normal((2, 2, 2, int(count), 16), np.float32)
        cache.append(key, value)
        cache.truncate(cache.lengths - min(3, int(count)))
    path = folder / f"{threading.get_ident()}"
    cache.save(path)
    cache = KVCache.load(path)
    cache.select([1, 0, 1])
    return [cache.attention(rng.standard_normal((3, 4, 1, 16), np.float32))]


def digest(results: list[Any]) -> bytes:
    """Return what results are known by."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in results)).digest()


class Soak:
    """What threads share: what each seed gave, what was done, and what went wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, dict[int, bytes]()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()

    def once(self, seed: int, what: str) -> None:
        """Make the calls of a seed, and compare with what they gave before."""
        found = digest(with_a_cache(seed, self.folder) if seed % 7 == 3 else call_of(seed))
        if self.known.setdefault(seed, found) != found:
            self.wrong.append(f"seed {seed} gave other bits, {what}")
        self.done[what] += 1

    def calls(self, number: int) -> None:
        """Make calls until it is over; every so often, one that is refused."""
        rng = random.Random(number)
        while not self.over.is_set():
            try:
                self.once(rng.randrange(SHAPES), "in a thread")
                if rng.random() < 0.05:
                    self.refused()
            except Exception as error:
                self.wrong.append(f"in a thread: {error!r}")

    def refused(self) -> None:
        """Make a call that has no meaning."""
        try:
            fastattn.attention(np.ones((2, 3)), np.ones((2, 4)), np.ones((2, 4)))
        except ValueError:
            self.done["refused"] += 1

    def forked(self, seed: int) -> None:
        """Make calls in a child."""
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
            signal.setitimer(signal.ITIMER_REAL, HANGS / 2)
            before = len(self.wrong)
            try:
                for more in range(5):
                    self.once((seed + more) % SHAPES, "in a child")
            except BaseException as error:
                self.wrong.append(repr(error))
            sys.stderr.write("".join(f"{line}\n" for line in self.wrong[before:]))
            os._exit(len(self.wrong) > before)
        _, status = os.waitpid(child, 0)
        if status:
            self.wrong.append(f"a child that began with seed {seed} ended with status {status}")
        self.done["in a child"] += 5

    def interrupted(self, seed: int) -> None:
        """Be interrupted somewhere in a long call, and go on."""
        arrays = np.ones((3, 4, 600, 64), np.float32)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + (seed % 97) * 1e-4)
                for _ in range(50):
                    fastattn.attention(*arrays[:, None])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            self.done["interrupted"] += 1
        self.once(seed, "after an interrupt")

    def in_a_handler(self, seed: int) -> None:
        """Make calls in a handler of a signal, which comes in a call."""
        signal.signal(signal.SIGALRM, lambda *_: self.once((seed + 1) % SHAPES, "in a handler"))
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        self.once(seed, "around a handler")
        signal.setitimer(signal.ITIMER_REAL, 0)

    def sample(self) -> dict[str, Any]:
        """Return how much there is of what must not grow."""
        status = Path("/proc/self/status").read_text("utf-8")
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        plans = session.current.plans
        return {
            "MiB": round(resident / 1024, 1),
            "threads": len(os.listdir("/proc/self/task")),
            "files": len(os.listdir("/proc/self/fd")),
            "plans": len(plans) + len(plans.older),
        }


def soak(minutes: float, threads: int, log: Path) -> list[str]:
    """Go on for some minutes, and return what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        workers = [threading.Thread(target=soak.calls, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        try:
            samples = turns(soak, minutes, log)
        finally:
            soak.over.set()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        for worker in workers:
            worker.join()
        faulthandler.cancel_dump_traceback_later()
        return soak.wrong + grown(samples)


def turns(soak: Soak, minutes: float, log: Path) -> list[dict[str, Any]]:
    """Do in the main thread what only it can, and write down how much there is of everything meanwhile."""
    rng, begin, samples = random.Random(0), time.monotonic(), list[dict[str, Any]]()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        while (seconds := time.monotonic() - begin) < 60 * minutes:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            turn: Callable[[int], None] = rng.choice((soak.forked, soak.interrupted, soak.in_a_handler))
            turn(rng.randrange(SHAPES))
            if not samples or seconds - samples[-1]["seconds"] > minutes / 6:
                samples.append({"seconds": round(seconds), **soak.sample(), **soak.done, "wrong": len(soak.wrong)})
                file.write(json.dumps(samples[-1]) + "\n")
                file.flush()
    return samples


def grown(samples: list[dict[str, Any]]) -> list[str]:
    """Return what has grown from the second third of the time to the last, or is more than it may be."""
    third = len(samples) // 3
    wrong = []
    if third:
        earlier, later = (
            max(each["MiB"] for each in part) for part in (samples[third : 2 * third], samples[2 * third :])
        )
        if later > earlier + GROWTH:
            wrong.append(f"memory grew from {earlier} to {later} MiB")
    most = {name: max(each[name] for each in samples) for name in ("threads", "files", "plans")}
    limits = {"threads": EXTRA_THREADS, "files": samples[0]["files"] + FILES, "plans": PLANS}
    return wrong + [
        f"{most[name]} {name}; expected {limit} at most" for name, limit in limits.items() if most[name] > limit
    ]


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long, %(default)s unless given")
    parser.add_argument("--threads", type=int, default=4, help="how many make calls, %(default)s unless given")
    parser.add_argument("--log", type=Path, default=Path(__file__).parents[2] / ".fuzz" / "soak.jsonl")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # it is, and may fork
    wrong = soak(given.minutes, given.threads, given.log)
    for line in wrong:
        print(line)
    print(given.log.read_text("utf-8").splitlines()[-1])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
