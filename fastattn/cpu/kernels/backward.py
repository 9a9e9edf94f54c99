"""The backward pass: five products, with the weights computed again (Dao et al. 2022, arXiv 2205.14135, appendix B).

A task is a group of key blocks of one head of keys. The blocks of queries that look at them come by, in order:

    for each block of queries:                        laid out both ways: queries in the lanes, and features
        for each block of keys of the group:
            s[j][i]   = key[j] · q[i] - lse[i]        queries in the lanes, as in the forward pass, masks and all
            p[j][i]   = 2^s
            ds[j][i]  = p · (value[j] · do[i] - Σ do · out)
            dq[i][:] += Σ_j ds[j][i] · key[j][:]      from here on features in the lanes
            dv[j][:] += Σ_i p[j][i] · do[i][:]
            dk[j][:] += Σ_i ds[j][i] · q[i][:]

dk and dv stay with the task. dq is in the result and is added to by one group of keys after the other: a ticket for
each block of queries says whose turn it is. Tasks are claimed in an order in which nobody waits for one that has not
been claimed, and with more heads than threads hardly anybody waits at all. Long sequences, and heads of queries that
share a head of keys, are more than one task for a group; these take turns with dk and dv in the same way. So every
sum has one order of its terms, and no order of tasks changes a bit.

What is masked has p = ds = 0, and 0 times what is not finite must not arise: keys and queries that are not finite are
replaced by 0 in the last three products, since where they may be looked at ds has NaN. Gradients that are not finite
are added one by one, where a query may look.
"""

from fastattn.cpu.kernels.dropout import drop
from fastattn.cpu.kernels.forward import clear, visible_keys
from fastattn.cpu.kernels.pack import pack_queries
from fastattn.cpu.kernels.panels import (
    add_across,
    add_along,
    are_finite,
    clean_panels,
    clear_row,
    pack_panels,
    product_along,
    unpack_panels,
)
from fastattn.cpu.kernels.prefetch import prefetch_rows
from fastattn.cpu.kernels.records import GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PLAN
from fastattn.cpu.kernels.scores import INFINITY, looks_at, lowest
from fastattn.cpu.kernels.softmax import MINUS_INFINITY, exp2
from fastattn.cpu.kernels.sums import any_has_lost, find_sums, hide_keys, load_sums, relate
from fastattn.simd import (
    all_finite,
    atomic_load,
    atomic_store,
    jit,
    load_element,
    load_i64,
    minimum,
    pause,
    record_view,
    store_element,
    store_i64,
    tile_fill,
    tile_load,
    tile_store,
    where_greater,
)

axis_view, call_view = record_view(GRADIENT_AXIS), record_view(GRADIENT_CALL)
plan_view = record_view(GRADIENT_PLAN)
AXIS_BYTES, PLAN_BYTES = GRADIENT_AXIS.itemsize, GRADIENT_PLAN.itemsize
LOG2_E = 1.4426950408889634
WORD = 8


@jit
def locate(call, plan, head):
    """Where a head's matrices begin: the addresses of all arrays of GRADIENT_ARRAYS, and the number of the head."""
    axis = call.plan + PLAN_BYTES + plan.axes * AXIS_BYTES
    number = 0
    query, key, value, mask = call.query, call.key, call.value, call.mask
    grad_out, out = call.grad_out, call.out
    grad_query, grad_key, grad_value = call.grad_query, call.grad_key, call.grad_value
    grad_mask = call.grad_mask
    for _ in range(plan.axes):
        axis -= AXIS_BYTES
        strides = axis_view(axis)
        index = head % strides.size
        head //= strides.size
        number += index * strides.head
        query += index * strides.query
        key += index * strides.key
        value += index * strides.value
        mask += index * strides.mask
        grad_out += index * strides.grad_out
        out += index * strides.out
        grad_query += index * strides.grad_query
        grad_key += index * strides.grad_key
        grad_value += index * strides.grad_value
        grad_mask += index * strides.grad_mask
    return number, query, key, value, mask, grad_out, out, grad_query, grad_key, grad_value, grad_mask


@jit
def wait_for(ticket, turn):
    """Wait until it is one's turn."""
    while atomic_load(ticket) != turn:
        pause()


