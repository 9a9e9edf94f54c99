"""What the portable kernels of the backward pass are made of: tiles of products, and of weights and their gradients.

A block is side x side threads. All products are of tiles of side · rows rows; thread (tx, ty) has the rows
ty + r · side and the columns tx + c · side of the result, so that neighbouring threads ask neighbouring banks. Operands
come by in shared memory, `depth` terms of a sum at a time.

Nothing here asks `cuda` for anything: the simulator lends that to the module of the kernel alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.cuda.kernels.elements import device, keeps, loader, real_of
from fastattn.cuda.kernels.plan import DELTA, NUMBERS, REPEATED, REST, SHIFT
from fastattn.cuda.kernels.scores import kinds, score_functions
from fastattn.functions.function import Function
from fastattn.functions.kinds import FULL

__all__ = ["PADDING", "Backward", "Tiles", "Tiling", "make_tiles"]

PADDING = 1  # of a row in shared memory, so that a column of it lies in different banks


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


class Backward(NamedTuple):
    """What a kernel is compiled for.

    Attributes
    ----------
    storage : {"float16", "bfloat16", "float32", "float64"}
        What operands and gradients are stored in. The arithmetic is in float32, or in float64 for float64.
    mask : str
        The same of the mask, or "bool", or "none".
    dropout : bool
    tiling : Tiling
    key, value : bool
        What `grad_keys` computes: both at once where the same slices share key and value.
    extreme : bool
        What `fastattn.cuda.host.plan` says of scale and softcap: the arithmetic is in float64.
    keep : bool
        Whether there is a boolean mask beside a floating one.
    softcap : bool
    adds : bool
        Whether something is added to scores.
    own : tuple of str
        Which fields of `fastattn.call.scores.HEAD` heads have of their own, but for those in `BOUNDING`.
    score_mod, mask_mod : Function or None
        The user's functions.
    by : (int, int) or None
        What `captured_parts` differentiates by: the number of an array that score_mod captures, and that of the place
        where it is read.
    """

    storage: str
    mask: str
    dropout: bool
    tiling: Tiling
    key: bool = True
    value: bool = True
    extreme: bool = False
    keep: bool = False
    softcap: bool = False
    adds: bool = False
    own: tuple[str, ...] = ()
    score_mod: Function | None = None
    mask_mod: Function | None = None
    by: tuple[int, int] | None = None

    @property
    def real(self) -> Any:
        """The NumPy type of the arithmetic."""
        return real_of(self.storage, self.extreme)


class Tiles(NamedTuple):
    """Device functions."""

    clear: Any
    multiply: Any
    multiply_visible: Any
    stage_across: Any
    stage: Any
    load_rows: Any
    weigh: Any
    add_up: Any


def make_tiles(spec: Backward, with_slope: bool = True) -> Tiles:
    """Make the device functions for a kernel of `Backward`.

    `with_slope`: gradients of scores become those of scale · (query · key); without, they are those of the mask, or
    of what the kernel differentiates by.
    """
    tiling, real = spec.tiling, spec.real
    stage_across, stage = _make_stages(tiling, spec.storage, real)
    clear, multiply, multiply_visible = _make_sums(tiling, real)
    load_rows, weigh = _make_load_rows(tiling, real), _make_weigh(spec, with_slope and spec.softcap)
    return Tiles(clear, multiply, multiply_visible, stage_across, stage, load_rows, weigh, _make_add_up(tiling))


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


def _make_load_rows(tiling: Tiling, real: Any) -> Any:
    tile, threads, zero, lowest = tiling.tile, tiling.threads, real(0.0), real(-math.inf)

    @device
    def load_rows(numbers_here, numbers, at, first_query, queries, thread):
        """Load the numbers of a tile of queries; a shift of -inf hides what is behind the last one."""
        for i in range(thread, tile, threads):
            shift, rest, delta = lowest, zero, zero
            if first_query + i < queries:
                own = at + NUMBERS * (first_query + i)
                shift, rest, delta = numbers[own + SHIFT], numbers[own + REST], numbers[own + DELTA]
            numbers_here[SHIFT, i], numbers_here[REST, i], numbers_here[DELTA, i] = shift, rest, delta

    return load_rows


def _make_weigh(spec: Backward, with_slope: bool) -> Any:
    side, rows, tile, real, dropout = spec.tiling.side, spec.tiling.rows, spec.tiling.tile, spec.real, spec.dropout
    differentiates, sloping = spec.by is not None, spec.by is None and spec.score_mod is not None
    (value, slope), (kind_of, _) = score_functions(spec, sloping, spec.by), kinds(spec)
    zero, hidden, lowest = real(0.0), real(-0.0), real(-math.inf)

    @device
    def weigh(
        scores, grads, elements, numbers_here, mask, keep, sizes, head, number, first_query, first_key, seed_low,
        seed_high, keep_scale, tx, ty,
    ):  # fmt: skip
        """Turn scores into weights after dropout, and dO · value into dS; -0.0 and 0 where hidden.

        Of a kernel that differentiates by a captured array, dS is by the element of it that was read, whose number is
        written to `elements`, or -1.
        """
        whole = kind_of(head, first_query, first_key) == FULL
        for r in range(rows):
            i = first_query + ty + r * side
            shift, rest = numbers_here[SHIFT, ty + r * side], numbers_here[REST, ty + r * side]
            delta = numbers_here[DELTA, ty + r * side]
            for c in range(rows):
                j = first_key + tx + c * side
                raw = scores[r, c]
                score, visible, gain = value(raw, mask, keep, head, i, j, whole)
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
                if differentiates:
                    steepness, element, times = gain
                    if grad == zero or times != 1:
                        element = -1
                    if grad != zero and times > 1:
                        head.captured[REPEATED] = 1
                    elements[(ty + r * side) * tile + tx + c * side] = element
                    grad *= steepness
                scores[r, c] = weight
                grads[r, c] = grad

    return weigh


def _make_add_up(tiling: Tiling) -> Any:
    scores_of_tile, threads, zero = tiling.tile * tiling.tile, tiling.threads, np.float64(0.0)

    @device
    def add_up(elements, terms, held, total, result, first, thread):
        """Go through the elements and terms of a tile, for those whose numbers leave `thread` as a remainder.

        An element that follows itself is held, and its sum, which is returned, is not in `result` yet.
        """
        for e in range(scores_of_tile):
            element = np.int64(elements[e])
            if element >= 0 and element % threads == thread:
                if element != held:
                    if held >= 0:
                        result[first + held] += total
                    held, total = element, zero
                total += np.float64(terms[e])
        return held, total

    return add_up
