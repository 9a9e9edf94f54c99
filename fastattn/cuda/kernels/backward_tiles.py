"""What the portable kernels of the backward pass are made of: tiles of products, and of weights and their gradients.

A block is side x side threads. All products are of tiles of side · rows rows; thread (tx, ty) has the rows
ty + r · side and the columns tx + c · side of the result, so that neighbouring threads ask neighbouring banks. Operands
come by in shared memory, `depth` terms of a sum at a time.

Nothing here asks `cuda` for anything: the simulator lends that to the module of the kernel alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastattn.cuda.kernels.elements import device, keeps, loader
from fastattn.cuda.kernels.plan import DELTA, NUMBERS, REST, SHIFT
from fastattn.cuda.kernels.scores import score_functions

__all__ = ["Tiles", "Tiling", "make_tiles"]


class Tiling(NamedTuple):
    """How a block of threads divides its work.

    Attributes
    ----------
    side : int
        Threads along each axis of the block.
    rows : int
        Rows, and columns of a tile of scores, that a thread has.
    columns : int
        Columns of a gradient that a thread has.
    depth : int
        Terms of the sums that are in shared memory at a time; divides `tile`.
    """

    side: int
    rows: int
    columns: int
    depth: int

    @property
    def tile(self) -> int:
        """Rows of a tile: as many queries as keys."""
        return self.side * self.rows

    @property
    def features(self) -> int:
        """Columns of a gradient that a block has."""
        return self.side * self.columns

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.side * self.side


class Tiles(NamedTuple):
    """Device functions."""

    clear: Any
    multiply: Any
    multiply_visible: Any
    stage_across: Any
    stage: Any
    load_rows: Any
    weigh: Any


def make_tiles(spec: Any, with_slope: bool = True) -> Tiles:
    """Make the device functions for a kernel of `fastattn.cuda.kernels.portable_backward.Backward`.

    `with_slope`: gradients of scores become those of scale · (query · key); without, they are those of the mask.
    """
    tiling, real = spec.tiling, spec.real
    stage_across, stage = _make_stages(tiling, spec.storage, real)
    clear, multiply, multiply_visible = _make_sums(tiling, real)
    sloping = spec.score_mod is not None
    functions, with_slope = score_functions(spec, sloping), with_slope and spec.softcap
    load_rows, weigh = _make_weights(tiling, spec.dropout, real, functions, sloping, with_slope)
    return Tiles(clear, multiply, multiply_visible, stage_across, stage, load_rows, weigh)


def _make_sums(tiling: Tiling, real: Any) -> tuple[Any, Any, Any]:
    side, rows, columns, depth = tiling.side, tiling.rows, tiling.columns, tiling.depth
    zero, one = real(0.0), real(1.0)

    @device
    def clear(result):
        """Set the sums of a thread, of columns of a gradient, to 0."""
        for r in range(rows):
            for c in range(columns):
                result[r, c] = zero

    @device
    def multiply(result, left, first, right, tx, ty):
        """result[r][c] += Σ_s left[first + s][ty + r · side] · right[s][tx + c · side]."""
        for s in range(depth):
            for r in range(rows):
                a = left[first + s, ty + r * side]
                for c in range(columns):
                    result[r, c] += a * right[s, tx + c * side]

    @device
    def multiply_visible(result, left, first, right, tx, ty):
        """The same where `right` may not be finite: nothing of it for what is -0.0 in `left`, and hidden."""
        for s in range(depth):
            for r in range(rows):
                a = left[first + s, ty + r * side]
                if a != zero or math.copysign(one, a) > zero:
                    for c in range(columns):
                        result[r, c] += a * right[s, tx + c * side]

    return clear, multiply, multiply_visible


def _make_stages(tiling: Tiling, storage: str, real: Any) -> tuple[Any, Any]:
    depth, tile, threads, features = tiling.depth, tiling.tile, tiling.threads, tiling.features
    load, zero = loader(storage, real), real(0.0)

    @device
    def stage_across(target, factor, source, at, row, column, first_row, row_count, first_column, column_count, thread):
        """target[feature][row] = factor · element, `depth` features of a tile of rows. How many were not finite."""
        odd = 0
        for e in range(thread, depth * tile, threads):
            s, i = e % depth, e // depth
            element = zero
            if first_row + i < row_count and first_column + s < column_count:
                element = load(source[at + (first_row + i) * row + (first_column + s) * column])
                if not math.isfinite(element):
                    odd += 1
            target[s, i] = factor * element
        return odd

    @device
    def stage(target, source, at, row, column, first_row, row_count, first_column, column_count, clean, thread):
        """Load `depth` rows, `features` columns of each: target[row][column]; `clean`: 0 for what is not finite."""
        for e in range(thread, depth * features, threads):
            s, f = e // features, e % features
            element = zero
            if first_row + s < row_count and first_column + f < column_count:
                element = load(source[at + (first_row + s) * row + (first_column + f) * column])
                if clean and not math.isfinite(element):
                    element = zero
            target[s, f] = element

    return stage_across, stage


def _make_weights(
    tiling: Tiling, dropout: bool, real: Any, functions: tuple[Any, Any], sloping: bool, with_slope: bool
) -> tuple[Any, Any]:
    side, rows, tile, threads = tiling.side, tiling.rows, tiling.tile, tiling.threads
    (value, slope), zero, hidden, lowest = functions, real(0.0), real(-0.0), real(-math.inf)

    @device
    def load_rows(numbers_here, numbers, at, first_query, queries, thread):
        """Load the numbers of a tile of queries; a shift of -inf hides what is behind the last one."""
        for i in range(thread, tile, threads):
            shift, rest, delta = lowest, zero, zero
            if first_query + i < queries:
                own = at + NUMBERS * (first_query + i)
                shift, rest, delta = numbers[own + SHIFT], numbers[own + REST], numbers[own + DELTA]
            numbers_here[SHIFT, i], numbers_here[REST, i], numbers_here[DELTA, i] = shift, rest, delta

    @device
    def weigh(
        scores, grads, numbers_here, mask, keep, sizes, head, number, first_query, first_key, seed_low, seed_high,
        keep_scale, tx, ty,
    ):  # fmt: skip
        """Turn scores into weights after dropout, and dO · value into dS; -0.0 and 0 where hidden."""
        for r in range(rows):
            i = first_query + ty + r * side
            shift, rest = numbers_here[SHIFT, ty + r * side], numbers_here[REST, ty + r * side]
            delta = numbers_here[DELTA, ty + r * side]
            for c in range(rows):
                j = first_key + tx + c * side
                raw = scores[r, c]
                score, visible, gain = value(raw, mask, keep, head, i, j)
                visible = visible and shift != lowest
                weight, grad = hidden, zero
                if visible:
                    exponent = (score - shift) - rest
                    if exponent > zero:  # no weight is above 1, whatever the roundings of huge scores
                        exponent = zero
                    share = real(math.exp(exponent))
                    weight, grad = share, grads[r, c]
                    if dropout:
                        factor = zero
                        if keeps(number, sizes, i, j, seed_low, seed_high):
                            factor = keep_scale
                        weight, grad = share * factor, grad * factor
                    grad = share * (grad - delta)
                    if sloping:
                        grad *= gain
                    if with_slope:
                        grad *= slope(raw, head)
                scores[r, c] = weight
                grads[r, c] = grad

    return load_rows, weigh