# -- a block of queries ------------------------------------------------------------------------------------------------


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
def load_starts(tile, plan, lse, present, starts):
    """starts[i] = what the exponents of a query's scores begin with. Whether all queries look at something."""
    full = True
    for i in range(plan.query_block):
        # where nothing is looked at, an exponent of -inf comes out
        start = MINUS_INFINITY if plan.unit == 1.0 else INFINITY
        if i < present:
            total = load_element(tile, lse + i * tile.itemsize) * 1.0
            if total == MINUS_INFINITY:
                full = False
            else:
                start = -total * LOG2_E if plan.unit == 1.0 else total
        store_element(tile, starts + i * tile.itemsize, start)
    return full


@jit
def clear_lane(tile, block, i, features):
    """Set a query in the lanes to 0."""
    at = block + i // tile.width * features * tile.row_bytes + i % tile.width * tile.itemsize
    for p in range(features):
        store_element(tile, at + p * tile.row_bytes, 0.0)


@jit
def load_lanes(tile, plan, query, grad_out, lse, present, scale, scratch):
    """Lay out a block of queries, and `scale` times the gradient of its result, with queries in the lanes.

    Those that look at nothing are 0. Whether there are none.
    """
    queries, grads = scratch + plan.query_lanes_at, scratch + plan.grad_lanes_at
    at, grad_at = queries, grads
    for first in range(0, present, tile.width):
        there = min(tile.width, present - first)
        pack_queries(tile, at, query, plan.query_row, plan.query_column, there, plan.head_dim, plan.scale)
        row, column = plan.grad_out_row, plan.grad_out_column
        pack_queries(tile, grad_at, grad_out, row, column, there, plan.value_dim, scale)
        query += tile.width * plan.query_row
        grad_out += tile.width * row
        at += plan.head_dim * tile.row_bytes
        grad_at += plan.value_dim * tile.row_bytes
    full = load_starts(tile, plan, lse, present, scratch + plan.starts_at)
    if not full:
        for i in range(present):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                clear_lane(tile, queries, i, plan.head_dim)
                clear_lane(tile, grads, i, plan.value_dim)
    return full


@jit
def load_rows(tile, plan, query, grad_out, lse, present, full, scratch):
    """Lay out the same in panels, for the products with features in the lanes; 0 for what is not finite.

    The gradients are multiplied by what dropout multiplies the weights by. Whether they were finite.
    """
    queries, grads, panel = scratch + plan.queries_at, scratch + plan.grads_at, plan.query_panel
    pack_panels(tile, queries, panel, query, plan.query_row, plan.query_column, present, plan.head_dim)
    if not are_finite(tile, queries, panel, present, plan.head_dim):
        clean_panels(tile, queries, panel, queries, panel, present, plan.head_dim, 1.0)
    pack_panels(tile, grads, panel, grad_out, plan.grad_out_row, plan.grad_out_column, present, plan.value_dim)
    finite = are_finite(tile, grads, panel, present, plan.value_dim)
    if not finite or plan.keep_scale != 1.0:
        clean_panels(tile, grads, panel, grads, panel, present, plan.value_dim, plan.keep_scale)
    if not full:
        for i in range(present):
            if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                clear_row(tile, queries, panel, i, plan.head_dim)
                clear_row(tile, grads, panel, i, plan.value_dim)
    return finite


@jit
def find_deltas(tile, plan, grad_out, out, lse, grad_lse, present, deltas, scratch):
    """deltas[i] = Σ_p do[i][p] · out[i][p] - grad_lse[i], 0 for a query that looks at nothing."""
    grads, outs, panel = scratch + plan.grads_at, scratch + plan.outs_at, plan.query_panel
    pack_panels(tile, grads, panel, grad_out, plan.grad_out_row, plan.grad_out_column, present, plan.value_dim)
    pack_panels(tile, outs, panel, out, plan.out_row, plan.out_column, present, plan.value_dim)
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


# -- with a block of keys ----------------------------------------------------------------------------------------------


@jit
def differentiate(kernel, plan, scores, grads, count, hidden, natural, start, delta):
    """Turn a block of scores into weights p, and one of value · do into ds.

    `hidden`: some may not be looked at. `natural`: scores are no exponents yet, but sums with a float mask.
    """
    tile = kernel.tile
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        if "mask" in kernel.steps and natural:
            exponent = (score - start) * plan.unit
        else:
            exponent = score
        weight = exp2(kernel, minimum(0.0, exponent))  # no weight is above 1, whatever the roundings of huge scores
        grad = tile_load(tile.single, grads, 0)
        if "dropout" in kernel.steps and plan.drop_below > 0:
            grad = grad * plan.keep_scale - delta
        grad = weight * grad
        if hidden:  # 0, also beside an lse of NaN
            weight = where_greater(lowest(tile), score, 0.0, weight)
            grad = where_greater(lowest(tile), score, 0.0, grad)
        tile_store(weight, scores, 0)
        tile_store(grad, grads, 0)
        scores += tile.row_bytes
        grads += tile.row_bytes


