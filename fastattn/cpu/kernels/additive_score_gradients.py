"""Gradients that come from those of the scores alone in additive attention: of a floating mask, of captured arrays.

Both are passes of their own behind the backward pass, which has formed the sums where a log-sum-exp has lost digits.
They go through the same blocks, and compute the same scores:

    for each block of queries, and of keys:
        weights[i][j] = dO[i] · value[j]                                    product_with_values
        for each query, for each vector of keys:
            weights[i][j] = dS[i][j]                                        slopes_of
            grad[index(i, j)] += dS[i][j] · the derivative by what is there

A task of the gradient of a mask owns a rectangle of one head of the mask, as in `fastattn.cpu.kernels.mask_gradient`, a
task of those of captured arrays adds to arrays of its own, as in `fastattn.cpu.kernels.captured_gradient`. So every sum
has one order of its terms. Sums are of float64.
"""

from fastattn.cpu.kernels.additive import padded
from fastattn.cpu.kernels.additive_backward import (
    backward_view,
    begin_queries,
    hide,
    lay_out,
    load_block,
    load_weight,
)
from fastattn.cpu.kernels.additive_terms import looks_at_none, slopes_of, terms_of
from fastattn.cpu.kernels.functions import add_to_captured
from fastattn.cpu.kernels.records import QUERY_NUMBERS
from fastattn.cpu.kernels.scores import keys_of_queries
from fastattn.cpu.kernels.tasks import call_view, locate, plan_view
from fastattn.simd import jit, load_element, load_f64, load_i64, store_f64, tile_load

WORD = 8


@jit
def add_to_mask(tile, given, target, weights, query, key, count):
    """Add dS of one query and some keys to the gradient of a mask, of which `target` is the head's."""
    target += query * given.grad_bias_row + key * given.grad_bias_column
    for _ in range(count):
        store_f64(target, load_f64(target) + load_element(tile, weights) * 1.0)
        weights += tile.itemsize
        target += given.grad_bias_column


@jit
def differentiate_pairs(kernel, plan, given, head, places, first_query, first_key, queries, count, target):
    """All queries of a block and all keys of one, of which products with values stand at `weights`."""
    tile = kernel.tile
    row_bytes, features = padded(tile, plan.head_dim) * tile.itemsize, plan.head_dim
    start, lanes = tile_load(tile.vector, places.sums, 0), places.lanes
    for i in range(queries):
        numbers = places.numbers + i * QUERY_NUMBERS * tile.itemsize
        shift, row_sum = load_element(tile, numbers), load_element(tile, numbers + tile.itemsize)
        rest, query = load_element(tile, numbers + 3 * tile.itemsize), first_query + i
        for j in range(0, count, tile.lanes):
            offset, key = (i * plan.key_block + j) * tile.itemsize, first_key + j
            hidden, weights = places.hidden + offset, places.weights + offset
            if looks_at_none(tile, hidden):
                continue
            terms_of(kernel, places, features, row_bytes, i, j, start, places.terms, lanes)
            slopes_of(
                kernel, plan, head, query, key, lanes, hidden, shift, row_sum, rest, weights,
                lanes, places.terms, row_bytes, 0,
            )  # fmt: skip
            there = min(tile.lanes, count - j)
            if kernel.work == "additive_captured_gradient":
                add_to_captured(head, target, lanes, weights, 1, there, 1, query, key)
            else:
                add_to_mask(tile, given, target, weights, query, key, there)


@jit
def differentiate_scores(kernel, call, plan, given, number, places, block, start_key, end_key, target):
    """A block of queries of one head, and keys between two: those that are looked at add to what `target` says."""
    tile = kernel.tile
    head = locate(call, plan, number)
    first = block * given.query_block
    queries = min(given.query_block, plan.queries - first)
    begin, end = keys_of_queries(plan, head, first, first + queries - 1)
    begin, end = max(start_key, begin - begin % plan.key_block), min(end_key, end)
    if begin >= end:
        return
    lse = call.lse + (number * plan.queries + first) * tile.itemsize
    begin_queries(kernel, call, plan, given, head, number, places, first, queries, False)
    for first_key in range(begin, end, plan.key_block):
        count = min(plan.key_block, end - first_key)
        filled = (count + tile.width - 1) // tile.width * tile.width
        if hide(kernel, plan, head, places, first, queries, first_key, filled, lse):
            load_block(tile, plan, head, places, first_key, queries, count, filled)
            differentiate_pairs(kernel, plan, given, head, places, first, first_key, queries, count, target)


@jit
def differentiate_part(kernel, call, plan, given, places, part):
    """A task of the gradients of captured arrays: some blocks of queries of some heads."""
    blocks = given.outer * given.head_blocks
    for number in range(part * blocks // plan.tasks, (part + 1) * blocks // plan.tasks):
        head, block = number // given.head_blocks, number % given.head_blocks
        differentiate_scores(kernel, call, plan, given, head, places, block, 0, plan.keys, part)


@jit
def differentiate_rectangle(kernel, call, plan, given, places, number):
    """A task of the gradient of a mask: a block of queries and one of keys, or all where the mask is broadcast."""
    mask_head, rectangle = number % given.outer, number // given.outer
    first_block, end_block, first_key, end_key = 0, given.head_blocks, 0, plan.keys
    if given.grad_bias_row != 0:
        first_block = rectangle % given.head_blocks
        end_block = first_block + 1
        rectangle //= given.head_blocks
    if given.grad_bias_column != 0:
        first_key = rectangle * plan.key_block
        end_key = min(plan.keys, first_key + plan.key_block)
    target = given.grad_bias + mask_head * given.grad_bias_head
    for i in range(given.inner):
        head = load_i64(given.shared_by + (mask_head * given.inner + i) * WORD)
        for block in range(first_block, end_block):
            differentiate_scores(kernel, call, plan, given, head, places, block, first_key, end_key, target)


def task_function(kernel):
    """The task function of either."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan, given = plan_view(call.plan), backward_view(call.out)
        places = lay_out(kernel.tile, plan, given, call.scratch + slot * plan.scratch_bytes)
        load_weight(kernel.tile, plan, places, call.weight)
        if kernel.work == "additive_captured_gradient":
            differentiate_part(kernel, call, plan, given, places, number)
        else:
            differentiate_rectangle(kernel, call, plan, given, places, number)

    return task
