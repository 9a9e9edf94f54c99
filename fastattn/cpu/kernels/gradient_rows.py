"""A block of queries in the backward pass, laid out both ways: queries in the lanes, and features in the lanes.

Beside the queries stand the gradients of their results, and for each query what is subtracted from its scores, and from
the gradients of its weights.
"""

from fastattn.cpu.kernels import matrix
from fastattn.cpu.kernels.masks import INFINITY
from fastattn.cpu.kernels.pack import pack_queries, unpack_rows
from fastattn.cpu.kernels.pairs import pair_rows
from fastattn.cpu.kernels.panels import are_finite, clean_panels, clear_row, pack_panels, pair_panels, unpack_panels
from fastattn.cpu.kernels.softmax import MINUS_INFINITY
from fastattn.simd import jit, load_element, store_element, tile_fill, tile_load, tile_store

LOG2_E = 1.4426950408889634


@jit
def row_product(tile, a, b, panel, features, buffer):
    """The scalar product of two rows in panels."""
    total = tile_load(tile.single, a, 0) * tile_load(tile.single, b, 0)
    for _ in range(tile.width, features, tile.width):
        a += panel
        b += panel
        total = total + tile_load(tile.single, a, 0) * tile_load(tile.single, b, 0)
    tile_store(total, buffer, 0)
    result = load_element(tile, buffer)
    for i in range(1, tile.width):
        result += load_element(tile, buffer + i * tile.itemsize)
    return result


@jit
def load_log_sums(kernel, plan, lse, present, log_sums):
    """log_sums[i] = what is subtracted from scores, in their base. Whether all queries see a key."""
    tile = kernel.tile
    factor = LOG2_E / plan.to_base_2
    full = True
    for i in range(plan.query_block):
        log_sum = INFINITY  # where nothing is looked at, an exponent of -inf comes out
        if i < present:
            total = load_element(tile, lse + i * tile.itemsize) * 1.0
            if total == MINUS_INFINITY:
                full = False
            else:
                log_sum = total * factor
        store_element(tile, log_sums + i * tile.itemsize, log_sum)
    return full


@jit
def clear_lane(tile, block, i, features):
    """Set a query in the lanes to 0."""
    at = block + i // tile.width * features * tile.row_bytes + i % tile.width * tile.itemsize
    for p in range(features):
        store_element(tile, at + p * tile.row_bytes, 0.0)


@jit
def load_lanes(kernel, plan, query, grad_out, lse, present, scale, scratch):
    """Lay out a block of queries, and `scale` times the gradient of its result, with queries in the lanes.

    Those that look at nothing are 0. Whether there are none. Of bfloat16, scales are powers of two.
    """
    tile = kernel.tile
    queries, grads = scratch + plan.query_lanes_at, scratch + plan.grad_lanes_at
    at, grad_at = queries, grads
    for first in range(0, present, tile.width):
        there = min(tile.width, present - first)
        pack_queries(kernel, tile, at, query, plan.query_row, plan.query_column, there, plan.head_dim, plan.scale)
        row, column = plan.grad_out_row, plan.grad_out_column
        pack_queries(tile, tile, grad_at, grad_out, row, column, there, plan.value_dim, scale)
        query += tile.width * plan.query_row
        grad_out += tile.width * row
        at += plan.head_dim * tile.row_bytes
        grad_at += plan.value_dim * tile.row_bytes
    full = load_log_sums(kernel, plan, lse, present, scratch + plan.log_sums_at)
    if not full:
        for i in range(present):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                clear_lane(tile, queries, i, plan.head_dim)
                clear_lane(tile, grads, i, plan.value_dim)
    if kernel.reads == "pairs":
        for _ in range(0, present, tile.width):
            pair_rows(tile, queries, plan.head_dim)
            pair_rows(tile, grads, plan.value_dim)
            queries += plan.head_dim * tile.row_bytes
            grads += plan.value_dim * tile.row_bytes
    if kernel.reads == "matrix":
        matrix.split_all_lanes(kernel, scratch + plan.query_lane_terms_at, queries, present, plan.head_dim)
        matrix.split_all_lanes(kernel, scratch + plan.grad_lane_terms_at, grads, present, plan.value_dim)
    return full


