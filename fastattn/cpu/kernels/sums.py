"""What the backward pass does where a log-sum-exp has lost digits that matter (`fastattn.call.rounding`).

Usually a weight is 2^(score - lse). Where the lse was rounded to too few digits the row's sum is formed again, from the
same scores to the bit, by the first group of keys:

    for each block of keys, of all:
        scores[j][i] = key[j] · q[i]
        m, l                                     as in the forward pass

and the weight is 2^((score - m) - log2(l)): near the maximum nothing is lost in the difference. A row whose lse is that
of more keys than these has no such sum, and is taken as any other.
"""

import math

from fastattn.cpu.kernels import gradient_matrix
from fastattn.cpu.kernels.masks import INFINITY, lowest
from fastattn.cpu.kernels.matrix import load_rows
from fastattn.cpu.kernels.pack import clear
from fastattn.cpu.kernels.panels import pack_factors, product_along
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.cpu.kernels.scores import cap, keys_of_block, keys_of_queries, restrict, restrict_with_functions
from fastattn.cpu.kernels.sinks import LN_2, log_beside, log_sum, share_of_sink, sink_of, term_of
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, absorb
from fastattn.simd import (
    jit,
    load_element,
    maximum,
    store_element,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

LOWEST = -2000.0  # an exponent of which 2 to the power is 0 in both dtypes


@jit
def has_lost(plan, lse):
    """Whether a log-sum-exp has lost digits that matter. Infinities have not."""
    size = abs(lse)
    return size >= plan.precise and size < INFINITY


@jit
def any_has_lost(tile, plan, lse, present):
    """Whether that of any query has."""
    for i in range(present):
        if has_lost(plan, load_element(tile, lse + i * tile.itemsize) * 1.0):
            return True
    return False


@jit
def hide_keys(kernel, plan, head, scores, grads, part, first_query, first_key, scratch):
    """Apply masks and interval to a part of a block of scores, where its rows want it.

    A user's function is applied as well, and what stands beside the scores multiplied by its derivative.
    """
    tile = kernel.tile
    work = scratch + plan.work_at
    for edge in range(2):
        begin, end = (part.begin, part.full) if edge == 0 else (part.full_end, part.end)
        if begin < end:
            rows, buffer = scores + begin * tile.row_bytes, work + tile.row_bytes
            first, count = first_key + begin, end - begin
            if "function" in kernel.steps:
                beside = 0 if grads == 0 else grads + begin * tile.row_bytes
                restrict_with_functions(kernel, plan, head, rows, beside, count, first_query, first, work, buffer)
            else:
                restrict(kernel, plan, head, rows, count, first_query, first, work, buffer)


@jit
def largest_scores(tile, scores, count):
    """The maximum over the keys."""
    best = tile_fill(tile.single, MINUS_INFINITY)
    for _ in range(count):
        best = maximum(tile_load(tile.single, scores, 0), best)
        scores += tile.row_bytes
    return best


@jit
def absorb_block(kernel, plan, head, first_query, first_key, keys, s, scratch):
    """Bring m and l of tile width `s` of the queries up to date with a block of keys."""
    tile = kernel.tile
    at, panel = s * tile.row_bytes, plan.score_panel
    part = keys_of_block(kernel, plan, head, first_query, first_key)
    count = part.end - part.begin
    if count <= 0:
        return
    scores, rows = scratch + plan.scores_at, part.begin * tile.row_bytes
    zero = tile_fill(tile.single, 0.0)
    if kernel.reads == "matrix":
        gradient_matrix.multiply_keys(kernel, plan, head, s, first_key, keys, part, scores + rows, scratch, NOTHING)
    else:
        queries = scratch + plan.query_lanes_at + at * plan.head_dim
        product_along(
            kernel, zero, count, keys + rows, panel, queries, plan.head_dim, plan.factor, scores + rows, NOTHING
        )
    if "softcap" in kernel.steps and plan.softcap != 0.0:
        cap(tile, plan, scores + rows, count, zero)
    hide_keys(kernel, plan, head, scores, 0, part, first_query, first_key, scratch)
    top = largest_scores(tile, scores + rows, count)
    tops, totals = scratch + plan.shifts_at + at, scratch + plan.rests_at + at
    absorb(kernel, scores + rows, count, top, plan.to_base_2, tops, totals, 0, 0)


@jit
def find_sums(kernel, plan, head, lse, first_query, present, numbers, sink_weights, scratch):
    """For each query of a block whose lse has lost digits: m and log2(l), or an infinite m where l is of other keys.

    `numbers` is where the deltas of these queries are: in the arrays behind. `sink_weights`, if not 0: where to write
    the weights of their sinks. The queries are in the lanes already.
    """
    tile, sink = kernel.tile, sink_of(head)
    keys, panel = scratch + plan.clean_keys_at, plan.score_panel
    tops, totals = scratch + plan.shifts_at, scratch + plan.rests_at
    subs = (present + tile.width - 1) // tile.width
    clear(tile, tops, subs)
    clear(tile, totals, subs)
    begin, end = keys_of_queries(plan, head, first_query, first_query + present - 1)
    for first_key in range(begin - begin % plan.key_block, end, plan.key_block):
        there = min(plan.key_block, plan.keys - first_key)
        source = head.key + first_key * plan.key_row
        row, column, features = plan.key_row, plan.key_column, plan.head_dim
        if kernel.reads == "matrix":
            load_rows(kernel, kernel, plan, keys, source, row, column, there, features)
        else:
            pack_factors(kernel, keys, panel, source, row, column, there, features)
        for s in range(subs):
            absorb_block(kernel, plan, head, first_query + s * tile.width, first_key, keys, s, scratch)
    for offset in range(0, present * tile.itemsize, tile.itemsize):
        given = load_element(tile, lse + offset) * 1.0
        if has_lost(plan, given):
            m, total = load_element(tile, tops + offset), load_element(tile, totals + offset) * 1.0
            logarithm = math.log(total) if total != 0.0 else MINUS_INFINITY
            own = m * (LN_2 * plan.to_base_2) + logarithm
            term = term_of(plan, sink, m, total)
            if sink != MINUS_INFINITY:
                logarithm, own = log_beside(plan, sink, m, total, term), log_sum(plan, sink, m, total, term)
            if own - given >= -plan.slack * abs(given):
                store_element(tile, numbers + plan.numbers + offset, m)
                store_element(tile, numbers + 2 * plan.numbers + offset, logarithm / LN_2)
                if sink_weights != 0:
                    store_element(tile, sink_weights + offset, share_of_sink(total, term))
            else:
                store_element(tile, numbers + plan.numbers + offset, INFINITY)


@jit
def load_sums(kernel, plan, lse, present, numbers, scratch):
    """Lay out what `relate` takes from the scores of a block of queries."""
    tile = kernel.tile
    for i in range(plan.query_block):
        offset = i * tile.itemsize
        log_sum = scratch + plan.log_sums_at + offset
        shift, rest = load_element(tile, log_sum) * 1.0, 0.0
        if i < present and has_lost(plan, load_element(tile, lse + offset) * 1.0):
            m = load_element(tile, numbers + plan.numbers + offset) * 1.0
            if m != INFINITY:
                shift, rest = m, load_element(tile, numbers + 2 * plan.numbers + offset) * 1.0
                store_element(tile, log_sum, 0.0)  # which may be infinite in base 2, and is not subtracted
        store_element(tile, scratch + plan.shifts_at + offset, shift)
        store_element(tile, scratch + plan.rests_at + offset, rest)


@jit
def relate(tile, plan, scores, count, s, scratch):
    """Make exponents of the scores of a block with tile width `s` of the queries; of a hidden key it remains -inf."""
    shift = tile_load(tile.single, scratch + plan.shifts_at + s * tile.row_bytes, 0)
    rest = tile_load(tile.single, scratch + plan.rests_at + s * tile.row_bytes, 0)
    to_base_2 = plan.to_base_2
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        exponent = maximum(LOWEST, (score - shift) * to_base_2 - rest)
        tile_store(where_greater(lowest(tile), score, MINUS_INFINITY, exponent), scores, 0)
        scores += tile.row_bytes
