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

from fastattn.cpu.atomics import atomic_load, atomic_store, pause
from fastattn.cpu.dropout import drop
from fastattn.cpu.forward import clear, prefetch_rows, visible_keys
from fastattn.cpu.layout import GRADIENT_AXIS, GRADIENT_CALL, GRADIENT_PLAN
from fastattn.cpu.masks import INFINITY, looks_at, lowest, restrict
from fastattn.cpu.pack import pack_queries
from fastattn.cpu.panels import (
    add_across,
    add_along,
    clean_panels,
    pack_panels,
    product_along,
    unpack_panels,
)
from fastattn.cpu.softmax import MINUS_INFINITY, exp2
from fastattn.simd import (
    all_zero,
    jit,
    load_element,
    load_i64,
    minimum,
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
    return number, query, key, value, mask, grad_out, out, grad_query, grad_key, grad_value


@jit
def wait_for(ticket, turn):
    """Wait until it is one's turn."""
    while atomic_load(ticket) != turn:
        pause()


@jit
def are_finite(tile, panels, panel, count, features):
    """Whether rows in panels hold neither NaN nor infinity."""
    sums = tile_fill(tile, 0.0)
    rest = tile_fill(tile.single, 0.0)
    whole = (count - count % tile.rows) * tile.row_bytes
    for _ in range(0, features, tile.width):
        for offset in range(0, whole, tile.rows * tile.row_bytes):
            sums = sums + tile_load(tile, panels + offset, tile.row_bytes) * 0.0
        for offset in range(whole, count * tile.row_bytes, tile.row_bytes):
            rest = rest + tile_load(tile.single, panels + offset, 0) * 0.0
        panels += panel
    return all_zero(sums + rest)


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
    """starts[i] = what the scores of a query begin with. Whether all queries look at something."""
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
def find_deltas(tile, plan, lse, grad_lse, grads, outs, panel, present, deltas, buffer):
    """deltas[i] = scale · (Σ do · out - grad_lse), 0 for a query that looks at nothing."""
    for i in range(present):
        delta = 0.0
        if load_element(tile, lse + i * tile.itemsize) != MINUS_INFINITY:
            offset = i * tile.row_bytes
            delta = row_product(tile, grads + offset, outs + offset, panel, plan.value_dim, buffer) * 1.0
            if grad_lse != 0:
                delta -= load_element(tile, grad_lse + i * tile.itemsize)
        store_element(tile, deltas + i * tile.itemsize, delta * plan.score_scale)


@jit
def copy_numbers(tile, target, source, present, length):
    """target[i] = source[i] for i < present, 0 behind."""
    for i in range(present):
        store_element(tile, target + i * tile.itemsize, load_element(tile, source + i * tile.itemsize))
    for i in range(present, length):
        store_element(tile, target + i * tile.itemsize, 0.0)


@jit
def clear_lane(tile, block, i, features):
    """Set a query in the lanes to 0."""
    at = block + i // tile.width * features * tile.row_bytes + i % tile.width * tile.itemsize
    for p in range(features):
        store_element(tile, at + p * tile.row_bytes, 0.0)


@jit
def clear_row(tile, panels, panel, i, features):
    """Set a row in panels to 0."""
    for _ in range(0, features, tile.width):
        tile_store(tile_fill(tile.single, 0.0), panels + i * tile.row_bytes, 0)
        panels += panel


@jit
def differentiate(tile, plan, scores, grads, count, hidden, start, delta):
    """Turn a block of scores into weights p, and one of value · do into ds. `hidden`: some may not be looked at."""
    for _ in range(count):
        score = tile_load(tile.single, scores, 0)
        if tile.masked and plan.unit != 1.0:
            exponent = (score - start) * plan.unit
        else:
            exponent = score
        weight = exp2(tile, minimum(0.0, exponent))  # no weight is above 1, whatever the roundings of huge scores
        grad = tile_load(tile.single, grads, 0)
        if tile.masked and plan.drop_below > 0:
            grad = grad * plan.keep_scale - delta
        grad = weight * grad
        if hidden:
            grad = where_greater(lowest(tile), score, 0.0, grad)
        tile_store(weight, scores, 0)
        tile_store(grad, grads, 0)
        scores += tile.row_bytes
        grads += tile.row_bytes


@jit
def add_visible(tile, plan, weights, source, row, column, lse, mask, count, present, ahead, target, panel):
    """dv[j] += p[j][i] · do[i] for those elements of do that are not finite, where query i may look at key j."""
    block_bytes = plan.key_block * tile.row_bytes
    for i in range(present):
        if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
            continue
        for p in range(plan.value_dim):
            odd = load_element(tile, source + i * row + p * column)
            if odd * 0.0 == 0.0:
                continue
            place = target + p // tile.width * panel + p % tile.width * tile.itemsize
            at = weights + i // tile.width * block_bytes + i % tile.width * tile.itemsize
            for j in range(count):
                if looks_at(tile, plan, mask, i, j, ahead):
                    here = place + j * tile.row_bytes
                    weight = load_element(tile, at + j * tile.row_bytes) * plan.keep_scale
                    store_element(tile, here, load_element(tile, here) + weight * odd)


@jit
def whole_tiles(tile, count):
    """`count`, rounded up to the rows of whole tiles."""
    return (count + tile.rows - 1) // tile.rows * tile.rows


@jit
def differentiate_group(tile, call, plan, kv_head, group, turn, scratch):
    """One task: a group of key blocks, and the queries of one head, or a part of them: those of turn `turn`."""
    width, row_bytes = tile.width, tile.row_bytes
    head = kv_head * plan.inner + turn // plan.parts
    number, query, key, value, mask, grad_out, out, grad_query, grad_key, grad_value = locate(call, plan, head)
    first_key = group * plan.group * plan.key_block
    end = min(plan.keys, first_key + plan.group * plan.key_block)
    first_block = turn % plan.parts * plan.part
    last_block = min(plan.query_blocks, first_block + plan.part)
    if plan.causal:
        first_block = max(first_block, (first_key - plan.first_position) // plan.query_block)
    key_ticket = call.key_tickets + (kv_head * plan.groups + group) * WORD
    query_tickets = call.query_tickets + head * plan.query_blocks * WORD

    # Working memory: keys, values and their gradients, in panels; the same of a block of queries, and it in the lanes.
    key_panels = (plan.head_dim + width - 1) // width
    value_panels = (plan.value_dim + width - 1) // width
    panel = plan.group * plan.key_block * row_bytes
    query_panel = plan.query_block * row_bytes
    keys = scratch
    values = keys + key_panels * panel
    key_sums = values + value_panels * panel
    value_sums = key_sums + key_panels * panel
    queries_t = value_sums + value_panels * panel
    grads_t = queries_t + plan.query_block * plan.head_dim * tile.itemsize
    queries = grads_t + plan.query_block * plan.value_dim * tile.itemsize
    grads = queries + key_panels * query_panel
    query_sums = grads + value_panels * query_panel
    starts = query_sums + key_panels * query_panel
    deltas = starts + query_panel // width
    counts = deltas + query_panel // width
    work = counts + query_panel // width  # at least a word for each panel
    score_panel = plan.key_block * row_bytes
    scores = work + 2 * row_bytes + tile.buffer_bytes
    score_grads = scores + plan.query_block // width * score_panel
    clean_keys = score_grads + plan.query_block // width * score_panel
    outs = clean_keys + key_panels * score_panel

    wait_for(key_ticket, turn)
    if first_block < last_block:
        present_keys = end - first_key
        at = key + first_key * plan.key_row
        pack_panels(tile, keys, panel, at, plan.key_row, plan.key_column, present_keys, plan.head_dim)
        at = value + first_key * plan.value_row
        pack_panels(tile, values, panel, at, plan.value_row, plan.value_column, present_keys, plan.value_dim)
        at = grad_key + first_key * plan.grad_key_row
        pack_panels(tile, key_sums, panel, at, plan.grad_key_row, tile.itemsize, present_keys, plan.head_dim)
        at = grad_value + first_key * plan.grad_value_row
        pack_panels(tile, value_sums, panel, at, plan.grad_value_row, tile.itemsize, present_keys, plan.value_dim)
        finite_keys = are_finite(tile, keys, panel, present_keys, plan.head_dim)
    visits = (end - first_key + plan.key_block - 1) // plan.key_block * (plan.query_block // width)
    step = (plan.query_block + visits - 1) // visits  # rows of the next block asked for at a time
    for block in range(first_block, last_block):
        first_query = block * plan.query_block
        present = min(plan.query_block, plan.queries - first_query)
        subs = (present + width - 1) // width
        query_at = query + first_query * plan.query_row
        grad_at = grad_out + first_query * plan.grad_out_row
        out_at = out + first_query * plan.out_row
        pack_panels(tile, grads, query_panel, grad_at, plan.grad_out_row, plan.grad_out_column, present, plan.value_dim)
        sums = (number * plan.queries + first_query) * tile.itemsize
        lse = call.lse + sums
        grad_lse = call.grad_lse + sums if call.grad_lse != 0 else 0
        delta_at = call.deltas + sums
        full = load_starts(tile, plan, lse, present, starts)
        if group == 0:
            pack_panels(tile, outs, query_panel, out_at, plan.out_row, plan.out_column, present, plan.value_dim)
            find_deltas(tile, plan, lse, grad_lse, grads, outs, query_panel, present, delta_at, work)
        finite = are_finite(tile, grads, query_panel, present, plan.value_dim)
        if not finite or plan.keep_scale != 1.0:
            clean_panels(tile, grads, query_panel, grads, query_panel, present, plan.value_dim, plan.keep_scale)
        pack_panels(tile, queries, query_panel, query_at, plan.query_row, plan.query_column, present, plan.head_dim)
        if not are_finite(tile, queries, query_panel, present, plan.head_dim):
            clean_panels(tile, queries, query_panel, queries, query_panel, present, plan.head_dim, 1.0)
        for s in range(subs):
            there = min(width, present - s * width)
            pack_queries(
                tile,
                queries_t + s * plan.head_dim * row_bytes,
                query_at + s * width * plan.query_row,
                plan.query_row,
                plan.query_column,
                there,
                plan.head_dim,
                plan.scale,
            )
            pack_queries(
                tile,
                grads_t + s * plan.value_dim * row_bytes,
                grad_at + s * width * plan.grad_out_row,
                plan.grad_out_row,
                plan.grad_out_column,
                there,
                plan.value_dim,
                plan.score_scale,
            )
        if not full:
            for i in range(present):
                if load_element(tile, lse + i * tile.itemsize) == MINUS_INFINITY:
                    clear_lane(tile, queries_t, i, plan.head_dim)
                    clear_lane(tile, grads_t, i, plan.value_dim)
                    clear_row(tile, queries, query_panel, i, plan.head_dim)
                    clear_row(tile, grads, query_panel, i, plan.value_dim)

        query_ticket = query_tickets + block * WORD
        wait_for(query_ticket, group)
        copy_numbers(tile, deltas, delta_at, present, plan.query_block)
        sums_at = grad_query + first_query * plan.grad_query_row
        pack_panels(tile, query_sums, query_panel, sums_at, plan.grad_query_row, tile.itemsize, present, plan.head_dim)
        share = 0
        for start_key in range(first_key, end, plan.key_block):
            offset = (start_key - first_key) * row_bytes
            keys_at = keys + offset
            key_operand, operand_panel = keys_at, panel
            if not finite_keys:
                there = min(plan.key_block, end - start_key)
                clean_panels(tile, clean_keys, score_panel, keys_at, panel, there, plan.head_dim, 1.0)
                key_operand, operand_panel = clean_keys, score_panel
            most = 0
            for s in range(subs):
                first = first_query + s * width
                masks = mask + first * plan.mask_row + start_key * plan.mask_column
                count, safe = visible_keys(tile, plan, first, start_key, masks)
                store_i64(counts + s * WORD, count)
                if block + 1 < last_block:
                    there = min(step, plan.queries - first_query - plan.query_block - share)
                    prefetch_rows(
                        query_at + (plan.query_block + share) * plan.query_row,
                        plan.query_row,
                        there,
                        plan.head_dim * tile.itemsize,
                    )
                    prefetch_rows(
                        grad_at + (plan.query_block + share) * plan.grad_out_row,
                        plan.grad_out_row,
                        there,
                        plan.value_dim * tile.itemsize,
                    )
                    prefetch_rows(
                        sums_at + (plan.query_block + share) * plan.grad_query_row,
                        plan.grad_query_row,
                        there,
                        plan.head_dim * tile.itemsize,
                    )
                    if group == 0:
                        prefetch_rows(
                            out_at + (plan.query_block + share) * plan.out_row,
                            plan.out_row,
                            there,
                            plan.value_dim * tile.itemsize,
                        )
                    share += step
                most = max(most, count)
                if count == 0:
                    continue
                p_at, ds_at = scores + s * score_panel, score_grads + s * score_panel
                rows = whole_tiles(tile, count)
                start = tile_load(tile.single, starts + s * row_bytes, 0)
                delta = tile_load(tile.single, deltas + s * row_bytes, 0)
                zero = tile_fill(tile.single, 0.0)
                begin = start
                if tile.masked and plan.unit != 1.0:
                    begin = zero
                q = queries_t + s * plan.head_dim * row_bytes
                product_along(tile, begin, count, keys_at, panel, q, plan.head_dim, p_at)
                begin = zero - delta
                if tile.masked and plan.drop_below > 0:
                    begin = zero
                do = grads_t + s * plan.value_dim * row_bytes
                product_along(tile, begin, count, values + offset, panel, do, plan.value_dim, ds_at)
                if tile.masked and plan.drop_below > 0:
                    drop(tile, plan, call.seed, ds_at, count, number, first, start_key)
                if safe < count:
                    there = min(width, plan.queries - first)
                    rest = safe * row_bytes
                    restrict(
                        tile,
                        plan,
                        p_at + rest,
                        count - safe,
                        masks + safe * plan.mask_column,
                        there,
                        plan.first_position + first,
                        start_key + safe,
                        work,
                        work + 2 * row_bytes,
                    )
                    differentiate(tile, plan, p_at, ds_at, safe, False, start, delta)
                    differentiate(tile, plan, p_at + rest, ds_at + rest, count - safe, True, start, delta)
                else:
                    differentiate(tile, plan, p_at, ds_at, count, False, start, delta)
                if tile.masked and plan.drop_below > 0:
                    drop(tile, plan, call.seed, p_at, count, number, first, start_key)
                clear(tile, p_at + count * row_bytes, rows - count)
                clear(tile, ds_at + count * row_bytes, rows - count)
                dq = query_sums + s * width * row_bytes
                add_across(tile, dq, query_panel, plan.head_dim, ds_at, key_operand, operand_panel, count)
            if most == 0:
                continue
            # Later queries look at more keys, if any: rows that the first of them see, and so on.
            done = 0
            for s in range(subs):
                count = whole_tiles(tile, load_i64(counts + s * WORD))
                if count <= done:
                    continue
                rows = done * row_bytes
                a = s * score_panel + rows
                left = present - s * width
                b = s * width * row_bytes
                add_along(
                    tile,
                    value_sums + offset + rows,
                    panel,
                    plan.value_dim,
                    count - done,
                    scores + a,
                    score_panel,
                    grads + b,
                    query_panel,
                    left,
                )
                add_along(
                    tile,
                    key_sums + offset + rows,
                    panel,
                    plan.head_dim,
                    count - done,
                    score_grads + a,
                    score_panel,
                    queries + b,
                    query_panel,
                    left,
                )
                done = count
            if not finite:
                masks = mask + first_query * plan.mask_row + start_key * plan.mask_column
                ahead = plan.first_position + first_query - start_key
                add_visible(
                    tile,
                    plan,
                    scores,
                    grad_at,
                    plan.grad_out_row,
                    plan.grad_out_column,
                    lse,
                    masks,
                    most,
                    present,
                    ahead,
                    value_sums + offset,
                    panel,
                )
        unpack_panels(
            tile, query_sums, query_panel, sums_at, plan.grad_query_row, tile.itemsize, present, plan.head_dim
        )
        atomic_store(query_ticket, group + 1)
    if first_block < last_block:
        at = grad_key + first_key * plan.grad_key_row
        unpack_panels(tile, key_sums, panel, at, plan.grad_key_row, tile.itemsize, present_keys, plan.head_dim)
        at = grad_value + first_key * plan.grad_value_row
        unpack_panels(tile, value_sums, panel, at, plan.grad_value_row, tile.itemsize, present_keys, plan.value_dim)
    atomic_store(key_ticket, turn + 1)


def task_function(tile):
    """The task function of the backward pass."""

    @jit
    def task(call_at, slot, number):
        call = call_view(call_at)
        plan = plan_view(call.plan)
        kv_head, number = number % plan.outer, number // plan.outer
        group, turn = number % plan.groups, number // plan.groups
        differentiate_group(tile, call, plan, kv_head, group, turn, call.scratch + slot * call.scratch_bytes)

    return task