@jit
def hide_from_empty(tile, plan, scores, count, start):
    """Scores of -inf for queries that look at nothing: a query of 0 and a key that is not finite have made NaN."""
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        if plan.unit == 1.0:
            score = where_greater(lowest(tile), start, MINUS_INFINITY, score)
        else:
            score = where_greater(start, -lowest(tile), MINUS_INFINITY, score)
        tile_store(score, scores, 0)
        scores += tile.row_bytes


@jit
def whole_tiles(tile, count):
    """`count`, rounded up to the rows of whole tiles."""
    return (count + tile.rows - 1) // tile.rows * tile.rows


@jit
def weigh(kernel, call, plan, number, s, first_query, first_key, offset, mask, lost, scratch):
    """The weights p of one tile width of queries, number `s` of its block, and a block of keys, and their ds.

    `offset` is where in a panel the block of keys begins; `lost`, whether the lse of a query has lost digits. Returns
    how many keys are looked at; p and ds of the others are 0 in the same tile, and not written behind it.
    """
    tile = kernel.tile
    count, safe = visible_keys(kernel, plan, first_query, first_key, mask)
    if count == 0:
        return 0
    weights = scratch + plan.scores_at + s * plan.score_panel
    grads = scratch + plan.score_grads_at + s * plan.score_panel
    start = tile_load(tile.single, scratch + plan.starts_at + s * tile.row_bytes, 0)
    delta = tile_load(tile.single, scratch + plan.deltas_at + s * tile.row_bytes, 0)
    zero = tile_fill(tile.single, 0.0)
    begin, grad_begin = start, zero - delta
    if "mask" in kernel.steps:
        if plan.unit != 1.0:
            begin = zero  # under a float mask, whose sum with the score comes first
        if plan.drop_below > 0:
            grad_begin = zero
    keys, values = scratch + plan.keys_at + offset, scratch + plan.values_at + offset
    queries = scratch + plan.query_lanes_at + s * plan.head_dim * tile.row_bytes
    grad_lanes = scratch + plan.grad_lanes_at + s * plan.value_dim * tile.row_bytes
    product_along(tile, begin, count, keys, plan.panel, queries, plan.head_dim, weights)
    product_along(tile, grad_begin, count, values, plan.panel, grad_lanes, plan.value_dim, grads)
    if "dropout" in kernel.steps and plan.drop_below > 0:
        drop(tile, plan, call.seed, grads, count, number, first_query, first_key)
    hide_keys(kernel, plan, weights, count, safe, first_query, first_key, mask, scratch)
    if not all_finite(start):
        hide_from_empty(tile, plan, weights, count, start)
        safe = 0
    natural = plan.unit != 1.0 and not lost
    if lost:
        relate(tile, plan, weights, count, s, scratch)
    if safe < count:
        rest = safe * tile.row_bytes
        differentiate(kernel, plan, weights + rest, grads + rest, count - safe, True, natural, start, delta)
    differentiate(kernel, plan, weights, grads, safe, False, natural, start, delta)
    if "dropout" in kernel.steps and plan.drop_below > 0:
        drop(tile, plan, call.seed, weights, count, number, first_query, first_key)
    behind = whole_tiles(tile, count) - count
    clear(tile, weights + count * tile.row_bytes, behind)
    clear(tile, grads + count * tile.row_bytes, behind)
    return count


