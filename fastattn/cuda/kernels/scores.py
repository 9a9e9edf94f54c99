"""What happens to a score between the first product and the softmax, and which keys a query looks at.

For a call's kind of scores (`fastattn.call.scores.Scores`) this file has all that the portable kernels know of it: the
interval of keys (`keys_of_queries`, `queries_of_keys`), what becomes of one score (`value`), the slope of that for the
backward pass (`slope`), and whether one query looks at one key (`sees`). Positions are numbers of keys. The user's
functions (`fastattn.cuda.kernels.functions`) are asked about keys alone that nothing else hides; that of which keys are
seen about none of a block that is known to be full, or empty, which is skipped (`kinds`).

Nothing here asks `cuda` for anything: the simulator lends that to the module of the kernel alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn.cuda.kernels.elements import device, mask_loader, real_of
from fastattn.cuda.kernels.functions import byte_at, calling
from fastattn.cuda.kernels.plan import (
    BOUND_FIRST,
    BOUND_KEYS,
    BOUND_LAST,
    BOUND_OFFSET,
    BOUNDS,
    CAPTURED,
    FIRST_BATCH,
    HEADS,
    KEEP,
    KIND_WORDS,
    KINDS,
    KINDS_BATCH,
    KINDS_HEAD,
    KINDS_QUERY,
    MASK,
    OUT_OF_RANGE,
    OWN,
    QUERIES,
    SIZES,
)
from fastattn.functions.function import Function
from fastattn.functions.kinds import EMPTY, FULL, KIND_KEYS, KIND_QUERIES, PARTIAL

#: Where no element was read: a slope, which element, and how often.
UNREAD = {real: (real(0), np.int64(0), np.int64(0)) for real in (np.float32, np.float64)}

SOFTCAP, OFFSET, SLOPE, SINK = map(OWN.index, ("softcap", "offset", "slope", "sink"))


class Head(NamedTuple):
    """What one query head of one row of the batch looks at, and what becomes of its scores.

    Attributes
    ----------
    queries, keys
        How many there are; keys of this head.
    first, last
        Query i looks at the keys from i + first to i + last, both included.
    mask, mask_row, mask_column
        Where the mask begins, and its steps from query to query and from key to key.
    keep, keep_row, keep_column
        The same of the boolean mask beside a floating one.
    softcap
        In the base that scores are in; 0 if there is none.
    offset, slope
        The position of query 0, and what is subtracted from a score for each key between its query and key.
    sink
        One more score of each query, which has no key; -inf if there is none.
    row, number, start
        The row of the batch, the number of the head, and the position of query 0 once more, which is whole.
    captured
        Words that tell of what the user's functions capture.
    """

    queries: int
    keys: int
    first: int
    last: int
    mask: int
    mask_row: int
    mask_column: int
    keep: int
    keep_row: int
    keep_column: int
    softcap: float
    offset: float
    slope: float
    sink: float
    row: int
    number: int
    start: int
    captured: Any


def is_floating(mask_kind: str) -> bool:
    """Whether a mask of this kind is added to the scores."""
    return mask_kind not in ("none", "bool")


def in_base_2(adds: bool, extreme: bool) -> bool:
    """Whether scores are in base 2: where nothing is added to them, and neither scale nor softcap is extreme."""
    return not adds and not extreme


# -- which keys --------------------------------------------------------------------------------------------------------


@device
def head_of(slice_, offsets, steps, sizes, own, captured):
    """What the tables say of a slice."""
    at = SIZES + slice_ * BOUNDS
    return Head(
        sizes[QUERIES],
        sizes[at + BOUND_KEYS],
        sizes[at + BOUND_FIRST],
        sizes[at + BOUND_LAST],
        offsets[MASK, slice_],
        steps[MASK, 0],
        steps[MASK, 1],
        offsets[KEEP, slice_],
        steps[KEEP, 0],
        steps[KEEP, 1],
        own[slice_, SOFTCAP],
        own[slice_, OFFSET],
        own[slice_, SLOPE],
        own[slice_, SINK],
        sizes[FIRST_BATCH] + slice_ // sizes[HEADS],
        slice_ % sizes[HEADS],
        sizes[at + BOUND_OFFSET],
        captured,
    )


@device
def keys_of_queries(head, first, last, block):
    """The first key and the end of those that any query from `first` to `last` looks at, from a whole block on."""
    begin, end = max(0, first + head.first), min(head.keys, last + head.last + 1)
    return begin - begin % block if begin < end else end, end


@device
def queries_of_keys(head, first, last, block):
    """The first query and the end of those that look at any key from `first` to `last`, from a whole block on."""
    begin, end = max(0, first - head.last), min(head.queries, min(last, head.keys - 1) - head.first + 1)
    if first >= head.keys:
        end = begin
    return begin - begin % block if begin < end else end, end


@device
def sees(head, query, key):
    """Whether a query may look at a key, but for masks; one behind the last query looks at nothing."""
    near = query < head.queries and key < head.keys
    return near and key >= query + head.first and key <= query + head.last


def kinds(spec: Any) -> tuple[Any, Any]:
    """The device functions `kind_of` and `first_of` of blocks of keys, for what a portable kernel is compiled for.

    A tile, which lies in one block, is asked for by its first query and key.
    """
    with_mask, place = spec.mask_mod is not None, kinds_at(spec.score_mod)

    @device
    def kind_of(head, query, key):
        """Whether the user's function hides all keys of a tile, or some as far as is known, or none."""
        if with_mask and head.captured[place + KINDS] != 0:
            of_head = head.row * head.captured[place + KINDS_BATCH] + head.number * head.captured[place + KINDS_HEAD]
            row = query // KIND_QUERIES * head.captured[place + KINDS_QUERY]
            return byte_at(head.captured[place + KINDS] + of_head + row + key // KIND_KEYS)
        return PARTIAL

    @device
    def first_of(head, query, begin, end):
        """The first of these keys from which on a tile is not empty."""
        if with_mask:
            while begin < end and kind_of(head, query, begin) == EMPTY:
                begin += KIND_KEYS - begin % KIND_KEYS
        return begin

    return kind_of, first_of


def kinds_at(score_mod: Function | None) -> int:
    """At which word what is told of blocks of keys begins, behind what a function of scores captures."""
    return CAPTURED + (0 if score_mod is None else score_mod.words)


# -- scores ------------------------------------------------------------------------------------------------------------


def score_functions(spec: Any, sloping: bool = False, by: tuple[int, int] | None = None) -> tuple[Any, Any]:
    """The device functions `value` and `slope` of a score, for what a portable kernel is compiled for.

    What is added is held in the range of the dtype that the call has where nothing is extreme. `sloping`: the slope of
    the user's function is wanted. `by`: that by an element of a captured array is, with which element it was, and how
    often one was read, as `fastattn.cuda.kernels.functions.calling` says.
    """
    real, narrow = real_of(spec.storage, spec.extreme), real_of(spec.storage)
    has_bool, has_bias, with_keep, with_softcap = spec.mask == "bool", is_floating(spec.mask), spec.keep, spec.softcap
    load_bias = mask_loader(spec.mask if has_bias else "float32", real, narrow)
    lowest, zero, one, twice, four = real(-math.inf), real(0), real(1), real(-2), real(4)
    with_slope, steepest, largest = "slope" in spec.own, real(np.finfo(narrow).max), real(np.finfo(real).max)
    with_functions, ask = spec.score_mod is not None or spec.mask_mod is not None, _asking(spec, real, sloping, by)
    plain: Any = one if by is None else UNREAD[real]

    @device
    def value(score, mask, keep, head, query, key, whole):
        """What becomes of scale · (query · key), and whether the query may look at the key; -inf where it may not.

        Third what is wanted of the slope of the user's function. `whole`: mask_mod hides nothing there.
        """
        seen, gain = sees(head, query, key), plain
        if with_softcap:
            score = head.softcap * real(math.tanh(score / head.softcap))
        if has_bool and seen:
            seen = mask[head.mask + query * head.mask_row + key * head.mask_column] != 0
        if with_keep and seen:
            seen = keep[head.keep + query * head.keep_row + key * head.keep_column] != 0
        added = zero
        if has_bias and seen:
            added = load_bias(mask[head.mask + query * head.mask_row + key * head.mask_column])
            seen = added != lowest
        if with_slope:  # sums of finite numbers stay finite
            linear = min(max(-head.slope * abs(head.offset + real(query - key)), -steepest), steepest)
            if abs(added) <= steepest:
                added = min(max(added + linear, -steepest), steepest)
            is_finite = abs(score) <= largest and abs(added) <= largest
            score += added
            if is_finite:
                score = min(max(score, -largest), largest)
        elif has_bias and seen:
            score += added
        if with_functions and seen:
            score, seen, gain = ask(score, head, query, key, whole)
        if not seen:
            score = lowest
        return score, seen, gain

    @device
    def slope(score, head):
        """The derivative of `value` by scale · (query · key) less the user's, where the query may look at the key."""
        if with_softcap:
            # 1 - tanh², of which nothing is left where that is rounded to 1
            fading = real(math.exp(twice * abs(score / head.softcap)))
            return four * fading / ((one + fading) * (one + fading))
        return one

    return value, slope


def _asking(spec: Any, real: Any, sloping: bool, by: tuple[int, int] | None) -> Any:
    """The device function of a score that calls the user's functions: the score, whether it is seen, and the slope."""
    plain: Any = real(1) if by is None else UNREAD[real]
    score_mod, mask_mod = spec.score_mod, spec.mask_mod
    with_score, with_mask, lowest, differentiates = (
        score_mod is not None,
        mask_mod is not None,
        real(-math.inf),
        by is not None,
    )
    place = kinds_at(score_mod) + KIND_WORDS
    change: Any = calling(score_mod, real, sloping, by) if score_mod is not None else None
    look: Any = calling(mask_mod, real) if mask_mod is not None else None

    @device
    def ask(score, head, query, key, whole):
        seen, gain, inside, position = True, plain, True, head.start + query
        if with_mask and not whole:
            answer, valid = look((head.row, head.number, position, key), head.captured, place)
            seen, inside = answer != 0, valid != 0
        if with_score and seen:
            given = (score, head.row, head.number, position, key)
            if differentiates:
                score, slope, element, times, valid = change(given, head.captured, CAPTURED)
                gain = slope, element, times
            elif sloping:
                score, gain, valid = change(given, head.captured, CAPTURED)
            else:
                score, valid = change(given, head.captured, CAPTURED)
            seen, inside = score != lowest, inside and valid != 0
        if not inside:
            head.captured[OUT_OF_RANGE] = 1
        return score, seen, gain

    return ask


def restriction(spec: Any) -> Any:
    """The device function that makes scores of a tile of products, for what a portable kernel is compiled for."""
    tiles, (value, _), (kind_of, _) = spec.tiles, score_functions(spec), kinds(spec)
    rows, columns, threads_y, threads_x = tiles.rows, tiles.columns, tiles.threads_y, tiles.threads_x

    @device
    def restrict(scores, seen, mask, keep, head, first_query, first_key, y, x):
        """What becomes of each score; where the query may not look -inf, and not `seen`."""
        whole = kind_of(head, first_query, first_key) == FULL
        for i in range(rows):
            for j in range(columns):
                query, key = first_query + y + i * threads_y, first_key + x + j * threads_x
                scores[i, j], seen[i, j], _ = value(scores[i, j], mask, keep, head, query, key, whole)

    return restrict
