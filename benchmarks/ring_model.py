"""How long does ring attention take on many machines: computing, bytes and latency, and where it ends?

``python benchmarks/ring_model.py`` prints the tables of docs/distributed.md. Nothing is measured here:
``benchmarks/ring.py`` measures two processes, and holds the same formula to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)
#: Words of a key or value that move in a step, for each one of the forward pass: gradients move in the backward pass.
MOVED = {"forward": 1.0, "backward": 2.0}
#: Seconds in which a number of a gradient is added, in units of those in which one of a result is merged.
ADDED = 0.2
#: Multiply-adds for each pair of a query and a key, in units of 2 · D: two products forward, five backward.
PRODUCTS = {"forward": 2, "backward": 5}


@dataclass(frozen=True)
class Machine:
    """What one worker is, and what is between two of them."""

    flops: float  # floating operations in a second, of one worker
    bandwidth: float  # bytes in a second, in each direction
    latency: float  # seconds until a message arrives that has no length
    overhead: float  # seconds of a step in which nothing is computed: calls, plans, threads
    merging: float  # seconds in which one number of a result is merged, by one core
    planning: float  # seconds for each of the workers, before the first step: who needs whose keys


@dataclass(frozen=True)
class Work:
    """A call: one row of a batch, causal, in zigzag."""

    length: int
    heads: int = 32
    key_heads: int = 8
    features: int = 128
    itemsize: int = 4


@dataclass(frozen=True)
class Step:
    """Seconds of one step of the ring."""

    computing: float
    merging: float
    moving: float
    overhead: float

    @property
    def busy(self) -> float:
        """How long a worker has to do itself."""
        return self.computing + self.merging + self.overhead


def step_of(work: Work, machine: Machine, workers: int, what: str) -> Step:
    """Return what one of as many steps takes as there are workers, each with as many keys."""
    share = work.length / workers
    flops = PRODUCTS[what] * 2 * work.features * work.heads * share * share / 2  # causal: half of the pairs
    moved = MOVED[what] * 2 * work.key_heads * share * work.features * work.itemsize
    if what == "forward":
        merged = work.heads * share * work.features  # two pieces, each with half of the queries
    else:
        merged = (work.heads + 4 * work.key_heads) * share * work.features * ADDED
    return Step(
        computing=flops / machine.flops,
        merging=merged * machine.merging,
        moving=machine.latency + moved / machine.bandwidth,
        overhead=machine.overhead,
    )


def seconds(work: Work, machine: Machine, workers: int, what: str = "forward") -> float:
    """Return the time of a call: all steps but the last have the next keys on their way meanwhile."""
    step = step_of(work, machine, workers, what)
    return workers * machine.planning + (workers - 1) * max(step.busy, step.moving) + step.busy


def efficiency(work: Work, machine: Machine, workers: int, what: str = "forward") -> float:
    """Return how much of the workers' time is computing what one would compute without merging, in as many times."""
    return step_of(work, machine, workers, what).computing * workers / seconds(work, machine, workers, what)


def least_share(work: Work, machine: Machine, what: str = "forward") -> float:
    """Return how many keys of each worker take as long to be computed with as to be moved, without latency."""
    bytes_of_key = MOVED[what] * 2 * work.key_heads * work.features * work.itemsize
    flops_of_pair = PRODUCTS[what] * work.features * work.heads
    return bytes_of_key / machine.bandwidth * machine.flops / flops_of_pair


#: A worker of 8 cores at 100 GF/s each, as a part of a node with memory of its own is, with networks that are usual.
NODE = {"flops": 8 * 100e9, "overhead": 200e-6, "merging": 2.5e-9, "planning": 60e-6}
NETWORKS = {
    "10 Gb/s, 50 µs": Machine(bandwidth=1.25e9, latency=50e-6, **NODE),
    "25 Gb/s, 20 µs": Machine(bandwidth=3.1e9, latency=20e-6, **NODE),
    "200 Gb/s, 2 µs": Machine(bandwidth=25e9, latency=2e-6, **NODE),
}


def table(length: int, what: str) -> list[str]:
    """Return a table in Markdown: the time on each network, and what part of it is computing."""
    work = Work(length)
    lines = [f"| workers | keys of each | {' | '.join(NETWORKS)} |", f"|---|---|{'---|' * len(NETWORKS)}"]
    for workers in WORKERS:
        cells = [
            f"{_time(seconds(work, machine, workers, what))}, {efficiency(work, machine, workers, what):.0%}"
            for machine in NETWORKS.values()
        ]
        lines.append(f"| {workers} | {length // workers:,} | {' | '.join(cells)} |")
    return lines


def _time(given: float) -> str:
    return f"{given:.3g} s" if given >= 1 else f"{given * 1e3:.3g} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 1_048_576])
    given = parser.parse_args(arguments)
    for what in PRODUCTS:
        for length in given.lengths:
            print(f"\n{length:,} positions, {what}\n")
            print("\n".join(table(length, what)))
        shares = (f"{name}: {least_share(Work(1), machine, what):.0f}" for name, machine in NETWORKS.items())
        print(f"\nkeys of each worker below which bytes take longer than computing, {what}: {'; '.join(shares)}")


if __name__ == "__main__":
    main()