@jit
def add_to_keys(tile, plan, offset, subs, present, scratch):
    """dv[j] += Σ_i p[j][i] · do[i], dk[j] += Σ_i ds[j][i] · q[i] for the keys of a block, from `offset` on in a panel.

    Later queries look at more keys, if any: so there are rows that all of them see, rows that all but the first tile
    width of queries see, and so on.
    """
    done = 0
    for s in range(subs):
        count = whole_tiles(tile, load_i64(scratch + plan.counts_at + s * WORD))
        if count <= done:
            continue
        rows = done * tile.row_bytes
        a, b, c = s * plan.score_panel + rows, s * tile.width * tile.row_bytes, offset + rows
        values, keys = scratch + plan.value_sums_at + c, scratch + plan.key_sums_at + c
        weights, weight_grads = scratch + plan.scores_at + a, scratch + plan.score_grads_at + a
        grads, queries = scratch + plan.grads_at + b, scratch + plan.queries_at + b
        terms = present - s * tile.width
        panel, step, inner = plan.panel, plan.score_panel, plan.query_panel
        add_along(tile, values, panel, plan.value_dim, count - done, weights, step, grads, inner, terms)
        add_along(tile, keys, panel, plan.head_dim, count - done, weight_grads, step, queries, inner, terms)
        done = count


@jit
def add_visible(kernel, plan, grad_out, lse, mask, count, present, ahead, offset, scratch):
    """dv[j] += p[j][i] · do[i] for those elements of do that are not finite, where query i may look at key j."""
    tile = kernel.tile
    for i in range(present):
        if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
            continue
        weights = scratch + plan.scores_at + i // tile.width * plan.score_panel + i % tile.width * tile.itemsize
        for p in range(plan.value_dim):
            odd = load_element(tile, grad_out + i * plan.grad_out_row + p * plan.grad_out_column)
            if odd * 0.0 == 0.0:
                continue
            place = (
                scratch + plan.value_sums_at + offset + p // tile.width * plan.panel + p % tile.width * tile.itemsize
            )
            for j in range(count):
                if looks_at(kernel, plan, mask, i, j, ahead):
                    here = place + j * tile.row_bytes
                    weight = load_element(tile, weights + j * tile.row_bytes) * plan.keep_scale
                    store_element(tile, here, load_element(tile, here) + weight * odd)


# -- a task ------------------------------------------------------------------------------------------------------------


@jit
def load_keys(tile, plan, key, value, first, count, scratch):
    """Lay out `count` keys and values in panels, from the first on."""
    key += first * plan.key_row
    value += first * plan.value_row
    pack_panels(tile, scratch + plan.keys_at, plan.panel, key, plan.key_row, plan.key_column, count, plan.head_dim)
    values = scratch + plan.values_at
    pack_panels(tile, values, plan.panel, value, plan.value_row, plan.value_column, count, plan.value_dim)


@jit
def ask_for(tile, plan, query, grad_out, out, grad_query, first, count):
    """Prefetch `count` rows of what belongs to queries, from row `first` on; `out` may be 0."""
    features, value_features = plan.head_dim * tile.itemsize, plan.value_dim * tile.itemsize
    prefetch_rows(query + first * plan.query_row, plan.query_row, count, features)
    prefetch_rows(grad_out + first * plan.grad_out_row, plan.grad_out_row, count, value_features)
    prefetch_rows(grad_query + first * plan.grad_query_row, plan.grad_query_row, count, features)
    if out != 0:
        prefetch_rows(out + first * plan.out_row, plan.out_row, count, value_features)


