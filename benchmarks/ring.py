"""How much faster are two processes than one, and is what they send the least that a ring sends?

    mpiexec -n 2 python benchmarks/ring.py

Each process has one thread. One alone and all together take turns, so that whatever else runs disturbs both; what is
printed are medians of ratios, beside what ``benchmarks/ring_model.py`` says of a machine with the flops,
bandwidth and latency that are measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
from mpi4py import MPI
from ring_model import Machine, Work, seconds, step_of

import fastattn
from fastattn.integrations.mpi import passes, ring_attention, ring_attention_backward, shard
from fastattn.integrations.mpi.courier import Courier

COMM = MPI.COMM_WORLD
HEADS, FEATURES = 8, 64
OPTIONS: dict[str, Any] = {"is_causal": True}
Arrays: TypeAlias = Any  # a list of these


def inputs(length: int) -> Arrays:
    """Return dO, query, key and value."""
    rng = np.random.default_rng(0)
    return list(rng.standard_normal((4, 1, HEADS, length, FEATURES), dtype=np.float32))


def pause() -> None:
    """Wait for all others, without taking their cores."""
    request = COMM.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def timed(call: Callable[[], object]) -> float:
    """Return how long the slowest rank takes."""
    pause()
    begin = time.perf_counter()
    call()
    return float(COMM.allreduce(time.perf_counter() - begin, MPI.MAX))


def alone(call: Callable[[], object]) -> float:
    """Return how long the first rank takes while the others sleep."""
    pause()
    begin = time.perf_counter()
    if COMM.rank == 0:
        call()
    taken = time.perf_counter() - begin
    pause()
    return float(COMM.bcast(taken))


def one(arrays: Arrays) -> dict[str, Callable[[], object]]:
    """Return both passes of one process."""
    grad_out, query, key, value = arrays
    operands = query, key, value
    out, lse = fastattn.attention(*operands, return_lse=True, **OPTIONS)
    return {
        "forward": lambda: fastattn.attention(*operands, return_lse=True, **OPTIONS),
        "backward": lambda: fastattn.attention_backward(grad_out, *operands, out, lse, **OPTIONS),
    }


def all_together(arrays: Arrays) -> dict[str, Callable[[], object]]:
    """Return both passes of all processes."""
    own: Arrays = [shard(COMM, array) for array in arrays]
    grad_out, query, key, value = own
    operands = query, key, value
    out, lse = ring_attention(COMM, *operands, return_lse=True, **OPTIONS)
    return {
        "forward": lambda: ring_attention(COMM, *operands, return_lse=True, **OPTIONS),
        "backward": lambda: ring_attention_backward(COMM, grad_out, *operands, out, lse, **OPTIONS),
    }


def observed(call: Callable[[], object]) -> tuple[int, float]:
    """Return how many bytes this rank sends, and the processor's seconds in which it computes, without waiting."""
    couriers: list[Courier] = []
    busy: list[float] = []
    attempt = passes.Forward.attempt

    class Kept(Courier):
        def __init__(self, comm: Any) -> None:
            super().__init__(comm)
            couriers.append(self)

    def counted(self: Any, function: Any, *arguments: Any) -> None:
        begin = time.thread_time()
        attempt(self, function, *arguments)
        busy.append(time.thread_time() - begin)

    with (
        mock.patch.object(passes, "Courier", Kept),
        mock.patch.object(passes.Forward, "attempt", counted),
        mock.patch.object(passes.Backward, "attempt", counted),
    ):
        call()
    return couriers[0].sent, sum(busy)


def of_processor(call: Callable[[], object]) -> float:
    """Return the processor's seconds of a call in one thread."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def network() -> tuple[float, float]:
    """Return bytes in a second, both ways at once, and the seconds of a message of one byte."""
    found = []
    for size in (1, 1 << 24):
        leaving, coming = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        after, before = (COMM.rank + 1) % COMM.size, (COMM.rank - 1) % COMM.size
        times = [timed(lambda: COMM.Sendrecv(leaving, after, recvbuf=coming, source=before)) for _ in range(9)]  # noqa: B023
        found.append(statistics.median(times))
    return (1 << 24) / max(found[1] - found[0], 1e-9), found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    fastattn.set_num_threads(1)
    ranks, length = COMM.size, given.length
    grown = round(length * sqrt(ranks) / (2 * ranks)) * 2 * ranks  # as much work for each rank as `length` for one
    whole = one(inputs(length))
    shared = {"strong": all_together(inputs(length)), "weak": all_together(inputs(grown))}
    bandwidth, latency = network()
    lines = [f"{ranks} ranks, {length} positions, weak {grown}; {bandwidth / 1e9:.2g} GB/s, {latency * 1e6:.0f} µs"]
    for what, call in whole.items():
        times: dict[str, list[float]] = {"alone": [], "strong": [], "weak": []}
        for _ in range(given.rounds):
            times["alone"].append(alone(call))
            for kind, calls in shared.items():
                times[kind].append(timed(calls[what]))
        work, ring = Work(length, HEADS, HEADS, FEATURES), shared["strong"][what]
        flops = step_of(work, Machine(1.0, 1.0, 0.0, 0.0, 0.0, 0.0), 1, what).computing / statistics.median(
            times["alone"]
        )
        machine = Machine(flops, bandwidth, latency, overhead=5e-4, merging=2.5e-9, planning=6e-5)
        seen = [(of_processor(call), *observed(ring)) for _ in range(given.rounds)]
        works = [COMM.allreduce(own) / COMM.allreduce(busy) / ranks for own, _, busy in seen]
        sent, least = seen[0][1], max(1, ranks - 1) * 2 * HEADS * (length // ranks) * FEATURES * 4
        for kind, factor in (("strong", ranks), ("weak", 1)):
            ratios = [a / b / factor for a, b in zip(times["alone"], times[kind], strict=True)]
            size = Work(length if kind == "strong" else grown, HEADS, HEADS, FEATURES)
            wanted = seconds(work, machine, 1, what) / seconds(size, machine, ranks, what) / factor
            lines.append(f"{what}, {kind}: efficiency {statistics.median(ratios):.2f}, by the model {wanted:.2f}")
        lines.append(
            f"{what}: {sent} bytes sent by a rank, {sent / max(1, least):.2f} times its keys and values once around"
        )
        step = step_of(work, machine, ranks, what)
        lines.append(
            f"{what}, strong, without waiting: efficiency {statistics.median(works):.2f}, by the model "
            f"{step.computing / step.busy:.2f}"
        )
    if COMM.rank == 0:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
