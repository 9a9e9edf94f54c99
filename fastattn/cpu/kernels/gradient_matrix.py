"""The backward pass on a matrix unit: what is laid out for it, and its five products.

Keys and values are rows for the first two, keys are columns for dq. Queries and the gradients of their results, which
have been laid out in float32 for all that is odd, are lanes for the first two, and panels for dv and dk; p and ds are
rounded for these three. dq is added up with queries in the lanes, as the forward pass adds up its results.
"""

from fastattn.cpu.kernels.matrix import (
    bytes_of_columns,
    bytes_of_lanes,
    bytes_of_rows,
    columns_from,
    load_columns,
    load_rows,
)
from fastattn.cpu.kernels.matrix_products import add_columns, add_panels, score_lanes, split_weights
from fastattn.cpu.kernels.prefetch import NOTHING
from fastattn.machine.tile import MATRIX_DEPTH, MATRIX_ROWS, MATRIX_TILE
from fastattn.simd import jit, tile_fill, tile_load, tile_store


@jit
def load_keys(kernel, plan, key, value, count, keys, values):
    """Lay out `count` keys and values, block after block."""
    for first in range(0, count, plan.key_block):
        there, row, column = min(plan.key_block, count - first), plan.key_row, plan.key_column
        load_rows(kernel, kernel, plan, keys, key + first * row, row, column, there, plan.head_dim)
        row, column = plan.value_row, plan.value_column
        load_rows(kernel, kernel, plan, values, value + first * row, row, column, there, plan.value_dim)
        keys += bytes_of_rows(kernel, plan, plan.head_dim)
        values += bytes_of_rows(kernel, plan, plan.value_dim)


@jit
def load_key_columns(kernel, plan, key, count, target):
    """Lay out the same keys as columns."""
    row, column, features = plan.key_row, plan.key_column, plan.head_dim
    for first in range(0, count, plan.key_block):
        there = min(plan.key_block, count - first)
        load_columns(kernel, kernel, plan, target, key + first * row, row, column, there, features, False)
        target += bytes_of_columns(kernel, plan, features)


@jit
def multiply_keys(kernel, plan, head, s, first_key, keys, part, scores, scratch, wanted):
    """The scores of a part of a block of keys, whose first is number `first_key`, and tile width `s` of the queries."""
    features, row, column = plan.head_dim, plan.key_row, plan.key_column
    numbers = scratch + plan.query_lanes_at + s * features * kernel.tile.row_bytes
    lanes = scratch + plan.query_lane_terms_at + s * bytes_of_lanes(kernel, features)
    source, buffer = head.key + (first_key + part.begin) * row, scratch + plan.grad_pairs_at
    first, count, zero = part.begin, part.end - part.begin, tile_fill(kernel.tile.single, 0.0)
    # fmt: off
    score_lanes(
        kernel, plan, keys, lanes, numbers, first, count, zero, source, row, column, features, plan.factor, scores,
        buffer, wanted,
    )
    # fmt: on


@jit
def multiply_block(kernel, plan, head, s, first_key, offset, part, grad_start, scratch, wanted):
    """The same for a block at `offset` in a panel, with value · do beside the scores."""
    before, features = s * plan.score_panel + part.begin * kernel.tile.row_bytes, plan.value_dim
    number, row, column = offset // plan.score_panel, plan.value_row, plan.value_column
    keys = scratch + plan.keys_at + number * bytes_of_rows(kernel, plan, plan.head_dim)
    values = scratch + plan.values_at + number * bytes_of_rows(kernel, plan, features)
    scores, grads = scratch + plan.scores_at + before, scratch + plan.score_grads_at + before
    multiply_keys(kernel, plan, head, s, first_key, keys, part, scores, scratch, wanted)
    numbers = scratch + plan.grad_lanes_at + s * features * kernel.tile.row_bytes
    lanes = scratch + plan.grad_lane_terms_at + s * bytes_of_lanes(kernel, features)
    source, buffer = head.value + (first_key + part.begin) * row, scratch + plan.grad_pairs_at
    first, count = part.begin, part.end - part.begin
    # fmt: off
    score_lanes(
        kernel, plan, values, lanes, numbers, first, count, grad_start, source, row, column, features, 1.0, grads,
        buffer, wanted,
    )
    # fmt: on


@jit
def weights_step(kernel, plan):
    """From one tile width of the queries to the next, in p and ds as they are laid out for dv and dk."""
    return plan.key_block // MATRIX_ROWS * kernel.terms * MATRIX_TILE


@jit
def round_weights(kernel, plan, begin, count, s, scratch):
    """Lay out p and ds of tile width `s` of the queries, and of some keys from `begin` on, for dv and dk.

    They are multiplied by what the other factors of their products could not be, ds in its place as well.
    """
    tile, before = kernel.tile, s * plan.score_panel + begin * kernel.tile.row_bytes
    weights, grads = scratch + plan.scores_at + before, scratch + plan.score_grads_at + before
    factor = plan.score_factor
    if factor != 1.0:
        for at in range(grads, grads + count * tile.row_bytes, tile.row_bytes):
            tile_store(tile_load(tile.single, at, 0) * factor, at, 0)
    at = s * weights_step(kernel, plan) + begin // MATRIX_ROWS * kernel.terms * MATRIX_TILE
    keep_scale = plan.keep_scale if "dropout" in kernel.steps else 1.0
    split_weights(kernel, weights, count, keep_scale, scratch + plan.weight_rows_at + at)
    split_weights(kernel, grads, count, 1.0, scratch + plan.grad_rows_at + at)


@jit
def add_to_queries(kernel, plan, s, offset, part, scratch):
    """dq[i] += Σ_j ds[j][i] · key[j] for tile width `s` of the queries, and part of a block at `offset` in a panel."""
    grads = scratch + plan.score_grads_at + s * plan.score_panel + part.begin * kernel.tile.row_bytes
    keys = scratch + plan.key_rows_at + offset // plan.score_panel * bytes_of_columns(kernel, plan, plan.head_dim)
    sums = scratch + plan.query_sums_at + s * plan.head_dim * kernel.tile.row_bytes
    count, columns, rest = part.end - part.begin, columns_from(kernel, keys, part.begin), scratch + plan.grad_pairs_at
    add_columns(kernel, plan, grads, count, columns, plan.head_dim, sums, rest, NOTHING)


@jit
def add_to_keys(kernel, plan, values, keys, row, rows, first, deep, scratch):
    """dv and dk, `values` and `keys`, of some rows of a block: from as many queries as fill `deep` tile widths."""
    step, wide = weights_step(kernel, plan), 2 * kernel.terms * MATRIX_TILE
    every = plan.query_block // MATRIX_DEPTH * wide  # of all queries, for 32 features
    at, rest = first * step + row // MATRIX_ROWS * kernel.terms * MATRIX_TILE, scratch + plan.grad_pairs_at
    weights, grads = scratch + plan.weight_rows_at + at, scratch + plan.grad_panel_terms_at + first * wide
    add_panels(kernel, rows, weights, step, deep, grads, every, plan.value_dim, values, plan.panel, rest)
    weights, queries = scratch + plan.grad_rows_at + at, scratch + plan.query_panel_terms_at + first * wide
    add_panels(kernel, rows, weights, step, deep, queries, every, plan.head_dim, keys, plan.panel, rest)
