"""The backward pass of additive attention where a log-sum-exp has lost digits, as in `fastattn.cpu.kernels.sums`.

In the first round a task goes through all keys with those of its queries, and forms m and l from the scores that all
rounds compute. Features are in the lanes, and a score for each of a vector of keys: so each lane has a maximum and a
sum of its own until the end.
"""

import math

from fastattn.cpu.kernels.additive import load_rows, padded, sum_of
from fastattn.cpu.kernels.additive_terms import LOG2_E, terms_of
from fastattn.cpu.kernels.functions import apply_along
from fastattn.cpu.kernels.masks import INFINITY, lowest, saturate
from fastattn.cpu.kernels.records import QUERY_NUMBERS
from fastattn.cpu.kernels.scores import capped
from fastattn.cpu.kernels.sinks import LN_2, log_of_both, share_of_sink, sink_of
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.cpu.kernels.sums import has_lost
from fastattn.simd import (
    jit,
    load_element,
    maximum,
    store_element,
    sum_rows,
    tile_fill,
    tile_load,
    tile_store,
    tile_transpose,
    where_greater,
)


@jit
def clear_states(tile, plan, places, queries):
    """The state of query i, where its weights will be: maxima and sums of the lanes, before any key has been seen."""
    for i in range(queries):
        state = places.weights + i * plan.key_block * tile.itemsize
        tile_store(tile_fill(tile.vector, lowest(tile)), state, 0)
        tile_store(tile_fill(tile.vector, 0.0), state + tile.vector_bytes, 0)


@jit
def biased(tile, score, bias):
    """Scores under a mask: -inf where that is -inf, whatever they are."""
    return where_greater(lowest(tile), bias, MINUS_INFINITY, saturate(tile, score + bias))


@jit
def absorb_vector(kernel, state, score):
    """Bring the state of a query up to date with the scores of a vector of keys."""
    tile = kernel.tile
    m, total = tile_load(tile.vector, state, 0), tile_load(tile.vector, state + tile.vector_bytes, 0)
    top = maximum(score, m)
    total = total * exp2(kernel, (m - top) * LOG2_E) + exp2(kernel, (score - top) * LOG2_E)
    tile_store(top, state, 0)
    tile_store(total, state + tile.vector_bytes, 0)


@jit
def absorb_keys(kernel, plan, given, head, places, first_query, first_key, lse, queries, count, filled):
    """Bring the states of the queries that want it up to date with a block of keys, of which `hidden` is known."""
    tile = kernel.tile
    row_bytes, hidden_bytes = padded(tile, plan.head_dim) * tile.itemsize, plan.key_block * tile.itemsize
    key = head.key + first_key * plan.key_row
    load_rows(tile, key, plan.key_row, plan.key_column, count, plan.head_dim, places.raws, places.exps, places.largest)
    for j in range(count, filled):  # hidden, but finite
        store_element(tile, places.largest + j * tile.itemsize, 0.0)
        for offset in range(0, row_bytes, tile.vector_bytes):
            tile_store(tile_fill(tile.vector, 0.0), places.exps + j * row_bytes + offset, 0)
    start = tile_load(tile.vector, places.sums, 0)
    for i in range(queries):
        if has_lost(given, load_element(tile, lse + i * tile.itemsize) * 1.0):
            for j in range(0, filled, tile.lanes):
                terms_of(kernel, places, plan.head_dim, row_bytes, i, j, start, places.terms, places.lanes)
                score = sum_rows(tile_transpose(tile_load(tile.square, places.lanes, tile.vector_bytes)))
                if "softcap" in kernel.steps and plan.softcap != 0.0:
                    score, _ = capped(tile, plan, score)
                bias = tile_load(tile.vector, places.hidden + i * hidden_bytes + j * tile.itemsize, 0)
                score = biased(tile, score, bias)
                if "function" in kernel.steps:
                    score, _ = apply_along(tile, head, score, bias, first_query + i, first_key + j)
                    score = where_greater(lowest(tile), bias, MINUS_INFINITY, score)
                absorb_vector(kernel, places.weights + i * hidden_bytes, score)


@jit
def store_sums(kernel, plan, given, head, places, lse, queries, sums, sink_weights):
    """Write m and log2(l) of each query that wants them to `sums`, or an infinite m where its lse is of other keys.

    `sink_weights`, if not 0: where to write the weights of their sinks.
    """
    tile, sink = kernel.tile, sink_of(head)
    for i in range(queries):
        total = load_element(tile, lse + i * tile.itemsize) * 1.0
        if has_lost(given, total):
            state = places.weights + i * plan.key_block * tile.itemsize
            m = load_element(tile, state) * 1.0
            for lane in range(1, tile.lanes):
                m = max(m, load_element(tile, state + lane * tile.itemsize) * 1.0)
            shares = exp2(kernel, (tile_load(tile.vector, state, 0) - m) * LOG2_E)
            tile_store(tile_load(tile.vector, state + tile.vector_bytes, 0) * shares, state, 0)
            own = sum_of(tile, state) * 1.0
            logarithm = math.log(own) if own != 0.0 else MINUS_INFINITY
            whole = m + logarithm
            if sink != MINUS_INFINITY:
                term = math.exp(sink - m) + own * 0.0 if own != 0.0 else 0.0
                logarithm = log_of_both(sink - m, own, term)
                whole = sink if own == 0.0 or term == INFINITY else m + logarithm
                if sink_weights != 0 and whole - total >= -given.slack * abs(total):
                    store_element(tile, sink_weights + i * tile.itemsize, share_of_sink(own, term))
            if not whole - total >= -given.slack * abs(total):
                m = INFINITY
            store_element(tile, sums + 2 * i * tile.itemsize, m)
            store_element(tile, sums + (2 * i + 1) * tile.itemsize, logarithm / LN_2)


@jit
def take_sums(tile, given, places, lse, queries, sums):
    """Let weights be relative to m and l, where these are known, and not to the log-sum-exp."""
    for i in range(queries):
        if has_lost(given, load_element(tile, lse + i * tile.itemsize) * 1.0):
            m = load_element(tile, sums + 2 * i * tile.itemsize)
            if m * 1.0 != INFINITY:
                numbers = places.numbers + i * QUERY_NUMBERS * tile.itemsize
                store_element(tile, numbers, m)
                rest = load_element(tile, sums + (2 * i + 1) * tile.itemsize)
                store_element(tile, numbers + 3 * tile.itemsize, rest)


@jit
def subtract_from_sums(tile, numbers, grad_lse, queries):
    """Subtract the gradient by the log-sum-exp from the sum of each query."""
    for i in range(queries):
        at = numbers + (i * QUERY_NUMBERS + 1) * tile.itemsize
        store_element(tile, at, load_element(tile, at) - load_element(tile, grad_lse + i * tile.itemsize))