@jit
def load_panels(kernel, plan, query, grad_out, lse, present, full, scratch):
    """Lay out the same in panels, for the products with features in the lanes; 0 for what is not finite.

    The gradients are multiplied by what dropout multiplies the weights by; where products are of bfloat16, weights are.
    Whether they were finite.
    """
    tile, keep_scale = kernel.tile, plan.keep_scale
    if kernel.of_bfloat16:
        keep_scale = 1.0
    queries, grads, panel = scratch + plan.queries_at, scratch + plan.grads_at, plan.query_panel
    pack_panels(kernel, tile, queries, panel, query, plan.query_row, plan.query_column, present, plan.head_dim)
    if not are_finite(tile, queries, panel, present, plan.head_dim):
        clean_panels(tile, queries, panel, queries, panel, present, plan.head_dim, 1.0)
    pack_panels(tile, tile, grads, panel, grad_out, plan.grad_out_row, plan.grad_out_column, present, plan.value_dim)
    finite = are_finite(tile, grads, panel, present, plan.value_dim)
    if not finite or keep_scale != 1.0:
        clean_panels(tile, grads, panel, grads, panel, present, plan.value_dim, keep_scale)
    if not full:
        for i in range(present):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                clear_row(tile, queries, panel, i, plan.head_dim)
                clear_row(tile, grads, panel, i, plan.value_dim)
    if kernel.reads == "pairs":
        pair_panels(tile, queries, panel, present, plan.head_dim)
        pair_panels(tile, grads, panel, present, plan.value_dim)
    if kernel.reads == "matrix":
        matrix.split_panels(kernel, plan, scratch + plan.query_panel_terms_at, queries, present, plan.head_dim)
        matrix.split_panels(kernel, plan, scratch + plan.grad_panel_terms_at, grads, present, plan.value_dim)
    return finite


@jit
def find_deltas(tile, plan, grad_out, out, lse, grad_lse, present, deltas, scratch):
    """deltas[i] = Σ_p do[i][p] · out[i][p] - grad_lse[i], 0 for a query that looks at nothing."""
    grads, outs, panel = scratch + plan.grads_at, scratch + plan.outs_at, plan.query_panel
    pack_panels(tile, tile, grads, panel, grad_out, plan.grad_out_row, plan.grad_out_column, present, plan.value_dim)
    pack_panels(tile, tile, outs, panel, out, plan.out_row, plan.out_column, present, plan.value_dim)
    for offset in range(0, present * tile.itemsize, tile.itemsize):
        delta = 0.0
        if load_element(tile, lse + offset) != MINUS_INFINITY:
            if plan.value_dim > 0:  # without values there are no panels
                row = offset * tile.width
                delta = row_product(tile, grads + row, outs + row, panel, plan.value_dim, scratch + plan.work_at) * 1.0
            if grad_lse != 0:
                delta -= load_element(tile, grad_lse + offset)
        store_element(tile, deltas + offset, delta)


@jit
def copy_numbers(tile, target, source, present, length, factor):
    """target[i] = source[i] · factor for i < present, 0 behind."""
    for i in range(present):
        store_element(tile, target + i * tile.itemsize, load_element(tile, source + i * tile.itemsize) * factor)
    for i in range(present, length):
        store_element(tile, target + i * tile.itemsize, 0.0)


@jit
def load_query_sums(kernel, plan, source, present, scratch):
    """Lay out the gradients of a block of queries so far: in panels or, for a matrix unit, queries in the lanes."""
    tile, sums, row = kernel.tile, scratch + plan.query_sums_at, plan.grad_query_row
    if kernel.reads != "matrix":
        pack_panels(tile, tile, sums, plan.query_panel, source, row, tile.itemsize, present, plan.head_dim)
        return
    for first in range(0, present, tile.width):
        there = min(tile.width, present - first)
        pack_queries(tile, tile, sums, source + first * row, row, tile.itemsize, there, plan.head_dim, 1.0)
        sums += plan.head_dim * tile.row_bytes


@jit
def store_query_sums(kernel, plan, target, present, scratch):
    """Write them to where they were."""
    tile, sums, row = kernel.tile, scratch + plan.query_sums_at, plan.grad_query_row
    if kernel.reads != "matrix":
        unpack_panels(tile, sums, plan.query_panel, target, row, tile.itemsize, present, plan.head_dim)
        return
    ones = scratch + plan.work_at
    tile_store(tile_fill(tile.single, 1.0), ones, 0)
    for first in range(0, present, tile.width):
        there = min(tile.width, present - first)
        unpack_rows(tile, tile, sums, ones, target + first * row, row, tile.itemsize, there, plan.head_dim)
        sums += plan.head_dim * tile.row_bytes