@jit
def differentiate_group(kernel, call, plan, kv_head, group, turn, scratch):
    """One task: a group of key blocks, and the queries of one head, or a part of them: those of turn `turn`."""
    tile = kernel.tile
    head = kv_head * plan.inner + turn // plan.parts
    number, query, key, value, mask, grad_out, out, grad_query, grad_key, grad_value, _ = locate(call, plan, head)
    first_key = group * plan.group * plan.key_block
    end = min(plan.keys, first_key + plan.group * plan.key_block)
    first_block = turn % plan.parts * plan.part
    last_block = min(plan.query_blocks, first_block + plan.part)
    if plan.causal:
        first_block = max(first_block, (first_key - plan.first_position) // plan.query_block)
    key_ticket = call.key_tickets + (kv_head * plan.groups + group) * WORD
    query_tickets = call.query_tickets + head * plan.query_blocks * WORD
    element, panel, query_panel = tile.itemsize, plan.panel, plan.query_panel
    key_sums, value_sums = scratch + plan.key_sums_at, scratch + plan.value_sums_at
    query_sums = scratch + plan.query_sums_at
    grad_key += first_key * plan.grad_key_row
    grad_value += first_key * plan.grad_value_row
    some = first_block < last_block
    finite_keys, count = True, end - first_key

    wait_for(key_ticket, turn)
    if some:
        load_keys(tile, plan, key, value, first_key, count, scratch)
        finite_keys = are_finite(tile, scratch + plan.keys_at, panel, count, plan.head_dim)
        pack_panels(tile, key_sums, panel, grad_key, plan.grad_key_row, element, count, plan.head_dim)
        pack_panels(tile, value_sums, panel, grad_value, plan.grad_value_row, element, count, plan.value_dim)
    visits = (end - first_key + plan.key_block - 1) // plan.key_block * (plan.query_block // tile.width)
    step = (plan.query_block + visits - 1) // visits  # rows of the next block that are asked for at a time
    for block in range(first_block, last_block):
        first_query = block * plan.query_block
        present = min(plan.query_block, plan.queries - first_query)
        subs = (present + tile.width - 1) // tile.width
        queries, grads = query + first_query * plan.query_row, grad_out + first_query * plan.grad_out_row
        outs, sums = out + first_query * plan.out_row, grad_query + first_query * plan.grad_query_row
        numbers = (number * plan.queries + first_query) * element
        lse, deltas = call.lse + numbers, call.deltas + numbers
        if group == 0:
            grad_lse = call.grad_lse + numbers if call.grad_lse != 0 else 0
            find_deltas(tile, plan, grads, outs, lse, grad_lse, present, deltas, scratch)
        full = load_lanes(tile, plan, queries, grads, lse, present, plan.score_scale, scratch)
        finite = load_rows(tile, plan, queries, grads, lse, present, full, scratch)
        lost = any_has_lost(tile, plan, lse, present)
        if lost and group == 0:
            at = mask + first_query * plan.mask_row
            find_sums(kernel, plan, key, at, lse, first_query, present, deltas, scratch)

        ticket = query_tickets + block * WORD
        wait_for(ticket, group)
        if lost:
            load_sums(tile, plan, lse, present, deltas, scratch)
        copy_numbers(tile, scratch + plan.deltas_at, deltas, present, plan.query_block, plan.score_scale)
        pack_panels(tile, query_sums, query_panel, sums, plan.grad_query_row, element, present, plan.head_dim)
        following = plan.query_block
        for start_key in range(first_key, end, plan.key_block):
            offset = (start_key - first_key) * tile.row_bytes
            keys, keys_panel = scratch + plan.keys_at + offset, panel
            if not finite_keys:
                keys, keys_panel = scratch + plan.clean_keys_at, plan.score_panel
                there, source = min(plan.key_block, end - start_key), scratch + plan.keys_at + offset
                clean_panels(tile, keys, keys_panel, source, panel, there, plan.head_dim, 1.0)
            masks = mask + first_query * plan.mask_row + start_key * plan.mask_column
            most = 0
            for s in range(subs):
                if block + 1 < last_block:
                    rows = min(step, plan.queries - first_query - following)
                    ask_for(tile, plan, queries, grads, outs if group == 0 else 0, sums, following, rows)
                    following += step
                ahead = s * tile.width
                at = masks + ahead * plan.mask_row
                count = weigh(kernel, call, plan, number, s, first_query + ahead, start_key, offset, at, lost, scratch)
                store_i64(scratch + plan.counts_at + s * WORD, count)
                most = max(most, count)
                if count > 0:
                    c, a = query_sums + ahead * tile.row_bytes, scratch + plan.score_grads_at + s * plan.score_panel
                    add_across(tile, c, query_panel, plan.head_dim, a, keys, keys_panel, count)
            if most > 0:
                add_to_keys(tile, plan, offset, subs, present, scratch)
                if not finite:
                    position = plan.first_position + first_query - start_key
                    add_visible(kernel, plan, grads, lse, masks, most, present, position, offset, scratch)
        unpack_panels(tile, query_sums, query_panel, sums, plan.grad_query_row, element, present, plan.head_dim)
        atomic_store(ticket, group + 1)
    if some:
        count = end - first_key
        unpack_panels(tile, key_sums, panel, grad_key, plan.grad_key_row, element, count, plan.head_dim)
        unpack_panels(tile, value_sums, panel, grad_value, plan.grad_value_row, element, count, plan.value_dim)
    atomic_store(key_ticket, turn + 1)


def task_function(kernel):
    """The task function of the backward pass.

    Tasks are numbered so that those which one waits for have lower numbers, and stand as far before it as can be.
    """

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        kv_head, number = number % plan.outer, number // plan.outer
        group, turn = number % plan.groups, number // plan.groups
        differentiate_group(kernel, call, plan, kv_head, group, turn, call.scratch + slot * call.scratch_bytes)

    return task
