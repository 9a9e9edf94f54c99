"""Which kernel a call gets, with which tiles, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn.cuda import portable
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.plan import slices_of
from fastattn.cuda.tiles import Tiles
from fastattn.problem import Problem

SMALL = Tiles(threads_y=2, threads_x=2, rows=2, columns=2, values=2, features=4, value_rows=4)  # for the simulator
NARROW, WIDE = 32, 64  # features that fit a tile of 64 queries or keys next to the others in 48 KB of shared memory
SHORT_ROW = 64  # columns of the result that need no more than four a thread


class Choice(NamedTuple):
    """A kernel, its specification, how many blocks of threads it is run with, and why it was chosen."""

    factory: Any
    spec: Any
    grid: int
    why: str

    @property
    def block(self) -> tuple[int, int]:
        """Threads of a block, (x, y)."""
        tiles: Tiles = self.spec.tiles
        return tiles.threads_x, tiles.threads_y


def tiles_for(storage: str, problem: Problem) -> Tiles:
    """The tiles of the portable kernels: 64 x 64 scores, with 256 threads of 4 x 4; of float64 32 x 32, of 2 x 2."""
    if SIMULATED:
        return SMALL
    features = WIDE if NARROW < problem.head_dim <= WIDE else NARROW
    values = 4 if problem.value_dim <= SHORT_ROW else 8
    if storage == "float64":
        return Tiles(16, 16, 2, 2, values // 2, NARROW, 16)
    return Tiles(16, 16, 4, 4, values, features, 16)


def choose_forward(storage: str, mask: str, problem: Problem) -> Choice:
    """The kernel of the result and the log-sum-exp; `mask` is "none" or what the mask is stored in."""
    tiles = tiles_for(storage, problem)
    spec = portable.Forward(storage, mask, problem.dropout_p > 0, tiles)
    blocks = -(-problem.queries // tiles.queries)
    parts = max(1, -(-problem.value_dim // tiles.value_columns))
    return Choice(portable.forward, spec, slices_of(problem) * blocks * parts, "portable: the one for every GPU")


def choose_weights(storage: str, mask: str, problem: Problem) -> Choice:
    """The kernel of the weights."""
    tiles = tiles_for(storage, problem)
    spec = portable.Weights(storage, mask, problem.dropout_p > 0, tiles)
    blocks = -(-problem.queries // tiles.queries) * -(-problem.keys // tiles.keys)
    return Choice(portable.weights, spec, slices_of(problem) * blocks, "portable: the only one there is")
