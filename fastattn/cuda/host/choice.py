"""Which kernel a call gets, with which tiles, and why."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastattn.call.problem import Problem
from fastattn.cuda.available import SIMULATED
from fastattn.cuda.host import decode as decoding
from fastattn.cuda.host import tensor_cores
from fastattn.cuda.host.plan import Table, is_extreme, slices_of
from fastattn.cuda.kernels import portable
from fastattn.cuda.kernels import tensor_cores as on_tensor_cores
from fastattn.cuda.kernels.plan import BOUNDING, OPERANDS
from fastattn.cuda.kernels.tiles import Tiles

SMALL = Tiles(threads_y=2, threads_x=2, rows=2, columns=2, values=2, features=4, value_rows=4)  # for the simulator
NARROW, WIDE = 32, 64  # features that fit a tile of 64 queries or keys next to the others in 48 KB of shared memory
SHORT_ROW = 64  # columns of the result that need no more than four a thread


class Choice(NamedTuple):
    """A kernel, its specification, what it is compiled and run with, and why it was chosen.

    Attributes
    ----------
    factory, spec
        What makes the kernel.
    grid : int
        How many blocks of threads.
    block : (int, int)
        Threads of a block, (x, y).
    why : str
    options : tuple of (str, object)
        Of `cuda.jit`.
    """

    factory: Any
    spec: Any
    grid: int
    block: tuple[int, int]
    why: str
    options: tuple[tuple[str, Any], ...] = ()


class Facts(NamedTuple):
    """What a choice depends on.

    Attributes
    ----------
    storage, mask : str
        What the operands, and the mask if it is not "none", are stored in.
    problem : Problem
    table : Table
        On the host.
    addresses : tuple of int
        Where the memory of query, key, value and out begins.
    capability : (int, int)
        Of the GPU.
    """

    storage: str
    mask: str
    problem: Problem
    table: Table
    addresses: tuple[int, ...]
    capability: tuple[int, int]


def tiles_for(storage: str, problem: Problem) -> Tiles:
    """The tiles of the portable kernels: 64 x 64 scores, with 256 threads of 4 x 4; in float64 32 x 32, of 2 x 2."""
    if SIMULATED:
        return SMALL
    features = WIDE if NARROW < problem.head_dim <= WIDE else NARROW
    values = 4 if problem.value_dim <= SHORT_ROW else 8
    if storage == "float64" or is_extreme(problem):
        return Tiles(16, 16, 2, 2, values // 2, NARROW, 16)
    return Tiles(16, 16, 4, 4, values, features, 16)


def kind_of(problem: Problem) -> dict[str, Any]:
    """What else the portable kernels are compiled for, by the names that it has in their specifications."""
    scores = problem.scores
    return {
        "extreme": is_extreme(problem),
        "keep": scores.bias and scores.keep,
        "softcap": scores.softcap is not None,
        "adds": scores.adds,
        "own": tuple(name for name in scores.own if name not in BOUNDING),
        "score_mod": scores.score_mod,
        "mask_mod": scores.mask_mod,
    }


@functools.lru_cache(maxsize=1024)
def wants_rows(storage: str, mask: str, problem: Problem, capability: tuple[int, int]) -> bool:
    """Whether a call gets tensor cores, if only rows of the operands lie as these need it.

    Where they do not, the operands are copied: the same values give the same bits, however they lie in memory.
    """
    slices = slices_of(problem)
    ideal = Table(np.zeros((OPERANDS, slices), np.int64), np.tile([0, 1], (OPERANDS, 1)), np.zeros(0, np.int64))
    return tensor_cores.against(storage, mask, problem, ideal, (0, 0, 0, 0), capability) is None


def choose_forward(facts: Facts) -> Choice:
    """The kernel of the result and the log-sum-exp: on tensor cores, unless something speaks against it.

    Few queries have been sent to the kernels that split the keys before.
    """
    storage, mask, problem = facts.storage, facts.mask, facts.problem
    why = decoding.against(problem)
    unsplit = "" if why is None else f"; keys are not split, as {why}"
    against = tensor_cores.against(*facts)
    if against is None:
        shape = tensor_cores.shape_for(storage, mask, max(problem.head_dim, problem.value_dim))
        return Choice(
            on_tensor_cores.forward,
            shape,
            tensor_cores.grid_of(shape, problem),
            tensor_cores.block_of(shape),
            f"tensor cores{unsplit}",
            tuple(tensor_cores.options(shape).items()),
        )
    tiles = tiles_for(storage, problem)
    blocks = -(-problem.queries // tiles.queries) * max(1, -(-problem.value_dim // tiles.value_columns))
    return Choice(
        portable.forward,
        portable.Forward(storage, mask, problem.dropout_p > 0, tiles, **kind_of(problem)),
        slices_of(problem) * blocks,
        (tiles.threads_x, tiles.threads_y),
        f"portable, because of {against}{unsplit}",
    )


def choose_weights(facts: Facts) -> Choice:
    """The kernel of the weights: there is one."""
    storage, mask, problem = facts.storage, facts.mask, facts.problem
    tiles = tiles_for(storage, problem)
    blocks = -(-problem.queries // tiles.queries) * -(-problem.keys // tiles.keys)
    return Choice(
        portable.weights,
        portable.Weights(storage, mask, problem.dropout_p > 0, tiles, **kind_of(problem)),
        slices_of(problem) * blocks,
        (tiles.threads_x, tiles.threads_y),
        "portable, the only one of weights",
    )


def choose_shifts(storage: str, mask: str, problem: Problem, base_2: bool) -> Choice:
    """The kernel of what weights are computed from: there is one; `base_2` as in `portable.Shifts`."""
    tiles = tiles_for(storage, problem)
    return Choice(
        portable.find_shifts,
        portable.Shifts(storage, mask, tiles, base_2, **kind_of(problem)),
        slices_of(problem) * -(-problem.queries // tiles.queries),
        (tiles.threads_x, tiles.threads_y),
        "portable, the only one of shifts",
    )


def said(capability: tuple[int, int]) -> str:
    """Which kernels calls get on a GPU, and why, in a few words."""
    split = f"keys split over blocks where up to {decoding.MAX_ROWS} queries share them"
    if capability < tensor_cores.CAPABILITY:
        need = ".".join(map(str, tensor_cores.CAPABILITY))
        return f"{split}, portable for all else, as tensor cores are used from compute capability {need} on"
    halves = f"tensor cores for float16 and bfloat16 of head sizes up to {tensor_cores.WIDEST}"
    return f"{split}, {halves}, portable for all else"
